"""`Journal`: a line is there only when its data is on the disk, and only whole lines of the same run are believed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.engine.hashes import piece_digest, tensor_hash
from arrowquant_gpu.engine.journal import Finished, Journal, verify
from arrowquant_gpu.errors import TargetError
from arrowquant_gpu.formats import Place
from arrowquant_gpu.formats.output import Output

from .snapshots import nothing_changes

RUN = {"source": "a1", "scheme": "int4_g64", "format": "parquet", "version": "0.2.0"}
TENSORS = [
    Finished("a", "0" * 32),
    Finished("b", "1" * 32, (0.875, math.inf, 0.1)),
    Finished("ü/𝔘 \n", "2" * 32, (0.5, -math.inf, 5e-324)),
]


@pytest.fixture(autouse=True)
def nothing_is_leaked() -> Iterator[None]:
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    if threading.active_count() != threads:
        raise AssertionError(f"threads: {threading.enumerate()}")
    if len(list(Path("/proc/self/fd").iterdir())) != descriptors:
        raise AssertionError("descriptors")


class Fake(Output):
    """An Output that notes what it is asked to sync, and can fail or wait there."""

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        super().__init__(folder / "out", is_directory=True, resume=resume)
        self.synced: list[str] = []
        self.in_sync: Callable[[str], object] = lambda name: None

    def sync(self, name: str) -> None:
        self.in_sync(name)
        self.synced.append(name)


def until(condition: Callable[[], object]) -> None:
    """Wait for another thread; a minute is forever."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def begun(folder: Path, *, resume: bool = False) -> Fake:
    output = Fake(folder, resume=resume)
    output.begin()
    return output


def noted(output: Output) -> list[str]:
    """Names in the lines of the journal, read without the code under test."""
    lines = output.journal.read_text("ascii").splitlines()
    return [json.loads(text)["name"] for text in lines[1:]]


def write(folder: Path, tensors: Sequence[Finished] = TENSORS) -> None:
    """An interrupted run that has finished these tensors."""
    output = begun(folder)
    journal = Journal(output, RUN, interval=0)
    for tensor in tensors:
        journal.add(tensor, ["w"])
    until(lambda: len(noted(output)) == len(tensors))
    journal.close()
    output.abort(keep=True)


def read(folder: Path, run: dict[str, str] = RUN) -> dict[str, Finished]:
    output = begun(folder, resume=True)
    try:
        journal = Journal(output, run)
        journal.close()
        return journal.finished
    finally:
        output.abort(keep=True)


def test_what_was_finished_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path) == {t.name: t for t in TENSORS}
    # Reading it changes nothing.
    with nothing_changes(tmp_path):
        assert list(read(tmp_path)) == [t.name for t in TENSORS]


@given(st.tuples(*[st.floats(allow_subnormal=True)] * 3))
def test_figures_come_back(tmp_path_factory: pytest.TempPathFactory, figures: tuple[float, float, float]) -> None:
    folder = tmp_path_factory.mktemp("figures")
    write(folder, [Finished("a", "0", figures)])
    back = read(folder)["a"].figures
    assert back is not None
    assert [x.hex() for x in back] == [x.hex() for x in figures]


def test_a_line_is_written_after_its_data_was_synced(tmp_path: Path) -> None:
    output = begun(tmp_path)
    events: list[tuple[str, list[str]]] = []
    output.in_sync = lambda name: events.append((name, noted(output)))
    journal = Journal(output, RUN, interval=0)
    for i, files in enumerate((["w"], ["w", "x"], ["y"])):
        journal.add(TENSORS[i], files)
        until(lambda i=i: len(noted(output)) == i + 1)
    journal.close()
    # Each sync, and what the journal said when it began: never a tensor of that round.
    assert events == [("w", []), ("w", ["a"]), ("x", ["a"]), ("y", ["a", "b"])]
    output.abort()


def test_the_journal_itself_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = begun(tmp_path)
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink() == output.journal:
            seen.append(noted(output))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(output, RUN, interval=0)
    journal.add(TENSORS[0], ["w"])
    until(lambda: seen)
    journal.close()
    assert seen == [["a"]]
    output.abort()


