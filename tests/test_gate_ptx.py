"""The PTX simulator against NumPy, exact fractions and the shim, and on planted faults; the lint on planted text.

The tests on hand-written PTX need nothing; those on compiled kernels need NVRTC.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from .bitwise import assert_bitwise_equal
from .gpuless.errors import KernelFault
from .gpuless.lint import lint
from .gpuless.ptx import PtxModule
from .gpuless.ptx_floats import fma
from .gpuless.sources import random_words
from .scalar_oracle import round_to

F32, U32 = np.float32, np.uint32

ENTRY = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 .ptr .align 1 a, .param .u64 .ptr .align 1 b, .param .u64 .ptr .align 1 y)
.maxntid 256
{
    .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %d<16>;
    ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; ld.param.u64 %d3, [y];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %d4, %r1, 4;
    add.s64 %d5, %d1, %d4; add.s64 %d6, %d2, %d4; add.s64 %d7, %d3, %d4;
    ld.global.u32 %r2, [%d5];
    ld.global.u32 %r3, [%d6];
    mov.b32 %f2, %r2; mov.b32 %f3, %r3;
    BODY
    st.global.u32 [%d7], %r4;
    ret;
}
"""
NAN = 0x7FFFFFFF
MINUS_ZERO = 0x80000000


def run(body: str, a: list[int] | np.ndarray, b: list[int] | np.ndarray | None = None) -> list[int]:
    """What the instructions leave in %r4, from a in %r2 and %f2 and b in %r3 and %f3, one thread per element."""
    words = np.array(a, U32)
    others = words if b is None else np.array(b, U32)
    y = np.zeros(words.size, U32)
    PtxModule(ENTRY.replace("BODY", body)).get_function("kernel")((1,), (words.size,), (words, others, y))
    return y.tolist()


def bits(*values: float) -> list[int]:
    return np.array(values, F32).view(U32).tolist()


@pytest.mark.parametrize(
    ("instruction", "a", "b", "want"),
    [
        ("min.f32", [0, MINUS_ZERO, 0x7FC00000, 0x7FC00000], [MINUS_ZERO, 0, *bits(1), 0xFFC00000], "-0 -0 1 nan"),
        ("max.f32", [0, MINUS_ZERO, 0x7FC00000, 0x7FC00000], [MINUS_ZERO, 0, *bits(1), 0xFFC00000], "0 0 1 nan"),
        ("max.NaN.f32", [0x7FC00000, *bits(2)], bits(1, 1), "nan 2"),
        ("min.ftz.f32", [1, *bits(1)], [*bits(1, 2)], "0 1"),
        ("div.rn.f32", bits(1, 0, 1), bits(3, 0, 0), [*bits(1 / 3), NAN, 0x7F800000]),
        ("mul.rn.f32", bits(2.0**-126), bits(0.5), [1 << 22]),
        ("mul.rn.ftz.f32", bits(2.0**-126), bits(0.5), [0]),
        ("add.rn.f32", [0x7F800000, 0x7F800001], [0xFF800000, 0], [NAN, NAN]),
    ],
)
def test_float_instructions(instruction: str, a: list[int], b: list[int], want: str | list[int]) -> None:
    words = {"nan": NAN, "-0": MINUS_ZERO}
    expected = want if isinstance(want, list) else [words.get(w, bits(float(w))[0]) for w in want.split()]
    assert run(f"{instruction} %f4, %f2, %f3; mov.b32 %r4, %f4;", a, b) == expected


