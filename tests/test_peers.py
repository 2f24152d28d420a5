"""Scales and codes against compressed-tensors' own min-max quantizer: all equal, where both define them."""

from __future__ import annotations

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.reference import Findings, integers
from arrowquant_gpu.schemes import Scheme

from .cases import make

pytestmark = pytest.mark.interop

SCHEMES = [
    f"int{bits}_{grain}{asym}"
    for bits in (2, 3, 4, 5, 6, 8)
    for grain in ("g32", "g128", "channel")
    for asym in ("", "_asym")
]
# What the two do not both define: a group of zeros, a scale that underflows, a span that overflows.
CONTENTS = ("normal", "ties", "positive", "negative", "one_hot", "wild")


def peer(x: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scales, stored zero points, stored codes) by compressed-tensors, run in float32."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    weight = torch.from_numpy(x)
    groups = weight.reshape(x.shape[0], -1, scheme.group_length(x.shape[1]))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(weight, scales, zeros, args)
    return scales.numpy(), zeros.int().numpy() + scheme.offset, codes.int().numpy() + scheme.offset


def comparable(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Per group: whether it is neither all zero, nor has a scale below the smallest normal, nor an infinite span."""
    lo, hi = reference.group_range(x, scheme)
    span = (hi.astype(np.float64) - lo) if not scheme.symmetric else 2 * np.maximum(-lo.astype(np.float64), hi)
    return (span / scheme.n_levels >= 2.0**-126) & (np.abs(span) <= float(np.finfo(np.float32).max))


def check_equal(x: np.ndarray, scheme: Scheme) -> int:
    """Compare one tensor; returns how many weights were compared."""
    packed, scales, zeros, findings = reference.quantize(x, scheme)
    assert findings == Findings()
    codes = reference.unpack(packed, scheme.bits, x.shape[1])
    want_scales, want_zeros, want_codes = peer(x, scheme)
    ok = comparable(x, scheme)
    np.testing.assert_array_equal(scales[ok], want_scales[ok])
    if zeros is not None:
        np.testing.assert_array_equal(zeros[ok], want_zeros[ok])
    each = reference.spread(ok, x.shape, scheme)
    np.testing.assert_array_equal(codes[each], want_codes[each])
    return int(each.sum())


@pytest.mark.parametrize("scheme", [Scheme.parse(s) for s in SCHEMES], ids=str)
def test_codes_equal_compressed_tensors(scheme: Scheme) -> None:
    compared = sum(check_equal(make(content, (64, 1024), "float32"), scheme) for content in CONTENTS)
    assert compared > 4 * 64 * 1024


@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g128_asym", "int8_g128_asym", "int8_channel"])
def test_codes_equal_compressed_tensors_on_sixteen_million_weights(scheme: str) -> None:
    """Enough weights that an unsigned zero point, whose ties fall otherwise in 1 of 10^6, is caught."""
    x = make("normal", (4096, 4096), "float32")
    assert check_equal(x, Scheme.parse(scheme)) == x.size


@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g128_asym", "int8_channel"])
def test_bfloat16_weights_equal_compressed_tensors_run_in_float32(scheme: str) -> None:
    x = make("normal", (256, 2048), "bfloat16")
    assert check_equal(x.astype(np.float32), Scheme.parse(scheme)) == x.size


def test_the_comparison_fails_on_one_changed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("normal", (4, 256), "float32")
    original = integers.pack
    monkeypatch.setattr(
        integers, "pack", lambda codes, bits: original(codes ^ (np.arange(codes.size) == 7).reshape(codes.shape), bits)
    )
    with pytest.raises(AssertionError):
        check_equal(x, Scheme.parse("int4_g128"))
