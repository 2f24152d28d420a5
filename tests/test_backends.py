"""Every backend gives the reference's bytes: the case table, any bits at all, and what must be counted and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, get_backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme

from .bitwise import assert_bitwise_equal
from .cases import SCHEMES, cases, make

# A backend that computes elsewhere is one more line.
BACKENDS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return get_backend(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# A backend's methods from host arrays to host arrays, and the same against the reference.


class Outputs:
    """Output arrays of one tensor on the backend, filled with a pattern that a code not written would leave."""

    def __init__(self, backend: Backend, scheme: Scheme, shape: tuple[int, int]) -> None:
        self.backend = backend
        self.packed = self._new(scheme.packed_shape(shape), np.uint8)
        self.scales = self._new(scheme.scales_shape(shape), DTYPES[scheme.scale_storage].numpy)
        beside, dtype = scheme.zeros_shape(shape), scheme.zeros_dtype
        self.zeros = None if beside is None or dtype is None else self._new(beside, DTYPES[dtype].numpy)

    def _new(self, shape: tuple[int, ...], dtype: Any) -> Any:
        made = self.backend.empty(shape, dtype)
        assert made.shape == shape
        return self.backend.put(np.full(shape, 0xA5, np.uint8).astype(dtype)) if made.size else made

    def host(self, a: Any) -> np.ndarray:
        out = np.empty(a.shape, a.dtype)
        self.backend.get(a, out)
        return out


def quantize(backend: Backend, x: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, Any, Findings]:
    """As `reference.quantize`, for granularity group and channel."""
    outputs = Outputs(backend, scheme, x.shape)
    findings = backend.quantize(backend.put(x), scheme, outputs.packed, outputs.scales, outputs.zeros)
    zeros = None if outputs.zeros is None else outputs.host(outputs.zeros)
    return outputs.host(outputs.packed), outputs.host(outputs.scales), zeros, findings


def encode(backend: Backend, x: np.ndarray, scheme: Scheme, scales: np.ndarray, zeros: Any) -> np.ndarray:
    outputs = Outputs(backend, scheme, x.shape)
    zero_points = None if zeros is None else backend.put(zeros)
    backend.encode(backend.put(x), scheme, backend.put(scales), zero_points, outputs.packed)
    return outputs.host(outputs.packed)


def dequantize(
    backend: Backend, packed: np.ndarray, scales: np.ndarray, zeros: Any, scheme: Scheme, length: int, dtype: str
) -> np.ndarray:
    """As `reference.dequantize`."""
    out = backend.empty((packed.shape[0], length), DTYPES[dtype].numpy)
    zero_points = None if zeros is None else backend.put(zeros)
    backend.dequantize(backend.put(packed), backend.put(scales), zero_points, scheme, out)
    host = np.empty(out.shape, out.dtype)
    backend.get(out, host)
    return host


def check(backend: Backend, x: np.ndarray, scheme: Scheme, dtypes: Iterable[str] = KERNEL_DTYPES) -> None:
    """Encode `x` and decode the result to `dtypes`; raise unless all equals the reference, findings included."""
    packed, scales, zeros, findings = reference.quantize(x, scheme)
    if scheme.granularity == "tensor":
        check_value_range(backend, x)
    else:
        got = quantize(backend, x, scheme)
        if got[3] != findings:
            raise AssertionError(f"findings: got {got[3]}, want {findings}")
        if findings == Findings():
            assert_bitwise_equal(got[0], packed, "packed")
            assert_bitwise_equal(got[1], scales, "scales")
            if zeros is not None:
                assert_bitwise_equal(got[2], zeros, "zeros")
    if findings != Findings():
        return
    assert_bitwise_equal(encode(backend, x, scheme, scales, zeros), packed, "encoded")
    for dtype in dtypes:
        check_decode(backend, packed, scales, zeros, scheme, x.shape[1], dtype)


def check_value_range(backend: Backend, x: np.ndarray) -> None:
    low, high, findings = backend.value_range(backend.put(x))
    values = reference.to_float32(x)
    want = reference.find(values)
    if findings != want:
        raise AssertionError(f"findings: got {findings}, want {want}")
    if want == Findings() and x.size:
        bounds = reference.group_range(values, Scheme(granularity="tensor"))
        assert_bitwise_equal(np.array([low, high]), np.array(bounds, np.float64).reshape(2), "value range")


def check_decode(
    backend: Backend, packed: np.ndarray, scales: np.ndarray, zeros: Any, scheme: Scheme, length: int, dtype: str
) -> None:
    with np.errstate(invalid="ignore"):
        want = reference.dequantize(packed, scales, zeros, scheme, length, dtype)
    assert_bitwise_equal(dequantize(backend, packed, scales, zeros, scheme, length, dtype), want, f"decoded {dtype}")


def check_table(backend: Backend, every: int) -> int:
    """Check every `every`-th case of the table; returns how many."""
    n = 0
    for n, (scheme, dtype, shape, content) in enumerate(cases(every=every), 1):
        try:
            check(backend, make(content, shape, dtype), scheme, [KERNEL_DTYPES[n % 3]])
        except AssertionError as e:
            raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e
    return n


# ---------------------------------------------------------------------------------------------------------------------


def test_a_sample_of_the_table(backend: Backend, record_property: Callable[[str, int], None]) -> None:
    n = check_table(backend, every=8)
    record_property("cases", n)
    assert n > 16_000


@pytest.mark.soak
def test_the_whole_table(backend: Backend, record_property: Callable[[str, int], None]) -> None:
    n = check_table(backend, every=1)
    record_property("cases", n)
    assert n > 120_000


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Any bit pattern of any kernel dtype in any small shape; often but not always finite."""
    shape = draw(st.tuples(st.integers(0, 6), st.integers(0, 600)))
    dtype = DTYPES[draw(st.sampled_from(KERNEL_DTYPES))].numpy
    raw = np.random.default_rng(draw(st.integers(0, 1 << 32))).bytes(shape[0] * shape[1] * dtype.itemsize)
    x = np.frombuffer(raw, dtype).reshape(shape).copy()
    if draw(st.integers(0, 4)):
        x[~np.isfinite(x.astype(np.float32))] = 0
    for _ in range(draw(st.integers(0, 3)) if x.size else 0):
        at = draw(st.integers(0, x.size - 1))
        pattern = draw(st.integers(0, (1 << 8 * dtype.itemsize) - 1))
        x.reshape(-1)[at] = np.array(pattern, f"u{dtype.itemsize}").view(dtype)
    return x


