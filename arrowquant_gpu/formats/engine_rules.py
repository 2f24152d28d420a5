"""Rules of serving engines that are narrower than a format: what is legal in a file and refused or misread by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..schemes import Scheme
from . import Entry, TensorInfo


class Rule(NamedTuple):
    """A rule of one engine.

    engine: its name
    words: what it does with the tensors that break the rule; "{what}" stands for how many these are
    breaks: whether a tensor with this scheme does
    """

    engine: str
    words: str
    breaks: Callable[[TensorInfo, Scheme], bool]


def is_expert(info: TensorInfo) -> bool:
    """Whether it is a matrix of one of the experts of a layer."""
    return re.search(r"\bexperts\.\d+\.", info.name) is not None


# transformers has all experts of a layer in one tensor, and joins them while it loads only where they are float.
UNFUSED_EXPERTS = Rule(
    "transformers 5",
    "loads no experts that were quantized one by one, as {what} are: it leaves them out, or refuses the model; use "
    "--ignore 'experts' for it.",
    lambda info, _: is_expert(info),
)


def broken(rules: Iterable[Rule], entries: Sequence[Entry]) -> list[str]:
    """A sentence for each rule that a quantized tensor breaks, with how many do and the first of them.

    >>> from pathlib import Path
    >>> rule = Rule("vLLM", "has no kernels for 2 bits, as {what} have.", lambda info, scheme: scheme.bits == 2)
    >>> info = TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024)
    >>> broken([rule], [Entry(info, Scheme.parse("int2_g32"), "")])
    ['vLLM has no kernels for 2 bits, as 1 tensors (first: fc.weight) have.']
    """
    found = []
    for rule in rules:
        names = [e.info.name for e in entries if e.scheme is not None and rule.breaks(e.info, e.scheme)]
        if names:
            what = f"{len(names)} tensors (first: {names[0]})"
            found.append(f"{rule.engine} {rule.words.format(what=what)}")
    return found
