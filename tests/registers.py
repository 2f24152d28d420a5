"""Registers of every kernel on every architecture, held to a budget.

    python -m tests.registers            # compile all, and lint their PTX
    python -m tests.registers --sample   # each for two architectures, in turn
    python -m tests.registers --write    # make the budget anew, to be reviewed in the diff

Registers decide how many threads a GPU can keep; a spill is a compile error already. The budget, tests/registers.json,
has one number for each architecture and kernel (for those of whole numbers that differ in width and symmetry only),
rounded up to what a GPU allocates.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from arrowquant_gpu.backends import launches, nvrtc
from arrowquant_gpu.backends.variants import Variant

from .gpuless.lint import lint

ARCHS = (75, 80, 86, 89, 90, 100, 120)
BUDGET = Path(__file__).with_name("registers.json")
GRANULE = 8  # registers of a thread are allocated in steps of this many

# What a kernel is called here -> architecture -> registers.
Registers = dict[str, dict[str, int]]


def shared(variant: Variant) -> str:
    """What variants with one budget have in common.

    >>> from arrowquant_gpu.backends import variants
    >>> shared(variants.quantize(4, True, "float16", 128))
    'quantize IN_T=__half GROUP=128 SOLVER=minmax'
    """
    dropped = () if variant.source.endswith("kquants") else ("BITS", "SYMMETRIC")
    return " ".join([variant.source, *(f"{name}={value}" for name, value in variant.macros if name not in dropped)])


def sample(every: Sequence[Variant], archs: Sequence[int] = ARCHS) -> list[tuple[Variant, int]]:
    """Each variant with two architectures, so that neighbours have others."""
    return [(v, archs[(i + shift) % len(archs)]) for i, v in enumerate(every) for shift in (0, 3)]


def measure(jobs: Iterable[tuple[Variant, int]]) -> Registers:
    """Compile (variant, architecture) pairs on all cores; the largest count of each that share a budget, rounded up.

    Raises DeviceError for the first that does not compile, spills included, and what `lint` raises for its PTX.
    """
    most: Registers = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for name, arch, registers in pool.map(_registers, jobs, chunksize=8):
            at = most.setdefault(name, {})
            at[arch] = max(at.get(arch, 0), -(-registers // GRANULE) * GRANULE)
    return most


def _registers(job: tuple[Variant, int]) -> tuple[str, str, int]:
    variant, arch = job
    compiled = nvrtc.compile_source(variant.source, variant.defines, arch)
    lint(compiled.ptx)
    return shared(variant), str(arch), compiled.registers


def budget() -> Registers:
    numbers: Registers = json.loads(BUDGET.read_text())["registers"]
    return numbers


def document(measured: Registers) -> str:
    """The budget as JSON, a line for each kernel."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(at)}" for name, at in measured.items())
    return f'{{\n "nvrtc": {json.dumps(nvrtc.version())},\n "registers": {{\n{rows}\n }}\n}}\n'


def over(measured: Registers, allowed: Registers) -> Iterator[str]:
    """What has no budget or is beyond it, in words."""
    for name, at in measured.items():
        for arch, registers in at.items():
            limit = allowed.get(name, {}).get(arch)
            if limit is None:
                yield f"{name} on sm_{arch}: {registers} registers, no budget"
            elif registers > limit:
                yield f"{name} on sm_{arch}: {registers} registers, the budget is {limit}"


def main(arguments: list[str]) -> int:
    every = list(launches.every())
    jobs = sample(every) if arguments == ["--sample"] else [(variant, arch) for arch in ARCHS for variant in every]
    measured = measure(jobs)
    if arguments == ["--write"]:
        BUDGET.write_text(document(measured))
    problems = list(over(measured, budget()))
    summary = f"{len(jobs)} kernels compiled without spills, their PTX linted; {len(problems)} over the register budget"
    print("\n".join([*problems, summary]))
    return len(problems) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
