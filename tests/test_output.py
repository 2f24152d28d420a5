"""`Output`: names, locks, and what a run that was killed at any moment leaves to the next one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.errors import TargetError
from arrowquant_gpu.formats import mapped_file
from arrowquant_gpu.formats import output as formats_output
from arrowquant_gpu.formats.lines import line, read_lines
from arrowquant_gpu.formats.output import FILES_KEY, Output

from .bitwise import assert_bitwise_equal
from .snapshots import differences, nothing_changes, snapshot

DATA = np.arange(100, dtype=np.uint8)
RECORDS = [{"fingerprint": {}}, {"name": "a"}, {"name": "b", "figures": [1.5, float("inf"), 0.25]}]


class Killed(BaseException):
    """Ends a run where it stands; `leave` then does to its output what the kernel does for a dead process."""


def leave(output: Output) -> None:
    """Close what the dead process had open, and with that unlock it; nothing on the disk changes."""
    output._close()
    output._release()


def write_output(output: Output, data: np.ndarray = DATA, n_finished: int = 0) -> None:
    """Everything up to the commit: two files and a manifest, or one with its manifest; and a journal."""
    output.begin()
    names = ["w.bin", "sub/x.bin"] if output.is_directory else [output.target.name]
    for name in names:
        output.create(name, len(data))
        output.write(name, 0, data)
    listed = json.dumps(sorted([*output.names(), output.manifest]))
    table = pa.table({"x": [1]}).replace_schema_metadata({FILES_KEY: listed})
    pq.write_table(table, output.path(output.manifest))
    write_journal(output, n_finished)


def write_journal(output: Output, n_finished: int) -> None:
    records = [{"fingerprint": {}}, *({"name": f"t{i}"} for i in range(n_finished))]
    output.journal.write_bytes(b"".join(map(line, records)))


def killed(target: Path, *, is_directory: bool = True, n_finished: int = 2, data: np.ndarray = DATA) -> Path:
    """The temporary directory of a run that was killed before its commit."""
    before = set(target.parent.iterdir())
    output = Output(target, is_directory=is_directory, overwrite=True)
    write_output(output, data, n_finished)
    leave(output)
    (path,) = set(target.parent.iterdir()) - before
    return path


# Names and aborts.


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    directory = Output(tmp_path / "out", is_directory=True)
    file = Output(tmp_path / "out.bin", is_directory=False)
    for output in (directory, file):
        output.begin()
        output.create("out.bin", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out.bin").write_text("mine")
    for output in (directory, file):
        with pytest.raises(TargetError, match="exists"):
            output.commit()
        output.abort()
    assert snapshot(tmp_path) == {"out": b"", "out/mine": b"mine", "out.bin": b"mine"}


def test_the_last_moment_of_a_file_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "out.bin", is_directory=False)
    output.begin()
    output.create("out.bin", 3)
    output.create(output.manifest, 1)
    real = os.link

    def too_late(source: Path, target: Path) -> None:
        target.write_text("mine")
        real(source, target)

    monkeypatch.setattr(os, "link", too_late)
    with pytest.raises(TargetError, match="appeared"):
        output.commit()
    output.abort()
    assert snapshot(tmp_path) == {"out.bin": b"mine"}


def test_abort_is_harmless_at_any_time(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.abort()
    output.begin()
    output.create("a", 1)
    output.abort()
    output.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["mkdir", "open", "flock"])
def test_an_interrupt_while_it_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    module = fcntl if step == "flock" else os
    real = getattr(module, step)

    def interrupted(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        if step != "open" or str(args[0]).endswith(".tmp"):
            raise Killed
        return made

    output = Output(tmp_path / "out", is_directory=True)
    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(Killed):
        output.begin()
    monkeypatch.undo()
    output.abort()
    assert list(tmp_path.iterdir()) == []


def test_the_journal_is_no_file_of_the_output(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    write_output(output, n_finished=1)
    assert output.journal.exists()
    assert output.names() == ["arrowquant_manifest.parquet", "sub/x.bin", "w.bin"]
    assert len(output.commit()) == 3
    assert sorted(snapshot(tmp_path / "out")) == ["arrowquant_manifest.parquet", "sub", "sub/x.bin", "w.bin"]
    with pytest.raises(RuntimeError, match="over"):
        _ = output.journal


def test_reads_and_syncs_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    write_output(output)
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: os.readv(fd, [b[0][:7]]) if not os.lseek(fd, at, 0) < 0 else 0)
    assert output.read("sub/x.bin", 3, 90).tobytes() == DATA[3:93].tobytes()
    assert output.read("w.bin", 100, 0).size == 0
    with pytest.raises(TargetError, match=r"w\.bin has become shorter"):
        output.read("w.bin", 90, 11)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd)))
    output.sync("w.bin")
    output.sync("sub/x.bin")
    temp = output.journal.parent
    # The folders once: without their entries the files are lost by a power cut, synced or not.
    assert sorted(synced) == sorted(map(str, (temp, temp / "sub", tmp_path)))
    output.abort()


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "preadv"])
def test_failures_of_reads_and_syncs_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    write_output(output)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TargetError, match="Input/output error"):
        output.read("w.bin", 0, 1) if call == "preadv" else output.sync("w.bin")
    output.abort()


# Lines.


def refused(*_: object) -> None:
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def without_calls(patch: pytest.MonkeyPatch) -> None:
    for call in ("pwrite", "preadv"):
        patch.setattr(os, call, refused)


# Ways to write lines, and what makes them be taken.
WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "map": without_calls,
    "far": lambda patch: patch.setattr(formats_output, "FAR", 0),
    "no map": lambda patch: patch.setattr(mmap, "mmap", refused),
    "old kernel": lambda patch: patch.setattr(mapped_file, "advise", lambda *_: False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("offset", "n_bytes", "lines", "stride"),
    [(0, 1, 2, 2), (3, 5, 7, 9), (4095, 2, 3, 4096), (1, 4096, 4, 5000), (20, 6, 5, 6), (0, 100, 200, 100)],
)
def test_lines_are_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, offset: int, n_bytes: int, lines: int, stride: int
) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    rng = np.random.default_rng(1)
    before = rng.integers(0, 256, offset + lines * stride, np.uint8)
    output.create("a", before.size)
    output.write("a", 0, before)
    data = rng.integers(0, 256, (lines, n_bytes), np.uint8)
    with monkeypatch.context() as patch:
        WAYS[way](patch)
        assert_bitwise_equal(
            output.read("a", offset, lines * n_bytes, lines, stride),
            np.concatenate([before[offset + i * stride :][:n_bytes] for i in range(lines)]),
        )
        output.write("a", offset, data, lines, stride)
        assert_bitwise_equal(output.read("a", offset, lines * n_bytes, lines, stride), data.reshape(-1))
    for i, line_bytes in enumerate(data):
        before[offset + i * stride :][:n_bytes] = line_bytes
    assert_bitwise_equal(output.read("a", 0, before.size), before)
    output.abort()


def test_lines_of_many_pieces_from_several_threads(tmp_path: Path) -> None:
    """Each piece is 3 bytes of every line of two files, so that several have bytes of every word."""
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    rng = np.random.default_rng(2)
    whole = {name: rng.integers(0, 256, (500, 300), np.uint8) for name in "ab"}
    for name, data in whole.items():
        output.create(name, data.size)
    pieces = [(name, i) for name in whole for i in range(0, 300, 3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: output.write(p[0], p[1], whole[p[0]][:, p[1] : p[1] + 3].copy(), 500, 300), pieces))
    for name, data in whole.items():
        assert_bitwise_equal(output.read(name, 0, data.size), data.reshape(-1))
    output.abort()


def test_lines_of_wider_types_and_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    output.create("a", 100)
    WAYS["far"](monkeypatch)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    output.write("a", 8, values, 2, 40)
    assert_bitwise_equal(output.read("a", 8, 12).view(np.float32), values[0])
    assert_bitwise_equal(output.read("a", 48, 12).view(np.float32), values[1])
    output.abort()


def test_lines_of_a_file_that_became_shorter(tmp_path: Path) -> None:
    """Nothing beyond its end is looked at, which would end this process."""
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    place = 100, 4000, 40, 1000
    for is_mapped in (True, False):
        output.create(f"{is_mapped}", 50_000)
        if is_mapped:
            output.read("True", *place)
        os.truncate(output.path(f"{is_mapped}"), 9000)
        with pytest.raises(TargetError, match="has become shorter"):
            output.read(f"{is_mapped}", *place)
    output.abort()


def test_a_disk_that_is_full_after_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system can be that writes elsewhere what is written again: the kernel says so before a line is."""
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    output.create("a", 50_000)
    WAYS["old kernel"](monkeypatch)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match="the disk is full"):
        output.write("a", 0, np.ones((3, 8), np.uint8), 3, 100)
    output.abort()