schemes = st.builds(
    Scheme.parse,
    st.builds(
        "int{}_{}{}{}".format,
        st.sampled_from(BITS),
        st.one_of(st.integers(1, 700).map("g{}".format), st.sampled_from(["channel", "tensor"])),
        st.sampled_from(["", "_asym"]),
        st.sampled_from(list(SCALE_SUFFIXES.values())),
    ),
)


@given(x=weights(), scheme=schemes)
def check_any_bits(backend: Backend, x: np.ndarray, scheme: Scheme) -> None:
    check(backend, x, scheme)


@given(
    scheme=schemes,
    rows=st.integers(0, 4),
    length=st.integers(0, 600),
    seed=st.integers(0, 1 << 32),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def check_any_code_bytes(backend: Backend, scheme: Scheme, rows: int, length: int, seed: int, dtype: str) -> None:
    """Decode bytes that no encoder wrote: unused bits set, zero points over 2**bits - 1, scales of any value."""
    rng, shape = np.random.default_rng(seed), (rows, length)
    packed = rng.integers(0, 256, scheme.packed_shape(shape), np.uint8)
    scale_type = DTYPES[scheme.scale_dtype].numpy
    n_scales = scheme.scales_shape(shape)
    raw = rng.integers(0, 1 << 8 * scale_type.itemsize, n_scales, f"u{scale_type.itemsize}")
    special = np.array(np.inf).astype(scale_type).view(raw.dtype)
    scales = np.where(rng.random(n_scales) < 0.2, raw | special, raw).view(scale_type)  # one in five infinite or NaN
    zeros = None if scheme.symmetric else rng.integers(0, 256, n_scales, np.uint8)
    check_decode(backend, packed, scales, zeros, scheme, length, dtype)


def test_any_bits(backend: Backend) -> None:
    check_any_bits(backend)


def test_any_code_bytes(backend: Backend) -> None:
    check_any_code_bytes(backend)


@pytest.mark.soak
@pytest.mark.parametrize("body", [check_any_bits, check_any_code_bytes])
def test_any_bits_and_code_bytes_many_times(backend: Backend, body: Callable[[Backend], None]) -> None:
    body(backend)


# ---------------------------------------------------------------------------------------------------------------------
# What a pass counts.

NOT_FINITE = {"float32": 4, "float16": 2, "bfloat16": 2}
PATTERNS = {  # infinities, quiet and signalling NaN, of both signs
    "float32": (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF),
    "float16": (0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF),
    "bfloat16": (0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF),
}


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g128_asym", "int8_channel", "int3_g5_asym_f16", "int4_tensor"])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(backend: Backend, dtype: str, scheme: str) -> None:
    shape = (3, 300)
    for i, at in enumerate((0, 15, 16, 127, 128, 287, 288, 299, 300, 899)):
        x = make("normal", shape, dtype)
        pattern = PATTERNS[dtype][i % 6]
        x.reshape(-1)[at] = np.array(pattern, f"u{NOT_FINITE[dtype]}").view(x.dtype)
        is_nan = i % 6 > 1
        assert reference.find(x.astype(np.float32)) == Findings(int(is_nan), int(not is_nan), at)
        check(backend, x, Scheme.parse(scheme))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_many_values_that_are_not_finite_are_counted(backend: Backend, dtype: str) -> None:
    rng = np.random.default_rng(7)
    for share in (0.01, 0.5, 1.0):
        x = make("normal", (11, 333), dtype)
        patterns = np.array(PATTERNS[dtype], f"u{NOT_FINITE[dtype]}").view(x.dtype)
        x = np.where(rng.random(x.shape) < share, rng.choice(patterns, x.shape), x)
        for scheme in ("int4_g32", "int4_g32_asym", "int8_channel_asym", "int2_tensor"):
            check(backend, x, Scheme.parse(scheme))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int4_g32_f16", "int4_g32_asym_f16", "int8_channel_f16", "int2_g100_asym_f16"])
def test_scales_over_the_largest_float16_are_counted(backend: Backend, dtype: str, scheme: str) -> None:
    """Around the bound too: 65519.99 becomes 65504, 65520 overflows."""
    rng = np.random.default_rng(8)
    levels = Scheme.parse(scheme).n_levels
    x = make("normal", (9, 256), dtype)
    x.reshape(-1)[rng.integers(0, x.size, 12)] = 3e38
    x[4, 5], x[6, 5] = 65519 * levels / 2, 65521 * levels / 2
    assert reference.quantize(x, Scheme.parse(scheme))[3].n_overflow > 2
    check(backend, x, Scheme.parse(scheme))


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights lie, and scales from elsewhere.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 7])
def test_rows_that_start_anywhere(backend: Backend, dtype: str, offset: int) -> None:
    """Aligned to their element and to nothing more, with rows of odd length."""
    flat = backend.put(make("normal", (1, 5 * 333 + offset), dtype))
    x = flat[0, offset:].reshape(5, 333)
    host = make("normal", (1, 5 * 333 + offset), dtype)[0, offset:].reshape(5, 333)
    for scheme in map(Scheme.parse, ("int4_g128", "int3_g32_asym", "int8_channel", "int5_g100_asym_bf16")):
        outputs = Outputs(backend, scheme, x.shape)
        assert backend.quantize(x, scheme, outputs.packed, outputs.scales, outputs.zeros) == Findings()
        packed, scales, zeros, _ = reference.quantize(host, scheme)
        assert_bitwise_equal(outputs.host(outputs.packed), packed, "packed")
        assert_bitwise_equal(outputs.host(outputs.scales), scales, "scales")
        if zeros is not None:
            assert_bitwise_equal(outputs.host(outputs.zeros), zeros, "zeros")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_encode_clamps_with_scales_that_are_too_small_or_too_large(backend: Backend, dtype: str) -> None:
    rng = np.random.default_rng(9)
    for scheme in SCHEMES[::5]:
        x = make("wild", (4, 300), dtype)
        scales = (10.0 ** rng.uniform(-4, 4, scheme.scales_shape(x.shape))).astype(DTYPES[scheme.scale_dtype].numpy)
        zeros = None if scheme.symmetric else rng.integers(0, 1 << scheme.bits, scales.shape, np.uint8)
        want = reference.pack(reference.encode(x.astype(np.float32), scales, zeros, scheme), scheme.bits)
        assert_bitwise_equal(encode(backend, x, scheme, scales, zeros), want, f"{scheme} encoded")


