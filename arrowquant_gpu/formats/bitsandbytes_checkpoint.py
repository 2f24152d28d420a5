"""The reader of bitsandbytes checkpoints; the layout is in bitsandbytes.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..reference.floats import VALUES
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Entry, TensorInfo
from .bitsandbytes import BLOCK_SIZES, GRIDS, NESTED_BLOCK, dynamic_map, nested_values
from .stored_model import StoredModel, described, packed_entry, row_blocks

_STATE = ".quant_state.bitsandbytes__"


class BitsAndBytesCheckpoint(StoredModel):
    """Reads a bitsandbytes model directory, from this package or another: NF4 and FP4, their scales quantized or not,
    and LLM.int8. See `StoredModel`.

    Blocks that go from one row to the next are refused.
    """

    format = "bitsandbytes"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        self._states: dict[str, dict[str, Any]] = {}
        found: dict[str, Entry] = {}
        parts: set[str] = set()
        for name in self.headers:
            if _STATE in name:
                weight, _, grid = name.partition(_STATE)
                found[weight] = self._four_bit(weight, grid)
                nested = ("nested_absmax", "nested_quant_map") if "nested_offset" in self._states[weight] else ()
                parts |= {name, weight, *(f"{weight}.{part}" for part in ("absmax", "quant_map", *nested))}
            elif name.endswith(".SCB"):
                weight = f"{name.removesuffix('.SCB')}.weight"
                found[weight] = self._eight_bit(weight)
                parts |= {name, weight, f"{weight}_format"}
        # `verify` asks: the codes were made with scales that are not in the file.
        self.scales_are_rounded = any("nested_offset" in state for state in self._states.values())
        return self.with_kept(found, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name, (n, k) = entry.info.name, entry.info.shape
        codes = self.view(self.headers[name]).view(np.uint8).reshape(n, scheme.row_bytes(k))
        is_int8 = scheme.grid == "int"
        scales = self._scales(name).reshape(scheme.scales_shape((n, k)))
        for row, stop in row_blocks(n, codes.shape[1]):
            part = codes[row:stop]
            packed = part ^ np.uint8(0x80) if is_int8 else (part >> np.uint8(4)) | (part << np.uint8(4))
            yield row, QuantizedTensor(packed, scales[row:stop], None, (stop - row, k), scheme, entry.info.dtype)

    def _scales(self, name: str) -> NDArray[np.float32]:
        """The float32 scales of a tensor, of all its rows."""
        state = self._states.get(name)
        if state is None:
            scaled: NDArray[np.float32] = self.view(self.headers[f"{name.removesuffix('.weight')}.SCB"])
            return scaled / np.float32(127)
        absmax: NDArray[Any] = self.view(self.headers[f"{name}.absmax"])
        if "nested_offset" not in state:
            return absmax
        return nested_values(absmax, self.view(self.headers[f"{name}.nested_absmax"]), state["nested_offset"])

    def _eight_bit(self, name: str) -> Entry:
        stored, scales = self.headers.get(name), self.headers[f"{name.removesuffix('.weight')}.SCB"]
        if stored is None or stored.dtype != "int8" or len(stored.shape) != 2:
            raise self.fail(f"{name} {described(stored)}; beside {scales.name} it is int8 of two dimensions")
        n, k = stored.shape
        self._check(scales.name, "float32", (n,))
        layout = self.headers.get(f"{name}_format")
        if layout is not None and (layout.n_bytes != 1 or self.view(layout).reshape(-1)[0] != 0):
            raise self.fail(f"{layout.name}: only format 0, row by row, can be read")
        return packed_entry(name, self.weight_dtype(name), (n, k), stored, Scheme(8, "channel"))

    def _four_bit(self, name: str, grid: str) -> Entry:
        """The float tensor of a quant_state, all of whose parts are checked against each other."""
        state = self._state(name, grid)
        size, dtype, shape = state.get("blocksize"), state.get("dtype"), state.get("shape")
        n, k = shape if isinstance(shape, list) and len(shape) == 2 else (0, 0)
        is_shape = isinstance(n, int) and isinstance(k, int) and n > 0 and k > 0
        if size not in BLOCK_SIZES or dtype not in KERNEL_DTYPES or not is_shape or state.get("quant_type") != grid:
            raise self.fail(f"{name}{_STATE}{grid}: {state} is not understood")
        if k % size:
            raise self.fail(f"{name}: rows of {k} weights in blocks of {size}, which go from one row to the next")
        stored = self.headers.get(name)
        if stored is None or stored.n_bytes != n * k // 2:
            raise self.fail(f"{name} {described(stored)}; {grid} of {shape} has {n * k // 2} bytes")
        blocks = n * k // size
        self._check_values(f"{name}.quant_map", VALUES[grid])
        if "nested_offset" in state:
            offset, nested = state["nested_offset"], state.get("nested_blocksize")
            if not isinstance(offset, float) or not math.isfinite(offset) or nested != NESTED_BLOCK:
                raise self.fail(f"{name}: mean {offset!r} and blocks of {nested!r} absmax values are not understood")
            self._check(f"{name}.absmax", "uint8", (blocks,))
            self._check(f"{name}.nested_absmax", "float32", (-(-blocks // NESTED_BLOCK),))
            self._check_values(f"{name}.nested_quant_map", dynamic_map())
        else:
            self._check(f"{name}.absmax", "float32", (blocks,))
        self._states[name] = state
        return packed_entry(name, dtype, (n, k), stored, Scheme(4, "group", size, grid=grid))

    def _state(self, name: str, grid: str) -> dict[str, Any]:
        if grid not in GRIDS:
            raise self.fail(f"{name}: {grid} of bitsandbytes; {' and '.join(GRIDS)} are what can be read")
        info = self.headers[f"{name}{_STATE}{grid}"]
        try:
            state = json.loads(self.view(info).tobytes())
        except (ValueError, RecursionError) as e:
            raise self.fail(f"{info.name} is no JSON: {e}") from e
        if not isinstance(state, dict):
            raise self.fail(f"{info.name} is no JSON object")
        return state

    def _check(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        found = self.headers.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise self.fail(f"{name} {described(found)}; expected {dtype} {list(shape)}")
        return found

    def _check_values(self, name: str, values: NDArray[np.float32]) -> None:
        if not np.array_equal(self.view(self._check(name, "float32", values.shape)), values):
            raise self.fail(f"{name} has other values than those of bitsandbytes, and cannot be read")
