"""Headers of safetensors files: what is read, and what is laid out, is what the safetensors library reads."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, HeaderError, SourceError
from arrowquant_gpu.formats.safetensors import HeaderCode, layout, read_header

from .fixtures import Raw, write_safetensors


def raw_file(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(path: Path, dtype: str, shape: list[object], size: int) -> Path:
    head = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    return raw_file(path, json.dumps(head).encode(), bytes(size))


def code_of(path: Path) -> str:
    with pytest.raises(HeaderError) as e:
        read_header(path)
    assert str(path) in str(e.value)
    return e.value.code


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_the_library_reads_it(dtype: str, tmp_path: Path) -> None:
    row = DTYPES[dtype]
    data = bytes(range(24 * row.bits // 8))
    path = write_safetensors(tmp_path / "a.safetensors", {"w": Raw(dtype, (2, 3, 4), data)}, {"format": "pt"})
    header = read_header(path)
    info = header.tensors["w"]
    assert (info.dtype, info.shape, info.n_bytes) == (dtype, (2, 3, 4), len(data))
    assert path.read_bytes()[info.offset : info.offset + info.n_bytes] == data
    assert (header.file_size, header.data_offset, header.metadata) == (
        path.stat().st_size,
        path.stat().st_size - len(data),
        {"format": "pt"},
    )
    with safetensors.safe_open(path, framework="np") as f:
        theirs = f.get_slice("w")
        assert (theirs.get_dtype(), theirs.get_shape()) == (row.safetensors, [2, 3, 4])


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 7), np.int16),
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, {"who": "büro"})
    header = read_header(path)
    assert header.metadata == {"who": "büro"}
    raw = path.read_bytes()
    for name, want in arrays.items():
        info = header.tensors[name]
        got = np.frombuffer(raw[info.offset : info.offset + info.n_bytes], DTYPES[info.dtype].numpy)
        assert got.reshape(info.shape).tobytes() == want.tobytes()
        assert info.shape == want.shape
    assert [t.offset for t in header.tensors.values()] == sorted(t.offset for t in header.tensors.values())


def test_digest_is_of_the_header_alone(tmp_path: Path) -> None:
    a = write_safetensors(tmp_path / "a", {"w": np.zeros(4, np.float32)})
    b = write_safetensors(tmp_path / "b", {"w": np.ones(4, np.float32)})
    c = write_safetensors(tmp_path / "c", {"v": np.zeros(4, np.float32)})
    assert read_header(a).digest == read_header(b).digest != read_header(c).digest


def test_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"w": np.zeros(100, np.float32)})
    os.truncate(path, path.stat().st_size - 42)
    with pytest.raises(HeaderError, match=r"42 of .* bytes are missing"):
        read_header(path)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "HTML page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\x00\x00\x08\x08", "save_pretrained"),
        (b"\x80\x02\x8a\nl\xfc\x9cF", "save_pretrained"),
        (b"PAR1\x15\x04", "arrowquant dequantize"),
    ],
)
def test_other_files_are_named(head: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(head)
    with pytest.raises(HeaderError, match=words) as e:
        read_header(path)
    assert e.value.code == HeaderCode.NOT_SAFETENSORS


@pytest.mark.parametrize("begin", [b"{\n", b'{"', b"\x1f\x8b", b"\x80\x02\x8a"])
def test_a_length_may_look_like_another_file(begin: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(begin, "little")
    path = raw_file(tmp_path / "a", b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(length))
    assert path.read_bytes().startswith(begin)
    assert read_header(path).tensors["w"].shape == (0,)


@pytest.mark.parametrize(
    ("shape", "size", "code"),
    [
        ([True, 4], 16, HeaderCode.SHAPE),
        ([2.0, 2], 16, HeaderCode.SHAPE),
        ([-2, -2], 16, HeaderCode.SHAPE),
        ([1] * 65, 4, HeaderCode.SHAPE),
        ([1 << 62, 4], 0, HeaderCode.OVERFLOW),  # wraps to 0 in 64 bits
        ([0, 1 << 62, 1 << 62], 0, HeaderCode.OVERFLOW),
        ([2, 2], 15, HeaderCode.SIZE),
    ],
)
def test_shapes_are_checked(shape: list[object], size: int, code: str, tmp_path: Path) -> None:
    assert code_of(one(tmp_path / "a.safetensors", "F32", shape, size)) == code


def test_sub_byte_types_take_whole_bytes(tmp_path: Path) -> None:
    assert read_header(one(tmp_path / "a", "F6_E2M3", [2, 2], 3)).tensors["w"].n_bytes == 3
    assert code_of(one(tmp_path / "b", "F4", [3], 1)) == HeaderCode.PARTIAL_BYTE


def test_errors_name_file_tensor_and_value(tmp_path: Path) -> None:
    path = one(tmp_path / "a.safetensors", "F31", [2, 2], 16)
    with pytest.raises(HeaderError) as e:
        read_header(path)
    assert str(path) in str(e.value)
    assert "'w'" in str(e.value)
    assert "'F31'" in str(e.value)


def test_long_names_do_not_fill_the_message(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a", b'{"' + b"x" * 1_000_000 + b'": 5}')
    with pytest.raises(HeaderError) as e:
        read_header(path)
    assert len(str(e.value)) < 1000


def test_error_survives_pickling() -> None:
    e = pickle.loads(pickle.dumps(HeaderError("words", HeaderCode.HOLE)))
    assert (str(e), e.code) == ("words", "hole")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"w": np.zeros(4, np.float32)})
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at) if at == 0 else b"")
    with pytest.raises(SourceError, match="became shorter"):
        read_header(path)


def test_reads_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"w": np.zeros(4, np.float32)})
    want, real = read_header(path), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n if at == 0 else min(n, 5), at))
    assert read_header(path) == want


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + b"[]," * 1_000_000,
        b'{"a":' + b"[" * 3_000_000,
        b'{"a":' * 600_000,
        b'{"a":{"shape":[' + b"0," * 1_500_000,
        b"{" + b" " * 3_000_000,
        b'{"' + b"\\u0000" * 500_000,
        b'{"__metadata__":{"a":"' + b"\\n" * 1_500_000,
    ],
    ids=["lists", "nested lists", "nested objects", "numbers", "blanks", "escapes", "metadata"],
)
def test_memory_stays_near_the_size_of_the_header(text: bytes, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.safetensors", text)
    tracemalloc.start()
    try:
        assert code_of(path) in {HeaderCode.ENTRY, HeaderCode.JSON}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(text) + 100_000


def test_memory_is_asked_for_after_the_file_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 99_000_000) + b"{")
    tracemalloc.start()
    try:
        assert code_of(path) == HeaderCode.HEADER_PAST_END
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


NAMES = st.text(max_size=20).filter(lambda s: s != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.lists(st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), SHAPES), max_size=8, unique_by=lambda t: t[0])


def _whole(tensor: tuple[str, str, tuple[int, ...]]) -> tuple[str, str, tuple[int, ...]]:
    name, dtype, shape = tensor
    return name, dtype, (*shape, 4) if DTYPES[dtype].bits < 8 else shape


@given(TENSORS, st.booleans(), st.one_of(st.none(), st.dictionaries(NAMES, NAMES, max_size=3)))
def test_layout_is_read_back_by_the_library_and_by_us(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, str, tuple[int, ...]]],
    keep_order: bool,
    metadata: dict[str, str] | None,
) -> None:
    tensors = [_whole(t) for t in tensors]
    head, places = layout(tensors, metadata, keep_order=keep_order)
    assert len(head) % 8 == 0
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    end = max((e for _, e in places.values()), default=len(head))
    raw = bytearray(head) + bytearray(i % 251 for i in range(end - len(head)))
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    path.write_bytes(raw)
    theirs = dict(safetensors.deserialize(bytes(raw)))
    header = read_header(path)
    assert set(theirs) == set(header.tensors) == {name for name, _, _ in tensors}
    for name, dtype, shape in tensors:
        begin, stop = places[name]
        assert theirs[name]["dtype"] == DTYPES[dtype].safetensors
        assert tuple(theirs[name]["shape"]) == shape
        assert bytes(theirs[name]["data"]) == raw[begin:stop]
        info = header.tensors[name]
        assert (info.dtype, info.shape, info.offset, info.n_bytes) == (dtype, shape, begin, stop - begin)
        if not keep_order and DTYPES[dtype].bits >= 8:
            assert begin % (DTYPES[dtype].bits // 8) == 0
    assert header.metadata == ({"format": "pt"} if metadata is None else metadata)
    with safetensors.safe_open(path, framework="np") as f:
        assert (f.metadata() or {}) == header.metadata
    if keep_order:
        order = sorted(places, key=lambda n: (places[n][0], [t[0] for t in tensors].index(n)))
        assert order == [t[0] for t in tensors]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("a", "int8", (1,)), ("a", "int8", (1,))], "name twice"),
        ([("__metadata__", "int8", (1,))], "__metadata__"),
        ([("a", "I8", (1,))], "dtype 'I8'"),
        ([("a", "float4_e2m1fn", (3,))], "shape"),
    ],
)
def test_layout_refuses_what_no_header_can_say(tensors: list[tuple[str, str, tuple[int, ...]]], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        layout(tensors)
