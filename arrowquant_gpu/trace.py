"""`span`: what runs when, as NVTX ranges for a profiler and, while a timeline is recorded, as events of a trace.

Domain `arrowquant`; a category is one of CATEGORIES; the message is a tensor's (or file's) name and the payload bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import nvtx

Category = Literal["plan", "read", "h2d", "kernel", "d2h", "write"]
CATEGORIES: tuple[Category, ...] = ("plan", "read", "h2d", "kernel", "d2h", "write")


@contextlib.contextmanager
def span(category: Category, name: str, n_bytes: int = 0) -> Iterator[None]:
    """A range over the body."""
    with nvtx.annotate(name, domain="arrowquant", category=category, payload=n_bytes):
        yield
