"""compressed-tensors checkpoints, format `pack-quantized`: the layout, and the reader. The sink is a file of its own.

One linear module `P` of [N, K] weights of b bits (docs/compressed_tensors.md):

    P.weight_packed      int32 [N, ceil(K b / 32)]   the code stream of schemes.py, each row padded to whole words
    P.weight_scale       weights' dtype [N, groups]
    P.weight_shape       int64 [2]                   N, K
    P.weight_zero_point  int32 [ceil(N b / 32), groups], asymmetric only: packed like codes, but down each column

Codes and zero points are stored as in this package, offset by 2**(b-1). Source: vllm-project/compressed-tensors,
compressors/pack_quantized and quantization/quant_config.py, versions 0.12 to 0.20.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import SchemeError, SourceError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Entry, TensorInfo
from .stored_model import StoredModel, row_blocks

# The widths whose packing every version of the readers agrees on, and which divide a 32-bit word.
BITS = (2, 4, 8)


def n_words(n: int, bits: int) -> int:
    """32-bit words that hold n codes."""
    return -(-n * bits // 32)


def stored_tensors(info: TensorInfo, scheme: Scheme | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a tensor becomes in the file: name -> (dtype, shape). `info` is that of the float tensor.

    >>> info = TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024)
    >>> stored_tensors(info, Scheme.parse("int4_g32_bf16"))["fc.weight_packed"]
    ('int32', (8, 8))
    """
    if scheme is None:
        return {info.name: (info.dtype, info.shape)}
    (n, k), groups = info.shape, scheme.scales_shape(info.shape)[1]
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{info.name}_packed": ("int32", (n, n_words(k, scheme.bits))),
        f"{info.name}_scale": (scheme.scale_dtype, (n, groups)),
        f"{info.name}_shape": ("int64", (2,)),
    }
    if not scheme.symmetric:
        stored[f"{info.name}_zero_point"] = ("int32", (n_words(n, scheme.bits), groups))
    return stored


