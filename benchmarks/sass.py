"""Machine instructions per weight of the kernels' hot loops, counted in what the compiler emitted: no GPU is used.

    python benchmarks/sass.py --out benchmarks/results

Method. A cubin is disassembled with nvdisasm and cut into basic blocks. A hot loop is a loop that reads or writes
weights 16 bytes at a time. Within it, blocks that ordinary weights never reach are left out: those that call (the slow
path of a division), count errors (atomics), read single weights, or form a loop inside the hot one (bytes one by one).
Of the ways round the loop that remain, counted is the one with the most wide accesses, then the most fused
multiply-adds, then the most word stores, then the fewest instructions: a full, aligned group of ordinary weights whose
scale is float32, in the thread that stores the scale. A predicated instruction counts as one, NOP as none. The count is
divided by the weights that the wide accesses move. Kernels that hold groups in registers have one such loop. Those that
stream them have one for each pass; the passes are added, and what happens once per group is left out.

Beside the SASS stand the thread-instructions per weight that the PTX executes in the simulator of tests/gpuless on a
tensor of ordinary weights: all of them, but a division is one instruction there.

`alu` is the part that needs the integer pipe, which has half the rate of the whole: on an H200 memory stays the limit
for bf16 -> int4 below about 19 instructions per weight in all and 9 of the integer pipe.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu.backends import nvrtc, variants  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends.variants import C_TYPES, Variant  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from tests.record import write  # noqa: E402
from tests.registers import ARCHS  # noqa: E402

VARIANTS = {
    **{f"{d} -> int4_g128": variants.quantize(4, True, d, 128) for d in C_TYPES},
    "bfloat16 -> int4_g128_asym": variants.quantize(4, False, "bfloat16", 128),
    "bfloat16 -> int4_g32": variants.quantize(4, True, "bfloat16", 32),
    "bfloat16 -> int2_g64": variants.quantize(2, True, "bfloat16", 64),
    "bfloat16 -> int3_g128": variants.quantize(3, True, "bfloat16", 128),
    "bfloat16 -> int5_g128": variants.quantize(5, True, "bfloat16", 128),
    "bfloat16 -> int6_g128": variants.quantize(6, True, "bfloat16", 128),
    "bfloat16 -> int8_g128": variants.quantize(8, True, "bfloat16", 128),
    "bfloat16 -> int8_channel": variants.quantize(8, True, "bfloat16", 0),
    "bfloat16 -> int8_tensor, range": variants.value_range("bfloat16"),
    "bfloat16 -> int8_tensor, codes": variants.encode(8, True, "bfloat16"),
    "int4_g128 -> bfloat16": variants.dequantize(4, True, "bfloat16"),
    "int8_channel -> float32": variants.dequantize(8, True, "float32"),
}

ITEM_BYTES = {c: DTYPES[name].bits // 8 for name, c in C_TYPES.items()}
JUMPS = ("BRA", "EXIT", "RET", "CALL", "BREAK", "BRX")
PIPES = {
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2",
    "alu": r"LOP3|IADD3?|VIADD|[IF]SETP|FMNMX3?|V?IM?NMX3?|F?SEL|PRMT|SHF|LEA|PLOP3|MOV|P2R|CS2R|FCHK",
    "memory": r"LD[GSC]?|LDCU|ULDC|STG|SHFL|S2R|S2UR",
    "control": r"BRA|BSSY|BSYNC|WARPSYNC|CALL|YIELD|EXIT|BMOV|BREAK|NOP|R2UR|VOTEU?",
    "conversion": r"MUFU|F2F|F2FP|I2F|F2I|I2FP",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A way round a loop: what ranks it, and its opcodes."""

    wide_bytes: int
    n_fma: int
    n_stores: int
    opcodes: tuple[str, ...]

    def __add__(self, other: Way) -> Way:
        return Way(
            self.wide_bytes + other.wide_bytes,
            self.n_fma + other.n_fma,
            self.n_stores + other.n_stores,
            self.opcodes + other.opcodes,
        )

    @property
    def rank(self) -> tuple[int, ...]:
        return self.wide_bytes, self.n_fma, self.n_stores, -len(self.opcodes)


