"""Which tensors are quantized, and why: ordered rules, first match wins. docs/policy.md says it in words.

The rules that hold where nobody asks for anything else are data: arrowquant_gpu/models/.

>>> from pathlib import Path
>>> from arrowquant_gpu.formats import TensorInfo
>>> def info(name, *shape): return TensorInfo(name, "bfloat16", shape, Path("m"), 0, 2)
>>> policy = Policy(None, {"vocab_size": 32000})
>>> policy.decide(info("model.layers.0.mlp.gate_proj.weight", 11008, 4096))
Decision(quantize=True, reason='linear weight', role='mlp', scheme=None)
>>> policy.decide(info("lm_head.weight", 32000, 4096)).reason
'output head'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import models
from ..dtypes import DTYPES
from ..errors import PolicyError
from ..formats import TensorInfo
from ..models import Model
from ..schemes import Scheme
from .recipe import RecipeRule


class Decision(NamedTuple):
    """Whether a tensor is to be quantized, and why; its role; and the scheme that a rule names, None for the plan's."""

    quantize: bool
    reason: str
    role: str = "other"
    scheme: Scheme | None = None


# What the sizes in config.json tell beyond the names; see `Policy.decide`.
_VOCABULARY = "as many rows as the vocabulary: an embedding or output head"
_EXPERTS = "as many matrices as experts; groups run along the last axis"
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
        _VOCABULARY,
    )
}


class Policy:
    """The rules for one model: the caller's, then those of the model's architecture.

    names: the tensors of the model, against which every expression must match at least once; None leaves that out
    config: config.json
    include, ignore: regular expressions, searched (`re.search`) in full tensor names, for example
        `model.layers.0.mlp.gate.weight`. `ignore` beats `include` beats `rules` beat the model's
    rules: those of --tensor-scheme and of a recipe, in order
    quantizes: roles that the output format quantizes too where nobody says otherwise

    `model` is what is known of the model, `n_layers` how many layers it has. Nothing of this makes a tensor quantizable
    that holds no weights (integers, nothing at all).

    Raises PolicyError for an expression that is not valid, or matches nothing.
    """

    def __init__(
        self,
        names: Iterable[str] | None,
        config: Mapping[str, Any] | None = None,
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
        *,
        rules: Sequence[RecipeRule] = (),
        quantizes: frozenset[str] = frozenset(),
    ) -> None:
        names = None if names is None else list(names)
        self._include = [_compiled("include", text, names) for text in include]
        self._ignore = [_compiled("ignore", text, names) for text in ignore]
        self._rules, self._quantizes = rules, quantizes
        self.model: Model = models.find(config, names or ())
        self.n_layers = self.model.n_layers(names or ())
        for rule in rules:
            if names is not None and rule.match is not None and not any(rule.match.search(name) for name in names):
                raise PolicyError(
                    f"{rule.where}: match {rule.match.pattern!r} matches none of the {len(names)} tensor names. "
                    f"{_near(rule.match.pattern, names)}"
                )
        sizes = list(_integers(config or {}))
        generic = models.generic()
        self._experts = {value for key, value in sizes if key in generic.expert_keys}
        # Only where no other size of the model is the same number does a row count tell an embedding.
        self._vocabulary = {value for key, value in sizes if key in generic.vocabulary_keys} - {
            value for key, value in sizes if key not in generic.vocabulary_keys
        }

    def check(self, infos: Iterable[TensorInfo]) -> list[str]:
        """Sentences about rules that fit no tensor because of their role, or only tensors that others decide about.

        Raises PolicyError for a rule without a role that fits none.
        """
        fit, decide = set[int](), set[int]()
        infos = list(infos)
        for info in infos:
            role = self._usual(info).role
            fitting = [n for n, rule in enumerate(self._rules) if self._fits(rule, info.name, role)]
            fit.update(fitting)
            decide.update(fitting[:1])
        warnings = []
        for n, rule in enumerate(self._rules):
            if n not in fit and rule.role is None:
                layers = "" if rule.layers is None else f" in layers {', '.join(map(str, rule.layers))}"
                raise PolicyError(
                    f"{rule.where}: it fits none of the {len(infos)} tensors{layers}; the model has layers 0 to "
                    f"{self.n_layers - 1}."
                    if self.n_layers
                    else f"{rule.where}: it fits none of the {len(infos)} tensors{layers}; none has a layer's number."
                )
            if n not in fit:
                warnings.append(f"{rule.where} fits no tensor: none that it could fit has the role {rule.role}.")
            elif n not in decide:
                warnings.append(f"{rule.where} decides nothing: rules before it fit all of its tensors.")
        return warnings

    def decide(self, info: TensorInfo) -> Decision:
        """The decision for one tensor, by its name, shape and dtype alone."""
        if not DTYPES[info.dtype].is_float:
            return Decision(False, f"{info.dtype}: not weights")
        if 0 in info.shape:
            return Decision(False, "empty")
        usual = self._usual(info)
        role = usual.role
        for pattern in self._ignore:
            if pattern.search(info.name):
                return Decision(False, f"ignored by --ignore {pattern.pattern}", role)
        if info.name in self.model.tied:
            return Decision(False, f"tied to {self.model.tied[info.name]}, which readers take in its place", role)
        rule = next((rule for rule in self._rules if self._fits(rule, info.name, role)), None)
        for pattern in self._include:
            if pattern.search(info.name):
                return Decision(True, f"included by --include {pattern.pattern}", role, rule.scheme if rule else None)
        if rule is None:
            return usual
        why = f"{rule.where}: {rule.reason}" if rule.reason else rule.where
        if rule.scheme is None:
            return Decision(False, f"kept by {why}", role)
        # A norm or a bias is no matrix, whatever the rule's expression happens to match.
        if len(info.shape) < 2 or not (usual.quantize or rule.names_tensors):
            return usual
        return Decision(True, f"{usual.reason}; {why}", role, rule.scheme)

    def _fits(self, rule: RecipeRule, name: str, role: str) -> bool:
        return rule.fits(name, role, self.model.layer(name), self.n_layers)

    def _usual(self, info: TensorInfo) -> Decision:
        """What happens where the caller asks for nothing."""
        found, ndim = self.model.rule(info.name, info.shape), len(info.shape)
        decision = Decision(found.quantize, found.reason, found.role)
        if not self.model.is_own(info.name):
            if ndim == 2 and decision.quantize and info.shape[0] in self._vocabulary:
                decision = Decision(False, _VOCABULARY, "embedding")
            elif ndim == 3 and not decision.quantize and info.shape[0] in self._experts and min(info.shape[1:]) >= 32:
                decision = Decision(True, _EXPERTS, "expert")
        if ndim == 2 and not decision.quantize and decision.role in self._quantizes:
            return decision._replace(quantize=True, reason=f"{decision.reason}, which this format quantizes too")
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