class CompressedTensorsCheckpoint(StoredModel):
    """Reads a `pack-quantized` model directory, from this package or another, int2, int4 or int8. See `StoredModel`."""

    format = "compressed-tensors"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        self._groups = self._config_groups(config)
        packed = {name: self._packed_entry(name) for name in self.headers if name.endswith(".weight_packed")}
        parts = {part for entry in packed.values() for part in stored_tensors(entry.info, entry.scheme)}
        return self.with_kept(packed, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name, (n, k) = entry.info.name, entry.info.shape
        row_bytes = scheme.packed_shape((1, k))[1]
        packed = self.view(self.headers[f"{name}_packed"]).view(np.uint8)
        scales = self.view(self.headers[f"{name}_scale"])
        words = None if scheme.symmetric else self.view(self.headers[f"{name}_zero_point"])
        for row, stop in row_blocks(n, packed.shape[1]):
            zeros = None if words is None else _unpack_zeros(words, scheme.bits, row, stop)
            shape = stop - row, k
            yield (
                row,
                QuantizedTensor(packed[row:stop, :row_bytes], scales[row:stop], zeros, shape, scheme, entry.info.dtype),
            )

    def _config_groups(self, config: Mapping[str, Any]) -> list[tuple[list[str], Mapping[str, Any]]]:
        """(targets, weights) of each group. Raises SourceError for another method or format."""
        found = config.get("quantization_config") or config.get("compression_config")
        if not isinstance(found, dict):
            raise self.fail("config.json has no quantization_config: this is no quantized model")
        method = found.get("quant_method")
        if method != "compressed-tensors":
            raise self.fail(f"quantization_config has quant_method {method!r}; compressed-tensors is what can be read")
        groups: list[tuple[list[str], Mapping[str, Any]]] = []
        described = found.get("config_groups")
        for group in described.values() if isinstance(described, dict) else ():
            targets, weights = (group.get(k) if isinstance(group, dict) else None for k in ("targets", "weights"))
            if not isinstance(targets, list) or not isinstance(weights, dict):
                raise self.fail("a group of quantization_config has no targets or no weights")
            written = group.get("format") or found.get("format")
            if written != "pack-quantized" or weights.get("type") != "int":
                raise self.fail(f"compressed-tensors format {written!r}; pack-quantized is what can be read")
            if weights.get("actorder") == "group":
                raise self.fail("activation order (actorder: group) cannot be read")
            groups.append(([str(target) for target in targets], weights))
        return groups

    def _scheme_of(self, name: str) -> Scheme:
        """The scheme of the float tensor `name`: an exact or re: target goes before a class name."""
        module = name.removesuffix(".weight")
        by_name = (w for targets, w in self._groups if any(_is_target(target, module) for target in targets))
        by_class = (w for targets, w in self._groups if "Linear" in targets)
        matched = next(itertools.chain(by_name, by_class), None)
        if matched is None:
            raise self.fail(f"{name} is packed, but no group of quantization_config has it as a target")
        bits, strategy = matched.get("num_bits"), matched.get("strategy")
        if bits not in BITS:
            raise self.fail(f"{name}: {bits}-bit codes, whose layout depends on what wrote them, cannot be read")
        if strategy not in ("group", "channel"):
            raise self.fail(f"{name}: strategy {strategy!r}; group and channel are what can be read")
        size = matched.get("group_size") if strategy == "group" else None
        scale_dtype = self.headers[f"{name}_scale"].dtype if f"{name}_scale" in self.headers else "none"
        if scale_dtype not in KERNEL_DTYPES:
            raise self.fail(f"{name}_scale is {scale_dtype}; expected one of {', '.join(KERNEL_DTYPES)}")
        try:
            return Scheme(bits, strategy, size, bool(matched.get("symmetric", True)), scale_dtype)
        except (SchemeError, TypeError) as e:
            raise self.fail(f"{name}: {e}") from e

    def _packed_entry(self, packed: str) -> Entry:
        """The float tensor of a `weight_packed`, all of whose parts are checked against each other."""
        name = packed.removesuffix("_packed")
        if f"{name}_g_idx" in self.headers:
            raise self.fail(f"{name}_g_idx: activation order cannot be read")
        scheme, shape, stored = self._scheme_of(name), self._shape_of(name), self.headers[packed]
        n_bytes = DTYPES[scheme.scale_dtype].bits // 8 * math.prod(shape)
        info = TensorInfo(name, scheme.scale_dtype, shape, stored.file, stored.offset, n_bytes)
        for part, expected in stored_tensors(info, scheme).items():
            found = self.headers.get(part)
            if found is None or (found.dtype, found.shape) != expected:
                has = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise self.fail(f"{part} {has}; {scheme.id} {list(shape)} has {expected[0]} {list(expected[1])}")
        return Entry(info, scheme, "packed")

    def _shape_of(self, name: str) -> tuple[int, int]:
        info = self.headers.get(f"{name}_shape")
        if info is None or info.shape != (2,) or info.dtype != "int64":
            raise self.fail(f"{name}_shape is missing, or not two int64")
        with info.file.open("rb") as f:
            f.seek(info.offset)
            n, k = np.frombuffer(f.read(info.n_bytes), "<i8").tolist()
        if n < 0 or k < 0:
            raise self.fail(f"{name}_shape is {[n, k]}")
        return n, k


def _is_target(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as e:
        raise SourceError(f"target {target!r} of quantization_config is no regular expression: {e}") from e


def _unpack_zeros(words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
    """Zero points of the rows row .. stop, [rows, groups], from words that hold 32 / bits rows each."""
    per_word = 32 // bits
    first = row // per_word
    part = words[first : -(-stop // per_word)].view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    zeros = ((part[:, None, :] >> shifts[:, None]) & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return zeros.reshape(-1, words.shape[1])[row - first * per_word : stop - first * per_word]
