"""The model card (README.md) of an output: the source's own, with a record of how the weights were made.

The record is one key, `arrowquant`, in the YAML front matter, and a paragraph between two marks in the text. Both are
replaced where an earlier run left them. Nothing else of the card changes, not even its line ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_BEGIN, _END = "<!-- arrowquant -->", "<!-- /arrowquant -->"
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# The key with all lines below it that are indented or empty.
_KEY = re.compile(r"^arrowquant:[^\n]*\n(?:(?:[ \t][^\n]*|\r?)\n)*", re.MULTILINE)
_NOTE = re.compile(rf"{_BEGIN}.*?{_END}(?:\r?\n){{0,2}}", re.DOTALL)


def model_card(original: bytes | None, provenance: Mapping[str, str], summary: str) -> bytes:
    """The card of an output. `original` is the source's card or None, `summary` a sentence for readers.

    >>> print(model_card(b"---\\nlicense: mit\\n---\\n# A model\\n", {"scheme": "int4_g128"}, "In 4 bits.").decode())
    ---
    license: mit
    arrowquant:
      scheme: "int4_g128"
    ---
    <!-- arrowquant -->
    In 4 bits.
    <!-- /arrowquant -->
    <BLANKLINE>
    # A model
    <BLANKLINE>
    """
    text = (original or b"").decode("utf-8", "surrogateescape")
    newline = "\r\n" if "\r\n" in text else "\n"
    record = "".join(f"  {key}: {json.dumps(value)}{newline}" for key, value in provenance.items())
    note = newline.join([_BEGIN, summary, _END, "", ""])
    front = _FRONT.match(text)
    body = _NOTE.sub("", text[front.end() :] if front else text, count=1)
    if front is None:
        head = f"---{newline}arrowquant:{newline}{record}---{newline}"
    elif not _is_block_mapping(front["yaml"]):
        head = front[0]
    else:
        start, end = front.span("yaml")
        kept = _KEY.sub("", front["yaml"])
        head = f"{text[:start]}{kept}arrowquant:{newline}{record}{text[end : front.end()]}"
    return (head + note + body).encode("utf-8", "surrogateescape")


def _is_block_mapping(yaml: str) -> bool:
    """Whether a key can be added at the end: every line that begins a node begins `key:`, or continues a list."""
    lines = [line for line in yaml.splitlines() if line.strip() and not line.startswith((" ", "\t", "#"))]
    return all(re.match(r"""(?:- |-$|[^\s"'{}\[\],&*!|>%@`-][^:]*:(?:\s|$))""", line) for line in lines)
