"""What `arrowquant info` shows: versions, every device, and the compiler of the kernels."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

PACKAGES = (
    *("numpy", "pyarrow", "safetensors", "ml_dtypes", "numba", "nvtx"),
    *("cupy-cuda12x", "cupy-cuda13x", "cupy", "cuda-bindings", "huggingface_hub"),
)


def versions() -> dict[str, str | None]:
    """Version of everything that can matter, None where it is not installed."""
    found: dict[str, str | None] = {"arrowquant_gpu": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """The CPU, then each GPU that CuPy can reach. Where there is none, `pick_device` says why."""
    cores = len(os.sched_getaffinity(0))
    found: list[dict[str, Any]] = [{"name": "cpu", "description": f"{_cpu_name()}, {cores} cores", "cores": cores}]
    if importlib.util.find_spec("cupy") is None:
        return found
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return found
    for i in range(count):
        properties = cupy.cuda.runtime.getDeviceProperties(i)
        name, memory = properties["name"].decode(), properties["totalGlobalMem"]
        capability = f"{properties['major']}.{properties['minor']}"
        found.append(
            {
                "name": f"cuda:{i}",
                "description": f"{name}, compute capability {capability}, {memory / 2**30:.0f} GiB",
                "compute_capability": capability,
                "memory_bytes": memory,
            }
        )
    return found


def formats() -> list[dict[str, Any]]:
    """The output formats, as `arrowquant formats` shows them."""
    from .formats.targets import TARGETS

    return [
        {
            "format": name,
            "target": "directory" if row.is_directory else "file",
            "scheme": row.scheme,
            "options": {key: list(values) for key, values in row.options.items()},
            "compressions": list(row.compressions),
        }
        for name, row in TARGETS.items()
    ]


def kernel_compiler() -> str:
    """What compiles the CUDA kernels here, or why nothing does."""
    from .backends import nvrtc

    return nvrtc.missing() or f"NVRTC {nvrtc.version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