# ---------------------------------------------------------------------------------------------------------------------
# The checks can fail.


class Faulty:
    """A backend with one planted fault."""

    def __init__(self, backend: Backend, fault: str) -> None:
        self.backend, self.fault, self.name = backend, fault, backend.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def _flip(self, a: Any) -> None:
        host = np.empty(a.shape, a.dtype)
        self.backend.get(a, host)
        host.reshape(-1).view(np.uint8)[host.nbytes // 2] ^= 1
        a[...] = self.backend.put(host)

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any) -> Findings:
        findings = self.backend.quantize(x, scheme, packed, scales, zeros)
        for name, a in (("packed", packed), ("scales", scales), ("zeros", zeros)):
            if self.fault == name:
                self._flip(a)
        return findings._replace(first=0) if self.fault == "findings" else findings

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any, packed: Any) -> None:
        self.backend.encode(x, scheme, scales, zeros, packed)
        if self.fault == "encoded":
            self._flip(packed)

    def value_range(self, x: Any) -> tuple[float, float, Findings]:
        low, high, findings = self.backend.value_range(x)
        return (np.nextafter(low, 1) if self.fault == "range" else low), high, findings

    def dequantize(self, packed: Any, scales: Any, zeros: Any, scheme: Scheme, out: Any) -> None:
        self.backend.dequantize(packed, scales, zeros, scheme, out)
        if self.fault == "decoded":
            self._flip(out)


@pytest.mark.parametrize(
    ("fault", "scheme"),
    [
        *[(fault, "int4_g32_asym") for fault in ("packed", "scales", "zeros", "findings", "encoded", "decoded")],
        ("range", "int4_tensor"),
        ("encoded", "int4_tensor"),
    ],
)
def test_one_flipped_bit_is_caught(backend: Backend, fault: str, scheme: str) -> None:
    x = make("normal", (4, 256), "float32")
    check(Faulty(backend, "none"), x, Scheme.parse(scheme))
    with pytest.raises(AssertionError, match=r"differ|findings"):
        check(Faulty(backend, fault), x, Scheme.parse(scheme))
