"""`Recipe`: ordered rules, regular expression, role or layers -> scheme or keep, from a YAML file. docs/recipes.md.

What a file may hold is said by recipe.schema.json beside this module.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import PolicyError, SchemeError
from ..models import mixes
from ..schemes import Scheme

# More than any recipe: a file of this size is something else.
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RecipeRule:
    """One rule: it fits a tensor that has all of `match`, `role` and `layers` that are not None.

    match: searched in the full name
    layers: numbers of layers; negative ones count from the last
    scheme: quantize with it; None keeps the tensor
    reason: words for the plan, or ""
    where: what errors and plans call it, like "rule 2 of recipe.yaml"
    """

    where: str
    match: re.Pattern[str] | None = None
    role: str | None = None
    layers: tuple[int, ...] | None = None
    scheme: Scheme | None = None
    reason: str = ""

    def fits(self, name: str, role: str, layer: int | None, n_layers: int) -> bool:
        """Whether this rule decides about a tensor of this name and role in this layer."""
        if self.match is not None and not self.match.search(name):
            return False
        if self.role is not None and self.role != role:
            return False
        return self.layers is None or (layer is not None and (layer in self.layers or layer - n_layers in self.layers))

    @property
    def names_tensors(self) -> bool:
        """Whether it says which tensors, so that it also quantizes what the table would keep; layers alone do not."""
        return self.match is not None or self.role is not None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe: its rules, and the format and scheme it was written for, where it names them.

    name: of its file, for messages

        >>> recipe = Recipe.parse("version: 1\\nscheme: int4_g128\\nrules:\\n- {role: embedding, scheme: int8_channel}")
        >>> recipe.scheme, recipe.rules[0].scheme.id, recipe.rules[0].where
        ('int4_g128', 'int8_channel', 'rule 1 of recipe')
    """

    name: str
    rules: tuple[RecipeRule, ...] = ()
    format: str | None = None
    scheme: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a file. Raises PolicyError for a file that cannot be read, or is no recipe."""
        path = Path(path)
        try:
            with path.open("rb") as f:
                data = f.read(MAX_BYTES + 1)
        except OSError as e:
            raise PolicyError(f"{path}: this recipe cannot be read: {e.strerror or e}") from e
        if len(data) > MAX_BYTES:
            raise PolicyError(f"{path}: more than {MAX_BYTES} bytes, which no recipe has")
        return cls.parse(data, path.name)

    @classmethod
    def parse(cls, text: str | bytes, name: str = "recipe") -> Recipe:
        """The recipe in a YAML text; `name` is what messages call it.

        Raises PolicyError that names the rule, the field, the value and what is allowed.
        """
        content = _content(text, name)
        _check(content, name)
        scheme = content.get("scheme")
        if scheme is not None and scheme not in mixes:
            _scheme(scheme, f"{name}: scheme", f", or a mix: {', '.join(mixes)}")
        rules = [_rule(rule, n, name) for n, rule in enumerate(content.get("rules", ()), start=1)]
        return cls(name, tuple(rules), content.get("format"), scheme)

    @classmethod
    def of(cls, recipe: Recipe | str | Path | None) -> Recipe:
        """A recipe, or the one in a file, or none: an empty one."""
        if recipe is None:
            return cls("")
        return recipe if isinstance(recipe, Recipe) else cls.read(recipe)


def tensor_scheme(pattern: str, scheme: str | Scheme) -> RecipeRule:
    """The rule that --tensor-scheme PATTERN=SCHEME is. Raises PolicyError for an expression or a scheme that is none.

    >>> tensor_scheme("embed_tokens", "int8_channel").where
    '--tensor-scheme embed_tokens=int8_channel'
    """
    where = f"--tensor-scheme {pattern}={scheme}"
    return RecipeRule(where, _pattern(pattern, where), scheme=_scheme(scheme, where))


def split_tensor_scheme(text: str) -> tuple[str, str]:
    """(expression, scheme) of RE=SCHEME, at the last equals sign. Raises PolicyError where there is none."""
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern or not scheme:
        raise PolicyError(f"--tensor-scheme {text!r}: write RE=SCHEME, for example embed_tokens=int8_channel")
    return pattern, scheme


def schema_text() -> str:
    """The JSON schema of recipes, as text."""
    return (resources.files(__package__) / "recipe.schema.json").read_text(encoding="utf-8")


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(schema_text()))


@functools.cache
def _loader() -> Any:
    """YAML's safe loader without what would be read in silence: keys that are there twice, anchors and merges."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                event = self.peek_event()
                raise yaml.composer.ComposerError(None, None, "aliases (*) are not read", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((str(key) for i, key in enumerate(keys) if key in keys[:i]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _content(text: str | bytes, name: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    # What the loader makes of numbers, dates and bytes that are none, and of lists in lists in lists.
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as e:
        words = " ".join(str(e).split()) if not isinstance(e, RecursionError) else "nested too deeply"
        raise PolicyError(f"{name}: not YAML that can be read: {words}") from e


def _check(content: Any, name: str) -> None:
    """Raise PolicyError for the first thing that the schema does not allow."""
    errors = sorted(_validator().iter_errors(content), key=lambda e: (len(e.absolute_path), str(e.absolute_path)))
    if errors:
        raise PolicyError(f"{_place(errors[0], name)}: {_words(errors[0])}")


def _place(error: Any, name: str) -> str:
    """The file, the rule by its number from 1, and the field."""
    path = list(error.absolute_path)
    if path[:1] == ["rules"] and len(path) > 1:
        return ": ".join([name, f"rule {path[1] + 1}", *(_field(path[2:]) if len(path) > 2 else ())])
    return ": ".join([name, *(_field(path) if path else ())])


def _field(path: Sequence[Any]) -> tuple[str]:
    return (str(path[0]) + "".join(f", item {step + 1}" for step in path[1:] if isinstance(step, int)),)


def _words(error: Any) -> str:
    """What is wrong, and what is allowed."""
    value, wanted = _shown(error.instance), error.validator_value
    match error.validator:
        case "additionalProperties":
            known = error.schema["properties"]
            unknown = [_shown(key) for key in error.instance if key not in known]
            return f"{', '.join(unknown)}: the fields here are {', '.join(known)}"
        case "required":
            return f"it needs the field {next(key for key in wanted if key not in error.instance)}"
        case "type":
            return f"{value} is not of type {wanted}"
        case "enum":
            return f"{value} is none of {', '.join(wanted)}"
        case "const":
            return f"{value}: only {json.dumps(wanted)} is allowed"
        case "anyOf":
            return "it needs match, role or layers, to say what it fits"
        case "oneOf":
            return "it needs either scheme or keep: true, and not both"
        case "minLength" | "minItems":
            return "it is empty"
    return str(error.message)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rule(rule: Mapping[str, Any], n: int, name: str) -> RecipeRule:
    place = f"{name}: rule {n}"
    match, layers, scheme = rule.get("match"), rule.get("layers"), rule.get("scheme")
    return RecipeRule(
        f"rule {n} of {name}",
        None if match is None else _pattern(match, f"{place}: match"),
        rule.get("role"),
        None if layers is None else tuple(int(layer) for layer in layers),
        None if scheme is None else _scheme(scheme, f"{place}: scheme"),
        rule.get("reason", ""),
    )


def _pattern(text: str, place: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        raise PolicyError(f"{place}: {_shown(text)} is not a regular expression: {e}") from e


def _scheme(text: str | Scheme, place: str, beside: str = "") -> Scheme:
    try:
        return Scheme.parse(text)
    except SchemeError as e:
        mix = " A mix is for the whole model: name it as its scheme." if text in mixes else ""
        raise PolicyError(f"{place}: {e}{beside}{mix}") from e
