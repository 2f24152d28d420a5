"""`find`: the model that a checkpoint holds, by its config and its tensor names; and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .gguf import Gguf, ggufs
from .tables import Architecture, Fused, Rule, architectures, generic

# Tensors of all layers and experts are alike: what is found for one is remembered for all.
_NUMBERED = re.compile(r"\b(layers|layer|blocks|experts)\.\d+")


@dataclass(frozen=True, eq=False)
class Model:
    """What is known of a model.

    name: of its architecture; where that is not in the table, what config.json calls it, or ""
    is_known: whether its architecture is in the table; otherwise the generic rules are all there is
    tied: output heads that are the embedding, by name, with the name of the embedding: readers take that one
    gguf: how a GGUF file calls its tensors and sizes; None where it has no table
    """

    name: str
    is_known: bool
    tied: Mapping[str, str]
    gguf: Gguf | None
    _roles: tuple[tuple[str, re.Pattern[str]], ...]
    _fused: tuple[Fused, ...]
    _rules: dict[tuple[str, int], Rule] = field(default_factory=dict)

    def role(self, name: str, shape: Sequence[int]) -> str:
        """One of ROLES, by name and shape.

        >>> model = find({"model_type": "mixtral"}, [])
        >>> model.role("model.layers.0.block_sparse_moe.gate.weight", (8, 4096))
        'router'
        """
        return self.rule(name, shape).role

    def rule(self, name: str, shape: Sequence[int]) -> Rule:
        """The rule of generic.toml that decides: for the role in the table of the architecture, else by the name.

        Where no rule is for that role with so many dimensions, the name decides, and the role stays.
        """
        key = _NUMBERED.sub(r"\1.0", name), len(shape)
        if key not in self._rules:
            self._rules[key] = self._rule(*key)
        return self._rules[key]

    def _rule(self, name: str, ndim: int) -> Rule:
        rules = [r for r in generic().rules if ndim in r.ndim]
        first = next(r for r in rules if r.match.search(name))
        if ndim < 2 or first.role == "bias":
            return first
        role = next((role for role, pattern in self._roles if pattern.search(name)), None)
        if role is None:
            return first
        own = [r for r in rules if r.role == role]
        return next((r for r in own if r.match.search(name)), own[0] if own else replace(first, role=role))

    def is_own(self, name: str) -> bool:
        """Whether the architecture's own table says what this tensor is."""
        return any(pattern.search(name) for _, pattern in self._roles)

    def layer(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to, or None.

        >>> find(None, []).layer("model.layers.3.mlp.experts.7.up_proj.weight")
        3
        """
        found = generic().layer.search(name)
        return None if found is None else int(found[1])

    def n_layers(self, names: Iterable[str]) -> int:
        """One more than the highest number of a layer."""
        return max((layer for name in names if (layer := self.layer(name)) is not None), default=-1) + 1

    def fused(self, name: str) -> tuple[str, str] | None:
        """(what is fused, whose parts) for a weight that serving engines fuse with others; None for any other.

        >>> find({"model_type": "llama"}, []).fused("model.layers.0.self_attn.k_proj.weight")
        ('q_proj, k_proj, v_proj', 'model.layers.0.self_attn')
        """
        if not name.endswith(".weight"):
            return None
        parent, _, part = name.removesuffix(".weight").rpartition(".")
        wholes = ((row.name, found[1]) for row in self._fused if row.whole and (found := row.whole.search(name)))
        parts = ((", ".join(row.parts), parent) for row in self._fused if part in row.parts)
        return next(wholes, next(parts, None))

    def shared(self, name: str) -> str | None:
        """What is alike for the parts of one fused matrix, and no others; None for a weight that is none.

        >>> find({"model_type": "mixtral"}, []).shared("model.layers.0.block_sparse_moe.experts.2.w3.weight")
        'model.layers.0.block_sparse_moe.experts.2: w1, w3'
        """
        parent, _, part = name.removesuffix(".weight").rpartition(".")
        rows = (row for row in self._fused if part in row.parts and name.endswith(".weight"))
        return next((f"{parent}: {', '.join(row.parts)}" for row in rows), None)

    def fused_groups(self, names: Iterable[str]) -> list[list[str]]:
        """The names, in order, in groups of those that serving engines fuse; any other is a group by itself.

        >>> find(None, []).fused_groups(["a.q_proj.weight", "a.o_proj.weight", "a.k_proj.weight", "b.q_proj.weight"])
        [['a.q_proj.weight', 'a.k_proj.weight'], ['a.o_proj.weight'], ['b.q_proj.weight']]
        """
        groups: dict[object, list[str]] = {}
        for name in names:
            groups.setdefault(self.fused(name) or name, []).append(name)
        return list(groups.values())


def find(config: Mapping[str, Any] | None, names: Iterable[str]) -> Model:
    """The model that config.json and the tensor names tell of.

    config: config.json; a part of it (text_config, ...) is looked at where the whole names nothing that is known

    An architecture that is not in the table, or none at all, gives a model with the generic rules.

    >>> find({"_class_name": "FluxTransformer2DModel"}, []).name
    'flux'
    >>> find({"model_type": "mamba"}, []).is_known
    False
    """
    names = list(names)
    parts = [config or {}, *(v for v in (config or {}).values() if isinstance(v, Mapping))]
    found = next((row for part in parts if (row := _by_config(part)) is not None), None)
    said = list(_said(config or {}))
    if found is None and not said:
        found = next((row for row in architectures().values() if _has_names(row, names)), None)
    if found is None:
        return Model(said[0] if said else "", False, {}, None, (), generic().fused)
    tables = ggufs()
    gguf = None if found.gguf is None else tables[found.gguf]
    return Model(found.name, True, _tied(found, parts, names), gguf, found.roles, found.fused)


def _said(config: Mapping[str, Any]) -> Iterator[str]:
    """Everything that names an architecture: the type first, then classes."""
    classes = config.get("architectures")
    for value in (config.get("model_type"), config.get("_class_name"), *(classes if isinstance(classes, list) else ())):
        if isinstance(value, str) and value:
            yield value


def _by_config(config: Mapping[str, Any]) -> Architecture | None:
    for said in _said(config):
        for row in architectures().values():
            if said in row.model_types or said in row.classes:
                return row
    return None


def _has_names(row: Architecture, names: Sequence[str]) -> bool:
    return bool(row.names) and all(any(pattern.search(name) for name in names) for pattern in row.names)


def _tied(row: Architecture, parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """The head that is the embedding, where config.json, or else the architecture, says so and both are there."""
    if row.embedding is None:
        return {}
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part.get("tie_word_embeddings"), bool)]
    head, embedding = row.embedding
    if not (said[0] if said else row.tied) or head not in names or embedding not in names:
        return {}
    return {head: embedding}
