"""GPTQ checkpoints, `quant_method: gptq`: the layout, and the sink. The reader is gptq_checkpoint.py.

One linear module `P` of [N, K] weights of b bits, in G groups a row (docs/formats/gptq.md):

    P.qweight  int32 [K b / 32, N]    down each column the code stream of schemes.py
    P.qzeros   int32 [G, N b / 32]    along each line a stream of zero points, less 1 in version 1
    P.scales   float16 [G, N]
    P.g_idx    int32 [K]              the group of each column

Sources: ModelCloud/GPTQModel, nn_modules/qlinear and utils/model.py, 7.6.0; vllm-project/vllm, gptq_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..reference.integers import pack
from ..schemes import Scheme
from . import Checkpoint, Entry, TensorInfo
from .engine_rules import UNFUSED_EXPERTS, Rule, broken
from .ignored_modules import ANY_SCHEME, ignore_list, module_of
from .model_directory import write_json
from .model_sink import Stored
from .output import Output
from .transposed import UNIT, TransposedSink, common_scheme, marlin_rules, transposed

QUANTIZE_CONFIG = "quantize_config.json"

# Version 1 stores zero points less 1.
VERSIONS = ("gptq", "gptq_v2")

_RULES = (
    Rule(
        "vLLM and SGLang",
        "take GPTQ codes of 4 and 8 bits only, and refuse those of {what}.",
        lambda _, scheme: scheme.bits not in (4, 8),
    ),
    Rule(
        "vLLM and SGLang",
        "take symmetric GPTQ only, and refuse or misread {what}.",
        lambda _, scheme: not scheme.symmetric,
    ),
    Rule(
        "GPTQModel, with which transformers loads GPTQ,",
        "has kernels for groups of 16, 32, 64 ... 1024 and for channels only, and refuses {what}.",
        lambda _, scheme: scheme.group_size not in (None, 16, 32, 64, 128, 256, 512, 1024),
    ),
    *marlin_rules("vLLM"),
    UNFUSED_EXPERTS,
)
# Where transformers (with optimum, gptq/constants.py) looks for the layers of a model by itself.
_KNOWN_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)
_BLOCK = re.compile(r"(?P<blocks>.*?)\.\d+\.(?P<inner>.+)")


class GptqSink(TransposedSink):
    """Writes a model directory. See `ModelSink`.

    checkpoint_format: gptq, or gptq_v2, which can carry asymmetric schemes
    """

    format = "gptq"
    bits = (2, 3, 4, 8)
    row_unit = length_unit = UNIT

    def __init__(
        self, output: Output, config: Mapping[str, Any] | None, *, checkpoint_format: str = "gptq", **options: Any
    ) -> None:
        super().__init__(output, config, **options)
        self.checkpoint_format = checkpoint_format

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme with float16 scales. See `Sink`."""
        if not scheme.symmetric and scheme.grid == "int" and self.checkpoint_format == "gptq":
            raise FormatError(
                f"version 1 of gptq stores zero points less 1 and has no place for one that is 0, as {scheme.id} can "
                f"have; use checkpoint_format=gptq_v2 (--format-option), a symmetric scheme, or {ANY_SCHEME}"
            )
        return super().scheme_for(info, scheme)

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        stored = super().tensors(entry)
        return (
            stored if entry.scheme is None else {**stored, f"{module_of(entry)}.g_idx": ("int32", entry.info.shape[1:])}
        )

    def fill(self, entry: Entry) -> None:
        """The group of each column, and what is the same in all groups. See `ModelSink`."""
        super().fill(entry)
        if entry.scheme is not None:
            length = entry.info.shape[1]
            columns = np.arange(length, dtype="<i4")
            self.put(f"{module_of(entry)}.g_idx", columns // np.int32(entry.scheme.group_length(length)))

    def code_lines(self, length: int, bits: int) -> tuple[int, int]:
        """See `TransposedSink`."""
        return length * bits // 32, 32

    def code_words(self, packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """See `TransposedSink`. The words of a row are those of its code stream."""
        return transposed(packed.view("<u4")).view(np.uint8)

    def zero_words(self, zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """See `TransposedSink`."""
        if self.checkpoint_format == "gptq":
            zeros = (zeros - np.uint8(1)) & np.uint8((1 << bits) - 1)
        return pack(np.ascontiguousarray(zeros.T), bits)

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'integers')}, in the format {self.checkpoint_format}"

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What a known engine refuses of what is planned."""
        found = broken(_RULES, entries)
        schemes = {e.scheme for e in entries if e.scheme is not None}
        if len(schemes) > 1:
            listed = ", ".join(sorted(scheme.id for scheme in schemes))
            found.append(f"transformers loads GPTQ of one scheme only, GPTQModel and vLLM of several ({listed}).")
        return found

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """See `Sink`."""
        super().open(entries, source, provenance)
        write_json(self._output, QUANTIZE_CONFIG, self.quantization(entries)["quantization_config"])

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        common = common_scheme(entries)
        # Heads and poolers are not looked at: readers quantize what is in the layers.
        ignored = [m for m in ignore_list(entries, self.config, tied_heads=()) if _BLOCK.fullmatch(m)]
        others = {module_of(e): e.scheme for e in entries if e.scheme not in (None, common)}
        dynamic = {
            **{f"+:^{re.escape(module)}$": _described(scheme) for module, scheme in others.items() if scheme},
            **{f"-:^{re.escape(module)}$": {} for module in ignored},
        }
        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            **_described(common),
            "desc_act": False,
            "lm_head": any(module_of(e) == "lm_head" for e in entries if e.scheme is not None),
            "true_sequential": True,
            "damp_percent": 0.01,
            "static_groups": False,
            "checkpoint_format": self.checkpoint_format,
        }
        quantized = [module_of(e) for e in entries if e.scheme is not None]
        blocks = {found["blocks"] for module in quantized if (found := _BLOCK.fullmatch(module))}
        if len(blocks) == 1 and not blocks & set(_KNOWN_BLOCKS):
            quantization["block_name_to_quantize"] = min(blocks)
        if ignored:
            quantization["modules_in_block_to_quantize"] = [_quantized_parts(quantized, ignored)]
        if dynamic:
            quantization["dynamic"] = dynamic
        return {"quantization_config": quantization}


def _described(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def _quantized_parts(quantized: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """The quantized modules by how their names end, where no other module ends so; by their whole names otherwise."""
    ends = list(dict.fromkeys(found["inner"] if (found := _BLOCK.fullmatch(m)) else m for m in quantized))
    return list(quantized) if any(m.endswith(end) for m in ignored for end in ends) else ends
