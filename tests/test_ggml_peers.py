"""ggml's blocks against libggml: every byte equal, where both define it; decoding against libggml and gguf-py."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import get_backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .ggml_cases import CONTENTS, IDS, make
from .test_backends import dequantize, quantize

pytestmark = pytest.mark.interop

# Scheme -> ggml's number and gguf-py's name of the type.
TYPES = {
    "f16": (1, "F16"),
    "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"),
    "q5_0": (6, "Q5_0"),
    "q5_1": (7, "Q5_1"),
    "q8_0": (8, "Q8_0"),
    "iq4_nl": (20, "IQ4_NL"),
    "bf16": (30, "BF16"),
    "ggml_mxfp4": (39, "MXFP4"),
    "ggml_nvfp4": (40, "NVFP4"),
}
# Contents that libggml leaves undefined, or that overflow: docs/numerics_ggml.md, last section.
UNDEFINED = {"ggml_mxfp4": ("subnormal", "wild", "largest"), "ggml_nvfp4": ("wild", "largest", "near_powers")}


@functools.cache
def library() -> Any:
    import llama_cpp

    [path] = Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so")
    return ctypes.CDLL(str(path))


def ggml_quantize(x: np.ndarray, name: str) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    packed = np.zeros(Scheme.parse(name).packed_shape(x.shape), np.uint8)
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    n = function(
        ctypes.c_int(TYPES[name][0]),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_void_p(packed.ctypes.data),
        *(ctypes.c_int64(k) for k in (0, *x.shape)),
        None,
    )
    assert n == packed.size
    return packed


def ggml_dequantize(packed: np.ndarray, name: str, length: int) -> np.ndarray:
    symbol = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}.get(
        name, f"dequantize_row_{name.removeprefix('ggml_')}"
    )
    out = np.zeros((packed.shape[0], length), np.float32)
    function = getattr(library(), symbol)
    function.restype = None
    function(ctypes.c_void_p(packed.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


@pytest.mark.parametrize("name", IDS)
def test_bytes_are_those_of_libggml(name: str) -> None:
    scheme = Scheme.parse(name)
    n = 0
    for content in CONTENTS:
        for dtype in KERNEL_DTYPES:
            x = make(content, (64, 1024), dtype)
            packed, _, _, findings = quantize(get_backend("cpu"), x, scheme)
            if findings != Findings() or content in UNDEFINED.get(name, ()):
                continue
            assert_bitwise_equal(packed, ggml_quantize(x, name), f"{name} of {dtype} {content}")
            n += x.size
    assert n > 2_000_000


@pytest.mark.parametrize("name", IDS)
def test_millions_of_weights(name: str) -> None:
    """At the scales of models, and of their widest rows."""
    rng = np.random.default_rng(17)
    spread = np.exp2(rng.uniform(-14, 4, (1024, 1))).astype(np.float32)
    for x in (
        rng.standard_normal((1024, 2048), np.float32) * spread,
        (rng.standard_t(3, (1024, 2048)) * spread).astype(np.float32),
        (rng.laplace(size=(1024, 2048)) * spread).astype(ml_dtypes.bfloat16),
    ):
        packed, _, _, findings = quantize(get_backend("cpu"), x, Scheme.parse(name))
        assert findings == Findings()
        assert_bitwise_equal(packed, ggml_quantize(x, name), name)


def test_every_exponent_of_mxfp4() -> None:
    """The 128 floats below each power of two and the 4 from it on, each as the largest of a block."""
    above = np.concatenate([np.arange(0x7FFF80, 0x800000), np.arange(4)])
    largest = (np.arange(2, 254)[:, None] << 23 | above).astype(np.uint32).view(np.float32).reshape(-1)
    x = np.zeros((largest.size, 32), np.float32)
    x[:, 5], x[:, 9] = largest, largest / np.float32(-3)
    packed = reference.quantize(x, Scheme.parse("ggml_mxfp4"))[0]
    assert_bitwise_equal(packed, ggml_quantize(x, "ggml_mxfp4"))
    plain = np.floor(np.log2(largest.astype(np.float64))) + 125
    assert 0 < (packed[:, 0] != plain).mean() < 0.3, "log2 rounded to float32 is another"


@pytest.mark.parametrize("name", IDS)
def test_decoded_weights_are_those_of_libggml_and_of_gguf(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    scheme, length = Scheme.parse(name), 1024
    packed = reference.quantize(make("heavy_tailed", (64, length), "float32"), scheme)[0]
    scales = np.empty((64, 0), np.float16)
    for dtype in KERNEL_DTYPES:
        got = dequantize(get_backend("cpu"), packed, scales, None, scheme, length, dtype)
        want = ggml_dequantize(packed, name, length).astype(DTYPES[dtype].numpy)
        assert_bitwise_equal(got, want, f"libggml {dtype}")
        stored = packed.view(np.float16) if name == "f16" else packed
        theirs = quants.dequantize(stored, GGMLQuantizationType[TYPES[name][1]])
        assert_bitwise_equal(got, theirs.astype(np.float32).astype(DTYPES[dtype].numpy), f"gguf {dtype}")


@pytest.mark.parametrize("name", IDS)
def test_any_bytes_are_decoded_as_by_libggml(name: str) -> None:
    scheme, length = Scheme.parse(name), 256
    packed = np.random.default_rng(5).integers(0, 256, (512, scheme.row_bytes(length)), np.uint8)
    got = reference.dequantize(packed, np.empty((512, 0), np.float16), None, scheme, length)
    want = ggml_dequantize(packed, name, length)
    is_nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), is_nan)
    assert_bitwise_equal(np.where(is_nan, 0, got), np.where(is_nan, 0, want), name)


def test_every_scheme_has_a_peer() -> None:
    assert set(TYPES) == {name for name, grid in GRIDS.items() if grid.family == "ggml"}


@pytest.mark.parametrize("name", IDS)
def test_a_flipped_bit_is_seen(name: str) -> None:
    x = make("normal", (2, 64), "float32")
    packed = ggml_quantize(x, name)
    packed[1, 7] ^= 1
    with pytest.raises(AssertionError, match="1 of"):
        assert_bitwise_equal(reference.quantize(x, Scheme.parse(name))[0], packed)
