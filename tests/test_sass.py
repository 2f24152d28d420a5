"""The instruction counter of benchmarks/sass.py: on a listing of known answer, and what keeps it honest."""

from __future__ import annotations

from typing import Any

import pytest

from arrowquant_gpu.backends import nvrtc
from benchmarks import sass
from benchmarks.sass import Program, measure, pipes, sass_bytes

# A loop over a group: a wide load or single ones, the arithmetic, a call that ordinary weights never make, a loop of
# stores in two copies, a store that a predicate chooses, and the jump back.
LISTING = """\
//## File ".nv_debug_ptx_txt", line 1
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_0:
//## File ".nv_debug_ptx_txt", line 2
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
//## File ".nv_debug_ptx_txt", line 3
        /*0030*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
//## File ".nv_debug_ptx_txt", line 4
        /*0050*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;
        /*0060*/                   LDG.E.U16.CONSTANT R5, [R2.64+0x2] ;
.L_x_2:
//## File ".nv_debug_ptx_txt", line 5
        /*0070*/                   FFMA R6, R4, R5, R6 ;
        /*0080*/              @!P1 BRA `(.L_x_3) ;
        /*0090*/                   CALL.REL.NOINC `(slow) ;
        /*0094*/                   MOV R6, R7 ;
.L_x_3:
//## File ".nv_debug_ptx_txt", line 1
        /*00a0*/                   MOV R9, 0x4 ;
//## File ".nv_debug_ptx_txt", line 6
        /*00b0*/                   STG.E.U8 [R2.64], R6 ;
//## File ".nv_debug_ptx_txt", line 1
        /*00c0*/                   MOV R9, 0x4 ;
//## File ".nv_debug_ptx_txt", line 6
        /*00d0*/               @P3 BRA `(.L_x_3) ;
        /*00e0*/                   STG.E.U8 [R2.64+0x1], R6 ;
//## File ".nv_debug_ptx_txt", line 7
        /*00f0*/               @P4 STG.E [R2.64], R6 ;
//## File ".nv_debug_ptx_txt", line 8
        /*0100*/                   NOP ;
        /*0110*/               @P5 BRA `(.L_x_0) ;
        /*0114*/                   BRA.DIV ~URZ, `(.L_x_5) ;
        /*0118*/               @P6 CALL.REL.NOINC `(.L_x_4) ;
        /*011c*/                   EXIT ;
.L_x_4:
        /*0120*/                   EXIT ;
.L_x_5:
        /*0124*/                   SHFL.BFLY PT, R0, R6, 0x4, 0x1f ;
        /*0128*/                   EXIT ;
slow:
//## File ".nv_debug_ptx_txt", line 5
        /*0130*/                   FFMA R6, R4, R5, R6 ;
        /*0140*/                   RET.REL.NODEC R2 ;
"""
EXECUTED = {1: 1.0, 2: 10.0, 3: 8.0, 4: 2.0, 5: 10.0, 6: 40.0, 7: 3.0, 8: 10.0}


def test_a_block_runs_as_often_as_its_lines() -> None:
    counts: dict[str, list[float]] = {}
    for instruction, runs, _ in Program(LISTING).runs(EXECUTED):
        counts.setdefault(instruction.opcode, []).append(runs)
    assert counts == {
        "S2R": [1.0],
        "IADD3": [10.0],
        "BRA": [10.0, 8.0, 10.0, 20.0, 20.0],
        "LDG.E.128.CONSTANT": [8.0],
        "LDG.E.U16.CONSTANT": [1.0, 1.0],  # two of one line are copies
        "FFMA": [10.0],
        "MOV": [20.0, 20.0],  # most of its block ran less often by their lines, but not the store
        "STG.E.U8": [20.0, 20.0],  # two copies of a loop share its executions
        "STG.E": [20.0],
        "NOP": [20.0],
        "BRA.DIV": [10.0],
        "CALL.REL.NOINC": [10.0],  # of a label: a jump
        "EXIT": [10.0, 10.0],
    }


def test_bytes_are_those_of_predicates_that_hold() -> None:
    assert sass_bytes(Program(LISTING).runs(EXECUTED)) == 8 * 16 + 2 * 2 + 40 + 3 * 4


def test_what_ordinary_weights_never_reach() -> None:
    """The slow path of a division, what follows its call, and the shuffle of a warp that has parted."""
    program = Program(LISTING)
    ordinary = [i.text for b in program.ordinary for i in program.blocks[b]]
    left_out = {i.text for block in program.blocks for i in block} - set(ordinary)
    assert left_out == {
        "CALL.REL.NOINC `(slow)",
        "MOV R6, R7",
        "SHFL.BFLY PT, R0, R6, 0x4, 0x1f",
        "RET.REL.NODEC R2",
    }
    assert sum(text.startswith("FFMA") for text in ordinary) == 1


def test_every_opcode_is_of_one_pipe() -> None:
    found = pipes({"FFMA.FTZ": 2.0, "IADD3.X": 1.5, "LDG.E.128": 1.0, "MUFU.RCP": 0.5, "BRA": 1.0, "UNKNOWN": 4.0})
    assert found == {"fma": 2.0, "alu": 1.5, "memory": 1.0, "conversion": 0.5, "control": 1.0, "other": 4.0}


@pytest.mark.nvrtc
@pytest.mark.parametrize(("scheme", "most"), [("int4_g128", 20), ("int4_g128_asym", 20), ("q4_0", 20), ("nvfp4", 46)])
@pytest.mark.parametrize("arch", [75, 90])
def test_ordinary_weights_are_plain(scheme: str, most: int, arch: int) -> None:
    """Groups on the slow path would be right, and several times as long; the result alone does not show them."""
    found = measure(scheme, "bfloat16", arch)[f"bfloat16 -> {scheme}"]
    counts = found[f"sm_{arch}"]
    assert counts["ptx_executed"] < most
    assert counts["sass_executed"] < most
    assert counts["global_bytes"]["sass"] == counts["global_bytes"]["ptx"] < 1.2 * found["bytes_per_weight"]


@pytest.mark.nvrtc
def test_a_count_that_moves_other_bytes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = sass.disassemble

    def without_stores(cubin: bytes, *options: str) -> str:
        return listing(cubin, *options).replace("STG.E.128", "MOV")

    monkeypatch.setattr(sass, "disassemble", without_stores)
    counts = measure("int4_g128", "bfloat16", 90)["int4_g128 -> bfloat16"]["sm_90"]
    assert counts["sass_executed"] is None
    assert counts["ptx_executed"] > 0


@pytest.mark.nvrtc
def test_lines_must_not_change_the_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = nvrtc.compile_source

    def as_if_optimized_less(source: str, defines: Any, arch: int) -> nvrtc.Compiled:
        with_lines = "-lineinfo" in nvrtc.FLAGS
        return compiled(source, {**defines, **({} if with_lines else {"OUT_T": "float"})}, arch)

    monkeypatch.setattr(nvrtc, "compile_source", as_if_optimized_less)
    with pytest.raises(SystemExit, match="changed the machine code"):
        measure("bf16", "bfloat16", 90)
