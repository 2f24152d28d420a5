"""Headers of safetensors files: read and checked as a whole, and laid out for writing.

A file is a little-endian u64 `n`, `n` bytes of JSON, and the tensors. The JSON object maps each name to
{"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the JSON; "__metadata__" maps
strings to strings. The tensors must tile the rest of the file: no overlap, no hole, no byte left over.
Format: https://huggingface.co/docs/safetensors, section Format.

The reader takes nothing from the file on trust. It is stricter than the safetensors library where that one guesses:
duplicate names and unknown keys are errors here. The header is scanned by its closed grammar instead of being parsed
as any JSON, so that what it costs in memory is bounded by what a valid header of its length can hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from ..dtypes import DTYPES, DType, from_safetensors
from ..errors import FormatError, HeaderError, SourceError
from . import TensorInfo
from .recognise import by_first_bytes

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
MAX_ENTRIES = 1 << 18  # tensors, or pairs of metadata, of one file
MAX_ENTRY_BYTES = 4096  # of one tensor's JSON object
MAX_DIMS = 64  # of a NumPy array
MAX_INT = 2**63 - 1


class HeaderCode(StrEnum):
    """Why a header is refused: the `code` of a HeaderError."""

    NOT_SAFETENSORS = "not_safetensors"  # the first bytes are those of something else
    FILE_TOO_SMALL = "file_too_small"  # not even a header length
    HEADER_TOO_LARGE = "header_too_large"  # over MAX_HEADER_BYTES
    HEADER_PAST_END = "header_past_end"  # longer than the file
    NOT_OBJECT = "not_object"  # does not begin with {
    UTF8 = "utf8"
    SURROGATE = "surrogate"  # half of a surrogate pair: a string that has no UTF-8 form
    JSON = "json"
    DUPLICATE = "duplicate"  # a name or key twice
    TOO_MANY = "too_many"  # over MAX_ENTRIES
    METADATA = "metadata"  # not strings to strings
    ENTRY = "entry"  # a tensor that is no object, or a very long one
    KEYS = "keys"  # not exactly dtype, shape and data_offsets
    DTYPE = "dtype"
    SHAPE = "shape"  # not up to MAX_DIMS non-negative integers
    OVERFLOW = "overflow"  # more bits than a 64-bit integer counts
    PARTIAL_BYTE = "partial_byte"  # sub-byte elements that do not fill their last byte
    OFFSETS = "offsets"  # not two integers, begin <= end
    SIZE = "size"  # data_offsets and shape disagree
    OVERLAP = "overlap"
    HOLE = "hole"
    TRUNCATED = "truncated"  # the file ends before the tensors do
    TRAILING = "trailing"  # bytes after the last tensor


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header. `tensors` is in the order of the file; `data_offset` is where the header ends.

    `digest` is BLAKE2b-128 of the header's bytes. `mtime_ns` tells a file that was changed since.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int
    file_size: int
    mtime_ns: int
    digest: bytes


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file; weights are not touched.

    Raises HeaderError, with a stable `code`, for anything that is not a whole and valid file of this format, and
    SourceError for a file that cannot be opened or read.

    >>> import tempfile, numpy as np, safetensors.numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.safetensors"
    ...     safetensors.numpy.save_file({"w": np.zeros((2, 3), np.float32)}, file)
    ...     info = read_header(file).tensors["w"]
    >>> info.dtype, info.shape, info.n_bytes
    ('float32', (2, 3), 24)
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{path}: not a regular file")
            raw = _read_raw(fd, path, status.st_size)
        finally:
            os.close(fd)
    except (OSError, ValueError) as e:
        if isinstance(e, SourceError):
            raise
        raise SourceError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    scan = _Scan(path, raw)
    tensors, metadata = scan.header(8 + len(raw))
    scan.tiling(tensors.values(), 8 + len(raw), status.st_size)
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return Header(tensors, metadata, 8 + len(raw), status.st_size, status.st_mtime_ns, digest)


def _read_raw(fd: int, path: Path, file_size: int) -> bytes:
    """The JSON bytes. Their length is compared with the size of the file before anything is allocated for them."""
    head = os.pread(fd, 64, 0)
    if (what := by_first_bytes(head)) is not None:
        raise HeaderError(f"{path}: this is {what}.", HeaderCode.NOT_SAFETENSORS)
    if len(head) < 8:
        raise HeaderError(
            f"{path}: {file_size} bytes are too few for a safetensors file, which begins with 8 bytes of header "
            f"length. Download or copy it again.",
            HeaderCode.FILE_TOO_SMALL,
        )
    n = int.from_bytes(head[:8], "little")
    if n > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{path}: the first 8 bytes announce a header of {n} bytes; the format allows {MAX_HEADER_BYTES}. "
            f"This is no safetensors file, or a damaged one.",
            HeaderCode.HEADER_TOO_LARGE,
        )
    if n > file_size - 8:
        raise HeaderError(
            f"{path}: a header of {n} bytes is announced, but the file ends {n - (file_size - 8)} bytes before that. "
            f"Download or copy it again.",
            HeaderCode.HEADER_PAST_END,
        )
    parts: list[bytes] = []
    at = 8
    while at < n + 8:
        part = os.pread(fd, n + 8 - at, at)
        if not part:
            raise SourceError(f"{path}: the file became shorter while it was read")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


_SPACE = re.compile(rb"[ \t\n\r]*")
# Possessive, so that a string of megabytes needs no memory for backtracking.
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"')
# A valid entry holds no further object and no string with a brace, so its first closing brace is its own.
_ENTRY = re.compile(rb"\{[^}]{0,%d}\}" % MAX_ENTRY_BYTES)
_KEYS = {"dtype", "shape", "data_offsets"}


def _integer(literal: str) -> int | float:
    # "-0" is a number that JSON has and integers do not: the format's own library refuses it.
    return -0.0 if literal == "-0" else int(literal)


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=list, parse_int=_integer, parse_constant=_no_constant)


def _short(value: object) -> str:
    """A value from the file for a message: escaped, and cut where it is long."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."


