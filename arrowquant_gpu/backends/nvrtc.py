"""CUDA source -> cubin, compiled by NVRTC and kept on disk. It needs no GPU, and knows nothing of what kernels do.

    cubin = build("quantize", {"BITS": 4, "SYMMETRIC": 1, ...}, arch=90)
    cupy.RawModule(path=str(cubin.path)).get_function("quantize")

A kernel is kernels/<source>.cu with an `extern "C"` entry of the same name; its variants are -D macros. Its key in the
cache is a hash of all that decides its bits: the source, every header it includes (those of CUDA too), macros, flags,
architecture, and the version of NVRTC. CuPy's own compile step is not used: it appends -ftz=true to the flags, and its
cache does not see edited headers.

The cache is $ARROWQUANT_CACHE_DIR, or arrowquant_gpu below $XDG_CACHE_HOME or ~/.cache. Files are written under a
temporary name and renamed, so that processes can share it; a damaged file is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeviceError

# Flags are part of the numerics: nothing is contracted, flushed or approximated. A register spill is an error.
FLAGS = (
    *("--std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"),
    *("--ptxas-options=-v", "--ptxas-options=--warn-on-spills", "--ptxas-options=--warning-as-error"),
)

TOOLKIT = Path("/usr/local/cuda/include")  # where a toolkit is that no environment variable names
_INSTALL = "install the extra that fits your driver: pip install 'arrowquant_gpu[cuda13]' or [cuda12]"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What NVRTC made of one variant. `log` is ptxas's report, where registers and spills are from."""

    cubin: bytes
    ptx: str
    registers: int
    spill_bytes: int
    log: str


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel in the cache."""

    path: Path
    key: str
    registers: int
    spill_bytes: int


def kernel_dir() -> Path:
    """Where the .cu and .cuh files are: inside the installed package, or kernels/ of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise DeviceError(
        f"the kernel sources are neither in {package}/_kernels nor in {package.parent}/kernels; reinstall"
    )