class Program:
    """The blocks of a disassembled kernel and where each can go on."""

    def __init__(self, listing: str):
        code: list[str] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                code.append(instruction[1])
        starts = {0, *labels.values()} | {i + 1 for i, text in enumerate(code) if opcode(text).split(".")[0] in JUMPS}
        bounds = [*sorted(s for s in starts if s < len(code)), len(code)]
        self.blocks = [code[a:b] for a, b in itertools.pairwise(bounds)]
        at = {start: i for i, start in enumerate(bounds)}
        self.next = [self._next(i, at, labels) for i in range(len(self.blocks))]

    def _next(self, i: int, at: dict[int, int], labels: dict[str, int]) -> list[int]:
        last = self.blocks[i][-1]
        kind = opcode(last).split(".")[0]
        following = [i + 1] if i + 1 < len(self.blocks) else []
        if kind in ("BRA", "BRX"):  # a table of jumps names its targets in a comment
            jumps = [at[labels[name]] for name in re.findall(r"\.L_\w+", last)]
            is_conditional = re.search(r"^@|\.DIV|\.CONV|\bU?P\d", last)
            return jumps + (following if is_conditional and kind == "BRA" else [])
        if kind in ("EXIT", "RET"):
            return following if last.startswith("@") else []
        return following

    def loops(self, within: set[int]) -> Iterator[tuple[int, set[int]]]:
        """(head, blocks) of every loop among these blocks, inner ones after the one that holds them."""
        for body in self._cycles(within):
            outside = {b for i, to in enumerate(self.next) if i not in body for b in to}
            head = min((body & outside) or body)
            yield head, body
            yield from self.loops(body - {head})

    def _cycles(self, within: set[int]) -> list[set[int]]:
        """The strongly connected parts that have a cycle."""
        reach: dict[int, set[int]] = {}
        for start in within:
            seen: set[int] = set()
            todo = [b for b in self.next[start] if b in within]
            while todo:
                b = todo.pop()
                if b not in seen:
                    seen.add(b)
                    todo += [c for c in self.next[b] if c in within]
            reach[start] = seen
        parts = {frozenset(b for b in reach[a] if a in reach[b]) for a in within if a in reach[a]}
        return [set(p) for p in parts]

    def hot_way(self, head: int, body: set[int]) -> Way | None:
        """The way round the loop that ordinary weights take, or None if there is none without rare blocks."""
        keep = {b for b in body if not is_rare(self.blocks[b])} - {head}
        for part in self._cycles(keep):
            # On sm_75 a warp waits for its threads in a loop of votes, left at once where they have not parted.
            names = {opcode(i).split(".")[0] for b in part for i in self.blocks[b]}
            if "VOTE" not in names or names & {"LDG", "STG"}:
                keep -= part
        best: dict[int, Way | None] = {}

        def rest(b: int) -> Way | None:
            """The best way from block b back to the head."""
            if b not in best:
                best[b] = None
                ways = [Way(0, 0, 0, ()) if n == head else rest(n) for n in self.next[b] if n == head or n in keep]
                known = [way for way in ways if way is not None]
                best[b] = way_through(self.blocks[b]) + max(known, key=lambda w: w.rank) if known else None
            return best[b]

        return None if is_rare(self.blocks[head]) else rest(head)


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", instruction).split()[0]


def is_rare(block: list[str]) -> bool:
    for instruction in block:
        name = opcode(instruction)
        called = name.startswith("CALL") and not instruction.startswith("@")
        if called or re.match(r"REDG?\b|ATOMG?\b|MATCH|ENDCOLLECTIVE|LDG\.E\.U16|WARPSYNC\.COLLECTIVE", name):
            return True
    return False


def way_through(block: list[str]) -> Way:
    names = [opcode(instruction) for instruction in block]
    return Way(
        sum(16 for n in names if re.match(r"(LDG|STG)\.E\.128", n)),
        sum(n.startswith("FFMA") for n in names),
        sum(n.startswith("STG") and not re.search(r"\.[US](8|16)", n) for n in names),
        tuple(n for n in names if n != "NOP"),
    )


