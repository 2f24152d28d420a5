"""Damage to one weight of a checkpoint, of the kinds that a wrong writer would do: the loaders then compute something
else, and a comparison that does not notice is worth nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

MODULE = "model.layers.0.mlp.down_proj"
Bytes = np.ndarray  # uint8 [bytes of the tensor]


def swapped_nibbles(x: Bytes) -> Bytes:
    """The two codes of each byte in the other order."""
    return (x << 4) | (x >> 4)


def without_offset(x: Bytes) -> Bytes:
    """Codes of 4 bits as two's complement instead of code + 8, or the other way round."""
    return x ^ np.uint8(0x88)


def one_more(x: Bytes) -> Bytes:
    """Zero points of 4 bits that are one too large, as those of the other version of GPTQ's format."""
    return x + np.uint8(0x11)


def reversed_codes(x: Bytes) -> Bytes:
    """Codes of 4 bits counted from the other end of the table."""
    return ~x


def reciprocal(x: Bytes) -> Bytes:
    """Float32 scales that divide instead of multiply."""
    return (np.float32(1) / x.view(np.float32)).view(np.uint8)


def zeroed(x: Bytes) -> Bytes:
    """Nothing."""
    return np.zeros_like(x)


def safetensors(part: str, change: Callable[[Bytes], Bytes], path: Path) -> None:
    """Change the bytes of one tensor of MODULE, in the file that has it: of a directory, or this one."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            head = json.loads(f.read(size))
        if (entry := head.get(f"{MODULE}.{part}")) is not None:
            begin, end = entry["data_offsets"]
            data = np.memmap(file, np.uint8, "r+", 8 + size + begin, (end - begin,))
            _put(data, change(np.array(data)))
            return
    raise AssertionError(f"{path}: no {MODULE}.{part}")


def gguf_q4_0(change: Callable[[Bytes], Bytes], file: Path) -> None:
    """Change the codes of the Q4_0 blocks of the same weight in a GGUF file."""
    import gguf

    (tensor,) = [t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight"]
    blocks = np.memmap(file, np.uint8, "r+", int(tensor.data_offset), (int(tensor.n_bytes) // 18, 18))
    _put(blocks[:, 2:], change(np.array(blocks[:, 2:])))
    blocks.flush()


def _put(data: np.ndarray, new: np.ndarray) -> None:
    assert not np.array_equal(data, new), "this changes nothing"
    data[:] = new