def cache_dir() -> Path:
    """The folder of compiled kernels; see the module's description."""
    if own := os.environ.get("ARROWQUANT_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arrowquant_gpu"


@functools.cache
def include_dir() -> Path:
    """The folder of cuda_fp16.h: of pip's nvidia-cuda-runtime, a conda environment, or a CUDA toolkit.

    Raises DeviceError where there is none.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as e:
        raise DeviceError(f"cuda-pathfinder is not installed; {_INSTALL}") from e
    for folder in (find_nvidia_header_directory("cudart"), TOOLKIT):
        if folder is not None and Path(folder, "cuda_fp16.h").is_file():
            return Path(folder)
    raise DeviceError(f"the CUDA headers (cuda_fp16.h) are not found; {_INSTALL}, or set CUDA_HOME to a CUDA toolkit")


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None if they can."""
    try:
        include_dir()
        version()
    except DeviceError as e:
        return str(e)
    return None


@functools.cache
def version() -> str:
    """The version of NVRTC, "13.0". Raises DeviceError where NVRTC is not installed or does not load."""
    nvrtc = _nvrtc()
    try:
        return ".".join(map(str, _checked(nvrtc.nvrtcVersion())))
    except RuntimeError as e:  # the bindings load the library at their first call
        raise DeviceError(f"NVRTC does not load ({e}); {_INSTALL}") from e


def build(source: str, defines: Mapping[str, str | int], arch: int) -> Cubin:
    """The cubin of kernels/<source>.cu with these macros for sm_<arch>, from the cache or newly compiled.

    Raises DeviceError if it does not compile, and if what compiling needs is not installed.
    """
    name = key(source, defines, arch)
    path = cache_dir() / f"{name}.cubin"
    facts = _read_facts(path)
    if facts is None:
        made = compile_source(source, defines, arch)
        facts = {
            "source": source,
            "defines": {k: str(v) for k, v in defines.items()},
            "arch": arch,
            "flags": FLAGS,
            "nvrtc": version(),
            "registers": made.registers,
            "spill_bytes": made.spill_bytes,
            "sha256": hashlib.sha256(made.cubin).hexdigest(),
        }
        _write(path, made.cubin)
        _write(path.with_suffix(".json"), json.dumps(facts, indent=2).encode())
    return Cubin(path, name, facts["registers"], facts["spill_bytes"])


def compile_source(source: str, defines: Mapping[str, str | int], arch: int) -> Compiled:
    """Compile without the cache. Raises as `build` does."""
    nvrtc = _nvrtc()
    file = _source_file(source)
    options = [f"-arch=sm_{arch}", *_options(defines), f"-I{file.parent}", f"-I{include_dir()}"]
    encoded = [option.encode() for option in options]
    program = _checked(nvrtc.nvrtcCreateProgram(file.read_bytes(), f"{source}.cu".encode(), 0, [], []))[0]
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        if failed:
            what = " ".join(f"{k}={v}" for k, v in defines.items())
            raise DeviceError(f"{source} {what} does not compile for sm_{arch} ({failed.name}):\n{log}")
        cubin = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise DeviceError(f"{source} for sm_{arch}: ptxas reports no registers:\n{log}")
    return Compiled(cubin, ptx, int(registers[1]), spills, log)


def key(source: str, defines: Mapping[str, str | int], arch: int) -> str:
    """A hash of everything that decides the bits of this variant, as the stem of its file names."""
    digest = hashlib.sha256()
    file = _source_file(source)
    for part in (version(), f"sm_{arch}", *_options(defines), _digest(file.read_text(), (file.parent, include_dir()))):
        digest.update(part.encode() + b"\0")
    return f"{source}-sm_{arch}-{digest.hexdigest()[:32]}"


def _options(defines: Mapping[str, str | int]) -> list[str]:
    return [*FLAGS, *(f"-D{name}={value}" for name, value in sorted(defines.items()))]


def _source_file(source: str) -> Path:
    file = kernel_dir() / f"{source}.cu"
    if not file.is_file():
        raise DeviceError(f"there is no kernel {source!r} in {file.parent}")
    return file


def _digest(text: str, folders: tuple[Path, ...]) -> str:
    """A hash of a source and of every header that it includes, directly or not, in the order they are met.

    A header that is in none of the folders is NVRTC's own, and has its version.
    """
    digest, todo, seen = hashlib.sha256(text.encode()), [text], set()
    while todo:
        for name in _INCLUDE.findall(todo.pop()):
            file = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if file is None or file in seen:
                continue
            seen.add(file)
            header = file.read_text(errors="replace")
            digest.update(f"\0{name}\0{header}".encode())
            todo.append(header)
    return digest.hexdigest()


def _read_facts(path: Path) -> dict[str, Any] | None:
    """The facts beside a cubin, or None unless both are there and belong together."""
    try:
        facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        intact = facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return {**facts, "registers": int(facts["registers"])} if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Write under another name and rename, so that no process sees a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder, path.name)
            fresh.write_bytes(content)
            fresh.replace(path)
    except OSError as e:
        raise DeviceError(f"the kernel cache cannot be written: {e}; set ARROWQUANT_CACHE_DIR to another folder") from e


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise DeviceError(f"cuda-bindings is not installed; {_INSTALL}") from e
    return nvrtc


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an NVRTC call returns after its status; every non-zero status is an error."""
    if result[0]:
        raise DeviceError(f"NVRTC failed: {result[0].name}")
    return result[1:]


def _bytes(size_of: Any, read: Any, program: Any) -> bytes:
    buffer = bytes(_checked(size_of(program))[0])
    _checked(read(program, buffer))
    return buffer


def _text(size_of: Any, read: Any, program: Any) -> str:
    return _bytes(size_of, read, program).decode(errors="replace").rstrip("\0\n ")
