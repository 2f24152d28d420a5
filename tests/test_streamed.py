"""Loads through the slots of a streamed device: the bytes of the reference, whatever runs late, fails or is full."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu import ops, reference, trace
from arrowquant_gpu.dtypes import DTYPES, WEIGHT_DTYPES
from arrowquant_gpu.engine import Load, Result, Sizes, Solved
from arrowquant_gpu.engine.loads import sizes
from arrowquant_gpu.engine.streamed import StreamedDevice, Streams
from arrowquant_gpu.errors import DeviceError, DeviceMemoryError, InputError, SourceError
from arrowquant_gpu.formats import Entry, TensorInfo
from arrowquant_gpu.formats import pieces as pieces_module
from arrowquant_gpu.formats.pieces import Cut, Piece, pieces
from arrowquant_gpu.schemes import Scheme, rows_and_length

from .bitwise import assert_bitwise_equal
from .cases import CONTENTS
from .simulated_streams import SimulatedStreams

FILE = Path("weights.safetensors")
SLOT_BYTES = 1 << 15
PIECE_BYTES = 1 << 13


class BytesReader:
    """Reads from memory into the buffer, a few bytes from its start; `fails` makes the next read raise."""

    name = "bytes"
    slack: int | None = 63

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.fails = data, False

    def read(self, load: Load, buffer: np.ndarray | None) -> np.ndarray:
        if self.fails:
            self.fails = False
            raise SourceError(f"{load.file}: a bad sector")
        assert buffer is not None
        start = (load.offset - buffer.ctypes.data) % 64
        part = buffer[start : start + load.n_bytes]
        part[...] = self.data[load.offset : load.offset + load.n_bytes]
        return part

    def expect(self, load: Load) -> None: ...

    def close(self) -> None: ...


class MappedReader(BytesReader):
    """Gives its own memory."""

    slack = None

    def read(self, load: Load, buffer: np.ndarray | None) -> np.ndarray:
        assert buffer is None
        part = self.data[load.offset : load.offset + load.n_bytes]
        part.flags.writeable = False
        return part


class DirectReader(BytesReader):
    """Reads into device memory where it is asked to, and counts that."""

    device_slack = 4096
    n_direct = 0

    def read_device(self, load: Load, buffer: Any) -> Any:
        assert buffer.nbytes >= load.n_bytes + self.device_slack
        self.n_direct += 1
        start = load.offset % 4096
        part = buffer[start : start + load.n_bytes]
        part.contents[...] = self.data[load.offset : load.offset + load.n_bytes]
        return part


def weights(rng: random.Random, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Finite weights; some of float32 have bits of any finite float."""
    content = rng.choice(["normal", "ties", "one_hot", "wild", "zeros", "negative"])
    n = int(np.prod(shape, dtype=np.int64))
    x = CONTENTS[content](np.random.default_rng(rng.randrange(1 << 32)), n)
    target = DTYPES[dtype].numpy
    if target.kind in "iu":
        return np.random.default_rng(n).integers(0, 100, n).astype(target).reshape(shape)
    info = ml_dtypes.finfo(target)
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(x, np.float32(info.min), np.float32(info.max)).astype(target).reshape(shape)


