"""The one table that every backend is held to: schemes x dtypes x shapes x contents, and nothing drawn at random
without a seed. `python -m tests.cases` prints how many cases there are."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme

GROUP_SIZES = (16, 32, 64, 100, 128, 256)

SCHEMES = tuple(
    Scheme(bits, granularity, size, symmetric, scale_dtype)
    for bits, (granularity, size), symmetric, scale_dtype in itertools.product(
        BITS,
        [*(("group", g) for g in GROUP_SIZES), ("group", 5), ("channel", None), ("tensor", None)],
        (True, False),
        SCALE_SUFFIXES,
    )
)

# Rows x length: empty, single, under / at / over a group and a vector load, tails, and enough rows for many blocks.
SHAPES = (
    (0, 8),
    (3, 0),
    (1, 1),
    (2, 7),
    (1, 128),
    (5, 127),
    (3, 129),
    (4, 256),
    (7, 384),
    (2, 1000),
    (67, 320),
    (1, 4133),
)

F32 = np.float32


def _normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return (rng.standard_normal(n) * 0.02).astype(F32)


def _ties(rng: np.random.Generator, n: int) -> np.ndarray:
    """Quotients that lie exactly between two codes, for every width: half-integers with amax 7.5, 127.5, ..."""
    x = rng.integers(-8, 8, n).astype(F32) + F32(0.5)
    x[:: max(1, n // 7)] = rng.choice(np.array([1.5, 3.5, 7.5, 15.5, 31.5, 127.5, -7.5], F32))
    return x


def _one_hot(rng: np.random.Generator, n: int) -> np.ndarray:
    x = np.zeros(n, F32)
    x[rng.integers(0, max(n, 1), min(n, 3))] = F32(-3.0)
    return x


def _wild(rng: np.random.Generator, n: int) -> np.ndarray:
    """Any finite float32 bit pattern: subnormals, both zeros, both ends of the exponent range."""
    x = rng.integers(0, 1 << 32, n, dtype=np.uint32).view(F32)
    return np.where(np.isfinite(x), x, F32(-0.0))


CONTENTS = {
    "normal": _normal,
    "ties": _ties,
    "one_hot": _one_hot,
    "wild": _wild,
    "zeros": lambda rng, n: np.zeros(n, F32),
    "negative_zero": lambda rng, n: np.where(rng.random(n) < 0.5, F32(-0.0), F32(0.0)),
    "positive": lambda rng, n: np.abs(_normal(rng, n)) + F32(1e-3),
    "negative": lambda rng, n: -np.abs(_normal(rng, n)) - F32(1e-3),
    "subnormal": lambda rng, n: (
        rng.integers(0, 1 << 12, n).astype(np.uint32).view(F32) * rng.choice(np.array([1, -1], F32), n)
    ),
    "largest": lambda rng, n: rng.choice(np.array([3.4028235e38, -3.4028235e38, 1.0], F32), n),
    "near_tiny_scale": lambda rng, n: (rng.standard_normal(n) * 3e-7).astype(F32),
}


def make(content: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """The [rows, length] tensor of one case: finite in its dtype, the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(f"{content}{shape}{dtype}".encode()))
    x = CONTENTS[content](rng, shape[0] * shape[1]).astype(F32)
    target = DTYPES[dtype].numpy
    info = ml_dtypes.finfo(target)
    with np.errstate(over="ignore", under="ignore"):
        y = np.clip(x, F32(info.min), F32(info.max)).astype(target)
    return y.reshape(shape)


def cases(
    *, every: int = 1, dtypes: tuple[str, ...] = KERNEL_DTYPES
) -> Iterator[tuple[Scheme, str, tuple[int, int], str]]:
    """Every `every`-th (scheme, dtype, shape, content) of the whole table, in an order that mixes all four."""
    table = list(itertools.product(SCHEMES, dtypes, SHAPES, CONTENTS))
    order = np.random.default_rng(20261121).permutation(len(table))
    for i in order[::every]:
        yield table[i]


if __name__ == "__main__":
    print(len(SCHEMES) * len(KERNEL_DTYPES) * len(SHAPES) * len(CONTENTS), "cases")
