"""`Mix`: schemes of the tensors of a GGUF file by what they are, under one name; data in mixes.toml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import ROLES, made, read, row


@dataclass(frozen=True, slots=True)
class Step:
    """One rule of a mix; see mixes.toml."""

    scheme: str
    role: str | None = None
    tensors: frozenset[str] | None = None
    layers: str | None = None
    experts: int | None = None
    gqa: int | None = None
    n_layers: int | None = None
    was: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix of schemes.

    base: id of the scheme that a tensor has unless a rule says otherwise
    file_type: general.file_type
    """

    name: str
    base: str
    file_type: int
    _steps: tuple[Step, ...]

    def scheme(
        self, role: str, gguf_name: str | None, layer: int | None, n_layers: int, *, experts: int = 0, gqa: int = 1
    ) -> str:
        """The id of the scheme of a tensor.

        role: one of ROLES; "head" for an embedding that is the output head too
        gguf_name: in the file, like blk.0.attn_v.weight; None where it has none
        layer, n_layers: the number of its layer, and of all layers
        experts, gqa: experts of a layer; query heads for one key and value head

        >>> [mixes["q4_k_m"].scheme("mlp", f"blk.{i}.ffn_down.weight", i, 16) for i in range(6)]
        ['q6_k', 'q6_k', 'q4_k', 'q4_k', 'q6_k', 'q4_k']
        """
        last = "" if gguf_name is None else gguf_name.removesuffix(".weight").rpartition(".")[2]
        found = self.base
        for step in self._steps:
            if (
                (step.role is None or step.role == role)
                and (step.tensors is None or last in step.tensors)
                and (step.layers is None or _is_among(step.layers, layer, n_layers))
                and (step.experts is None or step.experts == experts)
                and (step.gqa is None or gqa >= step.gqa)
                and (step.n_layers is None or step.n_layers == n_layers)
                and (step.was is None or found in step.was)
            ):
                found = step.scheme
        return found


def _is_among(layers: str, layer: int | None, n: int) -> bool:
    if layer is None:
        return False
    if layers == "more":
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    return layer < (n // {"eighth": 8, "sixteenth": 16}[layers] if layers in ("eighth", "sixteenth") else int(layers))


def parse_mixes(data: dict[str, Any]) -> dict[str, Mix]:
    """The content of mixes.toml."""

    def steps(place: str, tables: Sequence[Mapping[str, Any]]) -> list[Step]:
        return [_step(f"mixes.toml: {place}: rule {n}", table, data) for n, table in enumerate(tables, start=1)]

    first, last, found = steps("first", data["first"]), steps("last", data["last"]), {}
    for name, table in data["mixes"].items():
        own = steps(name, table.pop("rules"))
        found[name] = made(Mix, f"mixes.toml: {name}", table | {"name": name, "_steps": (*first, *own, *last)})
    return found


def _step(place: str, table: Mapping[str, Any], data: Mapping[str, Any]) -> Step:
    fields = dict(table)
    tensors = fields.get("tensors")
    if tensors is not None:
        fields["tensors"] = frozenset(row(place, data, tensors) if isinstance(tensors, str) else tensors)
    if "was" in fields:
        fields["was"] = frozenset(fields["was"])
    step = made(Step, place, fields)
    if step.role is not None and step.role not in ROLES:
        raise ValueError(f"{place}: role {step.role!r} is none of {', '.join(ROLES)}")
    if step.layers is not None and step.layers not in ("more", "eighth", "sixteenth") and not step.layers.isdecimal():
        raise ValueError(f"{place}: layers {step.layers!r} is none of more, eighth, sixteenth or a number")
    return step


mixes: Mapping[str, Mix] = parse_mixes(read("mixes.toml"))
