"""Quantized tensors of every kind for the tests of how they travel, and their comparison."""

from __future__ import annotations

import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.schemes import Scheme, rows_and_length
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .cases import SCHEMES, make

SHAPES = ((), (5,), (3, 40), (2, 3, 17), (0, 8), (3, 0))
EVERY_KIND = [s for i, s in enumerate(SCHEMES) if i % 7 == 0]


def quantized(scheme: str | Scheme = "int4_g16_asym", shape: tuple[int, ...] = (3, 40)) -> QuantizedTensor:
    scheme = Scheme.parse(scheme)
    x = make("normal", rows_and_length(shape), "float32")
    packed, scales, zeros, _ = reference.quantize(x, scheme)
    return QuantizedTensor(packed, scales, zeros, shape, scheme, "float16")


def arrays(q: QuantizedTensor) -> dict[str, np.ndarray]:
    named = {"data": q.packed, "scales": q.scales, "zero_points": q.zeros}
    return {k: v for k, v in named.items() if v is not None}


def check_equal(got: QuantizedTensor, want: QuantizedTensor) -> None:
    assert (got.shape, got.scheme, got.dtype) == (want.shape, want.scheme, want.dtype)
    assert (got.zeros is None) == (want.zeros is None)
    for name, a in arrays(want).items():
        assert_bitwise_equal(arrays(got)[name], a, name)