class Model:
    """Tensors that follow each other in one file, with or without gaps, and what the reference makes of them."""

    def __init__(
        self, tensors: Sequence[tuple[tuple[int, ...], str, str | None]], seed: int, *, start: int = 0, gap: int = 0
    ) -> None:
        rng = random.Random(seed)
        arrays = [weights(rng, shape, dtype) for shape, dtype, _ in tensors]
        self.entries, self.x, at = [], {}, start
        for i, ((shape, dtype, scheme), x) in enumerate(zip(tensors, arrays, strict=True)):
            info = TensorInfo(f"t{i}", dtype, shape, FILE, at, x.nbytes)
            self.entries.append(Entry(info, None if scheme is None else Scheme.parse(scheme), ""))
            self.x[info.name] = x
            at += x.nbytes + gap
        self.data = np.full(at + 64, 0xEE, np.uint8)
        for entry in self.entries:
            x = self.x[entry.info.name]
            self.data[entry.info.offset : entry.info.offset + x.nbytes] = x.reshape(-1).view(np.uint8)
        self.pieces = [p for e in self.entries for p in pieces(e, Cut(within_rows=True))]
        self.smallest = Sizes(*(max(column) for column in zip(*map(sizes, self.pieces), strict=True)))
        self.solved: dict[str, Solved] = {}
        for entry in self.entries:
            if entry.scheme is not None and entry.scheme.needs_range:
                x = self.x[entry.info.name].reshape(rows_and_length(entry.info.shape))
                low, high = bounds(x)
                self.solved[entry.info.name] = ops.solve_tensor(
                    low, high, entry.scheme, name=entry.info.name, shape=entry.info.shape
                )

    def part(self, piece: Piece) -> np.ndarray:
        """The weights of a piece, or its bytes."""
        x = self.x[piece.entry.info.name]
        if piece.entry.scheme is None:
            return x.reshape(-1).view(np.uint8)[piece.column : piece.column + piece.n_bytes]
        rows = x.reshape(rows_and_length(piece.entry.info.shape))
        return rows[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns]

    def loads(self, most: Sizes) -> Iterator[Load]:
        """The passes that the engine would ask for, in the order of the file."""
        for is_range in (True, False):
            group: list[Piece] = []
            for piece in self.pieces:
                scheme = piece.entry.scheme
                if is_range and (scheme is None or not scheme.needs_range):
                    continue
                total = Sizes(*map(sum, zip(*map(sizes, [*group, piece]), strict=True)))
                is_next = not group or group[-1].offset + group[-1].n_bytes == piece.offset
                if group and not (is_next and total.source <= most.source and total.results <= most.results):
                    yield load_of(group, is_range)
                    group = []
                group.append(piece)
            if group:
                yield load_of(group, is_range)

    def check(self, load: Load, results: Iterator[Result], *, has_weights: bool = True) -> int:
        """Raise unless a load's results are those of the reference. Returns how many there were."""
        n = 0
        for piece, result in zip(load.pieces, results, strict=True):
            want, what = self.part(piece), f"{piece.entry.info.name} of {piece.entry.info.dtype} {piece.entry.scheme}"
            assert result.piece is piece
            if has_weights:
                assert_bitwise_equal(result.weights, want, f"{what}: weights")
            else:
                assert (result.weights.size, result.weights.dtype) == (0, want.dtype)
            check_result(result, load, want, self.solved, what)
            n += 1
        return n


def check_result(result: Result, load: Load, x: np.ndarray, solved: dict[str, Solved], what: str) -> None:
    scheme = result.piece.entry.scheme
    if scheme is None or load.is_range:
        assert result.codes is None
        assert result.bounds == (bounds(x) if load.is_range else None), what
        return
    assert result.codes is not None
    known = solved[result.piece.entry.info.name][1] if scheme.scale_rule == "global" else None
    packed, scales, zeros, findings = reference.quantize(x, scheme, known)
    if scheme.granularity == "tensor" and x.size:
        scale, zeros = solved[result.piece.entry.info.name]
        assert scale is not None
        scales, findings = scale, reference.Findings()
        packed = reference.encode_packed(reference.to_float32(x), scales, zeros, scheme)
    assert result.findings == findings, what
    if findings != reference.Findings():  # then the codes are not defined
        return
    assert_bitwise_equal(result.codes.packed, packed, f"{what}: packed")
    assert_bitwise_equal(result.codes.scales, scales, f"{what}: scales")
    assert (result.codes.zeros is None) == (zeros is None)
    if zeros is not None:
        assert_bitwise_equal(result.codes.zeros, zeros, f"{what}: zeros")