@pytest.mark.parametrize(
    ("body", "a", "b", "want"),
    [
        ("shl.b32 %r4, %r2, %r3;", [1, 1, 1], [4, 31, 32], [16, 1 << 31, 0]),
        ("shr.s32 %r4, %r2, %r3;", [1 << 31, 1 << 31, 8], [31, 99, 40], [0xFFFFFFFF, 0xFFFFFFFF, 0]),
        ("prmt.b32 %r4, %r2, %r3, 0x7531;", [0x44332211], [0x88776655], [0x88664422]),
        ("prmt.b32 %r4, %r2, %r3, 0x00f9;", [0x00008001], [0x80000000], [0x0101FFFF]),
        ("bfe.u32 %r4, %r2, 8, 12;", [0xABCDEF12], None, [0xDEF]),
        ("bfe.u32 %r4, %r2, 28, 12;", [0xABCDEF12], None, [0xA]),
        ("bfi.b32 %r4, %r2, %r3, 4, 8;", [0xFFF], [0x12345678], [0x12345FF8]),
        ("bfi.b32 %r4, %r2, %r3, 0, 32;", [0xFFF], [0x12345678], [0xFFF]),
        ("lop3.b32 %r4, %r2, %r3, 255, 0x96;", [0xF0F0], [0xFF], [0xF0F0 ^ 0xFF ^ 255]),
        ("shf.l.wrap.b32 %r4, %r2, %r3, 8;", [0xAABBCCDD], [0x11223344], [0x223344AA]),
        ("shf.r.clamp.b32 %r4, %r2, %r3, 40;", [0xAABBCCDD], [0x11223344], [0x11223344]),
        ("mul.hi.s32 %r4, %r2, %r3;", [0xFFFFFFFF], [3], [0xFFFFFFFF]),
        ("div.s32 %r4, %r2, %r3;", [0xFFFFFFF9, 0x80000000], [2, 2], [0xFFFFFFFD, 0xC0000000]),
        ("rem.s32 %r4, %r2, %r3;", [0xFFFFFFF9], [2], [0xFFFFFFFF]),
        ("max.relu.s32 %r4, %r2, %r3;", [0xFFFFFFF9, 5], [0xFFFFFFFE, 3], [0, 5]),
        ("max.s16x2 %r4, %r2, %r3;", [0x80010001], [0x00020003], [0x00020003]),
        ("max.u16x2 %r4, %r2, %r3;", [0x80010001], [0x00020003], [0x80010003]),
        ("bfind.u32 %r4, %r2;", [0, 1, 0x00F0], None, [0xFFFFFFFF, 0, 7]),
        ("cvt.rni.s32.f32 %r4, %f2;", [*bits(2.5, -1.5, 3e9, -3e9), NAN], None, [2, 2**32 - 2, 2**31 - 1, 2**31, 0]),
        ("cvt.rn.bf16x2.f32 %r4, %f2, %f3;", bits(1.0), bits(-2.0), [0x3F80C000]),
        ("cvt.rn.f16.f32 %h1, %f2; cvt.u32.u16 %r4, %h1;", bits(65520, 1e-8, 3e-8), None, [0x7C00, 0, 1]),
        ("cvt.s32.s8 %r4, %r2;", [0x1FF], None, [0xFFFFFFFF]),
        ("setp.gtu.f32 %p1, %f2, %f3; selp.b32 %r4, 7, 9, %p1;", [NAN, *bits(1)], bits(1, 2), [7, 9]),
        ("setp.gt.f32 %p1, %f2, %f3; selp.b32 %r4, 7, 9, %p1;", [NAN, *bits(3)], bits(1, 2), [9, 7]),
        ("set.nan.f32.f32 %r4, %f2, %f3;", [NAN, 0], [0, 0], bits(1, 0)),
        ("{.reg .b16 lo,hi; mov.b32 {lo,hi}, %r2; mov.b32 %r4, {hi,lo};}", [0x11223344], None, [0x33441122]),
        ("mov.b32 %r4, 0f3F800000;", [0], None, bits(1)),
        ("mad.wide.u32 %d9, %r2, %r3, %d4; cvt.u32.u64 %r4, %d9;", [3], [5], [15]),
        ("mov.u32 %r4, 0; bra.uni $L; add.s32 %r4, %r4, 9; $L: add.s32 %r4, %r4, 1;", [0], None, [1]),
        ("vote.sync.ballot.b32 %r4, %p2, -1;", [5], None, "%p2 is read before"),
        ("setp.lt.u32 %p2, %r2, 6; vote.sync.ballot.b32 %r4, !%p2, -1;", [5, 6, 7], None, [6, 6, 6]),
        ("vote.sync.ballot.b32 %r4, %p2, 6;", [5], None, "not in its mask"),
        ("redux.sync.max.s32 %r4, %r2, -1;", [5, 2**32 - 7, 3], None, [5, 5, 5]),
    ],
)  # fmt: skip
def test_integer_instructions(body: str, a: list[int], b: list[int] | None, want: list[int] | str) -> None:
    if isinstance(want, str):
        with pytest.raises(KernelFault, match=want):
            run(body, a, b)
    else:
        assert run(body, a, b) == want


