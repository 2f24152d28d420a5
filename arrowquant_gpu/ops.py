"""`quantize` and `dequantize`: check once, allocate once, dispatch to a backend.

The two functions a caller needs are `quantize` and `dequantize`. The `*_rows` functions are the same work on row
blocks of a tensor that is never whole in memory; the checkpoint pipeline is built on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference, trace
from .arrow_values import empty
from .backends import Backend, Job, get_backend
from .dtypes import DTYPES, KERNEL_DTYPES, from_numpy
from .errors import InputError, NonFiniteError, ScaleOverflowError
from .interchange import Weights, as_weights
from .reference import Findings
from .schemes import Scheme, rows_and_length
from .tensor import QuantizedTensor

# Rows are converted or gathered in blocks of about this many bytes where a backend cannot read them in place.
BLOCK_BYTES = 16 << 20
# Bytes of weights that are quantized together, in tensors that are smaller.
TOGETHER_BYTES = 64 << 20


def quantize(
    x: object,
    scheme: str | Scheme = "int4_g128",
    *,
    device: str = "auto",
    threads: int | None = None,
    name: str = "weights",
) -> QuantizedTensor:
    """Quantize one tensor along its last axis.

    `x` is anything that `interchange.as_weights` takes: NumPy, Arrow, DLPack (torch, CuPy, JAX), buffers; of any
    numeric dtype and shape. It is read in place where its rows are contiguous float32, float16 or bfloat16, and block
    by block otherwise; it is never modified, and the result does not refer to it. The result lives where the weights
    are: host arrays for host input (also when `device` is a GPU), GPU arrays for input on a GPU. `device` is "auto"
    (the GPU the weights are on, else a usable GPU, else the CPU), "cpu", "cuda", "cuda:N" or "reference"; every one of
    them gives the same bytes. `name` is what errors call the tensor.

        >>> import numpy as np
        >>> w = np.arange(-128, 128, dtype=np.float32).reshape(2, 128)
        >>> q = quantize(w, "int8_g64", device="cpu")
        >>> q.scheme.id, q.packed.shape, q.scales.shape
        ('int8_g64', (2, 128), (2, 2))
        >>> float(np.abs(dequantize(q, device="cpu") - w).max()) <= float(q.scales.max()) / 2
        True

    Raises SchemeError, InputError, NonFiniteError, ScaleOverflowError, DeviceError.
    """
    scheme, weights = Scheme.parse(scheme), as_weights(x, name=name)
    backend = _backend_for(weights, device, threads)
    q = _room(weights, scheme, backend, name)
    quantize_blocks(
        weights.blocks, q.scheme, q.packed, q.scales, q.zeros, backend=backend, name=name, shape=weights.shape
    )
    return q


def quantize_all(
    arrays: Mapping[str, object],
    scheme: str | Scheme = "int4_g128",
    *,
    device: str = "auto",
    threads: int | None = None,
) -> Iterator[tuple[str, QuantizedTensor | InputError]]:
    """`quantize` of each array, in order: its name, and its result or the error that `quantize` would raise.

    What the CPU can read in place it quantizes together, as if it were one tensor, up to TOGETHER_BYTES: threads then
    wait neither for each other nor for Python between small ones. Results come when those of their run are there.

        >>> import numpy as np
        >>> found = dict(quantize_all({"a": np.ones((2, 128)), "b": np.array([np.nan])}, device="cpu"))
        >>> found["a"].scheme.id, type(found["b"]).__name__
        ('int4_g128', 'NonFiniteError')

    Raises SchemeError and DeviceError.
    """
    scheme = Scheme.parse(scheme)
    run: list[tuple[str, Weights, QuantizedTensor, Backend]] = []
    n_bytes = 0
    for name, x in arrays.items():
        try:
            weights = as_weights(x, name=name)
            backend = _backend_for(weights, device, threads)
            item = name, weights, _room(weights, scheme, backend, name), backend
        except InputError as e:
            yield from _run_together(run)
            yield name, e
            continue
        if len(weights.blocks) == 1 and is_direct(weights.blocks[0], scheme, backend):
            n_bytes = n_bytes * bool(run) + weights.blocks[0].nbytes
            run.append(item)
            if n_bytes >= TOGETHER_BYTES:
                yield from _run_together(run)
        else:
            yield from _run_together(run)
            yield from _run_together([item])
    yield from _run_together(run)


def _run_together(
    run: list[tuple[str, Weights, QuantizedTensor, Backend]],
) -> Iterator[tuple[str, QuantizedTensor | InputError]]:
    """Quantize a run into the arrays that are there for it, and empty it."""
    items, found = run.copy(), list[Findings]()
    run.clear()
    if len(items) > 1:
        jobs: list[Job] = [(x.blocks[0], q.scheme, q.packed, q.scales, q.zeros) for _, x, q, _ in items]
        found = quantize_together(jobs, backend=items[0][3], name=f"{items[0][0]} and {len(items) - 1} more")
    for i, (name, weights, q, backend) in enumerate(items):
        error: InputError | None = None
        try:
            if found:
                check(found[i], q.scheme, name=name, shape=weights.shape)
            else:
                parts = q.packed, q.scales, q.zeros
                quantize_blocks(weights.blocks, q.scheme, *parts, backend=backend, name=name, shape=weights.shape)
        except InputError as e:
            error = e
        yield name, error or q


def _backend_for(weights: Weights, device: str, threads: int | None) -> Backend:
    return get_backend(weights.device if weights.device != "cpu" and device == "auto" else device, threads)


def _room(weights: Weights, scheme: Scheme, backend: Backend, name: str) -> QuantizedTensor:
    """The result of these weights, where they are, with arrays that nothing has been written to.

    Raises InputError where the scheme does not fit their shape.
    """
    if (reason := scheme.misfit(weights.shape)) is not None:
        raise InputError(f"{name}: {reason}")
    allocate = backend.empty if weights.device != "cpu" else empty
    packed = allocate(scheme.packed_shape(weights.shape), np.uint8)
    scales = allocate(scheme.scales_shape(weights.shape), DTYPES[scheme.scale_storage].numpy)
    beside = scheme.zeros_shape(weights.shape)
    zeros = None if beside is None or scheme.zeros_dtype is None else allocate(beside, DTYPES[scheme.zeros_dtype].numpy)
    return QuantizedTensor(packed, scales, zeros, weights.shape, scheme, weights.dtype)


def dequantize(
    q: QuantizedTensor, dtype: str | None = None, *, device: str = "auto", threads: int | None = None
) -> Any:
    """Decode to an array of the tensor's shape: (code - zero) * scale in float32, rounded once to `dtype`.

    `dtype` is "float32", "float16" or "bfloat16"; by default the tensor's original dtype where it is one of these, else
    float32. The result is new memory, on the GPU where `q` is on one, else on the host.

        >>> import numpy as np
        >>> q = quantize(np.linspace(-1, 1, 8, dtype=np.float16), "int4_g8", device="cpu")
        >>> dequantize(q, device="cpu").dtype
        dtype('float16')

    Raises InputError where the arrays of `q` do not fit its shape and scheme, and DeviceError.
    """
    dtype = dtype or (q.dtype if q.dtype in KERNEL_DTYPES else "float32")
    if dtype not in KERNEL_DTYPES:
        raise InputError(f"dtype {dtype!r}: dequantize gives {', '.join(KERNEL_DTYPES)}")
    check_tensor(q)
    on_device = not isinstance(q.packed, np.ndarray)
    backend = get_backend(f"cuda:{q.packed.device.id}" if on_device and device == "auto" else device, threads)
    out = (backend.empty if on_device else np.empty)(rows_and_length(q.shape), DTYPES[dtype].numpy)
    dequantize_rows(q.packed, q.scales, q.zeros, q.scheme, out, backend=backend, name="dequantize")
    return out.reshape(q.shape)


def quantize_blocks(
    blocks: Sequence[Any],
    scheme: Scheme,
    packed: Any,
    scales: Any,
    zeros: Any | None,
    *,
    backend: Backend,
    name: str,
    shape: tuple[int, ...],
) -> None:
    """Quantize a whole tensor, row blocks that follow each other, into the given arrays; `shape` is for errors.

    Raises NonFiniteError and ScaleOverflowError; what the arrays hold then is of no use.
    """
    if scheme.granularity == "block" and len(blocks) > 1:
        raise InputError(f"{name}: {scheme.id} has squares over several rows; give the weights in one piece")
    if scheme.needs_range:
        _store(tensor_scale(blocks, scheme, backend=backend, name=name, shape=shape), scales, zeros, backend)
    findings, row = Findings(), 0
    for block in blocks:
        rows = slice(row, row + block.shape[0])
        if scheme.granularity == "tensor":
            encode_rows(block, scheme, scales, zeros, packed[rows], backend=backend, name=name)
        else:
            parts = scale_rows(scheme, scales, zeros, rows)
            found = quantize_rows(block, scheme, packed[rows], *parts, backend=backend, name=name)
            findings = merge(findings, found, row * block.shape[1], scheme.scales_shape((row, 1))[0] * scales.shape[1])
        row += block.shape[0]
    check(findings, scheme, name=name, shape=shape)


def quantize_together(jobs: Sequence[Job], *, backend: Backend, name: str) -> list[Findings]:
    """Quantize several tensors, each of which `is_direct`, as if they were one; `name` is what a profile calls them.

    What is not finite is counted for each, not raised: see `check`.
    """
    with trace.span("kernel", name, sum(job[0].nbytes for job in jobs)):
        return backend.quantize_all(jobs)


def is_direct(x: Any, scheme: Scheme, backend: Backend) -> bool:
    """Whether a host backend reads these rows in place and in one pass."""
    return not scheme.needs_range and _computes_on_host(backend) and _is_readable(x) and x.flags.aligned


def quantize_rows(
    x: Any,
    scheme: Scheme,
    packed: Any,
    scales: Any,
    zeros: Any | None,
    *,
    backend: Backend,
    name: str | None = None,
) -> Findings:
    """Quantize a block of rows [rows, length] into the given arrays, for granularity group or channel.

    `x` has any weight dtype and any strides. All arrays are on the host, or all on the backend's device. What is not
    finite is counted, not raised: `merge` the findings of a tensor's blocks and `check` them at its end.

    `name` is what the ranges in a profile are called (trace.py); None, here and in the functions below, makes none.
    """
    findings = Findings()
    for start, part in _readable(x, backend, name, _row_unit(scheme)):
        rows = slice(start, start + part.shape[0])
        outs = [packed[rows], *scale_rows(scheme, scales, zeros, rows)]
        if _is_host(packed) and not _computes_on_host(backend):
            staged = [None if out is None else backend.empty(out.shape, out.dtype) for out in outs]
            if zeros is not None and scheme.scale_rule == "global":
                staged[2] = _put(zeros, backend, name)
            with trace.span("kernel", name, part.nbytes):
                found = backend.quantize(part, scheme, *staged)
            for device_array, out in zip(staged, outs, strict=True):
                if out is not None and out is not zeros:
                    _get(device_array, out, backend, name)
        else:
            with trace.span("kernel", name, part.nbytes):
                found = backend.quantize(part, scheme, *outs)
        findings = merge(findings, found, start * x.shape[1], scheme.scales_shape((start, 1))[0] * scales.shape[1])
    return findings


def tensor_scale(
    blocks: Iterable[Any], scheme: Scheme, *, backend: Backend, name: str, shape: tuple[int, ...]
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """The first pass of schemes that need the range of all weights: see `solve_tensor`; from row blocks.

    Raises NonFiniteError and ScaleOverflowError for the whole tensor. An empty tensor has arrays of shape (0, 0).
    """
    low, high, findings, seen = 0.0, 0.0, Findings(), 0
    for block in blocks:
        block_low, block_high, found = range_of_rows(block, backend=backend, name=name)
        low, high = min(low, block_low), max(high, block_high)
        findings = merge(findings, found, seen, 0)
        seen += block.shape[0] * block.shape[1]
    check(findings, scheme, name=name, shape=shape)
    return solve_tensor(low, high, scheme, name=name, shape=shape)


def range_of_rows(x: Any, *, backend: Backend, name: str | None = None) -> tuple[float, float, Findings]:
    """(min(0, lowest), max(0, highest), findings) of a block of rows [rows, length] of any weight dtype and strides."""
    low, high, findings = 0.0, 0.0, Findings()
    for start, part in _readable(x, backend, name):
        with trace.span("kernel", name, part.nbytes):
            part_low, part_high, found = backend.value_range(part)
        low, high = min(low, part_low), max(high, part_high)
        findings = merge(findings, found, start * x.shape[1], 0)
    return low, high, findings


def solve_tensor(
    low: float, high: float, scheme: Scheme, *, name: str, shape: tuple[int, ...]
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """What the range of a whole tensor gives, arrays (1, 1), or (0, 0) where it is empty: its scale and zero point; or
    (None, its global scale).

    Raises ScaleOverflowError.
    """
    size = (1, 1) if math.prod(shape) else (0, 0)
    lowest, highest = np.full(size, low, np.float32), np.full(size, high, np.float32)
    scales, zeros, overflow = reference.solve(lowest, highest, scheme)
    check(overflow, scheme, name=name, shape=shape)
    return scales, zeros


def encode_rows(
    x: Any,
    scheme: Scheme,
    scales: Any,
    zeros: Any | None,
    packed: Any,
    *,
    backend: Backend,
    name: str | None = None,
) -> None:
    """Write the codes of a block of rows with scales that are known: the second pass of granularity tensor."""
    scales, zeros = _resident(scales, backend, name), None if zeros is None else _resident(zeros, backend, name)
    for start, part in _readable(x, backend, name):
        out = packed[start : start + part.shape[0]]
        if _is_host(out) and not _computes_on_host(backend):
            staged = backend.empty(out.shape, out.dtype)
            with trace.span("kernel", name, part.nbytes):
                backend.encode(part, scheme, scales, zeros, staged)
            _get(staged, out, backend, name)
        else:
            with trace.span("kernel", name, part.nbytes):
                backend.encode(part, scheme, scales, zeros, out)


def dequantize_rows(
    packed: Any,
    scales: Any,
    zeros: Any | None,
    scheme: Scheme,
    out: Any,
    *,
    backend: Backend,
    name: str | None = None,
) -> None:
    """Decode a block of rows into `out` [rows, length], one of KERNEL_DTYPES, row-major."""
    packed, scales = _resident(packed, backend, name), _resident(scales, backend, name)
    zeros = None if zeros is None else _resident(zeros, backend, name)
    if _is_host(out) and not _computes_on_host(backend):
        staged = backend.empty(out.shape, out.dtype)
        with trace.span("kernel", name, out.nbytes):
            backend.dequantize(packed, scales, zeros, scheme, staged)
        _get(staged, out, backend, name)
    else:
        with trace.span("kernel", name, out.nbytes):
            backend.dequantize(packed, scales, zeros, scheme, out)


def scale_rows(scheme: Scheme, scales: Any, zeros: Any | None, rows: slice) -> tuple[Any, Any | None]:
    """The part of scales and zeros, views, that belongs to these rows of weights; what is of the whole tensor as it is.

    Of granularity block `rows` begins where a block does.
    """
    if scheme.granularity == "tensor":
        return scales, zeros
    if scheme.granularity == "block" and scheme.group_size:
        rows = slice(rows.start // scheme.group_size, -(-rows.stop // scheme.group_size))
    return scales[rows], zeros if zeros is None or scheme.scale_rule == "global" else zeros[rows]


def merge(a: Findings, b: Findings, weights_before: int, scales_before: int) -> Findings:
    """Findings of a tensor so far, and of its next block that starts after so many weights and scales."""
    return Findings(
        a.n_nan + b.n_nan,
        a.n_inf + b.n_inf,
        a.first if a.first >= 0 or b.first < 0 else b.first + weights_before,
        a.n_overflow + b.n_overflow,
        a.first_overflow if a.first_overflow >= 0 or b.first_overflow < 0 else b.first_overflow + scales_before,
    )


def check(findings: Findings, scheme: Scheme, *, name: str, shape: tuple[int, ...]) -> None:
    """Raise NonFiniteError or ScaleOverflowError for what a whole tensor's findings count."""
    if findings.n_nan or findings.n_inf:
        raise NonFiniteError(name, findings.n_nan, findings.n_inf, findings.first, shape)
    if findings.n_overflow:
        raise ScaleOverflowError(name, scheme.scale_dtype, findings.n_overflow, findings.first_overflow)


