"""The reader of compressed-tensors checkpoints; the layout is in compressed_tensors_layout.py."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..errors import SchemeError, SourceError
from ..ops import scale_rows
from ..schemes import SCALE_SUFFIXES, Scheme
from ..tensor import QuantizedTensor
from . import Entry, TensorInfo, row_parts
from .compressed_tensors_layout import CONTAINERS, INTS, NVFP4, PACKED, parsed, stored_tensors
from .stored_model import StoredModel, packed_entry, row_blocks

# Types that codes have under the name of the float weight.
_CODES = tuple({row.dtype for row in CONTAINERS.values() if not row.codes})


class _Group(NamedTuple):
    """A group of modules in config.json: its format, and what it says of their weights."""

    targets: list[str]
    format: str
    weights: Mapping[str, Any]


class CompressedTensorsCheckpoint(StoredModel):
    """Reads a model directory of any format in `CONTAINERS`, from this package or another. See `StoredModel`."""

    format = "compressed-tensors"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        self._groups = self._config_groups(config)
        self._formats: dict[str, str] = {}
        found: dict[str, Entry] = {}
        parts: set[str] = set()
        for name, info in self.headers.items():
            is_packed = name.endswith(".weight_packed")
            if is_packed or (name.endswith(".weight") and info.dtype in _CODES and f"{name}_scale" in self.headers):
                found[name] = entry = self._entry(name.removesuffix("_packed"), info)
                parts |= stored_tensors(entry.info, entry.scheme, self._formats[entry.info.name]).keys()
                # Of activations, which are not read.
                parts |= {
                    f"{entry.info.name.removesuffix('weight')}input{kind}" for kind in ("_scale", "_global_scale")
                }
        return self.with_kept(found, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name, (n, k), written = entry.info.name, entry.info.shape, self._formats[entry.info.name]
        row_bytes = scheme.row_bytes(k)
        codes = self.view(self.headers[name + CONTAINERS[written].codes]).view(np.uint8)
        scales = row_parts.as_scales(self._array(f"{name}_scale", scheme), entry.info.shape, scheme)
        words = self.view(self.headers[f"{name}_zero_point"]) if written == PACKED and not scheme.symmetric else None
        beside = self.view(self.headers[f"{name}_global_scale"]).reshape(1, 1) if written == NVFP4 else None
        unit = scheme.group_size or 1 if scheme.granularity == "block" else 1
        for row, stop in row_blocks(n, codes.shape[1], unit):
            packed = codes[row:stop, :row_bytes]
            if written == INTS:
                packed = packed ^ np.uint8(scheme.offset)
            part, zeros = scale_rows(scheme, scales, beside, slice(row, stop))
            if words is not None:
                zeros = _unpack_zeros(words, scheme.bits, row, stop)
            yield row, QuantizedTensor(packed, part, zeros, (stop - row, k), scheme, entry.info.dtype)

    def _array(self, name: str, scheme: Scheme) -> NDArray[Any]:
        """Scales as QuantizedTensor holds them: those of one byte as bytes."""
        stored = self.view(self.headers[name])
        return stored if scheme.scale_dtype in SCALE_SUFFIXES else stored.view(np.uint8)

    def _config_groups(self, config: Mapping[str, Any]) -> list[_Group]:
        """The groups of modules. Raises SourceError for another method."""
        found = config.get("quantization_config") or config.get("compression_config")
        if not isinstance(found, dict):
            raise self.fail("config.json has no quantization_config: this is no quantized model")
        method = found.get("quant_method")
        if method != "compressed-tensors":
            raise self.fail(f"quantization_config has quant_method {method!r}; compressed-tensors is what can be read")
        groups: list[_Group] = []
        described = found.get("config_groups")
        for group in described.values() if isinstance(described, dict) else ():
            targets, weights = (group.get(k) if isinstance(group, dict) else None for k in ("targets", "weights"))
            if not isinstance(targets, list) or not isinstance(weights, dict):
                raise self.fail("a group of quantization_config has no targets or no weights")
            written = str(group.get("format") or found.get("format"))
            groups.append(_Group([str(target) for target in targets], written, weights))
        return groups

    def _group_of(self, name: str) -> _Group:
        """The group of the float tensor `name`: an exact or re: target goes before a class name."""
        module = name.removesuffix(".weight")
        by_name = (g for g in self._groups if any(_is_target(target, module) for target in g.targets))
        by_class = (g for g in self._groups if "Linear" in g.targets)
        matched = next(itertools.chain(by_name, by_class), None)
        if matched is None:
            raise self.fail(f"{name} is quantized, but no group of quantization_config has it as a target")
        return matched

    def _entry(self, name: str, codes: TensorInfo) -> Entry:
        """The float tensor `name` with these codes, all of whose parts are checked against each other."""
        if f"{name}_g_idx" in self.headers:
            raise self.fail(f"{name}_g_idx: activation order cannot be read")
        group = self._group_of(name)
        scale = self.headers.get(f"{name}_scale")
        has = "none" if scale is None else scale.dtype
        stored = CONTAINERS[group.format].scales if group.format in CONTAINERS else None
        if stored is None and has not in KERNEL_DTYPES:
            raise self.fail(f"{name}_scale is {has}; expected one of {', '.join(KERNEL_DTYPES)}")
        try:
            scheme = parsed(group.weights, group.format, has)
        except SchemeError as e:
            raise self.fail(f"{name}: {e}") from e
        shape = self._shape_of(name, codes, group.format)
        dtype = scheme.scale_dtype if group.format == PACKED else self.weight_dtype(name)
        entry = packed_entry(name, dtype, shape, codes, scheme)
        self.check_parts(stored_tensors(entry.info, scheme, group.format), f"{scheme.id} {list(shape)}")
        self._formats[name] = group.format
        return entry

    def _shape_of(self, name: str, codes: TensorInfo, written: str) -> tuple[int, int]:
        if written != PACKED:
            if len(codes.shape) != 2:
                raise self.fail(f"{codes.name} is {list(codes.shape)}, no matrix")
            n, k = codes.shape
            return (n, 2 * k) if CONTAINERS[written].dtype == "uint8" else (n, k)
        info = self.headers.get(f"{name}_shape")
        if info is None or info.shape != (2,) or info.dtype != "int64":
            raise self.fail(f"{name}_shape is missing, or not two int64")
        n, k = self.view(info).tolist()
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