def bounds(x: np.ndarray) -> tuple[float, float]:
    x = reference.to_float32(x)
    return float(min(x.min(initial=0), 0) + 0), float(max(x.max(initial=0), 0) + 0)


def load_of(group: Sequence[Piece], is_range: bool = False) -> Load:
    end = group[-1].offset + group[-1].n_bytes
    return Load(FILE, group[0].offset, end - group[0].offset, tuple(group), is_range)


# A tensor of every family of grids, and of every way in which a scale comes about.
GRIDS: tuple[tuple[tuple[int, ...], str, str | None], ...] = (
    ((40, 96), "bfloat16", "mxfp4"),
    ((9, 70), "float32", "nf4_g64"),
    ((33, 96), "bfloat16", "nvfp4"),
    ((12, 35), "float16", "e4m3_tensor"),
    ((200, 20), "bfloat16", "e4m3_b128"),
    ((7,), "float32", None),
    ((5, 96), "float32", "affine4_g32"),
    ((11, 64), "float64", "q8_0"),
    ((3, 1024), "bfloat16", "q6_k"),
    ((61, 13), "float32", "e5m2_channel"),
)
MIXED: tuple[tuple[tuple[int, ...], str, str | None], ...] = (
    ((40, 96), "bfloat16", "int4_g32_asym"),
    ((7,), "float32", None),
    ((9, 33), "float16", "int3_g5_asym_bf16"),
    ((3, 20000), "bfloat16", "int4_g128"),  # rows that are cut
    ((61, 130), "float32", "int8_channel_asym_f16"),
    ((5, 7), "float64", "int4_g4"),
    ((50, 70), "float8_e4m3fn", "int5_g16"),
    ((2, 3, 35), "float8_e5m2", "int6_tensor_asym"),
    ((0, 8), "float16", "int4_g8"),
    ((3, 0), "float32", "int4_tensor"),
    ((), "float32", "int2_channel"),
    ((90, 100), "bfloat16", "int4_tensor_bf16"),
    ((30000,), "int8", None),
    ((120, 64), "float32", "int8_tensor_asym_f16"),
    ((3, 11), "int16", "int4_g16_asym"),
    ((0,), "int32", None),
    ((17, 5), "bfloat16", "int2_g5"),
)


def random_tensors(seed: int, n: int = 12) -> list[tuple[tuple[int, ...], str, str | None]]:
    """Tensors of any scheme and dtype, small ones mostly."""
    rng = random.Random(seed)
    tensors: list[tuple[tuple[int, ...], str, str | None]] = []
    for _ in range(n):
        shape = rng.choice([(rng.randrange(1, 40), rng.randrange(1, 200)), (rng.randrange(3), 9), (2, 9000), (1,)])
        grain = rng.choice(["group", "channel", "tensor"])
        size = rng.choice([1, 5, 16, 32, 100, 128]) if grain == "group" else None
        # The scale of some tensors would be too large for float16, and they could not be solved.
        types = ["float32", "bfloat16"] if grain == "tensor" else ["float32", "float16", "bfloat16"]
        bits, scales = rng.choice([2, 3, 4, 5, 6, 8]), rng.choice(types)
        scheme = Scheme(bits, grain, size, rng.random() < 0.5, scales).id
        dtype = rng.choice([*WEIGHT_DTYPES, *["bfloat16"] * 6, *["float32"] * 3])
        tensors.append((shape, dtype, None if rng.random() < 0.25 else scheme))
    return tensors


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", PIECE_BYTES)


