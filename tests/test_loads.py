"""Pieces cover a tensor once, loads cover the pieces once, and the queue hands them out as it says."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.engine import Load, Sizes
from arrowquant_gpu.engine.loads import ALIGNMENT, Queue, sizes
from arrowquant_gpu.formats import Entry, TensorInfo
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.pieces import Cut, Piece, pieces
from arrowquant_gpu.schemes import Scheme, rows_and_length

SCHEMES = (None, "int4_g128", "int3_g5_asym_bf16", "int8_channel", "int2_tensor_asym", "int5_g24")


def entry(name: str, shape: tuple[int, ...], scheme: str | None, *, dtype: str = "float16", file: str = "a") -> Entry:
    n_bytes = DTYPES[dtype].bits // 8
    for n in shape:
        n_bytes *= n
    return Entry(TensorInfo(name, dtype, shape, Path(file), 1000, n_bytes), scheme and Scheme.parse(scheme), "")


@given(
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
    st.sampled_from(SCHEMES),
    st.sampled_from([1, 64, 500, 4096]),
    st.sampled_from([Cut(), Cut(within_rows=True), Cut(rows=8)]),
)
def test_pieces_cover_a_tensor_once(shape: tuple[int, ...], scheme: str | None, size: int, cut: Cut) -> None:
    e = entry("w", shape, scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats_pieces, "PIECE_BYTES", size)
        found = pieces(e, cut)
    assert [p.number for p in found] == list(range(len(found)))
    assert found[0].offset == e.info.offset
    for one, other in itertools.pairwise(found):
        assert other.offset == one.offset + one.n_bytes
    assert found[-1].offset + found[-1].n_bytes == e.info.offset + e.info.n_bytes
    if e.scheme is None:
        assert all(p.columns == p.n_bytes for p in found)
        return
    rows, length = rows_and_length(shape)
    assert sum(p.rows * p.columns for p in found) == rows * length
    for p in found:
        assert p.row % cut.rows == 0
        assert p.column % e.scheme.group_length(length) == 0 or e.scheme.granularity == "tensor"
        assert p.column * e.scheme.bits % 8 == 0
        assert (p.column, p.columns) == (0, length) or (p.rows == 1 and cut.within_rows)
        assert p.n_bytes <= max(size, cut.rows * length * 2, 2 * 128)


def test_sizes_hold_all_results() -> None:
    (p,) = pieces(entry("w", (3, 200), "int4_g128_asym"), Cut())
    # 300 bytes of codes, 6 scales, 6 zero points, counters.
    assert sizes(p) == Sizes(1200, 512 + 3 * ALIGNMENT)
    (p,) = pieces(entry("w", (3, 200), None), Cut())
    assert sizes(p) == Sizes(1200, 0)


def all_loads(queue: Queue, most: Sizes) -> list[Load]:
    found = []
    while (load := queue.take(most)) is not None:
        found.append(load)
        if load.is_range:
            for piece in load.pieces:  # these tests have tensors of one piece
                queue.second_pass([piece])
    return found


def laid_out(specs: list[tuple[str, int, str | None]]) -> list[list[Piece]]:
    """Tensors (file, rows of 50 float16, scheme), each behind the one before it in its file; all their pieces."""
    ends: dict[str, int] = {}
    found = []
    for i, (file, rows, scheme) in enumerate(specs):
        at = ends.get(file, 80)
        info = TensorInfo(f"t{i}", "float16", (rows, 50), Path(file), at, rows * 100)
        ends[file] = at + rows * 100
        found.append(pieces(Entry(info, scheme and Scheme.parse(scheme), ""), Cut()))
    return found


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.sampled_from(SCHEMES)), max_size=12),
    st.integers(1, 4),
)
def test_loads_cover_the_pieces_once(specs: list[tuple[str, int, str | None]], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats_pieces, "PIECE_BYTES", 700)
        work = laid_out(specs)
    tensor_wide = {p[0].entry.info.name for p in work if p[0].entry.scheme and len(p) == 1 and _per_tensor(p[0].entry)}
    work = [p for p in work if not _per_tensor(p[0].entry) or p[0].entry.info.name in tensor_wide]
    most = Sizes(1500, 4096)
    loads = all_loads(Queue(work, tensor_wide, width), most)
    want = sorted((p.entry.info.name, p.number) for ps in work for p in ps)
    assert sorted((p.entry.info.name, p.number) for x in loads if not x.is_range for p in x.pieces) == want
    assert {p.entry.info.name for x in loads if x.is_range for p in x.pieces} == tensor_wide
    for load in loads:
        assert (load.offset, load.n_bytes) == (load.pieces[0].offset, sum(p.n_bytes for p in load.pieces))
        assert all(p.entry.info.file == load.file for p in load.pieces)
        assert all(b.offset == a.offset + a.n_bytes for a, b in itertools.pairwise(load.pieces))
        if len(load.pieces) > 1:
            assert load.n_bytes <= most.source
            assert sum(sizes(p).results for p in load.pieces) <= most.results


def _per_tensor(e: Entry) -> bool:
    return e.scheme is not None and e.scheme.granularity == "tensor"


def test_files_take_turns() -> None:
    work = laid_out([(file, 10, "int4_g128") for file in "aabbccdd"])
    loads = all_loads(Queue(work, set(), 2), Sizes(1000, 4096))
    assert "".join(str(load.file) for load in loads) == "ababcdcd"


def test_a_second_pass_is_waited_for_and_comes_next() -> None:
    work = laid_out([("a", 5, "int4_tensor"), ("a", 5, "int4_g128"), ("a", 5, None)])
    queue = Queue(work, {"t0"}, 1)
    most = Sizes(500, 4096)
    first = queue.take(most)
    assert first is not None
    assert first.is_range
    second = queue.take(most)
    assert second is not None
    assert second.pieces[0].entry.info.name == "t1"
    queue.second_pass(first.pieces)
    names = [load.pieces[0].entry.info.name for load in all_loads(queue, most)]
    assert names == ["t0", "t2"]


def test_the_end_waits_for_second_passes_of_other_threads() -> None:
    work = laid_out([("a", 5, "int4_tensor")])
    queue, most, got = Queue(work, {"t0"}, 1), Sizes(500, 4096), []
    first = queue.take(most)
    assert first is not None
    waiting = threading.Thread(target=lambda: got.append(queue.take(most)))
    waiting.start()
    assert not got
    queue.second_pass(first.pieces)
    waiting.join()
    assert [load.is_range for load in got] == [False]
    assert queue.take(most) is None


def test_stop_wakes_who_waits() -> None:
    queue, most, got = Queue(laid_out([("a", 5, "int4_tensor")]), {"t0"}, 1), Sizes(500, 4096), []
    assert queue.take(most) is not None
    waiting = threading.Thread(target=lambda: got.append(queue.take(most)))
    waiting.start()
    queue.stop()
    waiting.join()
    assert got == [None]
