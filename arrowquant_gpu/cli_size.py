"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | None) -> int | None:
    """Bytes of "500MB", "1.5 GiB", "300000000" or None.

    >>> parse_size("500MB"), parse_size("1.5 GiB"), parse_size("8g")
    (500000000, 1610612736, 8000000000)

    Raises InputError for anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{text!r} is not a size; write for example 500MB, 2GB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])
