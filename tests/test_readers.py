"""Readers: the same bytes from all of them, wherever a load lies, and a typed error for every read that fails."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import logging
import mmap
import os
import random
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu.engine import Load, Reader, readers
from arrowquant_gpu.engine.readers import BLOCK, LINE, READERS, open_reader
from arrowquant_gpu.errors import DeviceError, InputError, SourceError
from arrowquant_gpu.formats.checkpoint import SafetensorsCheckpoint, open_checkpoint

from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors

COPYING = ("buffered", "direct")


class CuFile:
    """What kvikio.CuFile does, with the host's memory in place of the GPU's; `calls` are reads (position, size).

    At the end of a file kvikio's own reads fail, and those of cuFile are short.
    """

    opened = 0
    is_cufile = False
    calls: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, file: Path, flags: str = "r") -> None:
        assert flags == "r"
        self._file = file.open("rb")
        CuFile.opened += 1

    def pread(self, buf: Any, size: int | None = None, file_offset: int = 0, task_size: int | None = None) -> Any:
        assert size is not None
        assert buf.size == size
        CuFile.calls.append((file_offset, size))
        got = os.preadv(self._file.fileno(), [buf], file_offset)
        if got < size and not CuFile.is_cufile:
            raise RuntimeError("POSIX error on pread: EOF")
        return types.SimpleNamespace(get=lambda: got)

    def close(self) -> None:
        CuFile.opened -= 1
        self._file.close()


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> type[CuFile]:
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=CuFile))
    CuFile.opened, CuFile.calls, CuFile.is_cufile = 0, [], False
    return CuFile


def one_file(path: Path, n_bytes: int, seed: int = 0) -> SafetensorsCheckpoint:
    return open_checkpoint(
        write_safetensors(path, {"w": np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)})
    )


def load_of(source: SafetensorsCheckpoint, offset: int, n_bytes: int) -> Load:
    return Load(next(iter(source.tensors.values())).file, offset, n_bytes, ())


def space(n_bytes: int, address: int = 0) -> np.ndarray:
    """Uninitialised bytes, the first at this address modulo a page; what lies before and after is not to be touched."""
    memory = np.empty(n_bytes + 2 * BLOCK, np.uint8)
    start = (address - memory.ctypes.data) % BLOCK
    return memory[start : start + n_bytes]


def read(reader: Reader, load: Load, address: int = 0) -> np.ndarray:
    """What a read gives in a buffer of exactly the size it asks for."""
    return reader.read(load, None if reader.slack is None else space(load.n_bytes + reader.slack, address))


def n_open() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def reader_of() -> Iterator[Callable[..., Reader]]:
    """Opens readers, and sees that none leaves a descriptor behind."""
    before, opened = n_open(), []

    def make(name: str, source: SafetensorsCheckpoint) -> Reader:
        opened.append(open_reader(name, source))
        return opened[-1]

    yield make
    while opened:
        reader = opened.pop()
        reader.close()
        reader.close()
        del reader
    if (after := n_open()) > before:
        raise AssertionError(f"{after - before} descriptors are left open")


def random_loads(rng: random.Random, n_file: int, n: int) -> list[tuple[int, int]]:
    """(offset, n_bytes) all over a file: any bytes, both sides of blocks, empty, one byte, the end."""
    spans = [(0, n_file), (n_file, 0), (0, 0), (n_file - 1, 1), (0, 1)]
    while len(spans) < n:
        near = [rng.randrange(n_file), rng.randrange(n_file // BLOCK + 1) * BLOCK + rng.randint(-2, 2), n_file]
        a, b = sorted(min(max(rng.choice(near), 0), n_file) for _ in range(2))
        spans.append((a, rng.choice([b - a, b - a, min(b - a, 1), 0])))
    return spans


@pytest.mark.parametrize("name", READERS)
def test_any_load_of_any_file(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], kvikio: type[CuFile]
) -> None:
    rng = random.Random(name)
    for k, n_bytes in enumerate([1, 63, 4096 - 80, 4097, *(rng.randrange(1, 200_000) for _ in range(8))]):
        source = one_file(tmp_path / f"{k}.safetensors", n_bytes, k)
        reader = reader_of(name, source)
        whole = source.mapped(load_of(source, 0, 0).file)
        for offset, n in random_loads(rng, whole.size, 60):
            load, address = load_of(source, offset, n), rng.choice([0, 1, 16, 63, 64, BLOCK - 1, rng.randrange(BLOCK)])
            reader.expect(load)
            got = read(reader, load, address)
            assert_bitwise_equal(got, whole[offset : offset + n], f"{n} bytes at {offset} of {whole.size}")
            if n:
                assert (got.ctypes.data - offset) % LINE == 0
            if name == "direct" and n:
                assert (got.ctypes.data - offset) % BLOCK == 0


@pytest.mark.parametrize(("name", "offset", "tail"), [("buffered", 2 * LINE, 0), ("direct", 2 * BLOCK - 1, BLOCK - 1)])
def test_the_worst_place_fills_the_slack(
    name: str, offset: int, tail: int, tmp_path: Path, reader_of: Callable[..., Reader]
) -> None:
    source = one_file(tmp_path / "a.safetensors", 4 * BLOCK)
    reader, load = reader_of(name, source), load_of(source, offset, 2)
    assert reader.slack is not None
    buffer = space(load.n_bytes + reader.slack, 1)
    got = reader.read(load, buffer)
    assert got.ctypes.data + got.size + tail == buffer.ctypes.data + buffer.size
    with pytest.raises(AssertionError, match="slack"):
        reader.read(load, buffer[:-1])


@pytest.mark.parametrize("name", READERS)
def test_eight_threads_at_once(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], kvikio: type[CuFile]
) -> None:
    source = one_file(tmp_path / "a.safetensors", 20 << 20)
    reader, whole = reader_of(name, source), source.mapped(load_of(source, 0, 0).file)
    spans = [*random_loads(random.Random(0), whole.size, 60), (81, 17 << 20)]
    begin = threading.Barrier(8, timeout=30)

    def some(first: int) -> None:
        begin.wait()
        for offset, n in spans[first::8]:
            load = load_of(source, offset, n)
            reader.expect(load)
            assert_bitwise_equal(read(reader, load, first), whole[offset : offset + n], f"{n} bytes at {offset}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))


@pytest.mark.parametrize("name", READERS)
def test_one_descriptor_for_each_file(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], kvikio: type[CuFile]
) -> None:
    sources = [one_file(tmp_path / f"{i}.safetensors", 100_000, i) for i in range(3)]
    before = n_open()
    for source in sources:
        reader = reader_of(name, source)
        for offset in (0, 5000, 90_000):
            reader.expect(load_of(source, offset, 100))
            read(reader, load_of(source, offset, 100))
    # A map has one too: Python's mmap keeps a duplicate.
    assert n_open() == before + 3


@pytest.mark.parametrize("name", READERS)
def test_a_hint_may_reach_over_the_end(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], kvikio: type[CuFile]
) -> None:
    source = one_file(tmp_path / "a.safetensors", 100_000)
    reader = reader_of(name, source)
    for offset, n in [(99_000, 16 << 20), (1 << 40, 16 << 20), (100, 0), (1 << 40, 0)]:
        reader.expect(load_of(source, offset, n))


def test_what_is_expected_of_a_map_is_whole_pages_of_it(
    tmp_path: Path, reader_of: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_file(tmp_path / "a.safetensors", 100_000)
    reader, calls = reader_of("mapped", source), []
    whole = source.mapped(load_of(source, 0, 0).file)
    real = readers.advise

    def advise(address: int, size: int, advice: int) -> None:
        assert real(address, size, advice)
        calls.append((address - whole.ctypes.data, size, advice))

    monkeypatch.setattr(readers, "advise", advise)
    page = mmap.PAGESIZE
    for offset, n in [(5 * page + 7, 100), (page, page), (page - 1, 2), (99_000, 1 << 40), (1 << 40, 5), (page, 0)]:
        reader.expect(load_of(source, offset, n))
    start = 99_000 // page * page
    ranges = [(5 * page, 107), (page, page), (0, page + 1), (start, whole.size - start)]
    assert calls == [(*r, mmap.MADV_WILLNEED) for r in ranges]


# --- failures


@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("size", [0, 100, BLOCK, 60_000, 60_001, 2 * BLOCK])
def test_a_file_cut_after_its_header_was_read(
    name: str, size: int, tmp_path: Path, reader_of: Callable[..., Reader]
) -> None:
    source = one_file(tmp_path / "a.safetensors", 200_000)
    reader, load = reader_of(name, source), load_of(source, 50_001, 100_000)
    read(reader, load)
    os.truncate(load.file, size)
    got = max(0, size - load.offset)
    with pytest.raises(
        SourceError, match=rf"{re.escape(str(load.file))}: 100000 bytes at 50001 wanted, {got} got: .* shorter"
    ):
        read(reader, load)


@pytest.mark.parametrize("name", READERS)
def test_a_file_changed_before_it_is_opened(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], kvikio: type[CuFile]
) -> None:
    source = one_file(tmp_path / "a.safetensors", 200_000)
    load = load_of(source, 5000, 100)
    os.truncate(load.file, 100_000)
    with pytest.raises(SourceError, match="changed since its header was read"):
        read(reader_of(name, source), load)
    load.file.unlink()
    with pytest.raises(SourceError, match=rf"{re.escape(str(load.file))}: cannot be opened: No such file"):
        read(reader_of(name, source), load)


@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.ESTALE])
def test_a_read_that_fails(
    name: str, code: int, tmp_path: Path, reader_of: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second system call of a load fails. (os.preadv itself repeats a call that a signal interrupted.)"""
    source = one_file(tmp_path / "a.safetensors", 200_000)
    reader, load, real, calls = reader_of(name, source), load_of(source, 5000, 100_000), os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        calls.append(position)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        return real(fd, [buffers[0][: 2 * BLOCK]], position)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(
        SourceError, match=rf"{re.escape(str(load.file))}: 100000 bytes at 5000 cannot be read: {os.strerror(code)}"
    ) as e:
        read(reader, load)
    assert str(e.value).endswith(f"at {calls[1]}")
    assert_bitwise_equal(read(reader, load), source.mapped(load.file)[5000:105_000])


