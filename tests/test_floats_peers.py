"""Family float against the encoders it is defined by: bitsandbytes, torch, compressed-tensors and MLX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.reference import Findings, floats
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .float_cases import make

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

F32 = np.float32
# Without what the peers do not define: groups below their smallest scale, and beyond their largest.
CONTENTS = ("normal", "ties", "steps", "powers", "one_hot", "zeros", "negative_zero", "positive", "negative")


def quantized(x: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray, Any]:
    packed, scales, zeros, findings = reference.quantize(x, Scheme.parse(text))
    assert findings == Findings()
    return packed, scales, zeros


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_codes_absmax_and_values_are_those_of_bitsandbytes(grid: str, dtype: str) -> None:
    import bitsandbytes.functional as bnb
    import torch

    assert_bitwise_equal(floats.VALUES[grid], bnb.get_4bit_type(grid, device="cpu").numpy(), "values")
    for size in (32, 64, 1024):
        for content in (*CONTENTS, "midpoints", "scaled_midpoints", "ranges", "subnormal", "wild"):
            for shape in ((64, 1024), (1, 64 * 32 + 40)):
                x = make(content, shape, dtype)
                packed, scales, _ = quantized(x, f"{grid}_g{size}")
                weight = torch.from_numpy(x.astype(F32)).to(getattr(torch, dtype))
                words, state = bnb.quantize_4bit(weight, blocksize=size, quant_type=grid)
                swapped = words.numpy().reshape(packed.shape)  # there, the even code is in the high half
                what = f"{size} {content} {shape}"
                assert_bitwise_equal(packed, (swapped << 4 | swapped >> 4).astype(np.uint8), what)
                assert_bitwise_equal(scales.reshape(-1), state.absmax.numpy(), what)
                if dtype == "float32" and content not in ("wild", "ranges"):
                    decoded = reference.dequantize(packed, scales, None, Scheme.parse(f"{grid}_g{size}"), shape[1])
                    got = bnb.dequantize_4bit(words, state).numpy().reshape(shape)
                    assert_bitwise_equal(decoded + F32(0), got + F32(0), f"decoded {what}")


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_codes_are_those_of_a_torch_cast(grid: str) -> None:
    import torch

    values = floats.VALUES[grid]
    steps = np.unique(values[np.isfinite(values)])
    middles = (steps[:-1] + steps[1:]) / F32(2)
    any_bits = np.random.default_rng(2).integers(0, 1 << 32, 500_000, dtype=np.uint32).view(F32)
    bound = F32(floats.LARGEST[grid])
    x = np.concatenate([steps, middles, np.nextafter(middles, bound), np.nextafter(middles, -bound), any_bits])
    x = np.clip(x[np.isfinite(x)], -bound, bound)
    cast = torch.from_numpy(x).to(getattr(torch, "float8_e4m3fn" if grid == "e4m3" else "float8_e5m2"))
    assert_bitwise_equal(floats.small_codes(x, grid), cast.view(torch.uint8).numpy(), grid)


def _extremes(weight: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Lowest and highest weight of each group, in the shape that compressed-tensors wants."""
    import torch

    rows, length = weight.shape
    if scheme.granularity == "tensor":
        return weight.min(), weight.max()
    if scheme.granularity == "block":
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % 128)).reshape(-1, 128, length // 128, 128)
        return padded.amin((1, 3)), padded.amax((1, 3))
    groups = weight.reshape(rows, -1, scheme.group_length(length))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("text", ["e4m3_tensor", "e4m3_channel", "e4m3_g64", "e4m3_b128", "mxfp8_round"])
def test_8_bits_are_those_of_compressed_tensors(text: str) -> None:
    import torch
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = Scheme.parse(text)
    is_mx = scheme.scale_dtype == "e8m0"
    fields: dict[str, Any] = {"group_size": scheme.group_size} if scheme.granularity == "group" else {}
    fields |= {"block_structure": [128, 128]} if scheme.granularity == "block" else {}
    fields |= {"scale_dtype": torch.uint8} if is_mx else {}
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=scheme.granularity, **fields)
    for content in CONTENTS:
        x = make(content, (300, 512), "float32")
        packed, scales, _ = quantized(x, text)
        weight = torch.from_numpy(x)
        theirs, _ = calculate_qparams(*_extremes(weight, scheme), args)
        codes = quantize(weight, theirs, None, args, dtype=torch.float8_e4m3fn)
        stored = compress_mx_scale(theirs, torch.uint8) if is_mx else theirs
        assert_bitwise_equal(scales, stored.numpy().reshape(scales.shape), f"scales {content}")
        assert_bitwise_equal(packed, codes.view(torch.uint8).numpy(), f"codes {content}")
        decoded = dequantize(codes, theirs, None, args, dtype=torch.float32).numpy()
        assert_bitwise_equal(reference.dequantize(packed, scales, None, scheme, 512), decoded, f"decoded {content}")


@pytest.mark.parametrize("text", ["mxfp4_round", "nvfp4"])
def test_4_bits_are_those_of_compressed_tensors(text: str) -> None:
    import torch
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme, is_mx = Scheme.parse(text), text.startswith("mx")
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="group" if is_mx else "tensor_group",
        group_size=scheme.group_size,
        scale_dtype=torch.uint8 if is_mx else torch.float8_e4m3fn,
    )
    for content in CONTENTS:
        x = make(content, (300, 512), "float32")
        packed, scales, zeros = quantized(x, text)
        weight = torch.from_numpy(x)
        divisor = None if is_mx else generate_gparam(weight.min(), weight.max())
        theirs, _ = calculate_qparams(*_extremes(weight, scheme), args, global_scale=divisor)
        words = quantize_and_pack_fp4(weight, theirs, global_scale=divisor, group_size=scheme.group_size)
        stored = compress_mx_scale(theirs, torch.uint8) if is_mx else theirs.to(torch.float8_e4m3fn).view(torch.uint8)
        assert_bitwise_equal(scales, stored.numpy(), f"scales {content}")
        assert_bitwise_equal(packed, words.numpy(), f"codes {content}")
        if divisor is not None:
            assert_bitwise_equal(zeros, divisor.numpy().reshape(1, 1), "global scale")


@pytest.mark.parametrize(("text", "mode"), [("mxfp4_ceil", "mxfp4"), ("mxfp8_ceil", "mxfp8"), ("nvfp4_local", "nvfp4")])
def test_words_and_scales_are_those_of_mlx(text: str, mode: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    scheme = Scheme.parse(text)
    settings = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode}
    for content in CONTENTS:
        x = make(content, (256, 512), "float32")
        packed, scales, _ = quantized(x, text)
        words, theirs = mx.quantize(mx.array(x), **settings)
        assert_bitwise_equal(packed, np.array(words).view(np.uint8), f"words {content}")
        assert_bitwise_equal(scales, np.array(theirs), f"scales {content}")
        decoded = np.array(mx.dequantize(words, theirs, **settings, dtype=mx.float32))
        assert_bitwise_equal(reference.dequantize(packed, scales, None, scheme, 512), decoded, f"decoded {content}")
