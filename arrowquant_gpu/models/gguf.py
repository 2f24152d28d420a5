"""`Gguf`: what a GGUF file calls the tensors and sizes of an architecture; data in gguf.toml."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .parts import Part, Rule, parse_rules
from .tables import expression, generic, made, read, row

# What stands for a number or an optional prefix in a name of gguf.toml.
_PLACES = {"{layer}": r"(?P<layer>\d+)", "{expert}": r"(?P<expert>\d+)", "{bert}": r"(?:bert\.)?"}
# Where the number of a block is in a name of GGUF.
_BLOCK = re.compile(r"(?:^|\.)blk\.(\d+)\.")
_PERMUTED: Mapping[str, Literal["q", "k"]] = {"attn_q": "q", "attn_k": "k"}


class GgufName(NamedTuple):
    """Where a tensor of a checkpoint is in a GGUF file.

    name: of the tensor there
    expert: which matrix of the stack [experts, rows, columns] it is; None where it is a tensor by itself
    permute: its rows are put in llama.cpp's order, by the heads of q or of k; biases too
    add: what is added to every value
    layer: number of its block
    """

    name: str
    expert: int | None
    permute: Literal["q", "k"] | None
    add: float
    layer: int | None


@dataclass(frozen=True, slots=True)
class Key:
    """Where the value of one key is in config.json; see gguf.toml."""

    type: Literal["int", "float", "text", "bool"]
    sources: tuple[str, ...] = ()
    ratio: tuple[str, ...] = ()
    sum: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    times: float = 1
    same: tuple[str, ...] = ()
    values: Mapping[str, int] | None = None
    default: int | str | bool | None = None
    optional: bool = False
    absent: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Another tokenizer of models with a vocabulary of this size."""

    size: int
    tokenizer: str
    pre: str


@dataclass(frozen=True, slots=True)
class Misread:
    """A value in config.json with which llama.cpp computes otherwise than the model's authors, and how."""

    name: str
    value: Any
    how: str


