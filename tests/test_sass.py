"""The instruction counter of benchmarks/sass.py on a listing of known answer, and the counts it stands beside."""

from __future__ import annotations

import pytest

from arrowquant_gpu.backends import variants
from benchmarks.sass import Program, executed, hot_loops

# A loop over a group: a wide load or single ones, the arithmetic, a call that ordinary weights never make, byte stores
# that loop or one wide store, and the jump back.
LISTING = """\
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;
        /*0060*/                   LDG.E.U16.CONSTANT R5, [R2.64+0x2] ;
.L_x_2:
        /*0070*/                   FFMA R6, R4, R5, R6 ;
        /*0080*/              @!P1 BRA `(.L_x_3) ;
        /*0090*/                   CALL.REL.NOINC `(slow) ;
        /*00a0*/                   FFMA R6, R6, R6, R6 ;
.L_x_3:
        /*00b0*/               @P2 BRA `(.L_x_5) ;
.L_x_4:
        /*00c0*/                   STG.E.U8 [R2.64], R6 ;
        /*00d0*/               @P3 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_6) ;
.L_x_5:
        /*00f0*/                   STG.E [R2.64], R6 ;
.L_x_6:
        /*0100*/                   NOP ;
        /*0110*/               @P4 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
"""
HOT = ["IADD3", "BRA", "LDG.E.128.CONSTANT", "BRA", "FFMA", "BRA", "BRA", "STG.E", "BRA"]
VARIANT = variants.quantize(4, True, "bfloat16", 128)


def test_the_way_of_ordinary_weights_is_counted() -> None:
    ((weights, way),) = hot_loops(VARIANT, LISTING)
    assert weights == 8
    assert list(way.opcodes) == HOT


def test_the_loops_are_found() -> None:
    program = Program(LISTING)
    assert [len(body) for _, body in program.loops(set(range(len(program.blocks))))] == [11, 1]


def test_a_kernel_without_wide_accesses_has_no_count() -> None:
    with pytest.raises(SystemExit, match="16-byte"):
        hot_loops(VARIANT, LISTING.replace("LDG.E.128.CONSTANT", "LDG.E.U16.CONSTANT"))


@pytest.mark.nvrtc
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("arch", [75, 90])
def test_ordinary_weights_are_plain(symmetric: bool, arch: int) -> None:
    """Groups on the slow path would be right, and several times as long; the result alone does not show them."""
    assert executed(variants.quantize(4, symmetric, "bfloat16", 128), arch) < 20
