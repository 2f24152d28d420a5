"""Machine instructions per weight of every kernel, counted in what the compiler emitted: no GPU is used.

    python benchmarks/sass.py --out benchmarks/results

Two counts for each kernel and architecture, both of a tensor of ordinary (normally distributed) weights:

`ptx_executed`   What the simulator of tests/gpuless executes of the PTX. It is exact, but PTX is no machine code: a
                 division is one instruction there.
`sass_executed`  The same run in machine instructions. The line table of a cubin compiled with -lineinfo names the line
                 of PTX that each machine instruction is from. A basic block runs as often as the median of its
                 instructions' lines was executed, and no less often than any of its stores, shuffles and predicated
                 loads, which are not moved out of a loop. What ordinary weights never reach counts nothing: the slow
                 path of a division, and warps that gather on sm_75. Where ptxas has made several copies of a loop or
                 a branch, told by the memory instructions of one line, these share its executions. A predicated
                 instruction counts as one, NOP as none.

What is counted is warps, times 32: a lane that waits while others of its warp take a branch counts as well, in both.
The tensor has 2^16 weights and the grid one block, so that what a thread does once is spread over several rounds.

What keeps the second count honest: the machine code must be that of the kernel as it is compiled without -lineinfo,
and the bytes that it moves from and to global memory by this count, `global_bytes`, must be those that the PTX moved,
within 10 % (ptxas joins some loads). Where they are not, `sass_executed` is null.

`alu` and the other pipes are parts of `sass_executed`. The integer pipe has half the rate of the whole.
`memory_bound_below` is the number of instructions for which an H200 has time while it moves the bytes of one weight and
what is stored for it: 132 multiprocessors of 128 lanes at 1.98 GHz, 4.3 TB/s; half as many of `alu`. No kernel has been
timed for this.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu.backends import nvrtc  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends.nvrtc import Compiled  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from tests.gpuless.fake_cupy import Prepare  # noqa: E402
from tests.gpuless.loaders import facts_of  # noqa: E402
from tests.gpuless.ptx import PtxFunction, PtxModule  # noqa: E402
from tests.gpuless.stand_in import backend_over  # noqa: E402
from tests.record import write  # noqa: E402

ARCHS = (75, 80, 90, 120)
DTYPES_IN, DTYPE_OUT = ("float32", "bfloat16"), "bfloat16"
SCHEMES = (
    *("int2_g64", "int3_g128", "int4_g128", "int4_g128_asym", "int4_g32", "int5_g128", "int6_g128", "int8_g128"),
    *("int8_channel", "int8_tensor"),
    *(f"affine{bits}_g64" for bits in (2, 3, 4, 5, 6, 8)),
    *("nf4_g64", "fp4_g64", "e4m3_channel", "e4m3_b128", "e4m3_tensor", "e5m2_channel"),
    *("mxfp4", "mxfp4_ceil", "mxfp8", "nvfp4", "nvfp4_local"),
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "ggml_mxfp4", "ggml_nvfp4", "f16", "bf16"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
ROWS, SQUARES = (16, 4096), (128, 512)  # the shape of a tensor, and where scales are of square blocks
GLOBAL_SCALE = 6 * 448 / 0.1  # of nvfp4, for weights up to 0.1
LANES_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12  # thread-instructions of an H200 while it moves one byte
TOLERANCE = 0.1

JUMPS = ("BRA", "EXIT", "RET", "CALL", "BREAK", "BRX")
PIPES = {
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2",
    "alu": r"LOP3|IADD3?|VIADD|[IF]SETP|FMNMX3?|V?IM?NMX3?|F?SEL|PRMT|SHF|LEA|PLOP3|MOV|P2R|CS2R|FCHK",
    "memory": r"LD[GSC]?|LDCU|ULDC|ST[GS]|SHFL|S2R|S2UR",
    "control": r"BRA|BSSY|BSYNC|WARPSYNC|CALL|YIELD|EXIT|BMOV|BREAK|R2UR|VOTEU?|BAR",
    "conversion": r"MUFU|F2F|F2FP|I2F|F2I|I2FP",
}
# Memory instructions that ptxas makes of one in PTX each, unless it copies or joins them.
ANCHOR = re.compile(r"(LDG|STG|LDS|STS|SHFL|REDG?|ATOMG?)\b")


@dataclass(frozen=True, slots=True)
class Instruction:
    """A machine instruction, and the line of the PTX that it is from."""

    text: str
    line: int | None

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+ +", "", self.text).split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_pinned(self) -> bool:
        """Whether ptxas cannot have moved it here from where it runs more often, out of a loop."""
        return self.name in ("STG", "STS", "SHFL") or (self.name == "LDG" and self.text.startswith("@"))


class Program:
    """The blocks of a disassembled kernel, where each can go on, and which ordinary weights reach."""

    def __init__(self, listing: str):
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        line: int | None = None
        for text in listing.splitlines():
            if label := re.match(r"(\.L_\S+):", text):
                labels[label[1]] = len(code)
            elif known := re.match(r'\s*//## File "\.nv_debug_ptx_txt", line (\d+)', text):
                line = int(known[1])
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text):
                code.append(Instruction(instruction[1], line))
        starts = {0, *labels.values()} | {i + 1 for i, instruction in enumerate(code) if instruction.name in JUMPS}
        bounds = [*sorted(s for s in starts if s < len(code)), len(code)]
        self.blocks = [code[a:b] for a, b in itertools.pairwise(bounds)]
        at = {start: i for i, start in enumerate(bounds)}
        self.next = [self._next(i, at, labels) for i in range(len(self.blocks))]
        self.ordinary = self._reached()

    def _next(self, i: int, at: dict[int, int], labels: dict[str, int]) -> list[int]:
        last = self.blocks[i][-1]
        following = [i + 1] if i + 1 < len(self.blocks) else []
        if last.opcode.startswith("BRA.DIV"):  # taken by warps that have parted
            return following
        # A table of jumps names its targets in a comment; a call of a label is a jump out of a loop.
        if last.name in ("BRA", "BRX") or (last.name == "CALL" and ".L_" in last.text):
            jumps = [at[labels[name]] for name in re.findall(r"\.L_\w+", last.text)]
            is_conditional = re.search(r"^@|\.CONV|\bU?P\d", last.text)
            return jumps + (following if is_conditional and last.name != "BRX" else [])
        if last.name in ("EXIT", "RET"):
            return following if last.text.startswith("@") else []
        return following

    def _reached(self) -> list[int]:
        reached, todo = {0}, [0]
        while todo:
            new = {b for b in self.next[todo.pop()] if not is_rare(self.blocks[b])} - reached
            reached |= new
            todo += new
        return sorted(reached)

    def runs(self, executed: Mapping[int, float]) -> list[tuple[Instruction, float, float]]:
        """The instructions of ordinary blocks; how often the block of each runs, where lines of the PTX were executed
        so often; and how often its predicate holds, as far as a line tells.
        """
        anchors = [i for b in self.ordinary for i in self.blocks[b] if ANCHOR.match(i.opcode)]
        copies = Counter((i.name, i.line) for i in anchors)
        found = []
        for block in (self.blocks[b] for b in self.ordinary):
            lines = [executed.get(i.line or 0, 0.0) for i in block]
            share = median([copies[i.name, i.line] for i in block if (i.name, i.line) in copies] or [1])
            pinned = [n / max(1, copies[i.name, i.line]) for i, n in zip(block, lines, strict=True) if i.is_pinned]
            runs = max([median(lines) / share, *pinned])
            for i, n in zip(block, lines, strict=True):
                holds = min(runs, n / max(1, copies[i.name, i.line])) if i.text.startswith("@") else runs
                found.append((i, runs, holds))
        return found


def is_rare(block: list[Instruction]) -> bool:
    """Whether ordinary weights never come here: the slow path of a division, warps that gather."""
    return any(
        (i.name == "CALL" and not re.search(r"^@|\.L_", i.text))
        or re.match(r"ENDCOLLECTIVE|WARPSYNC\.COLLECTIVE", i.opcode)
        for i in block
    )


def pipes(opcodes: Mapping[str, float]) -> dict[str, float]:
    """Instructions by pipe, and `other`."""
    found = dict.fromkeys((*PIPES, "other"), 0.0)
    for opcode, n in opcodes.items():
        name = opcode.split(".")[0]
        found[next((pipe for pipe, names in PIPES.items() if re.fullmatch(names, name)), "other")] += n
    return found


def sass_bytes(runs: list[tuple[Instruction, float, float]]) -> float:
    """Bytes that machine instructions move from and to global memory."""
    total = 0.0
    for instruction, _, holds in runs:
        if instruction.name in ("LDG", "STG"):
            width = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.opcode)
            total += holds * (int(width[1]) if width else 32) / 8
    return total


def ptx_bytes(function: PtxFunction, executed: Mapping[int, float]) -> float:
    """Bytes that the PTX moved from and to global memory."""
    total = 0.0
    for instruction in function.entry.instructions:
        name, *modifiers = instruction.opcode
        if name in ("ld", "st") and "global" in modifiers:
            lanes = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
            total += executed.get(instruction.line, 0.0) * lanes * int(modifiers[-1][1:]) / 8
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Running a kernel.


class Counting:
    """Loads kernels into the simulator, with the line table; `last` is what was loaded last."""

    def __init__(self) -> None:
        self.last: tuple[dict[str, Any], Compiled, PtxFunction] | None = None

    def __call__(self, cubin: Path, entry: str) -> Prepare:
        facts = facts_of(cubin)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-lineinfo"))
            compiled = nvrtc.compile_source(facts["source"], facts["defines"], facts["arch"])
        # Directives of lines become empty lines: the numbers of all others stay as they are.
        text = re.sub(r"^[ \t]*\.(?:loc|file)\b.*", "", compiled.ptx, flags=re.M)
        self.last = facts, compiled, PtxModule(text).get_function(entry)
        return self.last[2].prepare

    def count(self, n_weights: int) -> dict[str, Any]:
        """What the last kernel took, per weight."""
        assert self.last is not None
        facts, compiled, function = self.last
        listing, plain = disassemble(compiled.cubin, "-gp"), self._without_lines(facts)
        program = Program(listing)
        if instructions(listing) != instructions(plain):
            raise SystemExit(f"{facts['source']} {facts['defines']}: the line table has changed the machine code")
        executed: Counter[int] = Counter()
        for number, warps in function.issued.items():
            executed[function.entry.instructions[number].line] += warps
        per_weight = {line: 32 * warps / n_weights for line, warps in executed.items()}
        runs = program.runs(per_weight)
        opcodes: Counter[str] = Counter()
        for instruction, n, _ in runs:
            if instruction.name != "NOP":
                opcodes[instruction.opcode] += n  # type: ignore[assignment] - a Counter adds floats as well
        moved = sass_bytes(runs), ptx_bytes(function, per_weight)
        is_credible = abs(moved[0] - moved[1]) <= TOLERANCE * moved[1]
        return {
            "sass_executed": round(sum(opcodes.values()), 2) if is_credible else None,
            "ptx_executed": round(sum(per_weight.values()), 2),
            **({pipe: round(n, 2) for pipe, n in pipes(opcodes).items()} if is_credible else {}),
            "global_bytes": {"sass": round(moved[0], 3), "ptx": round(moved[1], 3)},
            "registers": compiled.registers,
        }

    @staticmethod
    def _without_lines(facts: Mapping[str, Any]) -> str:
        return disassemble(nvrtc.compile_source(facts["source"], facts["defines"], facts["arch"]).cubin)


def instructions(listing: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", listing, re.M)


def disassemble(cubin: bytes, *options: str) -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_nvidia_binary_utility("nvdisasm") or "nvdisasm", "-c", *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def simulated(arch: int) -> Iterator[tuple[Any, Counting, Callable[[], None]]]:
    """The CUDA backend over the simulator, one block at a time; what counts; and what waits for the kernels."""
    counting = Counting()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        backend, host = backend_over(counting, patch, Path(folder), arch=arch, max_blocks=1)
        yield backend, counting, host.gpu.synchronize


def measure(text: str, dtype: str, arch: int) -> dict[str, dict[str, Any]]:
    """Every kernel that a scheme needs for weights of this dtype -> what it takes; decoding with the dtype it is to."""
    scheme, found = Scheme.parse(text), {}
    shape = SQUARES if scheme.granularity == "block" else ROWS
    x = (np.random.default_rng(1).standard_normal(shape) * 0.02).astype(DTYPES[dtype].numpy)
    n_scales, beside = scheme.scales_shape(shape), scheme.zeros_shape(shape)
    with simulated(arch) as (backend, counting, wait):
        weights = backend.put(x)
        packed = backend.empty(scheme.packed_shape(shape), np.uint8)
        scales = backend.put(np.full(n_scales, 0.001).astype(DTYPES[scheme.scale_storage].numpy))
        zeros = None
        if beside is not None:
            zeros = backend.put(np.full(beside, GLOBAL_SCALE, DTYPES[str(scheme.zeros_dtype)].numpy))
        stored = (packed.nbytes + (scales.nbytes if np.prod(n_scales) else 0) + (zeros.nbytes if zeros else 0)) / x.size

        def add(name: str, n_bytes: float, run: Callable[[], object]) -> None:
            run()
            wait()
            assert counting.last is not None
            facts = counting.last[0]
            kernel = " ".join([facts["source"], *(f"{k}={v}" for k, v in facts["defines"].items())])
            budget = {"bytes_per_weight": round(n_bytes, 3), "memory_bound_below": round(LANES_PER_BYTE * n_bytes, 1)}
            found[name] = {"kernel": kernel, **budget, f"sm_{arch}": counting.count(x.size)}

        if scheme.granularity == "tensor":
            if scheme.family == "int":
                add(f"{dtype} -> range", x.itemsize, lambda: backend.value_range(weights))
            encode = lambda: backend.encode(weights, scheme, scales, zeros, packed)  # noqa: E731
            add(f"{dtype} -> {text}, codes", x.itemsize + stored, encode)
        else:
            quantize = lambda: backend.quantize(weights, scheme, packed, scales, zeros)  # noqa: E731
            add(f"{dtype} -> {text}", x.itemsize + stored, quantize)
        if dtype == DTYPE_OUT:
            decode = lambda: backend.dequantize(packed, scales, zeros, scheme, weights)  # noqa: E731
            add(f"{text} -> {dtype}", x.itemsize + stored, decode)
    return found


def _measure(job: tuple[str, str, int]) -> dict[str, dict[str, Any]]:
    return measure(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine instructions per weight of every kernel")
    parser.add_argument("--out", type=Path, help="folder for sass.json")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS, help="architectures, 75 80 90 120 unless given")
    parser.add_argument("--dtype", nargs="*", default=DTYPES_IN, help="dtypes of weights, both unless given")
    options = parser.parse_args()
    # For one scheme after another, so that a kernel has its architectures in one line.
    jobs = [(s, d, a) for s, d, a in itertools.product(SCHEMES, options.dtype, options.arch)]
    kernels: dict[str, Any] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for (_, _, arch), found in zip(jobs, pool.map(_measure, jobs), strict=True):
            for name, counts in found.items():
                kernels.setdefault(name, {}).update(counts)
                if arch == options.arch[-1]:
                    print_row(name, kernels[name])
    if options.out:
        write(options.out / "sass.json", {"method": "benchmarks/sass.py", "nvrtc": nvrtc.version(), "kernels": kernels})


def print_row(name: str, counts: Mapping[str, Any]) -> None:
    per_arch = {key: at for key, at in counts.items() if key.startswith("sm_")}
    row = (f"{key} {at['sass_executed'] or '-':6} ({at['ptx_executed']})" for key, at in per_arch.items())
    print(f"{name:32}", *row, f"below {counts['memory_bound_below']}", flush=True)


if __name__ == "__main__":
    main()
