"""Stub."""

from __future__ import annotations

from collections.abc import Iterator

from .variants import Variant


def every() -> Iterator[Variant]:
    yield from ()
