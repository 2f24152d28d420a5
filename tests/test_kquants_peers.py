"""K-quants against libggml: the same weights from the same input, the same bytes but for codes that a scale of 0 hides;
decoding against libggml and gguf-py; and the error under the weights of libggml's own search."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from arrowquant_gpu import reference
from arrowquant_gpu.backends import get_backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .kquants_cases import IDS, make, random_blocks
from .minilm import model_dir
from .test_backends import dequantize, quantize
from .test_ggml_peers import library

pytestmark = pytest.mark.interop

# Scheme -> ggml's number of the type.
TYPES = {"q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}
# Where a code beyond 2**22 occurs before it is clamped, libggml's rounding is another: it takes the low bits of a sum.
CONTENTS = (
    *("normal", "ties", "one_hot", "zeros", "negative_zero", "positive", "negative", "near_tiny_scale"),
    *("laplace", "heavy_tailed", "outliers", "one_subblock", "subblocks_of_any_size", "same_magnitudes"),
    *("mirrored", "flat"),
)
EMPTY = np.empty((0, 0), np.float16)


def ggml_quantize(x: np.ndarray, name: str) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    packed = np.zeros(Scheme.parse(name).packed_shape(x.shape), np.uint8)
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    sizes = (ctypes.c_int64(n) for n in (0, *x.shape))
    pointers = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(packed.ctypes.data)
    assert function(ctypes.c_int(TYPES[name]), *pointers, *sizes, None) == packed.size
    return packed


def ggml_dequantize(packed: np.ndarray, name: str) -> np.ndarray:
    out = np.zeros((len(packed), packed.shape[1] // GRIDS[name].block_bytes * 256), np.float32)
    function = getattr(library(), f"dequantize_row_{name[:3].lower()}{name[3:].upper()}")
    function.restype = None
    function(ctypes.c_void_p(packed.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


def compare(x: np.ndarray, name: str) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Raise unless the weights that come back are the same bit for bit.

    How many blocks are the same, of how many; the weights that come back from us and from libggml.
    """
    scheme = Scheme.parse(name)
    packed, _, _, findings = quantize(get_backend("cpu"), x, scheme)
    assert findings == Findings()
    theirs = ggml_quantize(x, name)
    decoded = reference.dequantize(packed, EMPTY, None, scheme, x.shape[1])
    wanted = ggml_dequantize(theirs, name)
    assert_bitwise_equal(decoded + np.float32(0), wanted + np.float32(0), name)
    same = (packed == theirs).reshape(-1, GRIDS[name].block_bytes).all(axis=1)
    return int(same.sum()), same.size, decoded, wanted


def error_weights(x: np.ndarray, name: str) -> np.ndarray:
    """What libggml's search counts an error of a weight for."""
    if name == "q2_k":
        return np.abs(x)
    if name in ("q4_k", "q5_k"):
        blocks = x.reshape(-1, 32)
        return (np.sqrt((blocks**2).mean(axis=1, keepdims=True)) + np.abs(blocks)).reshape(x.shape)
    return x * x


def errors(x: np.ndarray, decoded: np.ndarray, name: str) -> tuple[float, float]:
    """(weighted error, mean square error) in float64."""
    x = x.astype(np.float64)
    off = decoded.astype(np.float64) - x
    return float((error_weights(x, name) * (np.abs(off) if name == "q2_k" else off**2)).sum()), float((off**2).mean())


@pytest.mark.parametrize("name", IDS)
def test_contents_come_back_as_from_libggml(name: str) -> None:
    n = 0
    for content in CONTENTS:
        for dtype in KERNEL_DTYPES:
            n += compare(make(content, (16, 2048), dtype), name)[1]
    assert n == len(CONTENTS) * 3 * 128


def heavy_tailed() -> Iterator[np.ndarray]:
    """At the scales of models: three distributions, in float32 and bfloat16, plain and with outlier columns."""
    rng = np.random.default_rng(23)
    shape = 256, 2048
    for x in (rng.standard_normal(shape), rng.laplace(size=shape), rng.standard_t(3, shape)):
        x = x * np.exp2(rng.uniform(-9, 0, (len(x), 1)))
        raised = x.copy()
        raised[:, ::97] *= 30
        for weights in (x, raised):
            yield weights.astype(np.float32)
            yield weights.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", IDS)
def test_no_error_is_above_that_of_libggml(name: str) -> None:
    """Weighted and mean square, of synthetic weights and of every matrix of MiniLM; nearly all blocks are identical."""
    same = n = 0
    matrices = [
        w for w in load_file(model_dir() / "model.safetensors").values() if w.ndim == 2 and w.dtype == np.float32
    ]
    assert len(matrices) > 35
    for x in [*heavy_tailed(), *(w.reshape(-1)[: w.size // 256 * 256].reshape(-1, 256) for w in matrices)]:
        n_same, n_blocks, decoded, wanted = compare(x, name)
        same, n = same + n_same, n + n_blocks
        values = x.astype(np.float32)
        ours, theirs = errors(values, decoded, name), errors(values, wanted, name)
        assert ours[0] <= theirs[0]
        assert ours[1] <= theirs[1]
    assert same / n > (0.9 if name == "q2_k" else 0.96)


@pytest.mark.parametrize("name", IDS)
def test_decoded_weights_are_those_of_libggml_and_of_gguf(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    scheme, packed = Scheme.parse(name), random_blocks(Scheme.parse(name), 512, 5)
    theirs = ggml_dequantize(packed, name)
    gguf = quants.dequantize(packed, GGMLQuantizationType[name.upper()]).astype(np.float32)
    for dtype in KERNEL_DTYPES:
        got = dequantize(get_backend("cpu"), packed, np.empty((512, 0), np.float16), None, scheme, 256, dtype)
        with np.errstate(over="ignore"):
            assert_bitwise_equal(got, theirs.astype(DTYPES[dtype].numpy), f"libggml {dtype}")
            assert_bitwise_equal(got, gguf.astype(DTYPES[dtype].numpy), f"gguf {dtype}")


def test_every_scheme_has_a_peer() -> None:
    assert set(TYPES) == set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_a_flipped_bit_is_seen(name: str) -> None:
    x = make("heavy_tailed", (2, 512), "float32")
    theirs = ggml_quantize(x, name)
    decoded = ggml_dequantize(theirs, name)
    theirs[1, 30] ^= 1
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(ggml_dequantize(theirs, name), decoded)
