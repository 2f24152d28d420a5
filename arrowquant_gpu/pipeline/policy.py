"""Which tensors are quantized: one table, read from the top, first match wins. docs/policy.md says it in words.

>>> from pathlib import Path
>>> from arrowquant_gpu.formats import TensorInfo
>>> def info(name, *shape): return TensorInfo(name, "bfloat16", shape, Path("m"), 0, 2)
>>> policy = Policy(None, {"vocab_size": 32000})
>>> policy.decide(info("model.layers.0.mlp.gate_proj.weight", 11008, 4096))
Decision(quantize=True, reason='linear weight')
>>> policy.decide(info("lm_head.weight", 32000, 4096)).reason
'output head'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..dtypes import DTYPES
from ..errors import PolicyError
from ..formats import TensorInfo


class Decision(NamedTuple):
    """Whether a tensor is to be quantized, and why."""

    quantize: bool
    reason: str


class Rule(NamedTuple):
    """One row of the table: it matches where the number of dimensions is in `ndim` and the name has `pattern`."""

    quantize: bool
    reason: str
    ndim: range
    pattern: str


_ANY, _SCALARS_AND_VECTORS, _MATRICES, _STACKS = range(99), range(2), range(2, 3), range(2, 4)

# A name is dotted components: _START comes before one, _END is the parameter at the end.
_START, _END = r"(?:^|\.)", r"\.(?:weight|kernel)$"

RULES: tuple[Rule, ...] = (
    Rule(False, "0-D or 1-D: a norm, bias or scale", _SCALARS_AND_VECTORS, ""),
    Rule(False, "bias", _ANY, r"(?:^|[._])bias(?:es)?$"),
    Rule(False, "position or relation bias, an embedding", _ANY, rf"{_START}\w*attention_bias{_END}"),
    Rule(
        False, "output head", _ANY, rf"{_START}\w*lm_head(?:\.|$)|{_START}(?:embed_out|lm_loss|vocab_projector){_END}"
    ),
    Rule(False, "output head", _ANY, rf"{_START}output_projection{_END}|^(?:model\.)?(?:output|head|proj_out){_END}"),
    Rule(False, "output head", _ANY, rf"^cls\.|{_START}predictions\.|{_START}\w*seq_relationship{_END}"),
    Rule(False, "embedding", _ANY, rf"{_START}[^.]*embed[^.]*(?:\.|$)"),
    Rule(False, "embedding", _ANY, rf"{_START}(?:wte|wpe|shared|emb|\w+_emb|position\w*|pos_\w+){_END}"),
    Rule(False, "norm", _ANY, rf"{_START}(?:\w*norm\w*|ln|ln_\w+){_END}"),
    Rule(False, "router of a mixture of experts", _ANY, rf"{_START}\w*router\w*(?:\.|$)"),
    Rule(False, "router of a mixture of experts", _ANY, rf"{_START}(?:gate|gating|shared_expert_gate)(?:\.wg)?{_END}"),
    Rule(False, "pooler", _ANY, rf"{_START}(?:\w+_)?pooler(?:\.|$)"),
    Rule(False, "classifier head", _ANY, rf"{_START}\w*(?:classifier|classification_head)\w*(?:\.|$)"),
    Rule(False, "classifier head", _ANY, rf"{_START}(?:qa_outputs|score|logits_proj|\w*value_head|v_head)(?:\.|$)"),
    Rule(True, "experts of a mixture, stacked; groups run along the last axis", _STACKS, rf"{_START}experts(?:\.\D|$)"),
    Rule(False, "3-D or more: a convolution or another parameter that is not linear", range(3, 99), ""),
    Rule(True, "linear weight", _MATRICES, r"(?:^|[._])weight$"),
    Rule(False, "a matrix whose name does not end in 'weight': not known to be linear", _ANY, ""),
)

# What the sizes in config.json tell beyond the names; see `Policy.decide`.
_VOCABULARY = Decision(False, "as many rows as the vocabulary: an embedding or output head")
_EXPERTS = Decision(True, "as many matrices as experts; groups run along the last axis")
# Why a matrix that could be quantized is kept: much of what the model gives depends on it. With 8 bits it gives hardly
# anything else, and the reason is then this one.
RAISED_BITS = 8
RAISED = {
    reason: f"{reason}, raised to {RAISED_BITS} bits"
    for reason in (
        "position or relation bias, an embedding",
        "output head",
        "embedding",
        "norm",
        "router of a mixture of experts",
        "pooler",
        "classifier head",
        _VOCABULARY.reason,
    )
}
_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size", "src_vocab_size", "tgt_vocab_size", "n_vocab")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Policy:
    """The table, with what the model's config and the caller say about this model.

    `include` and `ignore` are regular expressions, searched (`re.search`) in full tensor names, for example
    `model.layers.0.mlp.gate.weight`. `ignore` beats `include` beats the table; neither makes a tensor quantizable that
    holds no weights (integers, nothing at all). `names` are the tensors of the model, against which every expression
    must match at least once; None leaves that out.

    Raises PolicyError for an expression that is not valid, or matches nothing.
    """

    def __init__(
        self,
        names: Iterable[str] | None,
        config: Mapping[str, Any] | None = None,
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        names = None if names is None else list(names)
        self._include = [_compiled("include", text, names) for text in include]
        self._ignore = [_compiled("ignore", text, names) for text in ignore]
        sizes = list(_integers(config or {}))
        self._experts = {value for key, value in sizes if key in _EXPERT_KEYS}
        # Only where no other size of the model is the same number does a row count tell an embedding.
        self._vocabulary = {value for key, value in sizes if key in _VOCABULARY_KEYS} - {
            value for key, value in sizes if key not in _VOCABULARY_KEYS
        }

    def decide(self, info: TensorInfo) -> Decision:
        """The decision for one tensor, by its name, shape and dtype alone."""
        if not DTYPES[info.dtype].is_float:
            return Decision(False, f"{info.dtype}: not weights")
        if 0 in info.shape:
            return Decision(False, "empty")
        for pattern in self._ignore:
            if pattern.search(info.name):
                return Decision(False, f"ignored by --ignore {pattern.pattern}")
        for pattern in self._include:
            if pattern.search(info.name):
                return Decision(True, f"included by --include {pattern.pattern}")
        ndim = len(info.shape)
        decision = next(
            Decision(r.quantize, r.reason) for r in RULES if ndim in r.ndim and re.search(r.pattern, info.name)
        )
        if ndim == 2 and decision.quantize and info.shape[0] in self._vocabulary:
            return _VOCABULARY
        if ndim == 3 and not decision.quantize and info.shape[0] in self._experts and min(info.shape[1:]) >= 32:
            return _EXPERTS
        return decision


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of a config, nested ones (text_config, ...) too, with its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _compiled(option: str, text: str, names: list[str] | None) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as e:
        raise PolicyError(f"--{option} {text!r} is not a regular expression: {e}") from e
    if names is not None and not any(pattern.search(name) for name in names):
        raise PolicyError(f"--{option} {text!r} matches none of the {len(names)} tensor names. {_near(text, names)}")
    return pattern


def _near(text: str, names: list[str]) -> str:
    """The names, or parts of names, that look most like an expression that matched nothing."""
    plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", text).strip(".")
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = difflib.get_close_matches(plain, [*parts, *names], n=3, cutoff=0.5)
    if near:
        return f"Near it: {', '.join(near)}."
    return f"The names are like {', '.join(names[:3])}."