# What is left, and taken over.


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_leftover_is_continued(tmp_path: Path, is_directory: bool) -> None:
    left = killed(tmp_path / "out", is_directory=is_directory)
    name = "w.bin" if is_directory else "out"
    output = Output(tmp_path / "out", is_directory=is_directory, resume=True)
    output.begin()
    assert output.resumed
    assert output.journal.parent == left
    # Not the manifest, which is the last thing that a run writes.
    assert output.manifest not in output.names()
    output.create(name, 100)
    assert output.read(name, 0, 100).tobytes() == DATA.tobytes()
    with pytest.raises(TargetError, match="being written by another run"):
        Output(tmp_path / "out", is_directory=is_directory, resume=True).begin()
    output.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 40, 99, 101])
def test_a_file_of_another_size_is_made_anew(tmp_path: Path, size: int) -> None:
    left = killed(tmp_path / "out")
    (left / "w.bin").write_bytes(b"x" * size)
    (left / "sub" / "x.bin").unlink()
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    output.begin()
    for name in ("w.bin", "sub/x.bin"):
        output.create(name, 100)
        assert output.read(name, 0, 100).tobytes() == bytes(100)
    output.abort()


def test_a_file_that_became_a_link_is_not_written_through(tmp_path: Path) -> None:
    left = killed(tmp_path / "out")
    (tmp_path / "mine").write_bytes(bytes(100))
    (left / "w.bin").unlink()
    (left / "w.bin").symlink_to(tmp_path / "mine")
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    output.begin()
    with pytest.raises(TargetError, match="symbolic links"):
        output.create("w.bin", 100)
    output.abort()