def check_tensor(q: QuantizedTensor) -> None:
    """Raise InputError unless the arrays of `q` have the shapes and dtypes that its shape and scheme call for."""
    scale_dtype = DTYPES[q.scheme.scale_storage].numpy
    expected: list[tuple[str, Any, tuple[int, int], Any]] = [
        ("packed", q.packed, q.scheme.packed_shape(q.shape), np.dtype(np.uint8)),
        ("scales", q.scales, q.scheme.scales_shape(q.shape), scale_dtype),
    ]
    if (q.scheme.zeros_dtype is None) != (q.zeros is None):
        raise InputError(f"zeros: {q.scheme.id} has {'no' if q.zeros is not None else 'a'} zero point per group")
    if (beside := q.scheme.zeros_shape(q.shape)) is not None and q.scheme.zeros_dtype is not None:
        expected.append(("zeros", q.zeros, beside, DTYPES[q.scheme.zeros_dtype].numpy))
    for what, array, shape, dtype in expected:
        if tuple(array.shape) != shape or array.dtype != dtype:
            raise InputError(
                f"{what}: {array.dtype} {tuple(array.shape)} does not fit {q.scheme.id} of shape {list(q.shape)}, "
                f"which has {dtype} {shape}"
            )


def _is_host(a: Any) -> bool:
    return isinstance(a, np.ndarray)