def test_the_high_half_of_64_bit_products() -> None:
    values = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    from .gpuless.ptx_integers import product

    high = product(frozenset({"hi"}))
    assert high is not None
    a, b = (m.ravel() for m in np.meshgrid(np.array(values, np.uint64), np.array(values, np.uint64)))
    with np.errstate(over="ignore"):
        assert high(a, b).tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
        signed = [int(x) * int(y) >> 64 for x, y in zip(a.view(np.int64), b.view(np.int64), strict=True)]
        assert high(a.view(np.int64), b.view(np.int64)).tolist() == signed


def test_fma_rounds_once() -> None:
    """Against exact fractions, near ties, cancellation and subnormals."""
    rng = np.random.default_rng(3)
    a = (rng.integers(1 << 23, 1 << 24, 2000) * rng.choice([2.0**-20, 2.0**-80, 1.0], 2000)).astype(F32)
    b = (rng.integers(1 << 23, 1 << 24, 2000) * rng.choice([2.0**-24, 2.0**-90], 2000)).astype(F32)
    c = np.where(rng.random(2000) < 0.7, -a * b, rng.standard_normal(2000).astype(F32)).astype(F32)
    got = fma(a, b, c)
    for x, y, z, w in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert Fraction(float(w)) == round_to(exact, "float32")
    assert (got != a * b + c).sum() > 1000


BRANCHES = """
    and.b32 %r5, %r2, 1;
    setp.eq.s32 %p1, %r5, 0;
    mov.u32 %r4, 0;
    @%p1 bra $EVEN;
    mov.u32 %r6, %r2;
$LOOP: add.s32 %r4, %r4, %r6; sub.s32 %r6, %r6, 1; setp.gt.s32 %p2, %r6, 0; @%p2 bra $LOOP;
    bra.uni $JOIN;
$EVEN: mul.lo.s32 %r4, %r2, 1000;
$JOIN: shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1;
"""