@pytest.mark.parametrize("journal", [None, b"", b"garbage\n", line(RECORDS[0]), line(RECORDS[0]) + b'{"name": "a"}\n'])
def test_a_leftover_with_nothing_finished_is_started_anew(tmp_path: Path, journal: bytes | None) -> None:
    left = killed(tmp_path / "out")
    (left / ".arrowquant_journal.jsonl").unlink()
    if journal is not None:
        (left / ".arrowquant_journal.jsonl").write_bytes(journal)
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    output.begin()
    assert not output.resumed
    assert not left.exists()
    output.abort()


def test_resume_without_a_leftover_begins(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    write_output(output)
    assert not output.resumed
    output.commit()
    assert (tmp_path / "out" / "w.bin").read_bytes() == DATA.tobytes()


def test_the_newest_of_several_is_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = []
    for i, n_finished in enumerate((2, 1, 0)):
        aside = tmp_path / f"aside{i}"
        aside.mkdir()
        paths.append(killed(aside / "out", n_finished=n_finished))
    for i, path in enumerate(paths):
        paths[i] = path.rename(tmp_path / path.name)
        os.utime(paths[i], (1000 + i, 1000 + i))
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    output.begin()
    assert output.journal.parent == paths[1]
    assert [p.exists() for p in paths] == [False, True, False]
    assert caplog.records == []
    output.abort()


def test_a_leftover_that_is_given_up_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n_finished in (0, 3):
        killed(tmp_path / "out", n_finished=n_finished)
        output = Output(tmp_path / "out", is_directory=True)
        output.begin()
        output.abort()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 finished tensors of an interrupted run are given up; resume (--resume)" in record.getMessage()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_is_refused_gives_nothing_up(tmp_path: Path, resume: bool) -> None:
    left = killed(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for _ in range(2):
        with nothing_changes(tmp_path), pytest.raises(TargetError, match="exists"):
            Output(tmp_path / "out", is_directory=True, resume=resume).begin()
    (tmp_path / "out" / "mine").unlink()
    output = Output(tmp_path / "out", is_directory=True, resume=True)
    output.begin()
    assert output.journal.parent == left
    output.abort()


@pytest.mark.parametrize(("n_finished", "keep", "kept"), [(1, True, True), (0, True, False), (1, False, False)])
def test_abort_keeps_only_what_can_be_continued(tmp_path: Path, n_finished: int, keep: bool, kept: bool) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    write_output(output, n_finished=n_finished)
    output.abort(keep=keep)
    output.abort()
    assert bool(list(tmp_path.iterdir())) is kept
    again = Output(tmp_path / "out", is_directory=True, resume=True)
    again.begin()
    assert again.resumed is kept
    again.abort()


def test_a_commit_that_is_refused_can_be_repeated(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    write_output(output, n_finished=1)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TargetError, match="not a directory"):
        output.commit()
    output.abort(keep=True)
    (tmp_path / "out").unlink()
    again = Output(tmp_path / "out", is_directory=True, resume=True)
    again.begin()
    assert again.resumed
    again.abort()


# A kill after every single change that a commit makes on the disk.

CHANGES = ("link", "unlink", "rename", "replace", "rmdir")


def die_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Raise Killed after the n-th change of a name from now on; before the first for n = 0."""
    left = n

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            result = real(*args, **kwargs)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return change

    # Path's methods call those of os; shutil.rmtree calls os.unlink and os.rmdir.
    for name in CHANGES:
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))


def run(target: Path, data: np.ndarray, *, is_directory: bool, overwrite: bool, resume: bool = False) -> bool:
    output = Output(target, is_directory=is_directory, overwrite=overwrite, resume=resume)
    try:
        write_output(output, data, n_finished=1)
        output.commit()
    except Killed:
        leave(output)
        raise
    return output.resumed


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("is_directory", [True, False])
def test_a_kill_at_any_moment_of_a_commit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    is_directory: bool,
    overwrite: bool,
    resume: bool,
) -> None:
    old, new = np.full(100, 7, np.uint8), DATA
    for name, data in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        run(tmp_path / name / "out", data, is_directory=is_directory, overwrite=False)
    wanted, before = snapshot(tmp_path / "new"), snapshot(tmp_path / "old")
    n_resumed = 0
    for n in range(50):
        folder = tmp_path / str(n)
        folder.mkdir()
        if overwrite:
            run(folder / "out", old, is_directory=is_directory, overwrite=False)
        with monkeypatch.context() as patch:
            die_after(patch, n)
            try:
                run(folder / "out", new, is_directory=is_directory, overwrite=overwrite)
            except Killed:
                pass
            else:
                break
        # The weights under the final name, or what was set aside: the old ones or the new ones, all of them.
        main = "out/w.bin" if is_directory else "out"
        now = snapshot(folder)
        if not overwrite:
            assert now.get(main) in (None, wanted[main])
        elif main in now:
            assert now[main] in (before[main], wanted[main])
        else:
            (aside,) = (name for name in now if name.endswith(".previous/w.bin"))
            assert now[aside] == before[main]
        if not overwrite and main in now:
            # The run had reached its end: the next one is refused and changes nothing that counts.
            with pytest.raises(TargetError, match="out exists"):
                run(folder / "out", new, is_directory=is_directory, overwrite=False, resume=resume)
            now = snapshot(folder)
            assert {k: v for k, v in now.items() if not k.startswith(".out")} == wanted
            # Nor does one that may replace it write into the finished file, which the leftover can still be a link to.
            assert not run(folder / "out", new, is_directory=is_directory, overwrite=True, resume=resume)
            assert differences(snapshot(folder), wanted) == []
        else:
            n_resumed += run(folder / "out", new, is_directory=is_directory, overwrite=overwrite, resume=resume)
            assert differences(snapshot(folder), wanted) == []
    else:
        raise AssertionError("the commit never came to its end")
    record_property("kills", n)
    record_property("resumed", n_resumed)
    # A commit is killed at several points, and where it is killed before its last step it is continued.
    assert n >= 2
    assert (n_resumed > 0) is resume


def test_the_kill_itself_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 0)
        with pytest.raises(Killed):
            run(tmp_path / "out", DATA, is_directory=True, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_between_the_two_renames_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "out", DATA, is_directory=True, overwrite=False)
    output = Output(tmp_path / "out", is_directory=True, overwrite=True)
    write_output(output, DATA + np.uint8(1))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        result = real(self, target)
        if target.suffix == ".previous":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", rename)
    with nothing_changes(tmp_path / "out"):
        with pytest.raises(KeyboardInterrupt):
            output.commit()
        output.abort()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_after_the_link_keeps_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "out", is_directory=False)
    write_output(output)
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(KeyboardInterrupt):
        output.commit()
    output.abort(keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.manifest.parquet"]


# Lines that tell whether they are whole.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
SOME = st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=3), max_size=4)


def read_bytes(data: bytes) -> tuple[list[dict[str, object]], int]:
    fd = os.memfd_create("lines")
    try:
        os.write(fd, data)
        return read_lines(fd)
    finally:
        os.close(fd)


@given(SOME)
def test_lines_come_back_and_are_json(records: list[dict[str, object]]) -> None:
    raw = [line(r) for r in records]
    assert read_bytes(b"".join(raw)) == (records, sum(map(len, raw)))
    assert [{k: v for k, v in json.loads(r).items() if k != "sum"} for r in raw] == [
        {k: v for k, v in r.items() if k != "sum"} for r in records
    ]


def test_floats_come_back() -> None:
    ((record,), _) = read_bytes(line({"x": [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1]}))
    assert [float.hex(x) for x in record["x"]] == ["nan", "inf", "-inf", "-0x0.0p+0", float.hex(5e-324), float.hex(0.1)]


def test_lines_torn_or_damaged_at_any_byte() -> None:
    """Whatever is cut off or changed, what is read is the records before it."""
    raw = [line(r) for r in RECORDS]
    data, ends = b"".join(raw), np.cumsum([len(r) for r in raw])
    for at in range(len(data)):
        whole = int(np.searchsorted(ends, at, "right"))
        n_bytes = int(ends[whole - 1]) if whole else 0
        zeros = data[:at] + bytes(len(data) - at)
        for damaged in (data[:at], zeros, *(data[:at] + bytes([data[at] ^ 1 << k]) + data[at + 1 :] for k in range(8))):
            assert read_bytes(damaged) == (RECORDS[:whole], n_bytes), (at, damaged)
