"""`Widths` and `revise`: the width of each tensor by what is measured of it, before anything is written.

docs/widths.md says in words what is measured and what follows from it.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import models, ops, reference, trace
from ..backends import Backend, get_backend
from ..dtypes import DTYPES
from ..engine import Progress
from ..engine.converted import convert, divisors_of, recover
from ..engine.figures import Figures
from ..engine.interrupts import no_interrupt
from ..engine.ring import RESERVE, anonymous_bytes
from ..errors import FormatError, InputError, QualityError, SchemeError
from ..formats import Checkpoint, Diffusion, Entry, Sink
from ..formats.diffusion_columns import from_json, to_json
from ..formats.pieces import Piece
from ..reference import Findings
from ..schemes import Scheme, rows_and_length
from .plan import Measured, Plan, planned
from .policy import RAISED

# A tensor whose cosine is too low gets the next of these widths that is wider than its own.
LADDER = (2, 4, 8)
# The width that an entropy under the bound calls for; the first row that fits.
ENTROPY_BITS = ((0.5, 8), (0.7, 4), (math.inf, 2))
N_BINS = 256

# Weights that are measured at a time; a part of a row that is longer comes whole, as it does in a run.
BLOCK_WEIGHTS = 1 << 20
# What a thread holds: codes, decoded weights, and pieces of both as float64.
_WORKER_BYTES = 48 << 20
# More than the memory bandwidth of a socket feeds.
MAX_WORKERS = 32

_KEPT = 99


@dataclass(frozen=True, slots=True)
class Widths:
    """How each tensor gets its width; what a scheme asks for is where it begins.

    min_accuracy: the least cosine of a quantized tensor to its original, over 0 and up to 1. One that is under it gets
        the next width of `LADDER`; under it at 8 bits too, it is kept. None measures nothing
    entropy: begin with the width that the entropy of the tensor's values calls for (`ENTROPY_BITS`), in place of the
        width that the scheme asks for
    sensitive: "keep" leaves embeddings, output heads, routers and the like in float, "raise" quantizes those that are
        matrices with 8 bits
    fail_fast: a tensor under min_accuracy is an error

        >>> Widths(min_accuracy=0.65).is_measured, Widths().is_measured
        (True, False)

    Raises InputError for a min_accuracy that is no such cosine, and for another word.
    """

    min_accuracy: float | None = None
    entropy: bool = False
    sensitive: Literal["keep", "raise"] = "keep"
    fail_fast: bool = False

    def __post_init__(self) -> None:
        if self.min_accuracy is not None and not 0 < self.min_accuracy <= 1:
            raise InputError(f"min_accuracy {self.min_accuracy}: a least cosine is over 0 and up to 1")
        if self.sensitive not in ("keep", "raise"):
            raise InputError(f"sensitive {self.sensitive!r}: choose keep or raise")
        if self.fail_fast and self.min_accuracy is None:
            raise InputError("fail_fast: it needs a min_accuracy under which to fail")

    @property
    def is_measured(self) -> bool:
        """Whether weights must be read to decide."""
        return self.min_accuracy is not None or self.entropy


def revise(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    widths: Widths,
    *,
    devices: Sequence[str] = ("cpu",),
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan with the widths that its tensors need, each decision in the entry's reason.

    Every tensor that is to be quantized is read, quantized with the sink's scheme for the width, decoded and compared,
    block by block; nothing is written. Tensors that serving engines fuse get one width: the widest that one of them
    needs. A tensor whose scheme a rule of the policy names keeps it. The plan does not depend on devices and threads.

    devices: names as in `pick_device`, which share the tensors
    threads: of the CPU; by default all cores
    memory_limit: as in `quantize_checkpoint`; bounds the threads
    progress: called with (bytes done, bytes in all, tensor name) of the tensors that are measured

    Raises SchemeError for schemes other than int; QualityError where fail_fast says so, and where no tensor reaches
    min_accuracy; NonFiniteError, ScaleOverflowError and DeviceError as a run does.
    """
    if not widths.is_measured:
        return plan
    if plan.mix is not None or plan.scheme.grid != "int":
        asked = plan.scheme.id if plan.mix is None else plan.mix.name
        raise SchemeError(f"{asked} has one width; measured widths begin with an int scheme, for example int4_g128")
    quantized = {e.info.name: e for e in plan.entries if e.scheme is not None and e.info.name not in plan.fixed}
    model = models.find(source.config, source.tensors)
    units = [[quantized[name] for name in group] for group in model.fused_groups(quantized)]
    work = _Work(plan.scheme, source, sink, widths)
    backends = _backends(devices, threads, memory_limit)
    done, total = 0, sum(e.info.n_bytes for e in quantized.values())
    chosen: dict[str, _Choice] = {}
    with ThreadPoolExecutor(backends.qsize(), thread_name_prefix="arrowquant-widths") as pool:
        try:
            with no_interrupt():
                # In the order of the plan, so that of several errors it is always the same one that is raised.
                results = pool.map(lambda unit: work.choose(unit, backends), units)
            for unit, choices in zip(units, results, strict=True):
                for entry, choice in zip(unit, choices, strict=True):
                    chosen[entry.info.name] = choice
                    done += entry.info.n_bytes
                    if progress is not None:
                        progress(done, total, entry.info.name)
        except BaseException:
            work.is_stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    entries = [chosen[e.info.name].entry if e.info.name in chosen else e for e in plan.entries]
    measured = {name: choice.measured for name, choice in chosen.items()}
    if not any(e.scheme for e in entries):
        raise _none_left(plan, entries, measured, widths)
    return planned(plan, source, sink, entries, measured)


