"""bitsandbytes checkpoints, `quant_method: bitsandbytes`: the layout, and the sink. The reader is
bitsandbytes_checkpoint.py.

One linear module `P` of [N, K] weights, 4 bits, in blocks of B (docs/formats/bitsandbytes.md):

    P.weight              uint8 [N K / 2, 1]    the even code in the high nibble
    P.weight.absmax       float32 [N K / B]     uint8 where that is quantized too (double_quant), in blocks of 256:
    P.weight.nested_absmax     float32 [blocks of blocks]
    P.weight.nested_quant_map  float32 [256]
    P.weight.quant_map    float32 [16]          what the codes stand for
    P.weight.quant_state.bitsandbytes__nf4      uint8, JSON; or __fp4

and with 8 bits (LLM.int8) an int8 `P.weight` [N, K], `P.SCB`, float32 [N], 127 times the scale, and
`P.weight_format`, uint8, 0. Source: bitsandbytes-foundation/bitsandbytes, functional.py and nn/modules.py, 0.50.2.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..reference.floats import VALUES
from ..schemes import Scheme
from . import Codes, Entry, Place, TensorInfo
from .engine_rules import UNFUSED_EXPERTS, broken
from .ignored_modules import TIED_HEADS, any_shape, ignore_list, misfit, module_of
from .model_sink import ModelSink, Stored, kept
from .output import Output
from .pieces import Cut, Piece

GRIDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Absmax values of one block, where these are quantized too.
NESTED_BLOCK = 256
# Bytes kept for the JSON that holds the mean absmax: it is padded with spaces, as no float has more digits.
_OFFSET_ROOM = 25
_F32 = np.float32
# What stands in for a largest magnitude of 0.
_TINY = _F32(1e-38)


class BitsAndBytesSink(ModelSink):
    """Writes a model directory. See `ModelSink`.

    double_quant: "true" quantizes the absmax values to 8 bits
    """

    format = "bitsandbytes"
    # transformers fuses no matrices.
    fused_alike = False

    def __init__(
        self, output: Output, config: Mapping[str, Any] | None, *, double_quant: str = "false", **options: Any
    ) -> None:
        super().__init__(output, config, **options)
        self._is_double = double_quant == "true"
        # Of tensors that are under way: what is quantized when all of it is there.
        self._absmax: dict[str, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme as it is. See `Sink`."""
        is_int8 = scheme == Scheme(8, "channel")
        if not is_int8 and (scheme.grid not in GRIDS or scheme.group_size not in BLOCK_SIZES):
            raise FormatError(
                f"bitsandbytes has nf4 and fp4 in groups of {', '.join(map(str, BLOCK_SIZES))}, and int8_channel with "
                f"float32 scales (LLM.int8), not {scheme.id}; use nf4_g64"
            )
        if is_int8 and self._is_double:
            raise FormatError("double_quant is for nf4 and fp4: int8_channel has one scale a row and nothing to gain")
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        if not math.prod(info.shape) or info.shape[1] % scheme.group_length(info.shape[1]):
            raise FormatError(
                f"rows of {info.shape[1]} weights are not whole groups of {scheme.group_size}: in bitsandbytes groups "
                f"would go from one row to the next; use a smaller group, or {any_shape(scheme)}"
            )
        return scheme

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        scheme, name, shape = entry.scheme, entry.info.name, entry.info.shape
        if scheme is None:
            return kept(entry)
        if scheme.grid == "int":
            module = module_of(entry)
            return {
                f"{module}.SCB": ("float32", shape[:1]),
                name: ("int8", shape),
                f"{module}.weight_format": ("uint8", ()),
            }
        n = math.prod(shape)
        blocks = n // scheme.group_length(shape[1])
        stored: Stored = {
            f"{name}.quant_map": ("float32", (16,)),
            f"{name}.absmax": ("uint8" if self._is_double else "float32", (blocks,)),
            name: ("uint8", (n // 2, 1)),
            _state_name(entry, scheme): ("uint8", (len(self._state(entry, scheme, 0.0)),)),
        }
        if self._is_double:
            stored[f"{name}.nested_absmax"] = ("float32", (-(-blocks // NESTED_BLOCK),))
            stored[f"{name}.nested_quant_map"] = ("float32", (256,))
        return stored

    def cut(self, entry: Entry) -> Cut:
        """See `ModelSink`."""
        return Cut(within_rows=True)

    def fill(self, entry: Entry) -> None:
        """What is known of a tensor before any weight is read. See `ModelSink`."""
        scheme, name = entry.scheme, entry.info.name
        if scheme is None:
            return
        if scheme.grid == "int":
            self.put(f"{module_of(entry)}.weight_format", np.zeros((), np.uint8))
            return
        self.put(f"{name}.quant_map", VALUES[scheme.grid])
        if self._is_double:
            self.put(f"{name}.nested_quant_map", dynamic_map())
        else:
            self.put(_state_name(entry, scheme), self._state(entry, scheme, 0.0))

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        entry, length = piece.entry, piece.entry.info.shape[1]
        name, first, n = entry.info.name, piece.row * length + piece.column, piece.rows * piece.columns
        if scheme.grid == "int":
            scales = self.place(f"{module_of(entry)}.SCB", 4 * piece.row, 4 * piece.rows)
            return [self.place(name, first, n), scales]
        codes = self.place(name, first // 2, n // 2)
        group = scheme.group_length(length)
        return (
            [codes]
            if self._is_double
            else [codes, self.place(f"{name}.absmax", 4 * (first // group), 4 * (n // group))]
        )

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        if scheme.grid == "int":
            return [codes.packed ^ np.uint8(0x80), codes.scales * _F32(127)]
        swapped = (codes.packed >> np.uint8(4)) | (codes.packed << np.uint8(4))
        if not self._is_double:
            return [swapped, codes.scales]
        shape, group = piece.entry.info.shape, scheme.group_length(piece.entry.info.shape[1])
        with self._lock:
            absmax = self._absmax.get(piece.entry.info.name)
            if absmax is None:
                absmax = self._absmax[piece.entry.info.name] = np.empty(scheme.scales_shape(shape), _F32)
        first = piece.column // group
        absmax[piece.row : piece.row + piece.rows, first : first + codes.scales.shape[1]] = codes.scales
        return [swapped]

    def finish(self, entry: Entry) -> None:
        """Quantize the absmax values, with which the mean of all of them goes. See `Sink`."""
        scheme, name = entry.scheme, entry.info.name
        if scheme is None or scheme.grid == "int" or not self._is_double:
            return
        with self._lock:
            absmax = self._absmax.pop(name)
        codes, nested, offset = nested_codes(absmax.reshape(-1))
        self.put(f"{name}.absmax", codes)
        self.put(f"{name}.nested_absmax", nested)
        self.put(_state_name(entry, scheme), self._state(entry, scheme, offset))

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        double = ", with quantized scales" if self._is_double else ""
        return f"{provenance.get('scheme', 'blocks')}{double}, in the format of bitsandbytes"

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What a known engine refuses of what is planned. Raises FormatError where one config cannot say it all."""
        _grid(entries)
        return broken([UNFUSED_EXPERTS], entries)

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        grid = _grid(entries)
        is_int8 = grid == "int"
        dtypes = {e.info.dtype for e in entries if e.scheme is not None}
        quantization = {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": not is_int8,
            "_load_in_8bit": is_int8,
            "load_in_4bit": not is_int8,
            "load_in_8bit": is_int8,
            "bnb_4bit_quant_type": "fp4" if is_int8 else grid,
            "bnb_4bit_compute_dtype": min(dtypes) if len(dtypes) == 1 else "float32",
            "bnb_4bit_use_double_quant": self._is_double,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            # A list, also an empty one: without, transformers keeps what it takes for the head.
            "llm_int8_skip_modules": ignore_list(entries, self.config, TIED_HEADS),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
        return {"quantization_config": quantization}

    def _state(self, entry: Entry, scheme: Scheme, offset: float) -> NDArray[np.uint8]:
        """The JSON of a tensor, of the same length whatever `offset`, the mean absmax, is."""
        state: dict[str, Any] = {
            "quant_type": scheme.grid,
            "blocksize": scheme.group_size,
            "dtype": entry.info.dtype,
            "shape": list(entry.info.shape),
        }
        text = json.dumps(state)
        if self._is_double:
            nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            whole = json.dumps({**state, **nested})
            text = whole.ljust(len(json.dumps({**state, **nested, "nested_offset": 0})) - 1 + _OFFSET_ROOM)
        return np.frombuffer(text.encode("ascii"), np.uint8)


@functools.cache
def dynamic_map() -> NDArray[np.float32]:
    """The 256 values of an 8-bit code of bitsandbytes, ascending, float32: its `create_dynamic_map`, to the bit.

    A sign, a power of ten from 1e-6 to 1, and what is left of 7 bits for the middle of equal parts of 0.1 to 1.

    >>> values = dynamic_map()
    >>> len(values), float(values[127]), float(values[255])
    (256, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for i in range(7):
        parts = _linspace(2**i + 1)
        middles = (parts[:-1] + parts[1:]) / _F32(2)
        # The factor is rounded to float32 before the product, as torch does with a number.
        scaled = _F32(10.0 ** (i - 6)) * middles
        values += [*scaled.tolist(), *(-scaled).tolist()]
    found = np.array(sorted(values), _F32)
    found.flags.writeable = False
    return found


def nested_codes(absmax: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
    """Absmax values [n] as 8-bit codes [n], the largest magnitudes of blocks of 256, and the mean that was taken off.

    The mean is taken in float64 and rounded; a code is that of the nearest value of `dynamic_map`, the lower one in the
    middle between two. The last block, where it is shorter, is divided by its largest magnitude, and not multiplied
    by the reciprocal. Source: bitsandbytes, backends/default/ops.py, `quantize_blockwise`.
    """
    offset = _F32(absmax.astype(np.float64).mean())
    rest, values = absmax - offset, dynamic_map()
    whole = len(rest) // NESTED_BLOCK * NESTED_BLOCK
    blocks, tail = rest[:whole].reshape(-1, NESTED_BLOCK), rest[whole:]
    largest = np.abs(blocks).max(axis=1)
    x = (blocks * (_F32(1) / np.maximum(largest, _TINY))[:, None]).reshape(-1)
    if tail.size:
        of_tail = np.maximum(np.abs(tail).max(keepdims=True), _TINY)
        largest, x = np.append(largest, of_tail), np.append(x, tail / of_tail)
    codes = np.searchsorted((values[:-1] + values[1:]) / _F32(2), np.clip(x, _F32(-1), _F32(1)))
    return codes.astype(np.uint8), largest, float(offset)


def nested_values(codes: NDArray[np.uint8], largest: NDArray[np.float32], offset: float) -> NDArray[np.float32]:
    """The absmax values that `nested_codes` stand for."""
    return dynamic_map()[codes] * np.repeat(largest, NESTED_BLOCK)[: len(codes)] + _F32(offset)


def _linspace(n: int) -> NDArray[np.float32]:
    """torch.linspace(0.1, 1, n): from either end to the middle, each value with one rounding."""
    begin, end = _F32(0.1), _F32(1)
    step, i = np.float64((end - begin) / _F32(n - 1)), np.arange(n)
    return np.where(i < n // 2, np.float64(begin) + step * i, np.float64(end) - step * (n - 1 - i)).astype(_F32)


def _state_name(entry: Entry, scheme: Scheme) -> str:
    return f"{entry.info.name}.quant_state.bitsandbytes__{scheme.grid}"


def _grid(entries: Sequence[Entry]) -> str:
    """The grid of all quantized tensors: config.json has room for one. Raises FormatError."""
    grids = sorted({e.scheme.grid for e in entries if e.scheme is not None})
    if len(grids) > 1:
        raise FormatError(
            f"bitsandbytes has one kind of code for all tensors, not {' and '.join(grids)} beside each other; "
            f"use one scheme, or --format compressed-tensors"
        )
    return grids[0]
