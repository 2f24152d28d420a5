"""`Part`: a tensor of a file that is cut out of one of the checkpoint; data in gguf.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..errors import FormatError
from .tables import made


@dataclass(frozen=True, slots=True)
class Span:
    """Which rows or columns of a matrix: every `step`-th from `begin` up to `end`. A text is a size in config.json."""

    begin: int | str = 0
    end: int | str | None = None
    step: int = 1

    def of(self, config: Mapping[str, Any]) -> slice:
        begin, end = (_size(config, n) if isinstance(n, str) else n for n in (self.begin, self.end))
        return slice(begin, end, self.step)


@dataclass(frozen=True, slots=True)
class Rule:
    """A part before the sizes of a model are known: `name` has {layer}, `stack` is a size in config.json."""

    name: str
    stack: str | None = None
    rows: Span = Span()
    columns: Span = Span()
    transposed: bool = False

    def part(self, layer: str, config: Mapping[str, Any]) -> Part:
        """Raises FormatError for a size that config.json does not have."""
        stack = None if self.stack is None else _size(config, self.stack)
        name = self.name.replace("{layer}", layer)
        return Part(name, stack, self.rows.of(config), self.columns.of(config), self.transposed)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and columns of every matrix of a tensor, perhaps with rows and columns exchanged.

    name: its own
    stack: of so many matrices, one below the other, the tensor [rows, columns] consists; None where it is one matrix,
        or has a first axis that counts them

        >>> import numpy as np
        >>> part = Part("up", None, slice(None), slice(1, None, 2), transposed=True)
        >>> part.shape((3, 8, 10))
        (3, 5, 8)
        >>> part.cut(np.arange(6).reshape(1, 2, 3))
        array([[[1, 4]]])
    """

    name: str
    stack: int | None
    rows: slice
    columns: slice
    transposed: bool

    def matrices(self, whole: tuple[int, ...]) -> tuple[int, int, int]:
        """A tensor of this shape as [matrices, rows, columns].

        Raises FormatError for a shape that is not so many matrices.
        """
        n = self.stack or (whole[0] if len(whole) == 3 else 1)
        if len(whole) not in (2, 3) or (self.stack and (len(whole) != 2 or whole[0] % n)):
            raise FormatError(f"{self.name} is a part of a tensor {list(whole)}, which is not {n} matrices")
        return n, whole[-2] // (n if self.stack else 1), whole[-1]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, where the tensor has the shape `whole`.

        Raises FormatError for a shape that is not so many matrices, or of matrices without these rows and columns.
        """
        n, rows, columns = self.matrices(whole)
        inner = (len(range(*self.rows.indices(rows))), len(range(*self.columns.indices(columns))))
        if 0 in inner or (self.rows.stop or 0) > rows or (self.columns.stop or 0) > columns:
            asked = " and ".join(
                f"{what} {span.start or 0} to {span.stop or 'the last'}"
                for what, span in (("rows", self.rows), ("columns", self.columns))
            )
            raise FormatError(f"{self.name} is {asked} of matrices of {rows} rows and {columns} columns")
        inner = inner[::-1] if self.transposed else inner
        return (n, *inner) if self.stack or len(whole) == 3 else inner

    def cut(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """A view of its part of some matrices [n, rows, columns]."""
        found = matrices[:, self.rows, self.columns]
        return found.swapaxes(1, 2) if self.transposed else found


def parse_rules(place: str, rows: list[dict[str, Any]]) -> tuple[Rule, ...]:
    """The parts of one tensor, as gguf.toml has them."""
    rules = []
    for table in rows:
        spans = {key: made(Span, f"{place}: {key}", table[key]) for key in ("rows", "columns") if key in table}
        rules.append(made(Rule, place, table | spans))
    return tuple(rules)


def _size(config: Mapping[str, Any], name: str) -> int:
    nested = config.get("text_config")
    value = config.get(name, nested.get(name) if isinstance(nested, Mapping) else None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"config.json has no {name}, by which tensors are cut into parts")
    return value