def run_all(device: StreamedDevice, model: Model, *, has_weights: bool = True) -> None:
    """All loads, each by whichever slot is free, in one thread per slot; raises the first error of any."""
    loads = list(model.loads(device.slots[0].sizes))
    lock, errors, n = threading.Lock(), [], [0]

    def serve(slot: Any) -> None:
        while not errors:
            with lock:
                if not loads:
                    return
                load = loads.pop(0)
            try:
                done = model.check(load, slot.run(load, model.solved), has_weights=has_weights)
            except BaseException as e:
                errors.append(e)
                return
            with lock:
                n[0] += done

    threads = [threading.Thread(target=serve, args=(slot,)) for slot in device.slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    in_range = sum(p.entry.scheme is not None and p.entry.scheme.needs_range for p in model.pieces)
    assert n[0] == len(model.pieces) + in_range


def device_over(streams: Streams, model: Model, n_slots: int = 1, reader: BytesReader | None = None) -> StreamedDevice:
    return StreamedDevice(streams, reader or BytesReader(model.data), model.smallest, SLOT_BYTES, n_slots)


@pytest.mark.parametrize("reader", [BytesReader, MappedReader])
@pytest.mark.parametrize("start", [0, 3, 8])
def test_every_kind_of_piece(start: int, reader: type[BytesReader]) -> None:
    """Starts of 3 put every piece off its element's alignment."""
    model = Model(MIXED, start, start=start)
    device = device_over(SimulatedStreams(seed=start), model, reader=reader(model.data))
    run_all(device, model)
    device.close()


@pytest.mark.parametrize("seed", range(4))
def test_every_family_of_grids(seed: int) -> None:
    model = Model(GRIDS * 2, seed, start=8 * seed)
    device = device_over(SimulatedStreams(seed=seed), model, n_slots=1 + seed)
    run_all(device, model)
    device.close()


@pytest.mark.parametrize("seed", range(6))
def test_several_slots_share_the_streams(seed: int) -> None:
    model = Model(random_tensors(seed, 30), seed, start=seed, gap=seed % 2)
    device = device_over(SimulatedStreams(seed=seed, delay=2e-4), model, n_slots=1 + seed % 4)
    run_all(device, model)
    device.close()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(300))
def test_several_slots_share_the_streams_often(seed: int) -> None:
    test_several_slots_share_the_streams(100 + seed)


def test_a_load_is_one_copy_up_and_one_down() -> None:
    """Pieces that kernels can read and that follow each other: one copy each way, whatever their number and dtype."""
    tensors = [((8, 32), "bfloat16", "int4_g32"), ((4, 16), "float32", "int8_channel_asym")] * 5
    streams, model = SimulatedStreams(), Model(tensors, 0)
    device = device_over(streams, model)
    run_all(device, model)
    assert {k: streams.calls[k] for k in ("h2d", "kernel", "d2h", "wait")} == {
        "h2d": 1, "kernel": 11, "d2h": 1, "wait": 1,
    }  # fmt: skip
    device.close()


def test_weights_may_go_straight_to_the_device() -> None:
    streams, model = SimulatedStreams(), Model([((40, 96), "bfloat16", "int4_g32_asym")] * 3, 0)
    reader = DirectReader(model.data)
    device = device_over(streams, model, reader=reader)
    run_all(device, model, has_weights=False)
    assert (reader.n_direct, streams.calls["h2d"]) == (1, 0)
    device.close()


@pytest.mark.parametrize("tensor", [((8, 9), "float8_e5m2", "int4_g3"), ((50,), "float32", None)])
def test_what_the_host_must_see_is_read_there(tensor: Any) -> None:
    streams, model = SimulatedStreams(), Model([((40, 96), "bfloat16", "int4_g32_asym"), tensor], 0)
    reader = DirectReader(model.data)
    device = device_over(streams, model, reader=reader)
    run_all(device, model)
    assert reader.n_direct == 0
    device.close()


def test_findings_come_back() -> None:
    model = Model([((40, 96), "float32", "int4_g32"), ((40, 96), "float16", "int4_tensor")], 0)
    model.x["t0"][3, 5], model.x["t1"][7, 0] = np.nan, np.inf
    for entry in model.entries:
        x = model.x[entry.info.name]
        model.data[entry.info.offset : entry.info.offset + x.nbytes] = x.reshape(-1).view(np.uint8)
    device = device_over(SimulatedStreams(), model)
    first, second = (p for p in model.pieces if p.number == 0)
    (result,) = device.slots[0].run(load_of([first]), {})
    assert (result.findings.n_nan, result.findings.first) == (1, 3 * 96 + 5)
    (result,) = device.slots[0].run(load_of([second], is_range=True), {})
    assert (result.findings.n_inf, result.findings.first, result.bounds) == (1, 7 * 96, (0.0, 0.0))
    device.close()