def test_what_is_added_during_a_sync_waits_for_the_next(tmp_path: Path) -> None:
    """Its data may have been written after that sync had begun."""
    output = begun(tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    output.in_sync = lambda name: (inside.set(), go_on.wait(60))
    journal = Journal(output, RUN, interval=0)
    journal.add(TENSORS[0], ["w"])
    assert inside.wait(60)
    journal.add(TENSORS[1], ["w"])
    output.in_sync = lambda name: seen.append(noted(output))
    seen: list[list[str]] = []
    go_on.set()
    until(lambda: len(noted(output)) == 2)
    assert seen == [["a"]]
    journal.close()
    output.abort()


def test_adds_are_gathered_for_the_interval(tmp_path: Path) -> None:
    output = begun(tmp_path)
    journal = Journal(output, RUN, interval=3600)
    for tensor in TENSORS:
        journal.add(tensor, ["w"])
    journal.close()
    assert (output.synced, noted(output)) == ([], [])
    output.abort()


def test_close_does_not_wait_for_a_sync(tmp_path: Path) -> None:
    """One that hangs ends later, and its tensors are not noted."""
    output = begun(tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    output.in_sync = lambda name: (inside.set(), go_on.wait(60))
    journal = Journal(output, RUN, interval=0)
    journal.add(TENSORS[0], ["w", "x"])
    assert inside.wait(60)
    journal.close()
    journal.close()
    assert journal._thread.is_alive()
    go_on.set()
    journal._thread.join(60)
    assert not journal._thread.is_alive()
    assert (output.synced, noted(output)) == (["w"], [])
    output.abort()


@pytest.mark.parametrize("pause", [0, 0.0005, 0.002])
def test_close_at_any_moment_ends_the_thread(tmp_path: Path, pause: float) -> None:
    for i in range(30):
        output = begun(tmp_path)
        journal = Journal(output, RUN, interval=0)
        for tensor in TENSORS[: i % 4]:
            journal.add(tensor, ["w"])
        time.sleep(pause * (i % 5))
        journal.close()
        assert not journal._thread.is_alive()
        output.abort()


def test_close_just_before_a_round_begins_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = begun(tmp_path)
    journal = Journal(output, RUN, interval=0)
    real = journal._added.clear

    def clear() -> None:
        journal._stopped.set()
        journal._added.set()
        real()

    monkeypatch.setattr(journal._added, "clear", clear)
    journal.add(TENSORS[0], [])
    until(lambda: not journal._thread.is_alive())
    journal.close()
    output.abort()


def test_many_threads_may_add(tmp_path: Path) -> None:
    output = begun(tmp_path)
    journal = Journal(output, RUN, interval=0)
    tensors = [Finished(f"t{i}", "0") for i in range(400)]
    threads = [
        threading.Thread(target=lambda k=k: [journal.add(t, [f"f{k}"]) for t in tensors[k::8]]) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(noted(output)) == 400)
    journal.close()
    assert sorted(noted(output)) == sorted(t.name for t in tensors)
    output.abort()


@pytest.mark.parametrize("when", ["add", "close"])
def test_a_failed_sync_is_raised_once_and_nothing_is_noted(tmp_path: Path, when: str) -> None:
    output = begun(tmp_path)
    error = TargetError("out: the disk is full")

    def fail(name: str) -> None:
        raise error

    output.in_sync = fail
    journal = Journal(output, RUN, interval=0)
    journal.add(TENSORS[0], ["w"])
    until(lambda: not journal._thread.is_alive())
    with pytest.raises(TargetError, match="disk is full") as caught:
        journal.add(TENSORS[1], ["w"]) if when == "add" else journal.close()
    assert caught.value is error
    journal.close()
    assert noted(output) == []
    output.abort()


def test_a_journal_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = begun(tmp_path)
    journal = Journal(output, RUN, interval=0)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        journal.add(TENSORS[0], ["w"])
        until(lambda: not journal._thread.is_alive())
    with pytest.raises(TargetError, match="disk is full"):
        journal.close()
    output.abort()
    with monkeypatch.context() as patch:
        output = begun(tmp_path)
        patch.setattr(os, "write", full)
        with pytest.raises(TargetError, match="disk is full"):
            Journal(output, RUN)
        output.abort()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        output = begun(tmp_path)
        journal = Journal(output, RUN, interval=0)
        journal.add(TENSORS[1], ["w"])
        until(lambda: output.journal.read_bytes().count(b"\n") == 2)
        journal.close()
        output.abort(keep=True)
    assert read(tmp_path) == {"b": TENSORS[1]}


# Journals of other runs, and damaged ones.


CHANGES = {
    "scheme was int4_g64 and is int8_g64": RUN | {"scheme": "int8_g64"},
    "source was a1 and is a2; version was 0.2.0 and is 0.3.0": RUN | {"source": "a2", "version": "0.3.0"},
    "validate was not noted and is True": RUN | {"validate": "True"},
    "version was 0.2.0 and is not given": {k: v for k, v in RUN.items() if k != "version"},
}


@pytest.mark.parametrize("words", CHANGES)
def test_another_run_is_refused_and_nothing_is_touched(tmp_path: Path, words: str) -> None:
    write(tmp_path)
    with nothing_changes(tmp_path), pytest.raises(TargetError) as caught:
        read(tmp_path, CHANGES[words])
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: the interrupted run cannot be continued: {words}. "
        f"Run it again as it was, or without --resume to start anew."
    )
    assert list(read(tmp_path)) == [t.name for t in TENSORS]


def test_a_refused_run_cannot_remove_what_the_first_one_left(tmp_path: Path) -> None:
    write(tmp_path)
    output = begun(tmp_path, resume=True)
    with nothing_changes(tmp_path):
        with pytest.raises(TargetError):
            Journal(output, RUN | {"scheme": "int8_g64"})
        output.abort()


def test_another_format_of_the_journal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr("arrowquant_gpu.engine.journal.FORMAT", 2)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="journal format was 1 and is 2"):
        read(tmp_path)


