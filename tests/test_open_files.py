"""Descriptors of many files: few are open at a time, and none is closed that is in use."""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.errors import TargetError
from arrowquant_gpu.formats.open_files import MOST_OPEN, OpenFiles
from arrowquant_gpu.formats.output import Output


def n_open(folder: Path) -> int:
    """Descriptors of this process for files below a folder."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += link.readlink().is_relative_to(folder)
        except OSError:
            continue
    return found


def add(files: OpenFiles, path: Path) -> None:
    files.add(path.name, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))


def test_few_are_open(tmp_path: Path) -> None:
    files = OpenFiles(3)
    for i in range(10):
        add(files, tmp_path / str(i))
        assert n_open(tmp_path) == min(i + 1, 3)
    for i in (0, 9, 0, 5):
        with files.use(str(i)) as fd:
            assert Path(f"/proc/self/fd/{fd}").readlink() == tmp_path / str(i)
            assert n_open(tmp_path) == 3
    files.close()
    files.close()
    assert n_open(tmp_path) == 0
    with pytest.raises(KeyError), files.use("0"):
        pass


def test_what_is_in_use_stays_open(tmp_path: Path) -> None:
    files = OpenFiles(1)
    for name in "abc":
        add(files, tmp_path / name)
    with files.use("a") as first, files.use("b") as second, files.use("a") as again:
        assert first == again != second
        assert n_open(tmp_path) == 2
        os.pwrite(first, b"1", 0)
        os.pwrite(second, b"2", 0)
    assert n_open(tmp_path) == 1
    files.close()
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"1", b"2"]


def test_threads_write_to_the_right_files(tmp_path: Path) -> None:
    """More threads than descriptors: a descriptor that was closed too early is another file's by then."""
    files, names = OpenFiles(2), [str(i) for i in range(20)]
    for name in names:
        add(files, tmp_path / name)

    def write(step: int) -> None:
        name = names[(7 * step) % len(names)]
        with files.use(name) as fd:
            os.pwrite(fd, name.encode().ljust(4), 4 * (step // len(names)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(4000)))
    files.close()
    for name in names:
        assert (tmp_path / name).read_bytes() == name.encode().ljust(4) * 200


def test_an_output_of_more_files_than_may_be_open(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    names = [f"tensors/{i}" for i in range(MOST_OPEN + 50)]
    for i, name in enumerate(names):
        output.create(name, 2)
        output.write(name, 0, np.array([i], np.uint16))
    assert n_open(tmp_path) <= MOST_OPEN + 2
    for i, name in enumerate(names):
        assert output.read(name, 0, 2).view(np.uint16) == [i]
        output.sync(name)
    assert len(output.commit()) == len(names)
    assert n_open(tmp_path) == 0


def test_a_file_that_is_gone_when_it_is_opened_again(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", is_directory=True)
    output.begin()
    for i in range(MOST_OPEN + 1):
        output.create(str(i), 1)
    output.path("0").unlink()
    with pytest.raises(TargetError, match="out"):
        output.write("0", 0, np.zeros(1, np.uint8))
    output.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_map_goes_with_its_descriptor(tmp_path: Path) -> None:
    files = OpenFiles(1)
    for name in "ab":
        add(files, tmp_path / name)
        with files.use(name) as fd:
            os.posix_fallocate(fd, 0, 100)
    with files.mapped("a") as first, files.mapped("a") as again:
        assert first is again is not None
    # The second is the map's.
    assert n_open(tmp_path) == 2
    with files.mapped("b") as other:
        assert other is not first
    del first, again, other
    assert n_open(tmp_path) == 2
    with files.mapped("a") as file:
        assert file is not None
        lines = file.lines(10, 3, 4, 20, for_writing=True)
        assert lines is not None
        files.close()
        # Whoever has lines can still write them.
        lines[...] = np.arange(12).reshape(4, 3)
    assert (tmp_path / "a").read_bytes()[70:73] == bytes([9, 10, 11])
    del file, lines
    assert n_open(tmp_path) == 0


def test_what_cannot_be_mapped_has_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    files = OpenFiles()
    add(files, tmp_path / "a")
    monkeypatch.setattr(mmap, "mmap", refused)
    with files.mapped("a") as file:
        assert file is None
    with pytest.raises(KeyError), files.mapped("b"):
        pass
    files.close()