# ---------------------------------------------------------------------------------------------------------------------
# Failures.


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("kind", ["h2d", "kernel", "d2h", "wait"])
def test_a_failure_leaves_the_slot_usable(kind: str, n: int) -> None:
    """The work that had been enqueued is late, and must be over when the slot takes the next load."""
    model = Model(MIXED, 1, start=1, gap=1)
    streams = SimulatedStreams(seed=n, delay=5e-3, faults=[(kind, n)])
    device = device_over(streams, model)
    with pytest.raises(DeviceError, match=rf"weights.safetensors, tensor t\d+: sim:0: {kind} number {n} fails"):
        run_all(device, model)
    run_all(device, model)
    device.close()


def test_nothing_is_under_way_after_a_failure() -> None:
    model = Model([((40, 96), "bfloat16", "int4_g32")], 0)
    streams = SimulatedStreams(delay=0.05, faults=[("wait", 0)])
    device = device_over(streams, model)
    with pytest.raises(DeviceError, match="wait number 0 fails"):
        run_all(device, model)
    assert streams.n_under_way() == 0
    device.close()


def test_a_lost_device_is_an_error_and_no_hang() -> None:
    model = Model(random_tensors(5, 20), 5)
    for n in range(0, 40, 3):
        streams = SimulatedStreams(delay=1e-4, faults=[("lost", 6 + n)])  # after the allocations
        device = device_over(streams, model, n_slots=3)
        with pytest.raises(DeviceError, match="the device is lost"):
            run_all(device, model)
        device.close()


def test_a_failed_read_leaves_the_slot_usable() -> None:
    model = Model(MIXED, 2)
    device = device_over(SimulatedStreams(), model)
    device.reader.fails = True
    with pytest.raises(SourceError, match="a bad sector"):
        run_all(device, model)
    run_all(device, model)
    device.close()


def test_a_load_may_be_given_up() -> None:
    model = Model(MIXED, 3)
    device = device_over(SimulatedStreams(delay=1e-3), model)
    for load in model.loads(device.slots[0].sizes):
        results = device.slots[0].run(load, model.solved)
        next(results)
        results.close()
    run_all(device, model)
    device.close()


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def ring(streams: Streams, model: Model, **more: Any) -> StreamedDevice:
    return StreamedDevice(streams, BytesReader(model.data), model.smallest, more.pop("slot_bytes", SLOT_BYTES), **more)


def total(streams: SimulatedStreams) -> int:
    return streams.live("pinned") + streams.live("allocate")


def test_a_ring_is_freed_when_it_is_closed() -> None:
    n_threads, model, streams = threading.active_count(), Model(MIXED, 4), SimulatedStreams()
    device = ring(streams, model, n_slots=4)
    assert (len(device.slots), device.notes) == (4, ())
    run_all(device, model)
    assert total(streams) > 0
    gc.disable()
    try:
        device.close()
        assert total(streams) == 0
    finally:
        gc.enable()
    assert threading.active_count() == n_threads