@dataclass(frozen=True, eq=False)
class Gguf:
    """The names and keys of one architecture in GGUF files.

    architecture: general.architecture
    tokenizer, pre: tokenizer.ggml.model and tokenizer.ggml.pre; None where the architecture does not tell. See
        `vocabulary`
    same_names: the checkpoint is a GGUF file itself, whose names and keys are those of the file to be written
    """

    architecture: str
    tokenizer: str | None
    pre: str | None
    same_names: bool
    _names: tuple[tuple[re.Pattern[str], str], ...]
    _keys: Mapping[str, Key]
    _constants: Mapping[str, Any]
    _built_in: Mapping[str, Any]
    _omit: tuple[re.Pattern[str], ...]
    _layers: str | None
    _misread: tuple[Misread, ...]
    _vocabularies: tuple[Vocabulary, ...]
    _parts: tuple[tuple[re.Pattern[str], tuple[Rule, ...]], ...]
    _permute: bool
    _norms_plus_one: bool
    _rope_freqs: bool

    def name(self, hf_name: str) -> GgufName | None:
        """The name of a tensor, `.weight` and `.bias` included, in the file; None where there is no name for it.

        >>> ggufs()["mixtral"].name("model.layers.1.block_sparse_moe.experts.5.w2.weight")
        GgufName(name='blk.1.ffn_down_exps.weight', expert=5, permute=None, add=0.0, layer=1)
        """
        if self.same_names:
            block = _BLOCK.search(hf_name)
            return GgufName(hf_name, None, None, 0.0, None if block is None else int(block[1]))
        module, _, parameter = hf_name.rpartition(".")
        if self.omits(hf_name):
            return None
        is_usual = parameter in ("weight", "bias")
        for pattern, template in self._names:
            # Of parameters with a name of their own the table has the whole of both names.
            is_whole = template.endswith((".weight", ".bias"))
            found = pattern.fullmatch(hf_name if is_whole else module) if is_whole or is_usual else None
            if found is not None:
                parts = found.groupdict()
                layer, expert = (None if parts.get(k) is None else int(parts[k]) for k in ("layer", "expert"))
                name = template.replace("{layer}", str(layer))
                last = name.rpartition(".")[2]
                return GgufName(
                    name if is_whole else f"{name}.{parameter}",
                    expert,
                    _PERMUTED.get(last) if self._permute else None,
                    1.0 if self._norms_plus_one and last.endswith("norm") and parameter == "weight" else 0.0,
                    layer,
                )
        return None

    def omits(self, hf_name: str, config: Mapping[str, Any] | None = None) -> bool:
        """Whether files of this architecture leave a tensor out on purpose.

        config: config.json, which says how many layers the model has: those after them only predict further tokens

        >>> ggufs()["bert"].omits("pooler.dense.weight")
        True
        >>> ggufs()["deepseek_v3"].omits("model.layers.61.eh_proj.weight", {"num_hidden_layers": 61})
        True
        """
        if any(pattern.search(hf_name) for pattern in self._omit):
            return True
        n = None if self._layers is None else _lookup(config or {}, (self._layers,))
        layer = generic().layer.search(hf_name)
        return layer is not None and isinstance(n, int) and int(layer[1]) >= n

    def misread(self, config: Mapping[str, Any]) -> list[str]:
        """Sentences about what of this model llama.cpp computes otherwise than the model's authors."""
        return [
            f"config.json has {row.name} {row.value!r}: {row.how}."
            for row in self._misread
            if _lookup(config, (row.name,)) == row.value
        ]

    def parts(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        """The tensors that the file has in parts, with those. Raises FormatError for a size that config.json lacks."""
        return {
            name: tuple(rule.part(found.groupdict().get("layer") or "", config) for rule in rules)
            for name in names
            for pattern, rules in self._parts
            if (found := pattern.fullmatch(name)) is not None and not self.omits(name, config)
        }

    def keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the architecture with their values: int for u32, float for f32, bool, str.

        Raises FormatError for a size that config.json does not have, and for a value that llama.cpp does not know, or
        has another built in.

        >>> sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
        >>> keys = ggufs()["bert"].keys(sizes | {"intermediate_size": 1536, "max_position_embeddings": 512})
        >>> keys["bert.block_count"], keys["bert.attention.causal"]
        (6, False)
        """
        for name, want in self._built_in.items():
            said = _lookup(config, (name,))
            if said is not None and not _is_built_in(said, want):
                whole = f"{want}, again and again," if isinstance(want, list) else want
                raise FormatError(
                    f"config.json has {name} {said!r}; llama.cpp has {whole} built in. Choose another --format."
                )
        found: dict[str, Any] = {}
        for name, key in self._keys.items():
            if key.when is not None and key.when not in found:
                continue
            value = self._value(name, key, config)
            if value is not None:
                found[name] = value
        found |= self._constants
        return {f"{self.architecture}.{name}": value for name, value in found.items()}

    def vocabulary(self, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(tokenizer, pre) of a model with this config: those of the architecture, or of its size of vocabulary."""
        size = _lookup(config, ("vocab_size",))
        own = next((row for row in self._vocabularies if row.size == size), None)
        return (self.tokenizer, self.pre) if own is None else (own.tokenizer, own.pre)

    def tensors(self, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Tensors that the file has beside those of the checkpoint, computed from config.json.

        rope_freqs.weight, float32 [half of the rotated dimensions]: the divisors of the frequencies for rope scaling of
        type llama3 (Llama 3.1), by wavelength: short ones unchanged, long ones by `factor`, between them smoothly.

        Raises FormatError for a config without the sizes that these need.
        """
        kinds = self._keys.get("rope.scaling.type")
        if not self._rope_freqs or kinds is None or _lookup(config, kinds.sources) != "llama3":
            return {}
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        parts = {n: _lookup(config, (f"rope_parameters.{n}", f"rope_scaling.{n}")) for n in names}
        missing = [n for n, value in parts.items() if not _is_number(value)]
        if missing:
            raise FormatError(f"config.json has rope scaling of type llama3 without {', '.join(missing)}")
        factor, low, high, length = (float(parts[n]) for n in names)
        sizes = self.keys(config)
        dimensions = sizes[f"{self.architecture}.rope.dimension_count"]
        theta = sizes.get(f"{self.architecture}.rope.freq_base", 10000.0)
        turns = length * theta ** (-np.arange(0, dimensions, 2) / dimensions) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}

    def _value(self, name: str, key: Key, config: Mapping[str, Any]) -> int | float | str | None:
        value, share = _lookup(config, key.sources), _lookup(config, key.share)
        share = share if _is_number(share) else 1
        if value is None and key.ratio:
            over, under = (_lookup(config, (part,)) for part in key.ratio)
            if _is_number(over) and _is_number(under) and under:
                value = int(share * over) // under
        elif key.sum:
            summed = [_lookup(config, (part,)) for part in key.sum]
            value = sum(summed) if all(map(_is_number, summed)) else None
        elif _is_number(value):
            if key.same and _lookup(config, key.same) != value:
                other = _lookup(config, key.same)
                raise FormatError(
                    f"config.json has {key.sources[0]} {value!r} and {key.same[0]} {other!r}; llama.cpp has one value "
                    "for both. Choose another --format."
                )
            value = value * share * key.times
        if value is None:
            value = key.default
        if value is None or value in key.absent:
            if key.optional:
                return None
            raise FormatError(
                f"config.json has no {' or '.join(key.sources or key.ratio or key.sum)}, which GGUF stores as {name}"
            )
        if key.only is not None and value not in key.only:
            able = (
                f"what GGUF can say is {', '.join(key.only)}" if key.only else "that needs tensors that are not written"
            )
            raise FormatError(f"config.json has {key.sources[0]} {value!r}; {able}. Choose another --format.")
        if key.type == "text":
            return str(value)
        if key.type == "bool":
            if not isinstance(value, bool):
                raise FormatError(
                    f"config.json has {' or '.join(key.sources)} {value!r}, which is neither true nor false"
                )
            return value
        value = value if key.values is None else key.values[value]
        if not _is_number(value):
            raise FormatError(f"config.json has {' or '.join(key.sources)} {value!r}, which is not a number")
        return int(value) if key.type == "int" else float(value)


@functools.cache
def ggufs() -> Mapping[str, Gguf]:
    """gguf.toml, by the names that architectures.toml uses."""
    return parse_ggufs(read("gguf.toml"))


def parse_ggufs(data: dict[str, Any]) -> dict[str, Gguf]:
    """The content of gguf.toml."""
    found = {}
    for name, table in data["architectures"].items():
        place = f"gguf.toml: {name}"
        keys: dict[str, Key] = {}
        for part in table.pop("keys"):
            for key, fields in row(f"{place}: keys", data["keys"], part).items():
                keys[key] = _key(f"gguf.toml: keys.{part}.{key}", fields)
        for key in table.pop("without", ()):
            row(f"{place}: without", keys, key)
            del keys[key]
        names = [row(f"{place}: names", data["names"], part) for part in table.pop("names")]
        cut = [row(f"{place}: parts", data["parts"], part) for part in table.pop("parts", ())]
        vocabularies = table.pop("vocabularies", ())
        omit = [*data["omit"], *table.pop("omit", ())]
        fields = {
            "_names": tuple((_pattern(key), value) for part in names for key, value in part.items()),
            "_keys": keys,
            "_constants": table.pop("constants", {}),
            "_built_in": table.pop("built_in", {}),
            "_omit": tuple(expression(f"{place}: omit", text) for text in omit),
            "_layers": table.pop("layers", None),
            "_misread": tuple(made(Misread, f"{place}: misread", v) for v in table.pop("misread", ())),
            "_parts": tuple(
                (_pattern(key), parse_rules(f"{place}: parts.{key}", value))
                for part in cut
                for key, value in part.items()
            ),
            "_vocabularies": tuple(made(Vocabulary, f"{place}: vocabularies", v) for v in vocabularies),
            **{f"_{flag}": table.pop(flag, False) for flag in ("permute", "norms_plus_one", "rope_freqs")},
        }
        found[name] = made(Gguf, place, table | fields, tokenizer=None, pre=None, same_names=False)
    return found


def _key(place: str, fields: Mapping[str, Any]) -> Key:
    renamed = {"sources" if k == "from" else k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    key = made(Key, place, renamed)
    if key.type not in ("int", "float", "text", "bool"):
        raise ValueError(f"{place}: type {key.type!r} is none of int, float, text, bool")
    only = fields.get("only", key.values)
    return dataclasses.replace(key, only=None if only is None else tuple(only))


def _is_built_in(said: Any, want: Any) -> bool:
    if isinstance(want, list) and isinstance(said, list):
        return said == [want[i % len(want)] for i in range(len(said))]
    return bool(said == want)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for place, pattern in _PLACES.items():
        text = text.replace(re.escape(place), pattern)
    return re.compile(text)


def _lookup(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these, dotted where nested, that config.json or its text_config has; None is none."""
    for part in _parts(config):
        for name in names:
            value: Any = part
            for step in name.split("."):
                value = value.get(step) if isinstance(value, Mapping) else None
            if value is not None:
                return value
    return None


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    if isinstance(config.get("text_config"), Mapping):
        yield config["text_config"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
