"""GGUF files: the table of ggml's types, and the header: keys, and where each tensor lies. Little-endian throughout.

    "GGUF", u32 version, u64 number of tensors, u64 number of keys
    keys      string name (u64 length, UTF-8), u32 type, value; an array is u32 type, u64 length, items
    tensors   string name, u32 number of dimensions, u64 each dimension, the row length first, u32 type, u64 offset
    data      from the next multiple of the alignment on, which offsets count from and are multiples of

Source: ggml-org/ggml, docs/gguf.md; ggml-org/llama.cpp, ggml/src/gguf.cpp and gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import SourceError
from ..grids import GRIDS

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
# More than any model has: a header that says so is damaged, and is not worth the memory.
MAX_KEYS, MAX_TENSORS, MAX_ITEMS, MAX_DIMENSIONS = 1 << 16, 1 << 20, 1 << 22, 8
MAX_HEADER_BYTES = 1 << 28

# A value of a key as Python has it; arrays are lists of strings, or NumPy arrays.
Value = int | float | bool | str | list[str] | NDArray[Any]


class StoredValue(NamedTuple):
    """A value as a file has it: its type, and then its bytes. It is written again as it is."""

    raw: bytes


class GgmlType(NamedTuple):
    """One type of tensors: `block` elements take `block_bytes`.

    scheme: id of the scheme that weights of this type have; None where it is a plain type
    dtype: of the elements by themselves; None for blocks
    """

    id: int
    name: str
    block: int
    block_bytes: int
    scheme: str | None
    dtype: str | None


def _types() -> dict[str, GgmlType]:
    plain = {"F32": (0, "float32"), "F64": (28, "float64"), "I8": (24, "int8"), "I16": (25, "int16")}
    plain |= {"I32": (26, "int32"), "I64": (27, "int64")}
    found = {k: GgmlType(i, k, 1, DTYPES[d].bits // 8, None, d) for k, (i, d) in plain.items()}
    ids = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12}
    ids |= {"q5_k": 13, "q6_k": 14, "iq4_nl": 20, "bf16": 30, "ggml_mxfp4": 39, "ggml_nvfp4": 40}
    dtypes = {"f16": "float16", "bf16": "bfloat16"}
    for scheme, i in ids.items():
        name, grid = scheme.removeprefix("ggml_").upper(), GRIDS[scheme]
        found[name] = GgmlType(i, name, grid.block, grid.block_bytes, scheme, dtypes.get(scheme))
    return found


TYPES: Mapping[str, GgmlType] = _types()
BY_ID: Mapping[int, GgmlType] = {row.id: row for row in TYPES.values()}
BY_SCHEME: Mapping[str, GgmlType] = {row.scheme: row for row in TYPES.values() if row.scheme is not None}
BY_DTYPE: Mapping[str, GgmlType] = {row.dtype: row for row in TYPES.values() if row.dtype is not None}
# Types that other programs write and that are not read here, by id.
OTHERS = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
OTHERS |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"}

# Value type -> NumPy dtype of its items; strings and arrays have none.
_VALUES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_BY_NUMPY = {np.dtype(text): i for i, text in _VALUES.items()}


class GgufTensor(NamedTuple):
    """One tensor: its shape in NumPy's order, rows last, and the absolute position of its first byte."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GgufHeader(NamedTuple):
    """The header of a file, checked against the file's size; `stored` has the keys once more, as they are there."""

    keys: dict[str, Value]
    tensors: dict[str, GgufTensor]
    stored: dict[str, StoredValue]
    alignment: int