@pytest.mark.parametrize("kind", ["pinned", "allocate"])
def test_a_ring_shrinks_until_it_fits(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, streams = Model(MIXED, 5), SimulatedStreams(faults=[(kind, 5), (kind, 6), (kind, 9)])
    with caplog.at_level(logging.WARNING):
        device = ring(streams, model, n_slots=16, slot_bytes=1 << 21)
    assert device.notes == (
        "sim:0: out of memory for 16 slots of 2 MiB; going on with 8 of 2 MiB",
        "sim:0: out of memory for 8 slots of 2 MiB; going on with 4 of 2 MiB",
        "sim:0: out of memory for 4 slots of 2 MiB; going on with 2 of 2 MiB",
    )
    assert [r.getMessage() for r in caplog.records] == list(device.notes)
    each = StreamedDevice(SimulatedStreams(), BytesReader(model.data), model.smallest, 1 << 21, 1)
    assert total(streams) == 2 * total(each._streams)
    run_all(device, model)
    for d in (device, each):
        d.close()
    assert total(streams) == 0


def test_slots_shrink_when_one_is_left() -> None:
    model = Model(MIXED, 6)
    streams = SimulatedStreams(memory=100_000)
    device = ring(streams, model, n_slots=2, slot_bytes=1 << 17)
    assert [note.partition("with ")[2] for note in device.notes] == [
        "1 of 0.125 MiB",
        "1 of 0.0625 MiB",
        "1 of 0.03125 MiB",
    ]
    run_all(device, model)
    device.close()


def test_too_little_memory_for_the_smallest_slot() -> None:
    model, streams = Model(MIXED, 7), SimulatedStreams(memory=20_000)
    n_threads = threading.active_count() - 3
    with pytest.raises(DeviceMemoryError, match=r"sim:0: out of memory for a single slot .* \d+ bytes"):
        ring(streams, model, n_slots=4)
    assert total(streams) == 0
    assert threading.active_count() == n_threads


@pytest.mark.parametrize("max_bytes", [150_000, 200_000, 1_000_000, 3_000_000])
def test_a_ring_stays_under_its_limit(max_bytes: int) -> None:
    model, streams = Model(MIXED, 8), SimulatedStreams()
    device = ring(streams, model, n_slots=16, max_bytes=max_bytes, slot_bytes=1 << 17)
    assert max_bytes / 2 < total(streams) <= max_bytes
    assert device.notes == ()
    assert len(device.slots) >= 4 or device.slots[0].sizes == model.smallest
    run_all(device, model)
    device.close()


def test_a_limit_that_is_too_small() -> None:
    model = Model(MIXED, 9)
    with pytest.raises(InputError, match=r"leaves 60000 bytes, and the smallest slot .* takes \d+, .*--memory-limit"):
        ring(SimulatedStreams(), model, n_slots=16, max_bytes=60_000)


# ---------------------------------------------------------------------------------------------------------------------
# Timeline.


@pytest.mark.parametrize("n_slots", [1, 4])
def test_a_timeline_shows_the_stages_overlap(n_slots: int, tmp_path: Path) -> None:
    """One slot does one thing at a time; with several, a stage works while another does."""
    model = Model([((64, 64), "float32", "int8_g64")] * 40, 0)
    n_bytes = sum(p.n_bytes for p in model.pieces)
    speeds = {"h2d": n_bytes / 0.1, "kernel": n_bytes / 0.1, "d2h": 0.3 * n_bytes / 0.1}
    device = device_over(SimulatedStreams(speeds=speeds), model, n_slots=n_slots)
    with trace.timeline(tmp_path / "t.json") as timeline:
        run_all(device, model)
    device.close()
    tracks = {name: row for name, row in timeline.summary()["tracks"].items() if name.startswith("sim:0")}
    assert set(tracks) == {"sim:0 h2d", "sim:0 kernel", "sim:0 d2h"}
    assert tracks["sim:0 h2d"]["bytes"] == n_bytes
    assert all(abs(row["busy"] - row["seconds"]) < 1e-6 for row in tracks.values()), "work overlaps in one stream"
    spans = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [s for s in spans if s["ph"] == "X" and s["cat"] in ("h2d", "kernel", "d2h")]
    overlaps = [
        (a, b)
        for a, b in itertools.permutations(spans, 2)
        if a["tid"] != b["tid"] and a["ts"] <= b["ts"] and b["ts"] + 1e-2 < a["ts"] + a["dur"]
    ]
    assert bool(overlaps) == (n_slots > 1)
