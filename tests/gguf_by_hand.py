"""GGUF files written and read by this file alone, straight from the text of the format, for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Type -> (elements of a block, bytes of a block).
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84)}
SIZES |= {11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18), 27: (1, 8), 30: (1, 2)}
SIZES |= {39: (32, 17), 40: (64, 36)}


class Tensor(NamedTuple):
    """Type number, shape in NumPy's order, bytes."""

    kind: int
    shape: tuple[int, ...]
    data: bytes

    @property
    def rows(self) -> np.ndarray:
        """uint8 [rows, bytes of a row]."""
        block, size = SIZES[self.kind]
        return np.frombuffer(self.data, np.uint8).reshape(-1, self.shape[-1] // block * size)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, v: Any) -> bytes:
    if kind == 8:
        return string(v)
    if kind == 9:
        item, items = v
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, x) for x in items)
    return struct.pack("<" + CODES[kind], v)


def info(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """One row of the list of tensors; `dims` as in the file, row length first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(keys: Sequence[tuple[str, int, Any]], infos: Sequence[bytes], version: int = 3) -> bytes:
    """Everything before the data, without the padding."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(keys))
    return head + b"".join(string(k) + struct.pack("<I", t) + value(t, v) for k, t, v in keys) + b"".join(infos)


def write(
    keys: Sequence[tuple[str, int, Any]], tensors: Mapping[str, Tensor], version: int = 3, alignment: int = 32
) -> bytes:
    """A whole file; keys are (name, value type, value)."""
    infos, data = [], b""
    for name, t in tensors.items():
        infos.append(info(name, t.shape[::-1], t.kind, len(data)))
        data += t.data + bytes(-len(t.data) % alignment)
    head = header(keys, infos, version)
    return head + bytes(-len(head) % alignment) + data


def read(file: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a file with the usual alignment; it is trusted."""
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        (v,) = struct.unpack_from("<" + code, file, at)
        at += struct.calcsize("<" + code)
        return v

    def text() -> str:
        nonlocal at
        n = take("Q")
        at += n
        return file[at - n : at].decode()

    def item(kind: int) -> Any:
        if kind == 9:
            inner, n = take("I"), take("Q")
            return [item(inner) for _ in range(n)]
        return text() if kind == 8 else take(CODES[kind])

    assert file[:8] == b"GGUF\3\0\0\0"
    at = 8
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {text(): item(take("I")) for _ in range(n_keys)}
    rows = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    begin = at + -at % 32
    tensors = {}
    for name, dims, kind, offset in rows:
        block, size = SIZES[kind]
        assert offset % 32 == 0
        assert dims[0] % block == 0
        n = int(np.prod(dims)) // block * size
        tensors[name] = Tensor(kind, tuple(dims[::-1]), file[begin + offset : begin + offset + n])
        assert len(tensors[name].data) == n
    return keys, tensors