def test_branches_join_before_a_shuffle() -> None:
    want = [n * (n + 1) // 2 if n % 2 else 1000 * n for n in range(64)]
    got = run(BRANCHES, np.arange(64))
    assert got == [want[n ^ 1] for n in range(64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ex2.approx.f32 %f4, %f2;", "not modelled: ex2.approx.f32"),
        ("div.full.f32 %f4, %f2, %f3;", "not modelled: div.full.f32"),
        ("add.rz.f32 %f4, %f2, %f3;", "not modelled: add.rz.f32"),
        ("ld.local.u32 %r4, [%d5];", "not modelled: ld.local"),
        ("ld.global.u32 %r4, [%d5+128];", "out of bounds: byte 256 of 128"),
        ("ld.global.u32 %r4, [%d5+-4];", "out of bounds|wild pointer"),
        ("ld.global.u16 %r4, [%d5+1];", "misaligned access of 2 bytes"),
        ("ld.global.v2.u32 {%r4,%r5}, [%d5];", "misaligned access of 8 bytes"),
        ("st.global.u32 [%d3], %r2;", "two threads write one address"),
        ("st.global.u32 [%d7], %r2; ld.global.u32 %r4, [%d3];", "reads what another thread wrote"),
        ("div.u32 %r4, %r2, 0;", "integer division by zero"),
        ("mov.u32 %r4, %clock;", "%clock is read before"),
        ("mov.u64 %d8, 64; ld.global.u32 %r4, [%d8];", "wild pointer"),
        ("mov.u32 %r4, 0; setp.eq.s32 %p1, %r2, 0; @%p1 bar.sync 0; @!%p1 bar.sync 0;", "divergent barrier"),
        ("mov.u32 %r4, 0; setp.eq.s32 %p1, %r2, 0; @%p1 bar.warp.sync -1; @!%p1 bar.sync 0;", "deadlock"),
        ("$L: bar.sync 0; bar.sync 0; .maxnreg 32;", "is not modelled"),
    ],
)  # fmt: skip
def test_faults_are_reported(body: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        run(body, np.arange(32))


def test_a_block_beyond_its_launch_bounds_is_refused() -> None:
    with pytest.raises(KernelFault, match="blocks of 512 threads, compiled for at most 256"):
        run("", np.arange(512))


def test_issued_instructions_are_counted() -> None:
    """Once for a warp that comes to them, however many of its threads take part."""
    x, y = np.arange(64, dtype=U32), np.zeros(64, U32)
    kernel = PtxModule(ENTRY.replace("BODY", "mov.u32 %r4, 1; setp.lt.u32 %p1, %r2, 10; @%p1 popc.b32 %r4, %r2;"))
    function = kernel.get_function("kernel")
    function((1,), (64,), (x, x, y))
    counts: Counter[str] = Counter()
    for number, warps in function.issued.items():
        counts[function.entry.instructions[number].opcode[0]] += warps
    assert (counts["popc"], counts["setp"], counts["ld"]) == (2, 2, 5 * 2)


RESIDUAL = "mul.rn.f32 %f4, %f2, %f3; neg.f32 %f5, %f4; fma.rn.f32 %f6, %f5, %f7, %f2;"
LISTED = {"kernel": ("fma(neg(mul(x, r)), s, x)", "fma(fma(neg(mul(x, r)), s, x), r, mul(x, r))")}


def test_the_lint_takes_the_listed_sequence() -> None:
    text = ENTRY.replace("BODY", RESIDUAL + "fma.rn.f32 %f1, %f6, %f3, %f4;")
    assert lint(text, LISTED) == {"kernel": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("fma.rn.f32 %f4, %f2, %f3, %f2;", "not listed"),
        (RESIDUAL.replace("%f7, %f2;", "%f7, %f3;"), "not listed"),  # x is not the x of the product
        (RESIDUAL + "fma.rn.f32 %f1, %f6, %f7, %f4;", "not listed"),  # corrected by another factor
        (RESIDUAL.replace("neg", "abs"), "not listed"),
        (RESIDUAL.replace("neg.f32", "@%p1 neg.f32"), "not listed"),
        ("add.f32 %f4, %f2, %f3;", "add without .rn"),
        ("mul.rn.ftz.f32 %f4, %f2, %f3;", ".ftz is not exact"),
        ("div.approx.f32 %f4, %f2, %f3;", ".approx is not exact"),
        ("div.full.f32 %f4, %f2, %f3;", ".full is not exact"),
        ("sqrt.f32 %f4, %f2;", "sqrt without .rn"),
        ("mad.rn.f32 %f4, %f2, %f3, %f2;", "in disguise"),
        ("add.rn.f64 %d9, %d8, %d8;", "float64"),
    ],
)
def test_the_lint_refuses(body: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        lint(ENTRY.replace("BODY", body), LISTED)


def test_a_listed_sequence_is_listed_for_its_entry_only() -> None:
    with pytest.raises(KernelFault, match="not listed"):
        lint(ENTRY.replace("BODY", RESIDUAL), {"another": LISTED["kernel"]})


def test_random_words_hold_every_special_value() -> None:
    words = random_words(4096, seed=0)
    assert np.isnan(words.view(F32)).any()
    assert {0, MINUS_ZERO, 0x7F800000, 1} <= set(words.tolist())
    assert_bitwise_equal(words, random_words(4096, seed=0))