class _Choice(NamedTuple):
    entry: Entry
    measured: Measured


class _Part:
    """One tensor of those that get a width together: what is known of it so far."""

    def __init__(self, entry: Entry) -> None:
        assert entry.scheme is not None
        self.entry, self.name = entry, entry.info.name
        # The width that it needs for its own sake.
        self.need = entry.scheme.bits
        self.why: list[str] = []
        self.entropy: float | None = None
        self.accuracy: float | None = None

    def choice(self, scheme: Scheme | None, parts: Sequence[_Part]) -> _Choice:
        """What becomes of it, together with `parts`."""
        bits = _KEPT if scheme is None else scheme.bits
        why = list(self.why)
        if self.need < bits:
            widest = next(part.name for part in parts if part.need == bits)
            why.append(f"one scheme with {widest}, which is fused with it")
        reason = self.entry.reason
        if why:
            reason = "; ".join([reason, *why]) + (": kept" if scheme is None else f": {bits} bits")
        diffusion = self.entry.diffusion if scheme is not None else _undivided(self.entry.diffusion)
        entry = dataclasses.replace(self.entry, scheme=scheme, reason=reason, diffusion=diffusion)
        return _Choice(entry, Measured(self.accuracy, self.entropy))


def _undivided(diffusion: Diffusion | None) -> Diffusion | None:
    """The same of a tensor that is kept: what is copied is not divided."""
    if diffusion is None or diffusion.divisors is None:
        return diffusion
    spatial = diffusion.spatial
    if spatial is not None:
        spatial = to_json(dataclasses.replace(from_json(spatial), divisors=None, reason="kept in float"))
    return dataclasses.replace(diffusion, divisors=None, spatial=spatial)


