"""AWQ checkpoints, `quant_method: awq`, version gemm: the layout, the sink and the reader.

One linear module `P` of [N, K] weights of 4 bits, in G groups a row (docs/formats/awq.md):

    P.qweight  int32 [K, N / 8]
    P.qzeros   int32 [G, N / 8]
    P.scales   float16 [G, N]

A word holds the codes, or zero points, of 8 rows, in the order of ORDER. Sources: casper-hansen/AutoAWQ,
modules/linear/gemm.py and utils/packing_utils.py; vllm-project/vllm, quantization/awq.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..schemes import Scheme
from . import Entry
from .engine_rules import UNFUSED_EXPERTS, Rule, broken
from .ignored_modules import TIED_HEADS, ignore_list
from .transposed import TransposedModel, TransposedSink, common_scheme, marlin_rules

# The row, of 8, whose code is in bits 4 j to 4 j + 3 of a word.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(8))

# Words of a line, and of a row of codes, that are made together: what they take, about 1 MB, stays in a cache. Columns
# that are no power of two, so that rows do not fall on the same lines of it.
STRIP_WORDS, STRIP_COLUMNS = 64, 320
# Squares of words are transposed by halves, quarters and eighths: (bits, mask) of each.
_HALVES = ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F))

_RULES = (
    Rule(
        "GPTQModel, with which transformers loads AWQ,",
        "has kernels for groups of 16, 32, 64 and 128 and for channels only, and refuses {what}.",
        lambda _, scheme: scheme.group_size not in (None, 16, 32, 64, 128),
    ),
    *marlin_rules("vLLM"),
    UNFUSED_EXPERTS,
)


class AwqSink(TransposedSink):
    """Writes a model directory. See `ModelSink`."""

    format = "awq"
    bits = (4,)
    row_unit = 8
    length_unit = 2

    def code_lines(self, length: int, bits: int) -> tuple[int, int]:
        """See `TransposedSink`."""
        return length, 4

    def code_words(self, packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """See `TransposedSink`. A square of 8 rows and 8 columns, a word of codes each, becomes its transpose."""
        n_words, length = len(packed) // 8, 2 * packed.shape[1]
        if length % 8:
            packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
        rows = packed.view("<u4").reshape(n_words, 8, -1).swapaxes(0, 1)
        words = np.empty((rows.shape[2], 8, n_words), "<u4")
        for word in range(0, n_words, STRIP_WORDS):
            for column in range(0, rows.shape[2], STRIP_COLUMNS):
                part = slice(word, word + STRIP_WORDS), slice(column, column + STRIP_COLUMNS)
                squares = np.ascontiguousarray(rows[ORDER, *part])
                _transpose(squares)
                words[part[1], :, part[0]] = squares.transpose(2, 0, 1)
        return words.reshape(-1, n_words)[:length].view(np.uint8)

    def zero_words(self, zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """See `TransposedSink`."""
        eights = zeros.reshape(-1, 8, zeros.shape[1])
        pairs = eights[:, ORDER[0::2]] | (eights[:, ORDER[1::2]] << np.uint8(4))
        return np.ascontiguousarray(pairs.transpose(2, 0, 1)).reshape(zeros.shape[1], -1)

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'integers')}, in the format gemm of AWQ"

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What a known engine refuses of what is planned. Raises FormatError where there are several group sizes."""
        _group_size(entries)
        return broken(_RULES, entries)

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        quantization = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _group_size(entries),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignore_list(entries, self.config, TIED_HEADS) or None,
        }
        return {"quantization_config": quantization}


class AwqCheckpoint(TransposedModel):
    """Reads an AWQ model directory of version gemm, from this package or another. See `StoredModel`."""

    format = "awq"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        said = config.get("quantization_config") or {}
        version = str(said.get("version", "gemm")).lower()
        if version != "gemm":
            raise self.fail(f"AWQ version {version!r}; gemm is what can be read")
        return super().find(config)

    def scheme_of(self, module: str, scale_dtype: str) -> Scheme:
        """See `TransposedModel`."""
        said = self.quantization
        bits, size = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
        if bits != 4:
            raise self.fail(f"{module}: AWQ of {bits!r} bits; 4 are what can be read")
        is_channel = size in (-1, None)
        return Scheme(4, "channel" if is_channel else "group", None if is_channel else size, False, scale_dtype)

    def weights_shape(self, words: tuple[int, int], bits: int) -> tuple[int, int]:
        """See `TransposedModel`."""
        return words[1] * 8, words[0]

    def zeros_width(self, n: int, bits: int) -> int:
        """See `TransposedModel`."""
        return n // 8

    def codes(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """See `TransposedModel`."""
        columns = _rows_of(words, row, stop)
        return columns[:, 0::2] | (columns[:, 1::2] << np.uint8(4))

    def zeros(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """See `TransposedModel`."""
        return _rows_of(words, row, stop)


def _transpose(squares: NDArray[np.uint32]) -> None:
    """Transpose, in place, squares of 4-bit values: value j of word i of [8, ...] becomes value i of word j.

    Source: Henry S. Warren, Hacker's Delight, 7-3.

    >>> square = np.arange(8, dtype=np.uint32) + np.uint32(0x10)
    >>> _transpose(square)
    >>> [f"{word:08x}" for word in square]
    ['76543210', '11111111', '00000000', '00000000', '00000000', '00000000', '00000000', '00000000']
    """
    for axis, (bits, mask) in enumerate(_HALVES):
        first, second = np.moveaxis(squares.reshape(2, 2, 2, *squares.shape[1:]), axis, 0)
        swapped = first >> np.uint32(bits)
        swapped ^= second
        swapped &= np.uint32(mask)
        second ^= swapped
        swapped <<= np.uint32(bits)
        first ^= swapped


def _rows_of(words: NDArray[np.int32], row: int, stop: int) -> NDArray[np.uint8]:
    """What the words [lines, N / 8] hold for the rows row .. stop, one value a byte: [rows, lines]."""
    part = np.ascontiguousarray(words[:, row // 8 : -(-stop // 8)].T).view(np.uint8)
    pairs = part.reshape(-1, words.shape[0], 4)
    slots = np.stack([pairs & np.uint8(0x0F), pairs >> np.uint8(4)], axis=-1).reshape(len(pairs), -1, 8)
    return np.ascontiguousarray(slots[..., _INVERSE].transpose(0, 2, 1)).reshape(stop - row, -1)


def _group_size(entries: Sequence[Entry]) -> int:
    """The group size of all quantized tensors, -1 for channels: AWQ has one. Raises FormatError."""
    sizes = {e.scheme.group_size or -1 for e in entries if e.scheme is not None}
    if len(sizes) > 1:
        first = common_scheme(entries)
        raise FormatError(
            f"awq has one group size for all tensors, not {', '.join(map(str, sorted(sizes)))}; use {first.id} for all "
            f"of them, or --format compressed-tensors"
        )
    return min(sizes)