@pytest.mark.parametrize("name", COPYING)
def test_short_reads_go_on(
    name: str, tmp_path: Path, reader_of: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little a call returns, also where that is no whole block."""
    source = one_file(tmp_path / "a.safetensors", 60_000)
    reader, whole = reader_of(name, source), source.mapped(load_of(source, 0, 0).file)
    real, rng, positions = os.preadv, random.Random(1), []

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        positions.append(position)
        got = real(fd, buffers, position)
        few = min(got, rng.randint(1, 9000) if name == "buffered" else rng.randrange(BLOCK + 512, 2 * BLOCK, 512))
        buffers[0][few:got] = bytes(got - few)  # what was not read is not there
        return few

    monkeypatch.setattr(os, "preadv", preadv)
    for offset, n in random_loads(rng, whole.size, 100):
        assert_bitwise_equal(read(reader, load_of(source, offset, n)), whole[offset : offset + n], f"{n} at {offset}")
    if name == "direct":
        assert not [p for p in positions if p % BLOCK]
    assert len(positions) > 150


# --- O_DIRECT


def _direct_descriptors(file: Path) -> list[bool]:
    """Of each descriptor of a file that is open, whether it is direct."""
    fds = [int(fd.name) for fd in Path("/proc/self/fd").iterdir()]
    return [bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) for fd in fds if _leads_to(fd, file)]


def _leads_to(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except OSError:  # the descriptor of the listing itself
        return False


def test_direct_reads_are_direct_where_the_file_system_allows(
    tmp_path: Path, reader_of: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the file system says of O_DIRECT itself, and not this package, decides what must happen."""
    source = one_file(tmp_path / "a.safetensors", 3 * BLOCK)
    load = load_of(source, 100, 2 * BLOCK)
    allowed = _allows_direct(load.file)
    reader = reader_of("direct", source)
    with caplog.at_level(logging.INFO, "arrowquant_gpu"):
        read(reader, load)
    assert _direct_descriptors(load.file) == [allowed]
    assert len(reader.notes) == len(caplog.records) == (0 if allowed else 1)


def _allows_direct(file: Path) -> bool:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, BLOCK) as page:
            os.preadv(fd, [page], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.parametrize("refused_by", ["open", "read"])
def test_where_direct_is_refused_the_page_cache_is_used_and_said(
    refused_by: str,
    tmp_path: Path,
    reader_of: Callable[..., Reader],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As some file systems do: tmpfs before Linux 6.6 when the file is opened, others when it is read."""
    source = one_file(tmp_path / "a.safetensors", 300_000)
    reader, file = reader_of("direct", source), load_of(source, 0, 0).file
    whole, real_open, real_preadv = source.mapped(file), os.open, os.preadv
    all_at_once, n_refused = threading.Barrier(8, timeout=30), itertools.count()

    def refuse(*args: Any) -> Any:
        is_open = isinstance(args[0], Path)
        if args[1] & os.O_DIRECT if is_open else fcntl.fcntl(args[0], fcntl.F_GETFL) & os.O_DIRECT:
            if not is_open and next(n_refused) < 8:
                all_at_once.wait()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return (real_open if is_open else real_preadv)(*args)

    monkeypatch.setattr(os, "open" if refused_by == "open" else "preadv", refuse)
    with caplog.at_level(logging.INFO, "arrowquant_gpu"), ThreadPoolExecutor(8) as pool:
        loads = [load_of(source, 1000 + i, 200_000) for i in range(40)]
        for load, got in zip(loads, pool.map(lambda load: read(reader, load), loads), strict=True):
            assert_bitwise_equal(got, whole[load.offset : load.offset + load.n_bytes])
            reader.expect(load)
    assert reader.notes == (f"{file}: the file system refuses O_DIRECT, so this file is read through the page cache.",)
    assert [r.getMessage() for r in caplog.records] == [*reader.notes]
    assert False in _direct_descriptors(file)


def test_other_errors_of_a_direct_read_are_not_refusals(
    tmp_path: Path, reader_of: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_file(tmp_path / "a.safetensors", 300_000)
    reader = reader_of("direct", source)

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SourceError, match="Input/output error"):
        read(reader, load_of(source, 1000, 100))
    assert reader.notes == ()


# --- GPUDirect


def test_gds_reads_whole_pages_into_the_device_buffer(
    tmp_path: Path, reader_of: Callable[..., Any], kvikio: type[CuFile]
) -> None:
    rng = random.Random(3)
    source = one_file(tmp_path / "a.safetensors", 100_001)
    reader, whole = reader_of("gds", source), source.mapped(load_of(source, 0, 0).file)
    for offset, n in random_loads(rng, whole.size, 200):
        buffer = space(n + reader.device_slack)
        got = reader.read_device(load_of(source, offset, n), buffer)
        assert_bitwise_equal(got, whole[offset : offset + n], f"{n} at {offset}")
        assert got.size == 0 or (got.ctypes.data - offset) % BLOCK == 0
    assert kvikio.calls
    assert not [c for c in kvikio.calls if c[0] % BLOCK or (c[1] % BLOCK and sum(c) != whole.size)]
    assert kvikio.opened == 1
    reader.close()
    assert kvikio.opened == 0


def test_gds_worst_place_fills_the_slack(tmp_path: Path, reader_of: Callable[..., Any], kvikio: type[CuFile]) -> None:
    source = one_file(tmp_path / "a.safetensors", 4 * BLOCK)
    reader, load = reader_of("gds", source), load_of(source, 2 * BLOCK - 1, 2)
    buffer = space(2 + reader.device_slack)
    reader.read_device(load, buffer)
    assert kvikio.calls == [(BLOCK, buffer.size)]
    with pytest.raises(AssertionError):
        reader.read_device(load, buffer[:-1])


def test_gds_errors_name_file_and_position(
    tmp_path: Path, reader_of: Callable[..., Any], kvikio: type[CuFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_file(tmp_path / "a.safetensors", 200_000)
    reader, load = reader_of("gds", source), load_of(source, 50_001, 100_000)
    buffer = space(load.n_bytes + reader.device_slack)
    reader.read_device(load, buffer)
    os.truncate(load.file, 60_001)
    path = re.escape(str(load.file))
    with pytest.raises(SourceError, match=rf"{path}: 100000 bytes at 50001 cannot be read into GPU memory: POSIX"):
        reader.read_device(load, buffer)
    kvikio.is_cufile = True
    with pytest.raises(SourceError, match=rf"{path}: 100000 bytes at 50001 wanted, 10000 got"):
        reader.read_device(load, buffer)
    with pytest.raises(SourceError, match=r"changed since its header was read"):
        reader_of("gds", source).read_device(load, buffer)

    def cannot(file: Path, flags: str) -> None:
        raise RuntimeError("cuFile driver")

    monkeypatch.setattr(sys.modules["kvikio"], "CuFile", cannot)
    source = one_file(tmp_path / "b.safetensors", 200_000)
    with pytest.raises(SourceError, match=r"b.safetensors: kvikio cannot open it: cuFile driver"):
        reader_of("gds", source).read_device(load_of(source, 100, 1000), buffer)


@pytest.mark.parametrize("fault", [ImportError("No module named 'kvikio'"), OSError("libcufile.so.0: not found")])
def test_gds_without_kvikio(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "kvikio":
                raise fault

    monkeypatch.delitem(sys.modules, "kvikio", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DeviceError, match=rf"\({fault}\): pip install 'arrowquant_gpu\[gds13\]'"):
        open_reader("gds", one_file(tmp_path / "a.safetensors", 10))


def test_an_unknown_reader(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reader 'mmap': it is one of mapped, buffered, direct, gds"):
        open_reader("mmap", one_file(tmp_path / "a.safetensors", 10))