def n_bytes(kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose rows are whole blocks.

    >>> n_bytes(TYPES["Q4_K"], (2, 512))
    576
    """
    return math.prod(shape) // kind.block * kind.block_bytes


def layout(
    keys: Mapping[str, Value | StoredValue],
    tensors: Sequence[tuple[str, GgmlType, tuple[int, ...]]],
    alignment: int = ALIGNMENT,
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The header of a file with these keys and tensors, in their order: (header, name -> (begin, end), file size).

    int is written as u32 (u64 where it is larger), float as f32, str as string, arrays by their dtype. Where
    `alignment` is another than readers take by default, `keys` must have it as general.alignment.

    >>> header, places, size = layout({"general.architecture": "llama"}, [("w", TYPES["F32"], (2, 3))])
    >>> header[:4], places, size
    (b'GGUF', {'w': (128, 152)}, 160)
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)))
    for key, value in keys.items():
        head += _string(key) + _value(value)
    spans, at = {}, 0
    for name, kind, shape in tensors:
        size = n_bytes(kind, shape)
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind.id, at)
        spans[name] = at, at + size
        at += _padded(size, alignment)
    head += bytes(_padded(len(head), alignment) - len(head))
    return bytes(head), {k: (len(head) + a, len(head) + b) for k, (a, b) in spans.items()}, len(head) + at


def _padded(n: int, alignment: int = ALIGNMENT) -> int:
    return -(-n // alignment) * alignment


def _string(text: str) -> bytes:
    # Tokens of byte-level tokenizers that were read from damaged UTF-8 come back as they were.
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value | StoredValue) -> bytes:
    if isinstance(value, StoredValue):
        return value.raw
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack("<IIQ", _ARRAY, _BY_NUMPY[value.dtype], len(value)) + value.tobytes()


def read_header(file: Path) -> GgufHeader:
    """Read and check the header of a file of version 2 or 3; no weights are read.

    Raises SourceError, naming what is wrong, for a file that is not whole and valid, and for a tensor of a type that is
    not read.
    """
    try:
        with file.open("rb") as f:
            size = f.seek(0, 2)
            if size < 24:
                raise SourceError(f"{file}: {size} bytes are no GGUF file")
            with mmap.mmap(f.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as mapped:
                return _Reader(file, mapped, size).header()
    except OSError as e:
        raise SourceError(f"{file}: cannot be read: {e.strerror or e}") from e


class _Reader:
    """Reads a header from the front; every length is compared with what is left before anything is made of it."""

    def __init__(self, file: Path, data: mmap.mmap, size: int) -> None:
        self._file, self._data, self._size, self._at = file, data, size, 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._fail("does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            order = " or in big-endian byte order" if version & 0xFFFF == 0 else ""
            raise self._fail(f"is of version {version}{order}; versions 2 and 3, little-endian, can be read")
        n_tensors, n_keys = self._count("tensors", MAX_TENSORS), self._count("keys", MAX_KEYS)
        keys: dict[str, Value] = {}
        stored: dict[str, StoredValue] = {}
        for _ in range(n_keys):
            key = self._text("a key")
            if key in keys:
                raise self._fail(f"has the key {key[:100]!r} twice")
            begin = self._at
            keys[key] = self._item(key, self._number("<I"))
            stored[key] = StoredValue(self._data[begin : self._at])
        alignment = keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._fail(f"has general.alignment {alignment!r}, which is no power of two")
        found = [self._tensor(alignment) for _ in range(n_tensors)]
        return GgufHeader(keys, self._placed(found, _padded(self._at, alignment)), stored, alignment)

    def _fail(self, words: str) -> SourceError:
        return SourceError(f"{self._file}: {words}")

    def _take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            what = "is cut off" if len(self._data) == self._size else f"has over {MAX_HEADER_BYTES:,} bytes"
            raise self._fail(f"the header {what} (at byte {self._at:,}, {n:,} more are needed)")
        self._at += n
        return self._data[self._at - n : self._at]

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._take(struct.calcsize(code)))[0])

    def _count(self, what: str, most: int) -> int:
        n = self._number("<Q")
        if n > most:
            raise self._fail(f"has {n:,} {what}; {most:,} are the most that can be read")
        return n

    def _text(self, what: str) -> str:
        n = self._number("<Q")
        try:
            return self._take(n).decode()
        except UnicodeDecodeError as e:
            raise self._fail(f"has {what} that is not UTF-8: {e}") from e

    def _item(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._take(self._number("<Q")).decode("utf-8", "surrogateescape")
        if kind == _BOOL:
            return self._take(1) != b"\0"
        if kind in _VALUES:
            dtype = np.dtype(_VALUES[kind])
            value = np.frombuffer(self._take(dtype.itemsize), dtype)
            return float(value[0]) if dtype.kind == "f" else int(value[0])
        if kind == _ARRAY:
            return self._array(key)
        raise self._fail(f"key {key[:100]!r} is of type {kind}, which GGUF does not have")

    def _array(self, key: str) -> Value:
        kind = self._number("<I")
        n = self._count(f"items in {key[:100]!r}", MAX_ITEMS)
        if kind == _STRING:
            return [self._take(self._number("<Q")).decode("utf-8", "surrogateescape") for _ in range(n)]
        if kind == _BOOL:
            return np.frombuffer(self._take(n), np.uint8).astype(np.bool_)
        if kind not in _VALUES:
            raise self._fail(f"key {key[:100]!r} is an array of type {kind}, which cannot be read")
        dtype = np.dtype(_VALUES[kind])
        return np.frombuffer(self._take(n * dtype.itemsize), dtype)

    def _tensor(self, alignment: int) -> GgufTensor:
        """A tensor as it is listed; `offset` still counts from the data."""
        name = self._text("a name of a tensor")
        words = f"tensor {name[:100]!r}"
        n = self._number("<I")
        if n > MAX_DIMENSIONS:
            raise self._fail(f"{words} has {n} dimensions; {MAX_DIMENSIONS} are the most that can be read")
        shape = tuple(reversed([self._number("<Q") for _ in range(n)]))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in BY_ID:
            known = ", ".join(TYPES)
            raise self._fail(f"{words} is of type {OTHERS.get(kind, kind)}; types that can be read are {known}")
        row = BY_ID[kind]
        if math.prod(shape) > self._size * row.block:
            raise self._fail(f"{words} is {list(shape)}, more than the file holds")
        if (shape[-1] if shape else 1) % row.block:
            raise self._fail(f"{words}: rows of {shape[-1] if shape else 1} are not whole blocks of {row.name}")
        if offset % alignment:
            raise self._fail(f"{words} is at {offset}, which is no multiple of the alignment {alignment}")
        return GgufTensor(name, row, shape, offset, n_bytes(row, shape))

    def _placed(self, found: list[GgufTensor], data: int) -> dict[str, GgufTensor]:
        """The tensors by name, in the order of the file, with absolute offsets."""
        placed: dict[str, GgufTensor] = {}
        for t in found:
            if t.name in placed:
                raise self._fail(f"has tensor {t.name[:100]!r} twice")
            placed[t.name] = t._replace(offset=data + t.offset)
        in_order = sorted((t for t in placed.values() if t.n_bytes), key=lambda t: t.offset)
        for t in in_order:
            if t.offset + t.n_bytes > self._size:
                raise self._fail(f"tensor {t.name[:100]!r} ends at {t.offset + t.n_bytes:,} of {self._size:,} bytes")
        for a, b in pairwise(in_order):
            if a.offset + a.n_bytes > b.offset:
                raise self._fail(f"tensors {a.name[:100]!r} and {b.name[:100]!r} overlap")
        return placed
