"""`verify_checkpoint`: a quantized checkpoint against the float one it was made from, tensor by tensor."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import ops
from ..backends import Backend, get_backend
from ..dtypes import DTYPES
from ..engine import Progress
from ..engine.converted import columns_of, convert, recover
from ..engine.figures import Figures
from ..engine.parted import in_parts
from ..errors import InputError, VerifyError
from ..formats import Checkpoint, Entry, QuantizedCheckpoint, TensorInfo
from ..formats.checkpoint import open_checkpoint
from ..formats.quantized import open_quantized, pieces
from ..reference import TINY, to_float32
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor

# The least cosine accepted by default: (bits, granularity) -> cosine. docs/verify.md has the measurements.
# Squares count as groups, and more bits as 8.
MIN_COSINE: Mapping[int, Mapping[str, float]] = {
    2: {"group": 0.75, "channel": 0.60, "tensor": 0.30},
    3: {"group": 0.93, "channel": 0.88, "tensor": 0.70},
    4: {"group": 0.98, "channel": 0.96, "tensor": 0.90},
    5: {"group": 0.995, "channel": 0.99, "tensor": 0.97},
    6: {"group": 0.998, "channel": 0.997, "tensor": 0.99},
    8: {"group": 0.9995, "channel": 0.9995, "tensor": 0.999},
}

# Of e4m3 and e5m2, whatever the granularity: their 3 and 2 bits of mantissa are less than 8 bits of a whole number.
MIN_COSINE_FLOAT8 = 0.998

# Unit roundoff of each scale type: how far a stored scale may be from the exact one, relatively.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# For the float32 roundings of quotient, zero point and product, in steps; their sum is under 1e-4.
SLACK = 1e-3

# Each holds a row of the file and a few pieces.
MAX_WORKERS = 4

COLUMNS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("scheme", pa.string()),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("cosine", pa.float64()),
        pa.field("min_cosine", pa.float64()),
        pa.field("sqnr_db", pa.float64()),
        pa.field("max_error", pa.float64()),
        pa.field("max_steps", pa.float64()),
        pa.field("problem", pa.string()),
    ]
)


class Finding(NamedTuple):
    """What was found of one tensor; the fields are the columns of a report's table."""

    name: str
    action: str
    scheme: str | None
    dtype: str
    shape: tuple[int, ...]
    cosine: float | None = None
    min_cosine: float | None = None
    sqnr_db: float | None = None
    max_error: float | None = None
    max_steps: float | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify_checkpoint`: `findings`, worst first, of every tensor of either checkpoint.

    path, against: the two checkpoints
    findings: those with a problem first, then by cosine from the lowest; `action` is quantized, kept, missing,
        extra, or omitted by a format whose readers do without. The figures of a tensor that is not quantized are null
    seconds: what it took
    """

    path: Path
    against: Path
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def table(self) -> pa.Table:
        """The findings as Arrow, with the columns of `COLUMNS`."""
        return pa.Table.from_pylist([f._asdict() for f in self.findings], COLUMNS)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tensors that have a problem."""
        return tuple(f.name for f in self.findings if f.problem is not None)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts of tensors, the worst cosine and its tensor, seconds."""
        cosines = [(f.cosine, f.name) for f in self.findings if f.cosine is not None]
        worst = min(cosines, key=lambda c: (not math.isnan(c[0]), c[0]), default=(None, None))
        return {
            "n_tensors": len(self.findings),
            "n_quantized": len(cosines),
            "n_failed": len(self.failed),
            "worst_cosine": worst[0],
            "worst_tensor": worst[1],
            "seconds": self.seconds,
        }

    @property
    def sentence(self) -> str:
        """The result in words, with the first problems."""
        if not self.failed:
            return f"{self.path}: all {len(self.findings)} tensors agree with {self.against}"
        problems = [f"{f.name}: {f.problem}" for f in self.findings if f.problem is not None]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        return (
            f"{self.path}: {len(problems)} of {len(self.findings)} tensors do not agree with {self.against}. "
            f"{'; '.join(problems[:3])}{more}"
        )

    def check(self) -> None:
        """Raise VerifyError, with the sentence, where a tensor has a problem."""
        if self.failed:
            raise VerifyError(self.sentence)


def verify_checkpoint(
    dst: str | Path,
    against: str | Path,
    *,
    min_cosine: float | None = None,
    within_step: bool = True,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare the quantized checkpoint `dst` with the float checkpoint `against` it was made from.

    min_cosine: the least cosine of a quantized tensor; by default `MIN_COSINE` of its scheme
    within_step: every weight must also be within half a step of its group, and what the stored scale is off, as
        min-max quantization promises; with a grid other than int it must be what the scheme makes of the original.
        This finds a single wrong scale or code, which no cosine shows. Turn it off for checkpoints that were quantized
        in another way
    device, threads: as in `quantize`; the figures do not depend on them
    progress: called with (bytes done, bytes in all, tensor name) of `against`

    A quantized tensor is decoded to float32 and compared in float64, in one fixed order: cosine, SQNR (decibels),
    largest absolute error, and largest error in steps (a step is the scale of a weight's group). A kept tensor must be
    the original one bit for bit. Missing, extra and renamed tensors, and other dtypes or shapes, are problems.
    Memory: four rows of the file (16 MiB), and a few pieces of 4 MiB for each, however large the model.

        >>> import tempfile, safetensors.numpy
        >>> from arrowquant_gpu import quantize_checkpoint
        >>> folder = Path(tempfile.mkdtemp())
        >>> weights = {"fc.weight": np.eye(64, dtype=np.float32), "fc.bias": np.ones(64, np.float32)}
        >>> _ = safetensors.numpy.save_file(weights, folder / "m.safetensors")
        >>> _ = quantize_checkpoint(folder / "m.safetensors", folder / "m.parquet", "int8_g32", device="cpu")
        >>> report = verify_checkpoint(folder / "m.parquet", folder / "m.safetensors", device="cpu")
        >>> [(f.name, f.action, f.problem) for f in report.findings]
        [('fc.weight', 'quantized', None), ('fc.bias', 'kept', None)]
        >>> report.check()

    Raises SourceError for a checkpoint that cannot be read, InputError (min_cosine) and DeviceError. What the
    comparison finds is in the report; `VerifyReport.check` raises it.
    """
    start = time.perf_counter()
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise InputError(f"min_cosine {min_cosine}: a cosine is from -1 to 1")
    quantized = open_quantized(dst)
    original = in_parts(open_checkpoint(against), quantized.format)
    done, total = 0, sum(info.n_bytes for info in original.tensors.values())
    omitted: tuple[str, ...] = getattr(quantized, "omitted", ())
    findings = list(_unmatched(quantized.entries, original.tensors, omitted))
    common = [name for name in quantized.entries if name in original.tensors]
    compare = _Compare(quantized, original, get_backend(device, threads), min_cosine, within_step, threading.Lock())
    # Tensors side by side, each in one thread and in its own order: the figures do not depend on the threads.
    with ThreadPoolExecutor(min(MAX_WORKERS, threads or os.cpu_count() or 1), thread_name_prefix="verify") as pool:
        try:
            for name, found in zip(common, pool.map(compare.tensor, common), strict=True):
                findings.append(found)
                done += original.tensors[name].n_bytes
                if progress is not None:
                    progress(done, total, name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    findings.sort(key=_badness)
    return VerifyReport(quantized.path, original.path, tuple(findings), time.perf_counter() - start)


def _badness(f: Finding) -> tuple[bool, float, str]:
    cosine = 2.0 if f.cosine is None else f.cosine
    return f.problem is None, -2.0 if math.isnan(cosine) else cosine, f.name


def _finding(action: str, info: TensorInfo, scheme: Scheme | None = None, problem: str | None = None) -> Finding:
    return Finding(info.name, action, None if scheme is None else scheme.id, info.dtype, info.shape, problem=problem)


def _unmatched(
    entries: Mapping[str, Entry], tensors: Mapping[str, TensorInfo], omitted: Collection[str]
) -> Iterator[Finding]:
    """Tensors that only one side has. Where both sides lack one of the same kind, the names may have changed."""
    missing = [info for name, info in tensors.items() if name not in entries and name not in omitted]
    extra = [entry for name, entry in entries.items() if name not in tensors]
    first_missing = {_kind(info): info.name for info in reversed(missing)}
    first_extra = {_kind(entry.info): entry.info.name for entry in reversed(extra)}
    for name in omitted:
        if name in tensors:
            yield _finding("omitted", tensors[name])
    for info in missing:
        yield _finding("missing", info, None, f"it is missing{_renamed(first_extra.get(_kind(info)))}")
    for entry in extra:
        problem = f"the original has no such tensor{_renamed(first_missing.get(_kind(entry.info)))}"
        yield _finding("extra", entry.info, entry.scheme, problem)


def _kind(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _renamed(alike: str | None) -> str:
    return "" if alike is None else f"; {alike} has its dtype and shape, was it renamed?"


def _text(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else str(list(value))


@dataclass(frozen=True, slots=True)
class _Compare:
    """Two checkpoints and how they are compared. A backend computes for one thread at a time."""

    checkpoint: QuantizedCheckpoint
    original: Checkpoint
    backend: Backend
    min_cosine: float | None
    within_step: bool
    lock: threading.Lock

    def tensor(self, name: str) -> Finding:
        """The finding for a tensor that both checkpoints have."""
        entry, info = self.checkpoint.entries[name], self.original.tensors[name]
        for what, got, want in (("dtype", entry.info.dtype, info.dtype), ("shape", entry.info.shape, info.shape)):
            if got != want:
                action = "kept" if entry.scheme is None else "quantized"
                problem = f"its {what} is {_text(got)}, the original's {_text(want)}"
                return _finding(action, entry.info, entry.scheme, problem)
        return self._kept(entry) if entry.scheme is None else self._quantized(entry, entry.scheme)

    def _kept(self, entry: Entry) -> Finding:
        """Bit for bit."""
        name = entry.info.name
        want = self.original.view(name).reshape(-1)
        n_differ, first = 0, -1
        for at, piece in pieces(self.checkpoint, name):
            assert isinstance(piece, np.ndarray)
            differ = np.flatnonzero(piece.view(np.uint8) != want[at : at + piece.size].view(np.uint8))
            if differ.size and first < 0:
                first = at + int(differ[0]) // piece.itemsize
            n_differ += differ.size
        problem = None if first < 0 else f"{n_differ} of its bytes are not the original's, the first in element {first}"
        return _finding("kept", entry.info, None, problem)

    def _quantized(self, entry: Entry, scheme: Scheme) -> Finding:
        """Cosine, SQNR, largest error, and largest error in steps."""
        name = entry.info.name
        want = self.original.view(name).reshape(-1)
        figures, steps, over = Figures(), 0.0, -1
        # Where something is not finite, its error in steps is not either.
        with np.errstate(all="ignore"):
            for at, piece in pieces(self.checkpoint, name):
                assert isinstance(piece, QuantizedTensor)
                decoded = np.empty(piece.shape, np.float32)
                with self.lock:
                    parts = piece.packed, piece.scales, piece.zeros
                    ops.dequantize_rows(*parts, scheme, decoded, backend=self.backend, name=name)
                x = divided = want[at : at + decoded.size].reshape(decoded.shape)
                divisors = columns_of(entry, at, decoded.shape[1])
                if divisors is not None:
                    # Steps are of the weights that were rounded.
                    divided = np.empty(decoded.shape, np.float32)
                    convert(x, divisors, divided)
                if scheme.family == "int":
                    in_steps, excess = steps_off(divided, decoded, piece)
                else:
                    in_steps = excess = self._off(divided, decoded, piece).astype(np.float64)
                recover(decoded, divisors)
                figures.add(x, decoded)
                steps = float(np.maximum(steps, in_steps.max(initial=0)))
                bad = np.flatnonzero(~(excess <= 0))
                if bad.size and over < 0:
                    over = at + int(bad[0]) // excess.shape[1] * piece.shape[1]
        return self._judged(entry, scheme, figures, steps, over)

    def _off(self, original: NDArray[Any], decoded: NDArray[np.float32], q: QuantizedTensor) -> NDArray[np.float32]:
        """How far decoded weights [rows, n] are from what the scheme makes of the original, or 0 without `within_step`.

        Infinite where either is not finite.
        """
        is_finite = np.isfinite(to_float32(original)) & np.isfinite(decoded)
        if not self.within_step or not is_finite.all():
            return np.where(is_finite, np.float32(0), np.float32(np.inf))
        shape, scheme = (decoded.shape[0], decoded.shape[1]), q.scheme
        packed, scales, zeros = np.empty(scheme.packed_shape(shape), np.uint8), q.scales, q.zeros
        expected = np.empty(shape, np.float32)
        with self.lock:
            options: dict[str, Any] = {"backend": self.backend, "name": None}
            if scheme.granularity == "tensor":
                ops.encode_rows(original, scheme, scales, zeros, packed, **options)
            else:
                scales = np.empty(scheme.scales_shape(shape), DTYPES[scheme.scale_storage].numpy)
                if zeros is not None and scheme.scale_rule != "global":
                    zeros = np.empty_like(zeros)
                ops.quantize_rows(original, scheme, packed, scales, zeros, **options)
            if getattr(self.checkpoint, "scales_are_rounded", False):
                # The codes are judged here, which were made with the exact scales, and the scales by the cosine.
                scales = q.scales
            ops.dequantize_rows(packed, scales, zeros, scheme, expected, **options)
        off: NDArray[np.float32] = np.abs(decoded - expected)  # what is not finite stays so
        return off

    def _judged(self, entry: Entry, scheme: Scheme, figures: Figures, steps: float, over: int) -> Finding:
        """The finding for what was measured; `over` is the first weight of a row that is too far off, or -1.

        `steps` is the largest error in steps, of another family than int what `_off` gives.
        """
        least = least_cosine(scheme) if self.min_cosine is None else self.min_cosine
        row = over // max(1, rows_and_length(entry.info.shape)[1])
        is_int = scheme.family == "int"
        found = _finding("quantized", entry.info, scheme)._replace(
            min_cosine=least, max_steps=steps if is_int else None
        )
        if not math.isfinite(steps):
            problem = f"row {row} is not finite, in the original or decoded"
            return found._replace(cosine=math.nan, sqnr_db=-math.inf, max_error=math.inf, problem=problem)
        found = found._replace(cosine=figures.cosine, sqnr_db=figures.sqnr_db, max_error=figures.max_error)
        if figures.cosine < least:
            return found._replace(problem=f"its cosine {figures.cosine:.6f} is under {least}")
        if not self.within_step or over < 0:
            return found
        if not is_int:
            return found._replace(problem=f"row {row} is not what {scheme.id} makes of the original")
        problem = f"row {row} has a weight further off than rounding explains (largest: {steps:.3g} steps)"
        return found._replace(problem=problem)


def least_cosine(scheme: Scheme) -> float:
    """The least cosine accepted by default.

    >>> least_cosine(Scheme.parse("int4_g128")), least_cosine(Scheme.parse("q4_k"))
    (0.98, 0.98)
    """
    bits, granularity = min(scheme.bits, 8), "group" if scheme.granularity == "block" else scheme.granularity
    return MIN_COSINE_FLOAT8 if scheme.grid in ("e4m3", "e5m2") else MIN_COSINE[bits][granularity]


def steps_off(
    original: NDArray[Any], decoded: NDArray[np.float32], q: QuantizedTensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Largest error of each group in steps (its scale), and by how much that is over what min-max allows.

    A code is at most half a step off, and clamping adds what the stored scale is off over the group's range of k
    steps (k = levels / 2 symmetric, levels asymmetric): max(u, tiny / 2 scale) * k, with u the scale type's unit
    roundoff and tiny its smallest value, the spacing of subnormal scales. Both are [rows, groups]; (1, 1) for
    granularity tensor.
    """
    error = np.abs(to_float32(original) - decoded)
    scheme, scales = q.scheme, q.scales.astype(np.float64)
    if error.size == 0:
        return np.zeros(scales.shape), np.zeros(scales.shape)
    if scheme.granularity == "tensor":
        largest = error.max(keepdims=True)
    else:
        largest = np.maximum.reduceat(error, np.arange(0, error.shape[1], scheme.group_length(error.shape[1])), axis=1)
    in_steps = largest / scales
    k = scheme.n_levels / 2 if scheme.symmetric else scheme.n_levels
    inexact = np.maximum(ROUNDOFF[scheme.scale_dtype], TINY[scheme.scale_dtype] / (2 * scales))
    return in_steps, in_steps - (0.5 + SLACK + k * inexact)
