"""The TOML files as frozen values: what they may hold is said by the fields here, and anything else is an error.

These files belong to the package, so that an error in one is a bug of the package: a ValueError that names the place.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

ROLES = (
    "attention",
    "mlp",
    "expert",
    "shared expert",
    "router",
    "embedding",
    "head",
    "norm",
    "bias",
    "conv",
    "modulation",
    "position",
    "other",
)

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of generic.toml: it matches where the number of dimensions is in `ndim` and the name has `match`."""

    role: str
    reason: str
    quantize: bool
    ndim: range
    match: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Fused:
    """One row of [fused]: parts of one parent, or, where there are none, what `whole` finds in a name."""

    name: str
    parts: tuple[str, ...] = ()
    whole: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Generic:
    """generic.toml; `fused` are names of rows of [fused]."""

    rules: tuple[Rule, ...]
    vocabulary_keys: frozenset[str]
    expert_keys: frozenset[str]
    layer: re.Pattern[str]
    fused: tuple[Fused, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of architectures.toml; `roles` are (role, expression) in the order in which they are tried."""

    name: str
    model_types: frozenset[str]
    classes: frozenset[str]
    names: tuple[re.Pattern[str], ...]
    roles: tuple[tuple[str, re.Pattern[str]], ...]
    fused: tuple[Fused, ...]
    tied: bool
    embedding: tuple[str, str] | None
    gguf: str | None


def read(file: str) -> dict[str, Any]:
    """One of the files beside this module."""
    return tomllib.loads((resources.files(__package__) / file).read_text(encoding="utf-8"))


def made(kind: type[_Row], place: str, fields: Mapping[str, Any], **defaults: Any) -> _Row:
    """A value of a class from a table. Raises ValueError for fields that it does not have, or needs."""
    try:
        return kind(**{**defaults, **fields})
    except TypeError as e:
        raise ValueError(f"{place}: {e}") from e


def expression(place: str, text: str) -> re.Pattern[str]:
    """A regular expression of a table."""
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"{place}: {text!r} is not a regular expression: {e}") from e


def row(place: str, table: Mapping[str, Any], name: str) -> Any:
    """The row of this name. Raises ValueError where there is none."""
    if name not in table:
        raise ValueError(f"{place}: there is no {name!r}; there are {', '.join(table)}")
    return table[name]


@functools.cache
def generic() -> Generic:
    """generic.toml."""
    return parse_generic(read("generic.toml"), fused_rows(read("architectures.toml")))


@functools.cache
def architectures() -> Mapping[str, Architecture]:
    """architectures.toml, in its order."""
    return parse_architectures(read("architectures.toml"))


def parse_generic(data: dict[str, Any], fused: Mapping[str, Fused]) -> Generic:
    """The content of generic.toml; `fused` is the table of that name."""
    start, end = data.pop("start"), data.pop("end")
    rules = []
    for n, table in enumerate(data.pop("rules"), start=1):
        place = f"generic.toml: rule {n}"
        text = table.pop("match", "").replace("{start}", start).replace("{end}", end)
        ndim = _ndim(place, table.pop("ndim", "0-"))
        rules.append(made(Rule, place, table, quantize=False, ndim=ndim, match=expression(place, text)))
        _check_role(place, rules[-1].role)
    return made(
        Generic,
        "generic.toml",
        data
        | {
            "rules": tuple(rules),
            "vocabulary_keys": frozenset(data["vocabulary_keys"]),
            "expert_keys": frozenset(data["expert_keys"]),
            "layer": expression("generic.toml: layer", data["layer"]),
            "fused": tuple(row("generic.toml: fused", fused, name) for name in data["fused"]),
        },
    )


def fused_rows(data: dict[str, Any]) -> dict[str, Fused]:
    """[fused] of architectures.toml."""
    rows = {}
    for name, value in data["fused"].items():
        place = f"architectures.toml: fused.{name}"
        whole = expression(place, value) if isinstance(value, str) else None
        rows[name] = Fused(name, () if whole is not None else tuple(value), whole)
    return rows


def parse_architectures(data: dict[str, Any]) -> dict[str, Architecture]:
    """The content of architectures.toml."""
    fused, found = fused_rows(data), {}
    for name, table in data["architectures"].items():
        place = f"architectures.toml: {name}"
        roles = []
        for key in table.pop("roles"):
            for role, text in row(f"{place}: roles", data["roles"], key).items():
                _check_role(f"{place}: roles.{key}", role)
                roles.append((role, expression(f"{place}: roles.{key}.{role}", text)))
        embedding = table.pop("embedding", None)
        found[name] = made(
            Architecture,
            place,
            table
            | {
                "name": name,
                "model_types": frozenset(table.get("model_types", ())),
                "classes": frozenset(table.get("classes", ())),
                "names": tuple(expression(f"{place}: names", text) for text in table.get("names", ())),
                "roles": tuple(roles),
                "fused": tuple(row(f"{place}: fused", fused, key) for key in table["fused"]),
                "embedding": None if embedding is None else (embedding[0], embedding[1]),
            },
            tied=False,
            gguf=None,
        )
    return found


def _check_role(place: str, role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"{place}: role {role!r} is none of {', '.join(ROLES)}")


def _ndim(place: str, text: str) -> range:
    m = re.fullmatch(r"(\d)(-?)(\d?)", text)
    if m is None:
        raise ValueError(f"{place}: ndim {text!r} is not like 2, 0-1 or 3-")
    first, dash, last = m.groups()
    return range(int(first), int(last) + 1 if last else 99 if dash else int(first) + 1)
