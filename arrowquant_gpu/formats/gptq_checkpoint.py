"""The reader of GPTQ checkpoints; the layout is in gptq.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reference.integers import unpack
from ..schemes import Scheme
from . import Entry
from .gptq import QUANTIZE_CONFIG, VERSIONS, GptqSink
from .transposed import TransposedModel, transposed


class GptqCheckpoint(TransposedModel):
    """Reads a GPTQ model directory, from this package or another, 2, 3, 4 and 8 bits, both versions. See `StoredModel`.

    Columns in another order than that of their groups (activation order) are refused.
    """

    format = "gptq"
    added_files = (QUANTIZE_CONFIG,)

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        said = config.get("quantization_config") or {}
        self._version = said.get("checkpoint_format") or said.get("format") or "gptq"
        if self._version not in VERSIONS:
            raise self.fail(f"checkpoint_format {self._version!r}; {' and '.join(VERSIONS)} are what can be read")
        self._dynamic = said.get("dynamic") or {}
        if not isinstance(self._dynamic, dict):
            raise self.fail("dynamic of quantization_config is no JSON object")
        return super().find(config)

    def scheme_of(self, module: str, scale_dtype: str) -> Scheme:
        """See `TransposedModel`."""
        said = {**self.quantization, **self._override(module)}
        bits, size = said.get("bits"), said.get("group_size", -1)
        if bits not in GptqSink.bits:
            raise self.fail(f"{module}: bits {bits!r}; {', '.join(map(str, GptqSink.bits))} are what can be read")
        is_channel = size in (-1, None)
        granularity = "channel" if is_channel else "group"
        return Scheme(bits, granularity, None if is_channel else size, bool(said.get("sym", True)), scale_dtype)

    def weights_shape(self, words: tuple[int, int], bits: int) -> tuple[int, int]:
        """See `TransposedModel`."""
        return words[1], words[0] * 32 // bits

    def zeros_width(self, n: int, bits: int) -> int:
        """See `TransposedModel`."""
        return n * bits // 32

    def codes(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """See `TransposedModel`."""
        return transposed(words[:, row:stop]).view(np.uint8)

    def zeros(self, words: NDArray[np.int32], bits: int, row: int, stop: int) -> NDArray[np.uint8]:
        """See `TransposedModel`."""
        part = np.ascontiguousarray(words[:, row * bits // 32 : -(-stop * bits // 32)]).view(np.uint8)
        zeros = np.ascontiguousarray(unpack(part, bits, stop - row).T)
        return (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1) if self._version == "gptq" else zeros

    def check_columns(self, module: str, length: int, group_length: int) -> None:
        """See `TransposedModel`."""
        name = f"{module}.g_idx"
        found = self.headers.get(name)
        if found is None:
            return
        if found.dtype != "int32" or found.shape != (length,):
            raise self.fail(f"{name} is {found.dtype} {list(found.shape)}; expected int32 [{length}]")
        if not np.array_equal(self.view(found), np.arange(length) // group_length):
            raise self.fail(f"{name}: activation order (desc_act) cannot be read")

    def _override(self, module: str) -> Mapping[str, Any]:
        """What `dynamic` says of a module, by the first expression that matches."""
        for pattern, override in self._dynamic.items():
            try:
                matches = re.match(pattern.removeprefix("+:"), module)
            except re.error as e:
                raise self.fail(f"dynamic {pattern!r} of quantization_config is no regular expression: {e}") from e
            if matches and isinstance(override, dict) and not pattern.startswith("-:"):
                return override
        return {}