def disassemble(cubin: bytes) -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_nvidia_binary_utility("nvdisasm") or "nvdisasm", "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hot_loops(variant: Variant, listing: str) -> list[tuple[int, Way]]:
    """(weights, way round) for each pass over the weights."""
    program = Program(listing)
    item = ITEM_BYTES[variant.defines.get("IN_T") or variant.defines["OUT_T"]]
    passes: dict[bool, tuple[int, Way]] = {}
    for head, body in program.loops(set(range(len(program.blocks)))):
        way = program.hot_way(head, body)
        if way is None or not way.wide_bytes:
            continue
        weights, encodes = way.wide_bytes // item, way.n_fma > 0
        # A pass can have two loops, of which one only ends what the other, unrolled, has left.
        known = passes.get(encodes)
        if known is None or len(way.opcodes) / weights < len(known[1].opcodes) / known[0]:
            passes[encodes] = weights, way
    if not passes:
        raise SystemExit(f"{variant}: no hot loop found; has the kernel lost its 16-byte accesses?")
    return list(passes.values())


def pipes(opcodes: Counter[str]) -> Iterator[tuple[str, int]]:
    left = Counter(opcodes)
    for pipe, names in PIPES.items():
        matching = [n for n in left if re.fullmatch(names, n)]
        yield pipe, sum(left.pop(n) for n in matching)
    yield "other", left.total()


def count(variant: Variant, arch: int) -> dict[str, Any]:
    """Instructions per weight of one variant on one architecture, in all and by pipe."""
    compiled = nvrtc.compile_source(variant.source, variant.defines, arch)
    per_weight: Counter[str] = Counter()
    for weights, way in hot_loops(variant, disassemble(compiled.cubin)):
        by_name = Counter(name.split(".")[0] for name in way.opcodes)
        for pipe, n in pipes(by_name):
            per_weight[pipe] += n / weights  # type: ignore[assignment] - a Counter adds floats as well
    total = sum(per_weight.values())
    return {
        "instructions": round(total, 2),
        **{pipe: round(n, 2) for pipe, n in per_weight.items()},
        "registers": compiled.registers,
    }


def executed(variant: Variant, arch: int) -> float:
    """Thread-instructions per weight that the PTX of a quantize kernel with held groups executes."""
    from tests.gpuless.ptx import PtxModule

    defines = variant.defines
    group, bits, symmetric = int(defines["GROUP"]), int(defines["BITS"]), defines["SYMMETRIC"] == "1"
    dtype = next(name for name, c in C_TYPES.items() if c == defines["IN_T"])
    scheme = Scheme(bits, "group", group, symmetric)
    n = 64 * 4096
    x = (np.random.default_rng(1).standard_normal(n) * 0.02).astype(DTYPES[dtype].numpy)
    packed = np.zeros(scheme.packed_shape((1, n)), np.uint8)
    scales = np.zeros(scheme.scales_shape((1, n)), np.float32)
    zeros = None if symmetric else np.zeros(scales.shape, np.uint8)
    kernel = PtxModule(nvrtc.compile_source(variant.source, defines, arch).ptx).get_function(variant.source)
    runs, size = np.int64(n // group), np.int64(group)
    sizes = (np.int64(1), np.int64(n), runs, np.int32(0), size, np.int32(1), runs, np.int64(1), np.int32(1))
    lanes = max(1, group // 32)
    blocks = n // group * lanes // 256
    kernel((blocks,), (256,), (x, packed, scales, zeros, np.zeros(7, np.uint64), *sizes))
    return round(kernel.executed.total() / n, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine instructions per weight of the kernels' hot loops")
    parser.add_argument("--out", type=Path, help="folder for sass.json")
    out = parser.parse_args().out
    kernels: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        counts = {f"sm_{arch}": count(variant, arch) for arch in ARCHS}
        kernels[name] = {"kernel": str(variant), "sass_per_weight": counts}
        if variant.defines.get("GROUP", "0") != "0":
            kernels[name]["ptx_executed_per_weight"] = {f"sm_{arch}": executed(variant, arch) for arch in (75, 90)}
        print(f"{name:32}", *(f"{arch} {c['instructions']:5.2f}" for arch, c in counts.items()), flush=True)
    if out:
        write(out / "sass.json", {"method": "benchmarks/sass.py", "nvrtc": nvrtc.version(), "kernels": kernels})


if __name__ == "__main__":
    main()
