"""Host weights through the CUDA backend by `ops`: the pass over the range, what is given, and what comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import ops
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .cases import make
from .gpuless.loaders import ShimLoader
from .gpuless.stand_in import backend_over

pytestmark = pytest.mark.compiler


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4_local", "e4m3_tensor", "e4m3_b128", "affine4_g64", "q4_0", "q6_k"])
def test_host_weights_come_back_as_the_reference_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 130 * 256 * 2)  # several blocks of rows
    scheme, x = Scheme.parse(text), make("normal", (300, 256), "bfloat16")
    want = ops.quantize(x, scheme, device="reference")
    packed, scales = np.empty_like(want.packed), np.empty_like(want.scales)
    zeros = None if want.zeros is None else np.empty_like(want.zeros)
    ops.quantize_blocks([x], scheme, packed, scales, zeros, backend=backend, name="w", shape=x.shape)
    assert_bitwise_equal(packed, want.packed, "packed")
    assert_bitwise_equal(scales, want.scales, "scales")
    if zeros is not None:
        assert_bitwise_equal(zeros, want.zeros, "zeros")
    out = np.empty(x.shape, DTYPES["bfloat16"].numpy)
    ops.dequantize_rows(packed, scales, zeros, scheme, out, backend=backend)
    assert_bitwise_equal(out, ops.dequantize(want, "bfloat16", device="reference"), "decoded")