class _Scan:
    """A cursor over the bytes of a header."""

    def __init__(self, path: Path, raw: bytes):
        self.path, self.raw, self.at = path, raw, 0

    def fail(self, code: HeaderCode, words: str, name: str | None = None) -> NoReturn:
        tensor = "" if name is None else f"tensor {_short(name)}: "
        raise HeaderError(f"{self.path}: {tensor}{words}", code)

    def header(self, data_offset: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """All tensors, sorted by their place in the file, and the metadata."""
        if self.raw[:1] != b"{":
            self.fail(HeaderCode.NOT_OBJECT, f"the header begins with {self.raw[:8]!r}, not with {{")
        tensors: list[TensorInfo] = []
        metadata: dict[str, str] = {}
        for name in self.members():
            if name == "__metadata__":
                metadata = self.metadata()
            else:
                tensors.append(self.tensor(name, data_offset))
        self.space()
        if self.at != len(self.raw):
            self.fail(HeaderCode.JSON, f"the header goes on after its closing brace, at byte {8 + self.at}")
        # The name decides between empty tensors at one place, so that the order is always the same.
        tensors.sort(key=lambda t: (t.offset, t.n_bytes, t.name))
        return {t.name: t for t in tensors}, metadata

    def space(self) -> None:
        m = _SPACE.match(self.raw, self.at)
        assert m is not None  # it matches nothing, too
        self.at = m.end()

    def at_token(self, token: bytes) -> bool:
        self.space()
        return self.raw[self.at : self.at + 1] == token

    def accept(self, token: bytes) -> bool:
        """Step over `token` and the space before it, if that is what comes."""
        if not self.at_token(token):
            return False
        self.at += 1
        return True

    def expect(self, token: bytes) -> None:
        if not self.accept(token):
            found = self.raw[self.at : self.at + 12]
            self.fail(
                HeaderCode.JSON,
                f"the header is not valid: {token.decode()} expected at byte {8 + self.at}, found {found!r}"
                if found
                else f"the header ends where {token.decode()} is expected",
            )

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. The caller steps over the value before asking for the next key."""
        self.expect(b"{")
        seen: set[str] = set()
        if self.accept(b"}"):
            return
        while True:
            key = self.string()
            if key in seen:
                self.fail(HeaderCode.DUPLICATE, f"the name {_short(key)} occurs twice in the header")
            seen.add(key)
            if len(seen) > MAX_ENTRIES:
                self.fail(HeaderCode.TOO_MANY, f"more than {MAX_ENTRIES} names in one header")
            self.expect(b":")
            yield key
            if self.accept(b"}"):
                return
            self.expect(b",")

    def string(self) -> str:
        self.space()
        m = _STRING.match(self.raw, self.at)
        if m is None:
            self.fail(HeaderCode.JSON, f"the header is not valid: no string, or an unended one, at byte {8 + self.at}")
        self.at = m.end()
        text = self.utf8(m.group())
        if "\\" not in text:
            return text[1:-1]
        value: str = self.json(text)
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(HeaderCode.SURROGATE, f"half a surrogate pair in the string {_short(value)} of the header")
        return value

    def utf8(self, part: bytes) -> str:
        """The text of the bytes that end at the cursor."""
        try:
            return part.decode()
        except UnicodeDecodeError as e:
            self.fail(HeaderCode.UTF8, f"the header is not UTF-8 at byte {8 + self.at - len(part) + e.start}")

    def json(self, text: str, name: str | None = None) -> Any:
        try:
            return _DECODER.decode(text)
        except (ValueError, RecursionError) as e:
            self.fail(HeaderCode.JSON, f"the header is not valid JSON in {_short(text)}: {e}", name)

    def metadata(self) -> dict[str, str]:
        words = "__metadata__ of the header must be an object of strings"
        if not self.at_token(b"{"):
            self.fail(HeaderCode.METADATA, words)
        found: dict[str, str] = {}
        for key in self.members():
            if not self.at_token(b'"'):
                self.fail(HeaderCode.METADATA, f"{words}; the value of {_short(key)} is no string")
            found[key] = self.string()
        return found

    def tensor(self, name: str, data_offset: int) -> TensorInfo:
        """One tensor, checked for itself; the cursor is at its entry."""
        self.space()
        m = _ENTRY.match(self.raw, self.at)
        if m is None:
            found = self.raw[self.at : self.at + 40]
            self.fail(
                HeaderCode.ENTRY,
                f"must be an object of at most {MAX_ENTRY_BYTES} bytes in the header, not {found!r}",
                name,
            )
        self.at = m.end()
        pairs = self.json(self.utf8(m.group()), name)
        fields = dict(pairs)
        if len(fields) != len(pairs):
            self.fail(HeaderCode.DUPLICATE, f"a key occurs twice in {_short([k for k, _ in pairs])}", name)
        if fields.keys() != _KEYS:
            self.fail(
                HeaderCode.KEYS, f"its keys are {_short(sorted(fields))}; they must be {', '.join(sorted(_KEYS))}", name
            )
        label, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        dtype = from_safetensors(label) if isinstance(label, str) else None
        if dtype is None:
            known = ", ".join(d.safetensors for d in DTYPES.values())
            self.fail(HeaderCode.DTYPE, f"dtype {_short(label)} is not one of {known}", name)
        if not _is_counts(shape) or len(shape) > MAX_DIMS:
            self.fail(HeaderCode.SHAPE, f"shape {_short(shape)} must be at most {MAX_DIMS} non-negative integers", name)
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail(
                HeaderCode.OFFSETS, f"data_offsets {_short(offsets)} must be two integers, 0 <= begin <= end", name
            )
        n_bits = _n_bits(shape, dtype.bits)
        if n_bits is None or offsets[1] > MAX_INT - data_offset:
            self.fail(
                HeaderCode.OVERFLOW,
                f"shape {_short(shape)} of {label} at data_offsets {_short(offsets)} is over {MAX_INT} bits or bytes",
                name,
            )
        if n_bits % 8:
            self.fail(
                HeaderCode.PARTIAL_BYTE, f"shape {shape} of {label} takes {n_bits} bits, which is no whole byte", name
            )
        size = offsets[1] - offsets[0]
        if size * 8 != n_bits:
            self.fail(
                HeaderCode.SIZE,
                f"shape {_short(shape)} of {label} takes {n_bits // 8} bytes, but data_offsets {offsets} hold {size}",
                name,
            )
        return TensorInfo(name, dtype.name, tuple(shape), self.path, data_offset + offsets[0], size)

    def tiling(self, tensors: Iterable[TensorInfo], data_offset: int, file_size: int) -> None:
        """Tensors, in the order of their offsets, must follow each other from the header to the end of the file."""
        at = data_offset
        for t in tensors:
            if t.offset != at:
                code, words = (HeaderCode.OVERLAP, "inside") if t.offset < at else (HeaderCode.HOLE, "after")
                self.fail(
                    code,
                    f"it begins at {t.offset - data_offset}, {words} the place {at - data_offset} where the tensors "
                    f"before it end: {'two tensors overlap' if t.offset < at else 'the bytes between belong to none'}",
                    t.name,
                )
            at += t.n_bytes
        if at > file_size:
            self.fail(
                HeaderCode.TRUNCATED,
                f"the file is truncated: {at - file_size} of {at} bytes are missing. Download or copy it again.",
            )
        if at < file_size:
            self.fail(HeaderCode.TRAILING, f"{file_size - at} bytes follow the last tensor, which ends at byte {at}")


def _is_counts(value: object) -> TypeGuard[list[int]]:
    # `type is int`, because JSON's true is an int to Python.
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _n_bits(shape: Sequence[int], bits: int) -> int | None:
    """Bits of a tensor, or None where a 64-bit integer does not hold them; empty dimensions do not hide large ones."""
    if math.prod(d for d in shape if d) * bits > MAX_INT:
        return None
    return math.prod(shape) * bits


def layout(
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    *,
    keep_order: bool = False,
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a file to be written, and where each tensor goes: name -> (begin, end), counted from byte 0.

    `tensors` are (name, dtype as in dtypes.py, shape). Wide types come first, then names in order, so that every
    tensor is aligned to its element; `keep_order` places them as given instead. `metadata` of None is
    {"format": "pt"}, which transformers asks for. The length field is part of the header; the file ends where the
    last tensor does. The caller writes the bytes, in any order.

    Raises FormatError for what a header cannot say: a name twice or reserved, an unknown dtype, a sub-byte tensor
    that is no whole number of bytes.

    >>> head, places = layout([("b", "int8", (3,)), ("a", "float32", (2, 2))])
    >>> len(head), places == {"a": (len(head), len(head) + 16), "b": (len(head) + 16, len(head) + 19)}
    (152, True)
    """
    rows: list[tuple[str, DType, tuple[int, ...], int]] = []
    for name, dtype, shape in tensors:
        row = DTYPES.get(dtype)
        if row is None:
            raise FormatError(f"tensor {_short(name)}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        n_bits = _n_bits(shape, row.bits) if _is_counts(list(shape)) and len(shape) <= MAX_DIMS else None
        if n_bits is None or n_bits % 8:
            raise FormatError(f"tensor {_short(name)}: safetensors cannot hold shape {list(shape)} of {dtype}")
        rows.append((name, row, tuple(shape), n_bits // 8))
    if not keep_order:
        rows.sort(key=lambda r: (-r[1].bits, r[0]))
    head: dict[str, object] = {"__metadata__": dict(metadata) if metadata is not None else {"format": "pt"}}
    at = 0
    places: dict[str, tuple[int, int]] = {}
    for name, row, shape, size in rows:
        if name in head:
            raise FormatError(f"tensor {_short(name)}: safetensors cannot hold this name twice, or not at all")
        head[name] = {"dtype": row.safetensors, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = (at, at + size)
        at += size
    try:
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as e:
        raise FormatError(f"safetensors cannot hold {_short(e.object[e.start : e.end])} in a name or metadata") from e
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"a header of {len(text)} bytes is over the {MAX_HEADER_BYTES} of safetensors: use more shards"
        )
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: (begin + b, begin + e) for n, (b, e) in places.items()}