def test_a_journal_torn_at_any_byte_is_continued(tmp_path: Path) -> None:
    """What is whole is believed, what follows goes, and the next line is a whole one."""
    write(tmp_path)
    (path,) = tmp_path.glob(".out*/.arrowquant_journal.jsonl")
    data = path.read_bytes()
    ends = list(itertools.accumulate(len(text) + 1 for text in data.split(b"\n")[:-1]))
    # At least one finished tensor, or there is nothing that can be continued.
    for at in range(ends[1], len(data) + 1):
        path.write_bytes(data[:at] + (b"\0" * 7 if at % 2 else b""))
        output = begun(tmp_path, resume=True)
        journal = Journal(output, RUN, interval=0)
        whole = sum(end <= at for end in ends) - 1
        assert list(journal.finished.values()) == TENSORS[:whole]
        journal.add(Finished("new", "3"), [])
        until(lambda output=output, whole=whole: len(noted(output)) == whole + 1)
        journal.close()
        output.abort(keep=True)
        assert list(read(tmp_path)) == [*(t.name for t in TENSORS[:whole]), "new"]


def test_a_tensor_that_was_done_again_has_its_last_line(tmp_path: Path) -> None:
    write(tmp_path, [TENSORS[0], TENSORS[1], TENSORS[0]._replace(hash="new")])
    assert read(tmp_path) == {"a": TENSORS[0]._replace(hash="new"), "b": TENSORS[1]}


# Hashes.


def test_the_hash_is_the_one_that_is_written_down() -> None:
    pieces = [[np.arange(5, dtype="<f4"), np.arange(6, dtype=np.uint8).reshape(2, 3)], [np.zeros(0, np.uint8)]]
    digests = [xxhash.xxh3_128_digest(b"".join(a.tobytes() for a in arrays)) for arrays in pieces]
    assert [piece_digest(arrays) for arrays in pieces] == digests
    assert tensor_hash(digests) == xxhash.xxh3_128_hexdigest(digests[0] + digests[1])
    assert len(tensor_hash([])) == 32


def test_verify_reads_the_places_of_all_pieces(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    data = np.random.default_rng(0).integers(0, 256, 300, np.uint8)
    for name in ("w", "x"):
        output.create(name, 300)
        output.write(name, 0, data if name == "w" else data[::-1].copy())
    places = {0: [Place("w", 10, 50), Place("x", 0, 20)], 1: [Place("x", 20, 30), Place("w", 299, 1)]}
    places[2] = [Place("w", 100, 12, lines=3, stride=7)]
    sink: Any = SimpleNamespace(pieces=lambda entry: list(places), places=lambda piece: places[piece])
    parts = [[data[10:60], data[280:].copy()[::-1].copy()], [data[250:280][::-1].copy(), data[299:]]]
    lines = [i for begin in (100, 107, 114) for i in range(begin, begin + 4)]
    parts.append([data[lines]])
    expected = tensor_hash([piece_digest(arrays) for arrays in parts])
    entry: Any = None
    assert verify(output, sink, entry, expected)
    covered = {("w", i) for i in (*range(10, 60), *lines, 299)} | {("x", i) for i in range(50)}
    for name, i in itertools.product("wx", range(300)):
        old = output.read(name, i, 1)
        output.write(name, i, old ^ 1)
        assert verify(output, sink, entry, expected) is ((name, i) not in covered)
        output.write(name, i, old)
    output.abort()
