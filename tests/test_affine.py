"""Family affine: the reference against lines of its own and MLX's formula, the backends against the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import get_backend
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.errors import SchemeError
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import BITS, Scheme

from .affine_cases import CONTENTS, SCHEMES, SHAPES, check_counts, make
from .bitwise import assert_bitwise_equal
from .grid_cases import check_cases, sample


def by_one(x: np.ndarray, bits: int) -> tuple[list[int], float, float]:
    """Codes, scale and bias of one group, weight by weight."""
    f = np.float32
    w, n = [f(v) for v in x], f(2**bits - 1)
    lo, hi = min(w), max(w)
    step = max((hi - lo) / n, f(1e-7))
    if abs(lo) > abs(hi):
        edge = lo
    else:
        edge, step = hi, -step
    k = f(np.rint(edge / step))
    scale, bias = (edge / k, edge) if k != 0 else (step, f(0))
    return [int(min(max(np.rint((v - bias) / scale), 0), n)) for v in w], float(scale), float(bias)


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_weight_by_weight(bits: int) -> None:
    scheme = Scheme(bits, "group", 32, False, "float32", "affine")
    for content in ("normal", "ties", "one_hot", "zeros", "positive", "negative"):
        x = make(content, (2, 77), "float32")
        packed, scales, biases, findings = reference.quantize(x, scheme)
        codes = reference.unpack(packed, bits, 77)
        assert findings == Findings()
        for row, group in itertools.product(range(2), range(3)):
            part = slice(group * 32, min(77, group * 32 + 32))
            want = by_one(x[row, part], bits)
            got = codes[row, part].tolist(), float(scales[row, group]), float(biases[row, group])
            assert got == want, content


def test_the_cpu_backend() -> None:
    backend = get_backend("cpu", 2)
    assert check_cases(backend, sample(SCHEMES, SHAPES, CONTENTS, 1500, seed=1), make) == 1500
    check_counts(backend, ["affine4_g32"])


def test_overflows_are_counted() -> None:
    x = np.zeros((2, 64), np.float32)
    x[1, 3], x[1, 4] = 3e38, -3e38
    assert reference.quantize(x, Scheme.parse("affine4_g32"))[3] == Findings(n_overflow=1, first_overflow=2)


def test_only_the_groups_of_mlx_exist() -> None:
    for text in ("affine4_g16", "affine4_channel", "affine4_g64_asym", "affine7_g64"):
        with pytest.raises(SchemeError):
            Scheme.parse(text)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_words_scales_and_biases_are_those_of_mlx(dtype: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    shape = (256, 512)
    for bits, group, content in itertools.product(
        BITS, (32, 64, 128), ("normal", "ties", "zeros", "positive", "one_hot")
    ):
        x = make(content, shape, dtype)
        packed, scales, biases, _ = reference.quantize(x, Scheme(bits, "group", group, False, dtype, "affine"))
        weights = mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))
        words, *rest = mx.quantize(weights, group_size=group, bits=bits)
        assert_bitwise_equal(packed, np.array(words).view(np.uint8), f"words {bits} {group} {content}")
        for ours, theirs in zip((scales, biases), rest, strict=True):
            assert_bitwise_equal(ours.astype(np.float32) + 0, np.array(theirs.astype(mx.float32)) + 0, content)
