"""Records in a file that only ever grows, one a line: JSON whose last key tells whether the line is whole.

    {"name": "fc.weight", "hash": "6f1d...", "sum": "a4c0..."}

`sum` is XXH3-64 of the line before it. What a power cut tore or left as zeros, and everything after it, is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import xxhash


def line(record: Mapping[str, Any]) -> bytes:
    r"""A record, which is not empty, as a line. Floats come back as they are, infinities and NaN too.

    >>> line({"name": "fc.weight"})
    b'{"name": "fc.weight", "sum": "818df7ff0946b50d"}\n'
    """
    text = json.dumps(record)[:-1].encode("ascii")
    return text + _tail(text)


def read_lines(fd: int) -> tuple[list[dict[str, Any]], int]:
    """The records of an open file up to the first line that is not whole, and how many bytes they take."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    records, end = [], 0
    for raw in data.splitlines(keepends=True):
        text = raw[: -len(_tail(b""))]
        if text + _tail(text) != raw:
            break
        record = json.loads(text + b"}")
        records.append(record)
        end += len(raw)
    return records, end


def _tail(text: bytes) -> bytes:
    return b', "sum": "%s"}\n' % xxhash.xxh3_64_hexdigest(text).encode("ascii")