class _Work:
    """One revision: what its threads share."""

    def __init__(self, scheme: Scheme, source: Checkpoint, sink: Sink, widths: Widths) -> None:
        self.scheme, self.source, self.sink, self.widths = scheme, source, sink, widths
        self.is_stopped = threading.Event()

    def choose(self, unit: Sequence[Entry], backends: queue.SimpleQueue[Backend]) -> list[_Choice]:
        """One width for entries that are fused (or for one that is not), with a backend that nobody else uses."""
        backend = backends.get()
        try:
            return self._climb([_Part(entry) for entry in unit], backend)
        finally:
            backends.put(backend)

    def _climb(self, parts: list[_Part], backend: Backend) -> list[_Choice]:
        if self.widths.entropy:
            for part in parts:
                # Those that were raised have the widest already, for another reason than their values.
                if part.entry.reason not in RAISED.values():
                    part.entropy = self._entropy(part.entry)
                    part.need = next(bits for bound, bits in ENTROPY_BITS if part.entropy < bound)
                    part.why.append(f"entropy {part.entropy:.6f}")
        first = max(part.need for part in parts)
        rungs = [first, *(bits for bits in LADDER if bits > first)]
        for bits, wider in zip(rungs, [*rungs[1:], _KEPT], strict=True):
            schemes = self._schemes(parts, bits, wider)
            if schemes is not None and self._are_good(parts, schemes, wider, backend):
                return [part.choice(scheme, parts) for part, scheme in zip(parts, schemes, strict=True)]
        return [part.choice(None, parts) for part in parts]

    def _schemes(self, parts: Sequence[_Part], bits: int, wider: int) -> list[Scheme] | None:
        """What the sink makes of this width; None where it refuses a part, which then needs the next one."""
        schemes = []
        for part in parts:
            try:
                schemes.append(self.sink.scheme_for(part.entry.info, dataclasses.replace(self.scheme, bits=bits)))
            except FormatError as e:
                part.need = wider
                part.why.append(f"not with {bits} bits: {e}")
        return schemes if len(schemes) == len(parts) else None

    def _are_good(self, parts: Sequence[_Part], schemes: Sequence[Scheme], wider: int, backend: Backend) -> bool:
        """Measure all parts; those that are too far off need the next width."""
        least, are_good = self.widths.min_accuracy, True
        if least is None:
            return True
        for part, scheme in zip(parts, schemes, strict=True):
            part.accuracy = self._cosine(dataclasses.replace(part.entry, scheme=scheme), scheme, backend)
            # The cosine of weights that decode to infinities is no number.
            if part.accuracy >= least:
                continue
            if self.widths.fail_fast:
                raise QualityError(part.name, part.accuracy, least, f"{scheme.bits} bits ({scheme.id})")
            are_good, part.need = False, wider
            part.why.append(f"cosine {part.accuracy:.6f} at {scheme.bits} bits is under {least:g}")
        return are_good

    def _cosine(self, entry: Entry, scheme: Scheme, backend: Backend) -> float:
        """Of the weights that `scheme` gives, decoded, to the original ones: what `--validate` would find."""
        info, figures, found = entry.info, Figures(), Findings()
        length, groups = rows_and_length(info.shape)[1], scheme.scales_shape(info.shape)[1]
        with trace.span("plan", info.name, info.n_bytes):
            solved = None
            if scheme.granularity == "tensor":
                blocks = (block.weights for block in self._blocks(entry))
                solved = ops.tensor_scale(blocks, scheme, backend=backend, name=info.name, shape=info.shape)
            for block in self._blocks(entry):
                shape = block.weights.shape
                packed = np.empty(scheme.packed_shape(shape), np.uint8)
                if solved is not None:
                    scales, zeros = solved
                    ops.encode_rows(block.weights, scheme, scales, zeros, packed, backend=backend)
                else:
                    scales = np.empty(scheme.scales_shape(shape), DTYPES[scheme.scale_dtype].numpy)
                    zeros = None if scheme.symmetric else np.empty(scales.shape, np.uint8)
                    part = ops.quantize_rows(block.weights, scheme, packed, scales, zeros, backend=backend)
                    first_scale = block.row * groups + block.column // scheme.group_length(length)
                    found = ops.merge(found, part, block.row * length + block.column, first_scale)
                # Once something was found the tensor is only looked through: the error counts all of it.
                if found.first >= 0 or found.first_overflow >= 0:
                    continue
                decoded = np.empty(shape, np.float32)
                ops.dequantize_rows(packed, scales, zeros, scheme, decoded, backend=backend)
                recover(decoded, block.divisors)
                figures.add(block.original, decoded)
            ops.check(found, scheme, name=info.name, shape=info.shape)
        return figures.cosine

    def _entropy(self, entry: Entry) -> float:
        """Of a histogram of the values over `N_BINS` equal bins from the lowest to the highest, from 0 to 1.

        -sum(p log2 p) / log2(N_BINS), p being the shares of the bins; 0 where all values are one.
        """
        with trace.span("plan", entry.info.name, entry.info.n_bytes):
            low, high = np.inf, -np.inf
            for block in self._blocks(entry):
                values = reference.to_float32(block.weights)
                # NaN stays NaN, whatever it is compared with later.
                low, high = np.minimum(low, values.min()), np.maximum(high, values.max())
            if not math.isfinite(low) or not math.isfinite(high):
                self._refuse(entry)
            if low == high:
                return 0.0
            counts = np.zeros(N_BINS, np.int64)
            for block in self._blocks(entry):
                bins = reference.to_float32(block.weights).astype(np.float64)
                bins -= low
                bins *= N_BINS / (float(high) - float(low))
                # The highest value closes the last bin.
                found = np.minimum(bins.astype(np.intp), N_BINS - 1).reshape(-1)
                counts += np.bincount(found, minlength=N_BINS)
        shares = counts[counts > 0] / counts.sum()
        return float(-np.sum(shares * np.log2(shares)) / math.log2(N_BINS))

    def _refuse(self, entry: Entry) -> None:
        """Raise NonFiniteError for all that is not finite in a tensor."""
        found, length = Findings(), rows_and_length(entry.info.shape)[1]
        for block in self._blocks(entry):
            part = reference.find(reference.to_float32(block.weights))
            found = ops.merge(found, part, block.row * length + block.column, 0)
        ops.check(found, self.scheme, name=entry.info.name, shape=entry.info.shape)

    def _blocks(self, entry: Entry) -> Iterator[_Block]:
        """A tensor in order, in blocks of whole rows, or parts of a row as the sink cuts them."""
        for piece in self.sink.pieces(entry):
            step = max(1, BLOCK_WEIGHTS // max(1, piece.columns))
            for row in range(piece.row, piece.row + piece.rows, step):
                if self.is_stopped.is_set():
                    raise InterruptedError("the revision was stopped")
                rows = min(step, piece.row + piece.rows - row)
                yield block_of(self.source, piece._replace(row=row, rows=rows))


class _Block(NamedTuple):
    """Weights [rows, columns] from `row` and `column` on: as they are in the source, and as they are quantized.

    divisors: what `original` was divided by, and what is decoded must be multiplied by, for each column; or None
    """

    row: int
    column: int
    original: NDArray[Any]
    weights: NDArray[Any]
    divisors: NDArray[np.float32] | None


def block_of(source: Checkpoint, piece: Piece) -> _Block:
    """The weights of a piece, by its row and column alone; views of the source unless they are divided."""
    info, divisors = piece.entry.info, divisors_of(piece)
    rows, columns = slice(piece.row, piece.row + piece.rows), slice(piece.column, piece.column + piece.columns)
    original = source.view(info.name).reshape(rows_and_length(info.shape))[rows, columns]
    weights = original
    if divisors is not None:
        weights = np.empty(original.shape, np.float32)
        convert(original, divisors, weights)
    return _Block(piece.row, piece.column, original, weights, divisors)


def _backends(devices: Sequence[str], threads: int | None, memory_limit: int | None) -> queue.SimpleQueue[Backend]:
    """Backends to be taken by one thread each: of a GPU one, of the CPU as many as threads, each with one thread."""
    room = None if memory_limit is None else max(0, memory_limit - anonymous_bytes() - RESERVE) // _WORKER_BYTES
    backends: queue.SimpleQueue[Backend] = queue.SimpleQueue()
    for name in devices:
        n = 1 if name.startswith("cuda") else min(getattr(get_backend(name, threads), "threads", 1), MAX_WORKERS)
        if room is not None:
            n = max(1, min(n, room // len(devices)))
        for _ in range(n):
            backends.put(get_backend(name, 1 if n > 1 else threads))
    return backends


def _none_left(
    plan: Plan, entries: Sequence[Entry], measured: Mapping[str, Measured], widths: Widths
) -> QualityError | FormatError:
    """The error for a plan of which every tensor would be kept."""
    accuracies = {name: m.accuracy for name, m in measured.items() if m.accuracy is not None}
    if not accuracies or widths.min_accuracy is None:
        reason = next(e.reason for e in entries if e.info.name in measured)
        return FormatError(f"{plan.format} can carry none of the {len(measured)} tensors to quantize: {reason}")
    best = max(accuracies, key=lambda name: (not math.isnan(accuracies[name]), accuracies[name]))
    what = f"the widest codes that it can have; it is the best of {len(measured)} tensors, all of which would be kept"
    return QualityError(best, accuracies[best], widths.min_accuracy, what)
