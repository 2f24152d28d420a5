"""The container of GGUF files: its bytes by hand, and what is refused of damaged and hostile ones."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.gguf_file import BY_ID, OTHERS, TYPES, layout, n_bytes, read_header

from .gguf_by_hand import SIZES, Tensor, header, info, read, string, value, write

RNG = np.random.default_rng(20261122)
KEYS = [
    ("general.architecture", 8, "llama"),
    ("llama.block_count", 4, 2),
    ("tokens", 9, (8, ["a", "é", ""])),
    ("scores", 9, (6, [0.5, -1.0])),
    ("flags", 9, (7, [True, False, True])),
    ("small", 1, -3),
    ("large", 10, 1 << 40),
    ("exact", 12, 1e-300),
    ("yes", 7, True),
]
TENSORS = {
    "norm": Tensor(0, (5,), RNG.bytes(20)),
    "rows": Tensor(8, (3, 64), RNG.bytes(3 * 68)),
    "stack": Tensor(12, (2, 2, 256), RNG.bytes(4 * 144)),
    "number": Tensor(1, (), b"ab"),
    "empty": Tensor(0, (0, 7), b""),
}


def test_a_file_by_hand() -> None:
    head, places, size = layout({"a": 7, "b": "xy"}, [("w", TYPES["F16"], (2, 3)), ("v", TYPES["F32"], (1,))])
    expected = b"GGUF" + struct.pack("<IQQ", 3, 2, 2)
    expected += struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    expected += struct.pack("<Q", 1) + b"b" + struct.pack("<IQ", 8, 2) + b"xy"
    expected += struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 3, 2, 1, 0)
    expected += struct.pack("<Q", 1) + b"v" + struct.pack("<IQIQ", 1, 1, 0, 32)
    assert head == expected + bytes(-len(expected) % 32)
    assert places == {"w": (len(head), len(head) + 12), "v": (len(head) + 32, len(head) + 36)}
    assert size == len(head) + 64


def test_what_is_laid_out_is_read_by_hand() -> None:
    keys: dict[str, Any] = {
        "int": 3,
        "long": 1 << 33,
        "float": 0.5,
        "no": False,
        "text": "é",
        "tokens": ["a", ""],
        "types": np.array([1, 2], "<i4"),
        "scores": np.array([0.25], "<f4"),
    }
    kinds = [(name.lower(), row, (2, 2 * row.block)) for name, row in TYPES.items() if row.id in SIZES]
    head, places, size = layout(keys, kinds)
    data = bytearray(head + RNG.bytes(size - len(head)))
    got, tensors = read(bytes(data))
    assert got == {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in keys.items()}
    assert {name: (t.kind, t.shape) for name, t in tensors.items()} == {n: (k.id, s) for n, k, s in kinds}
    for name, (begin, end) in places.items():
        assert tensors[name].data == data[begin:end]


def test_sizes_of_blocks() -> None:
    assert {i: (row.block, row.block_bytes) for i, row in BY_ID.items() if i in SIZES} == SIZES
    assert not OTHERS.keys() & BY_ID.keys()
    assert n_bytes(TYPES["NVFP4"], (3, 128)) == 3 * 2 * 36


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_files_of_others(tmp_path: Path, version: int, alignment: int) -> None:
    keys = [*KEYS, ("general.alignment", 4, alignment)]
    file = tmp_path / "a.gguf"
    file.write_bytes(data := write(keys, TENSORS, version, alignment))
    found = read_header(file)
    for name, kind, wanted in keys:
        got = found.keys[name]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == (wanted[1] if kind == 9 else wanted), name
    for name, t in TENSORS.items():
        got = found.tensors[name]
        assert (got.type.id, got.shape, data[got.offset : got.offset + got.n_bytes]) == (t.kind, t.shape, t.data)


def damaged(keys: Any = (), infos: Any = (), data: int = 4096, version: int = 3) -> bytes:
    head = header(keys, infos, version)
    return head + bytes(-len(head) % 32) + bytes(data)


ONE = info("w", [32, 2], 8, 0)
HOSTILE = {
    "not GGUF": (b"GGUX" + bytes(100), "does not begin with GGUF"),
    "short": (b"GGUF\3\0\0\0", "no GGUF file"),
    "version 1": (damaged(version=1), "is of version 1;"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "keys"),
    "tensors that are not there": (b"GGUF" + struct.pack("<IQQ", 3, 1000, 0) + bytes(99), "cut off"),
    "long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(99), "cut off"),
    "key not UTF-8": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"\xff") + value(4, 4) * 2, "UTF-8"),
    "key twice": (damaged([("a", 4, 1), ("a", 4, 1)]), "'a' twice"),
    "type of value": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + bytes([13, 0, 0, 0] * 9), "type 13"),
    "array of arrays": (damaged([("a", 9, (9, [(4, [1])]))]), "array of type 9"),
    "long array": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 8, 1 << 50),
        "items in 'a'",
    ),
    "array cut off": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 10, 1 << 20),
        "cut off",
    ),
    "alignment 0": (damaged([("general.alignment", 4, 0)]), "no power of two"),
    "alignment 3": (damaged([("general.alignment", 4, 3)]), "no power of two"),
    "alignment text": (damaged([("general.alignment", 8, "32")]), "no power of two"),
    "dimensions": (damaged(infos=[info("w", [1] * 9, 0, 0)]), "9 dimensions"),
    "huge": (damaged(infos=[info("w", [1 << 63, 1 << 63, 1 << 63], 0, 0)]), "more than the file holds"),
    "type IQ2_XS": (damaged(infos=[info("blk.0.w", [256], 17, 0)]), "'blk.0.w' is of type IQ2_XS"),
    "type TQ1_0": (damaged(infos=[info("blk.0.w", [256], 34, 0)]), "is of type TQ1_0"),
    "type 99": (damaged(infos=[info("w", [256], 99, 0)]), "is of type 99"),
    "part of a block": (damaged(infos=[info("w", [255], 12, 0)]), "not whole blocks of Q4_K"),
    "not aligned": (damaged(infos=[info("w", [32], 8, 8)]), "no multiple of the alignment 32"),
    "behind the end": (damaged(infos=[info("w", [32], 8, 4096)]), "ends at"),
    "far behind": (damaged(infos=[info("w", [32], 8, (1 << 63) // 32 * 32)]), "ends at"),
    "name twice": (damaged(infos=[ONE, info("w", [32], 8, 96)]), "'w' twice"),
    "overlap": (damaged(infos=[info("w", [32, 4], 8, 0), info("v", [32], 8, 96)]), "'w' and 'v' overlap"),
    "same place": (damaged(infos=[ONE, info("v", [32, 2], 8, 0)]), "overlap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    data, words = HOSTILE[name]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(data)
    with pytest.raises(SourceError, match=words) as e:
        read_header(file)
    assert str(file) in str(e.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_header(tmp_path / "none.gguf")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    data = write(KEYS, TENSORS)
    end = len(data) - 32 + len(TENSORS["number"].data)
    file = tmp_path / "cut.gguf"
    for n in range(0, end, 3):
        file.write_bytes(data[:n])
        with pytest.raises(SourceError):
            read_header(file)
    file.write_bytes(data[:end])
    assert read_header(file).tensors.keys() == TENSORS.keys()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(write(KEYS, TENSORS))
    head = 400
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, head))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            number = data.draw(st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1)))
            raw[at : at + 8] = struct.pack("<Q", number)
    file = tmp_path / "any.gguf"
    file.write_bytes(raw)
    try:
        found = read_header(file)
    except SourceError:
        return
    spans = sorted((t.offset, t.offset + t.n_bytes) for t in found.tensors.values() if t.n_bytes)
    assert all(0 < a < b <= len(raw) for a, b in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
