"""What GPTQ and AWQ checkpoints have in common: tensors are [in, out], so that a row of weights is a column of words.

One linear module `P` of [N, K] weights becomes `P.qweight` and `P.qzeros`, int32 words, and `P.scales`, float16 [G, N],
where G is the number of groups of a row. What is in the words is said by gptq.py and awq.py.

A piece is some rows of weights, in whole words: a stretch of every line of each of these tensors.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..errors import FormatError, SchemeError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Codes, Entry, Place, TensorInfo
from .engine_rules import Rule
from .ignored_modules import ANY_SCHEME, misfit, module_of
from .model_sink import ModelSink, Stored, kept
from .pieces import Cut, Piece
from .stored_model import StoredModel, described, packed_entry, row_blocks

# Rows whose codes and zero points fill whole words at every width: 32 codes of 3 bits are 3 words.
UNIT = 32
# 32-bit words of a cache line.
LINE_WORDS = 16


def transposed(words: NDArray[Any]) -> NDArray[Any]:
    """The transpose of words [rows, columns] as an array of its own, written a cache line at a time.

    >>> transposed(np.array([[1, 2, 3], [4, 5, 6]], np.uint32)).tolist()
    [[1, 4], [2, 5], [3, 6]]
    """
    out = np.empty(words.shape[::-1], words.dtype)
    for row in range(0, len(words), LINE_WORDS):
        out[:, row : row + LINE_WORDS] = words[row : row + LINE_WORDS].T
    return out


def marlin_rules(engine: str) -> tuple[Rule, Rule]:
    """What the Marlin kernels take. Source: vllm-project/vllm, quantization/utils/marlin_utils.py."""
    return (
        Rule(
            engine,
            "has fast kernels for groups of 32, 64 and 128 and for channels only; it refuses or is slow with {what}.",
            lambda _, scheme: scheme.group_size not in (None, 32, 64, 128),
        ),
        Rule(
            engine,
            "has fast kernels for multiples of 64 rows and 128 columns only; it refuses or is slow with {what}.",
            lambda info, _: bool(info.shape[0] % 64 or info.shape[1] % 128),
        ),
    )


def common_scheme(entries: Sequence[Entry]) -> Scheme:
    """The scheme that most of the quantized tensors have; of equals the first."""
    return Counter(e.scheme for e in entries if e.scheme is not None).most_common(1)[0][0]


class _Lines(NamedTuple):
    """A tensor of `n` lines; a row of weights has `bits` bits in each of them."""

    name: str
    n: int
    bits: int


class TransposedSink(ModelSink):
    """Writes a model directory with tensors [in, out]. See `ModelSink`."""

    # What a format says.

    fused_alike = True
    bits: tuple[int, ...]
    # What divides K and N.
    row_unit: int
    length_unit: int

    @abstractmethod
    def code_lines(self, length: int, bits: int) -> tuple[int, int]:
        """(lines of qweight, bits that a row of weights has in each)."""

    @abstractmethod
    def code_words(self, packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """Codes of rows, as in `Codes`, as the bytes of qweight [lines, bytes]."""

    @abstractmethod
    def zero_words(self, zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """Zero points [rows, groups] as the bytes of qzeros [groups, bytes]."""

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme with float16 scales. See `Sink`."""
        if scheme.grid != "int" or scheme.bits not in self.bits or scheme.granularity not in ("group", "channel"):
            widths = ", ".join(f"int{bits}" for bits in self.bits)
            raise FormatError(
                f"{self.format} has {widths} codes with a scale per group or channel, not {scheme.id}; use int4_g128"
            )
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        if scheme.scale_dtype not in ("float32", "float16"):
            raise FormatError(
                f"{self.format} stores scales in float16, not in {scheme.scale_dtype}; leave the suffix out, or use "
                f"{ANY_SCHEME}"
            )
        n, k = info.shape
        if k % scheme.group_length(k):
            raise FormatError(
                f"rows of {k} weights are not whole groups of {scheme.group_size}, as {self.format} needs; "
                f"{ANY_SCHEME} carries the rest as a shorter group"
            )
        if n % self.row_unit or k % self.length_unit or not n or not k:
            raise FormatError(
                f"[{n}, {k}] weights do not fill the words of {self.format}, which needs multiples of {self.row_unit} "
                f"rows and {self.length_unit} columns; {ANY_SCHEME} carries any shape"
            )
        return dataclasses.replace(scheme, scale_dtype="float16")

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        if entry.scheme is None:
            return kept(entry)
        n = entry.info.shape[0]
        codes, scales, zeros = self._lines(entry, entry.scheme)
        return {
            codes.name: ("int32", (codes.n, n * codes.bits // 32)),
            zeros.name: ("int32", (zeros.n, n * zeros.bits // 32)),
            scales.name: ("float16", (scales.n, n)),
        }

    def cut(self, entry: Entry) -> Cut:
        """Words stay whole. See `ModelSink`."""
        return Cut(rows=UNIT)

    def fill(self, entry: Entry) -> None:
        """The zero points of a symmetric scheme, which are all the same. See `ModelSink`."""
        scheme = entry.scheme
        if scheme is not None and scheme.symmetric:
            n, k = entry.info.shape
            line = self.zero_words(np.full((n, 1), scheme.offset, np.uint8), scheme.bits)
            self.put(f"{module_of(entry)}.qzeros", np.repeat(line, scheme.scales_shape((n, k))[1], axis=0))

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        n = piece.entry.info.shape[0]
        found = []
        for lines in self._lines(piece.entry, scheme)[: 2 if scheme.symmetric else 3]:
            line, stride = piece.rows * lines.bits // 8, n * lines.bits // 8
            place = self.place(lines.name, piece.row * lines.bits // 8, lines.n * line)
            found.append(place if line == stride else place._replace(lines=lines.n, stride=stride))
        return found

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        arrays = [self.code_words(codes.packed, scheme.bits), np.ascontiguousarray(codes.scales.T)]
        if codes.zeros is not None:
            arrays.append(self.zero_words(codes.zeros, scheme.bits))
        return arrays

    def _lines(self, entry: Entry, scheme: Scheme) -> tuple[_Lines, _Lines, _Lines]:
        module, shape = module_of(entry), entry.info.shape
        groups = scheme.scales_shape(shape)[1]
        return (
            _Lines(f"{module}.qweight", *self.code_lines(shape[1], scheme.bits)),
            _Lines(f"{module}.scales", groups, 16),
            _Lines(f"{module}.qzeros", groups, scheme.bits),
        )


class TransposedModel(StoredModel):
    """Reads a model directory with tensors [in, out]. See `StoredModel`."""

    # What a format says.

    @abstractmethod
    def scheme_of(self, module: str, scale_dtype: str) -> Scheme:
        """What config.json says of a module. Raises SourceError, SchemeError, and TypeError for what is no number."""

    @abstractmethod
    def weights_shape(self, words: tuple[int, int], bits: int) -> tuple[int, int]:
        """The shape [N, K] of the weights whose qweight has this shape."""

    @abstractmethod
    def zeros_width(self, n: int, bits: int) -> int:
        """Words of a line of qzeros for N rows."""

    @abstractmethod
    def codes(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """`Codes.packed` of the rows row .. stop; both are multiples of UNIT, or `stop` is N."""

    @abstractmethod
    def zeros(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """Zero points [rows, groups] of these rows."""

    def check_columns(self, module: str, length: int, group_length: int) -> None:
        """Raise SourceError where the columns of a module are not in groups one after the other."""
        return

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        self.quantization = config.get("quantization_config") or {}
        found = {name: self._entry(name) for name in self.headers if name.endswith(".qweight")}
        modules = [name.removesuffix(".qweight") for name in found]
        parts = {f"{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales", "g_idx")}
        return self.with_kept(found, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        module, (n, k) = module_of(entry), entry.info.shape
        codes, scales, zeros = (self.view(self.headers[f"{module}.{part}"]) for part in ("qweight", "scales", "qzeros"))
        for row, stop in row_blocks(n, scheme.row_bytes(k), UNIT):
            found = self.zeros(zeros, scheme.bits, row, stop)
            if scheme.symmetric and (found != scheme.offset).any():
                raise self.fail(f"{module}.qzeros: zero points other than {scheme.offset}, but the scheme is symmetric")
            packed = self.codes(codes, scheme.bits, row, stop)
            part = np.ascontiguousarray(scales[:, row:stop].T)
            shape = stop - row, k
            kept_zeros = None if scheme.symmetric else found
            yield row, QuantizedTensor(packed, part, kept_zeros, shape, scheme, entry.info.dtype)

    def _entry(self, words: str) -> Entry:
        """The float tensor of a `qweight`, all of whose parts are checked against each other."""
        module, stored = words.removesuffix(".qweight"), self.headers[words]
        scales = self.headers.get(f"{module}.scales")
        if scales is None or scales.dtype not in KERNEL_DTYPES or len(scales.shape) != 2:
            raise self.fail(
                f"{module}.scales {described(scales)}; expected two dimensions of {', '.join(KERNEL_DTYPES)}"
            )
        try:
            scheme = self.scheme_of(module, scales.dtype)
        except (SchemeError, TypeError) as e:
            raise self.fail(f"{module}: {e}") from e
        if stored.dtype != "int32" or len(stored.shape) != 2:
            raise self.fail(f"{words} {described(stored)}; expected two dimensions of int32")
        n, k = self.weights_shape((stored.shape[0], stored.shape[1]), scheme.bits)
        if not n or not k or n % 8 or k % scheme.group_length(k):
            raise self.fail(f"{words}: [{n}, {k}] weights are not whole groups and words of {scheme.id}")
        groups = scheme.scales_shape((n, k))[1]
        expected: Stored = {
            f"{module}.scales": (scales.dtype, (groups, n)),
            f"{module}.qzeros": ("int32", (groups, self.zeros_width(n, scheme.bits))),
        }
        self.check_parts(expected, f"{scheme.id} of [{n}, {k}]")
        self.check_columns(module, k, scheme.group_length(k))
        name = f"{module}.weight"
        return packed_entry(name, self.weight_dtype(name), (n, k), stored, scheme)