def _computes_on_host(backend: Backend) -> bool:
    return backend.name != "cuda"


def _put(a: NDArray[Any], backend: Backend, name: str | None) -> Any:
    """A host array where the backend computes."""
    with trace.span("h2d", None if _computes_on_host(backend) else name, a.nbytes):
        return backend.put(a)


def _get(a: Any, out: NDArray[Any], backend: Backend, name: str | None) -> None:
    """Bring what a device computed to the host."""
    with trace.span("d2h", name, out.nbytes):
        backend.get(a, out)


def _resident(a: Any, backend: Backend, name: str | None) -> Any:
    """`a`, row-major, where the backend computes."""
    return _put(np.require(a, requirements=["C", "A"]), backend, name) if _is_host(a) else a


def _row_unit(scheme: Scheme) -> int:
    """Rows that have scales in common."""
    return scheme.group_size or 1 if scheme.granularity == "block" else 1


def _readable(x: Any, backend: Backend, name: str | None, unit: int = 1) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of `x` as the backend can read them: `x` itself where it can be read in place, else blocks that
    begin at a multiple of `unit`.
    """
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    if not _is_host(x):
        yield 0, x if _is_readable(x) else _device_float(x)
        return
    if _is_readable(x) and x.flags.aligned and _computes_on_host(backend):
        yield 0, x
        return
    dtype = x.dtype if from_numpy(x.dtype).name in KERNEL_DTYPES else np.dtype(np.float32)
    step = max(1, BLOCK_BYTES // (x.shape[1] * dtype.itemsize * unit)) * unit
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        with trace.span("read", name, part.nbytes):
            if part.dtype != dtype:
                part = reference.to_float32(part)
            part = np.require(part, dtype, ["C", "A"])
        yield start, _put(part, backend, name)


def _is_readable(x: Any) -> bool:
    """Whether kernels can read this array, of any device, but for its alignment."""
    return from_numpy(x.dtype).name in KERNEL_DTYPES and bool(x.flags.c_contiguous)


def _device_float(x: Any) -> Any:
    """Device rows as the kernels read them: row-major, float32 where the kernels do not know the dtype."""
    if from_numpy(x.dtype).name not in KERNEL_DTYPES:
        x = x.astype(np.float32)
    return x.copy() if not x.flags.c_contiguous else x


def _store(
    solved: tuple[NDArray[Any] | None, NDArray[Any] | None], scales: Any, zeros: Any | None, backend: Backend
) -> None:
    """Put what a first pass gave where the tensor's codes will be."""
    if solved[0] is not None:
        scales[...] = solved[0] if _is_host(scales) else backend.put(solved[0])
    if zeros is not None and solved[1] is not None:
        zeros[...] = solved[1] if _is_host(zeros) else backend.put(solved[1])
