"""`ShimModule`: a .cu file compiled by g++ against the headers in include/ and run on the CPU, thread by thread.

    module = ShimModule(Path("kernels/quantize.cu"), {"BITS": "4"})
    quantize = module.get_function("quantize")
    quantize((blocks,), (256,), (x, packed, scales, np.int64(n)))

The compiled file is kept in .cache/shim of the checkout under a name made of everything that went into it.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arguments import Bound, Parameter, Pointer, bind, dimensions
from .errors import KernelFault
from .launcher import launcher

INCLUDE = Path(__file__).with_name("include")
CACHE = Path(__file__).parents[2] / ".cache" / "shim"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"),
)
SANITIZE_FLAGS = (
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # g++ puts no red zones around variables of a named section unless asked to.
    "-fsanitize-sections=cu_shared",
)
UNIT = """\
#include "cuda_shim.h"
#include <cuda/std/cstdint>
namespace {{
#include "{source}"
}}
extern "C" {{
extern char __start_cu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cu_shared[] __attribute__((weak, visibility("hidden")));
}}
#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))
SHIM_EXPORT int shim_launch(const unsigned *d, unsigned order, unsigned fill, void **arguments) {{
  const shim::Launch launch{{{{d[0], d[1], d[2]}}, {{d[3], d[4], d[5]}}, order, static_cast<unsigned char>(fill),
                            __start_cu_shared, __stop_cu_shared}};
  return shim::launch(&{entry}, launch, arguments);
}}
SHIM_EXPORT int shim_signature(char *kinds, int *sizes) {{ return shim::signature(&{entry}, kinds, sizes); }}
"""
KINDS = {"p": "pointer", "f": "float", "i": "integer", "s": "any"}


@dataclass(frozen=True)
class Schedule:
    """In which order threads and blocks run, and what shared memory holds at the start of each block.

    `order` is 0 for forward, 1 for reverse, and else the seed of a random order.
    """

    order: int = 0
    fill: int = 0xA5


FORWARD, REVERSE = Schedule(0), Schedule(1)
# The fills are a small negative float, NaN, and a large float: reading one of them changes some result.
SCHEDULES = (FORWARD, Schedule(1, 0xFF), Schedule(2, 0x7F), Schedule(3, 0x00))


class ShimModule:
    """One source file with one set of macros.

    `source` is the .cu file; `defines` its -D macros; `include_dirs` where its own headers are found, besides its own
    directory. `sanitize` compiles with AddressSanitizer and UndefinedBehaviorSanitizer. `arch` chooses between the
    branches that a kernel has for different GPUs: 90 stands for sm_90.
    """

    def __init__(
        self,
        source: Path,
        defines: Mapping[str, str] | None = None,
        *,
        sanitize: bool = False,
        arch: int = 90,
        include_dirs: Sequence[Path] = (),
    ):
        self.source = source.resolve()
        self.defines = dict(defines or {})
        self.sanitize = sanitize
        self.arch = arch
        self.include_dirs = [self.source.parent, *(path.resolve() for path in include_dirs)]

    def get_function(self, entry: str) -> ShimFunction:
        """The kernel `entry`, compiled unless the cache has it. KernelFault with g++'s words if it does not compile."""
        return ShimFunction(self._library(entry), entry, sanitize=self.sanitize)

    def _flags(self) -> list[str]:
        defines = [f"-D{name}={value}" for name, value in sorted(self.defines.items())]
        defines.append(f"-D__CUDA_ARCH__={self.arch}0")
        includes = [f"-I{path}" for path in (INCLUDE, *self.include_dirs)]
        return [*_flags(self.sanitize), *defines, *includes]

    def _library(self, entry: str) -> Path:
        unit = UNIT.format(source=self.source, entry=entry)
        headers = [path for folder in self.include_dirs for path in sorted(folder.glob("*.cu*"))]
        key = _key(unit, self._flags(), headers)
        runtime = _fiber_library(self.sanitize)

        def compile_to(target: Path) -> None:
            text = target.with_suffix(".cpp")
            text.write_text(unit)
            try:
                _run_compiler([*self._flags(), "-shared", str(text), str(runtime), "-o", str(target)])
            finally:
                text.unlink()

        return _cached(f"{entry}-{key}.so", compile_to)


class ShimFunction:
    """One compiled kernel; call it as CuPy's RawKernel is called."""

    def __init__(self, library: Path, entry: str, *, sanitize: bool):
        self.library, self.entry = library, entry
        self._launcher = launcher(sanitize)
        self.parameters = [
            Parameter(f"parameter {i}", KINDS[kind], n_bytes)
            for i, (kind, n_bytes) in enumerate(self._launcher.call(library, "signature"))
        ]

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[object],
        shared_mem: int = 0,
        *,
        schedule: Schedule = FORWARD,
    ) -> None:
        """Run the grid on NumPy arrays in place. KernelFault where the launch, the kernel or a sanitizer fails."""
        self.prepare(grid, block, args, shared_mem, schedule=schedule)()

    def prepare(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[object],
        shared_mem: int = 0,
        *,
        schedule: Schedule = FORWARD,
    ) -> Callable[[], None]:
        """Check a launch now, and return the function that runs it: a stream runs kernels later.

        Dynamic shared memory has no meaning here: `extern __shared__` does not compile.
        """
        if shared_mem:
            raise KernelFault(f"{self.entry}: {shared_mem} bytes of dynamic shared memory, and no kernel here has any")
        wide_grid, wide_block = dimensions(grid, block, self.entry)
        bound = bind(args, self.parameters, self.entry)
        return lambda: self._run([*wide_grid, *wide_block], bound, schedule)

    def _run(self, sizes: list[int], bound: Bound, schedule: Schedule) -> None:
        values = [(v.allocation, v.offset) if isinstance(v, Pointer) else v for v in bound.values]
        contents = [allocation.tobytes() for allocation in bound.allocations]
        try:
            results = self._launcher.call(
                self.library, "launch", sizes, schedule.order, schedule.fill, values, contents
            )
        except KernelFault as fault:
            raise KernelFault(f"{self.entry}: {fault}") from None
        for allocation, before, after in zip(bound.allocations, contents, results, strict=True):
            if before != after:
                if not allocation.flags.writeable:
                    raise KernelFault(f"{self.entry}: wrote to a read-only array of {allocation.size} bytes")
                allocation[:] = np.frombuffer(after, np.uint8)


def _flags(sanitize: bool) -> list[str]:
    return [*FLAGS, *(SANITIZE_FLAGS if sanitize else ())]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _key(unit: str, flags: list[str], sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for text in (_compiler_version(), unit, *flags):
        digest.update(text.encode() + b"\0")
    for path in (*sources, *sorted(path for path in INCLUDE.rglob("*") if path.is_file())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _cached(name: str, compile_to: Callable[[Path], None]) -> Path:
    """The cached file `name`, made by `compile_to` under a temporary name first: never half-written, never shared."""
    target = CACHE / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / name
            compile_to(fresh)
            fresh.replace(target)
    return target


def _fiber_library(sanitize: bool) -> Path:
    """The library that runs threads, for all kernels."""
    source = INCLUDE / "fiber.cpp"
    flags = _flags(sanitize)
    return _cached(
        f"fiber-{_key('', flags, [])}.so",
        lambda target: _run_compiler([*flags, f"-I{INCLUDE}", "-shared", str(source), "-o", str(target)]),
    )


def _run_compiler(arguments: Sequence[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise KernelFault(f"g++ failed:\n{done.stderr.strip()}")
