"""Families of grids other than whole numbers: cases of them, and what a backend makes of one against the reference."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from . import cases
from .bitwise import assert_bitwise_equal
from .test_backends import PATTERNS, dequantize, quantize

F32 = np.float32
Shape = tuple[int, int]
Case = tuple[Scheme, str, Shape, str]
Contents = Mapping[str, Callable[[np.random.Generator, int], np.ndarray]]
Make = Callable[[str, Shape, str], np.ndarray]
Check = Callable[[Backend, np.ndarray, Scheme, Iterable[str]], None]
# What is wrong -> the file of kernels/, what is replaced by what, and the scheme that shows it.
Faults = Mapping[str, tuple[str, str, str, str]]


def sample(
    schemes: Sequence[Scheme], shapes: Iterable[Shape], contents: Collection[str], n: int, seed: int
) -> Iterator[Case]:
    """n cases: the schemes in turn, mixed, from where another seed has stopped; a scheme has every dtype and shape once
    before it has one again, with another content.
    """
    rest = list(itertools.product(KERNEL_DTYPES, shapes, contents))
    numbers = np.arange(len(rest)).reshape(-1, len(contents))
    mixed = np.random.default_rng(len(schemes)).permutation(len(schemes))
    rng = np.random.default_rng(seed)
    orders = [rng.permuted(rng.permuted(numbers, axis=1), axis=0).T.reshape(-1) for _ in schemes]
    for i in range(seed * n, seed * n + n):
        nth, at = divmod(i, len(schemes))
        yield (schemes[mixed[at]], *rest[orders[at][nth % len(rest)]])


def make(contents: Contents, content: str, shape: Shape, dtype: str) -> np.ndarray:
    """As `cases.make`, of other contents as well."""
    if content in cases.CONTENTS:
        return cases.make(content, shape, dtype)
    rng = np.random.default_rng([*content.encode(), *shape])
    target = DTYPES[dtype].numpy
    info = ml_dtypes.finfo(target)
    with np.errstate(over="ignore", under="ignore"):
        x = np.clip(contents[content](rng, shape[0] * shape[1]), F32(info.min), F32(info.max))
        return x.astype(target).reshape(shape)


def check(backend: Backend, x: np.ndarray, scheme: Scheme, dtypes: Iterable[str] = KERNEL_DTYPES) -> None:
    """Encode `x` and decode the result to `dtypes`; raise unless all equals the reference, findings included."""
    packed, scales, zeros, findings = reference.quantize(x, scheme)
    got = quantize(backend, x, scheme)
    if got[3] != findings:
        raise AssertionError(f"findings differ: got {got[3]}, want {findings}")
    if findings != Findings():
        return
    assert_bitwise_equal(got[0], packed, "packed")
    assert_bitwise_equal(got[1], scales, "scales")
    if zeros is None:
        assert got[2] is None
    else:
        assert_bitwise_equal(got[2], zeros, "zeros")
    check_decoded(backend, packed, scales, zeros, scheme, x.shape[1], dtypes)


def check_decoded(
    backend: Backend,
    packed: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    scheme: Scheme,
    length: int,
    dtypes: Iterable[str] = KERNEL_DTYPES,
) -> None:
    """Decode to `dtypes`; raise unless each equals the reference."""
    for dtype in dtypes:
        want = reference.dequantize(packed, scales, zeros, scheme, length, dtype)
        got = dequantize(backend, packed, scales, zeros, scheme, length, dtype)
        assert_bitwise_equal(got, want, f"{scheme} {dtype}")


def check_cases(backend: Backend, table: Iterable[Case], make: Make, check: Check = check) -> int:
    """`check` every case, those of a scheme decoded to one dtype after the other; returns how many there were."""
    n, seen = 0, Counter[Scheme]()
    for scheme, dtype, shape, content in table:
        decoded = KERNEL_DTYPES[(n + seen[scheme]) % len(KERNEL_DTYPES)]
        try:
            check(backend, make(content, shape, dtype), scheme, [decoded])
        except AssertionError as e:
            raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e
        n, seen[scheme] = n + 1, seen[scheme] + 1
    return n


def check_not_finite(backend: Backend, name: str, shape: Shape, places: Collection[int], check: Check = check) -> None:
    """What is not finite is counted: each pattern alone in its place, three of them, and all."""
    for dtype in KERNEL_DTYPES:
        sound = cases.make("normal", shape, dtype)
        whole = dict(zip(places, PATTERNS[dtype], strict=True))
        for some in (*({at: whole[at]} for at in whole), dict(list(whole.items())[::2]), whole):
            x = sound.copy()
            bits = x.view(f"u{x.itemsize}").reshape(-1)
            for at, pattern in some.items():
                bits[at] = pattern
            check(backend, x, Scheme.parse(name), KERNEL_DTYPES)


def check_overflows(
    backend: Backend, name: str, shape: Shape, values: Iterable[tuple[int, float]], check: Check = check
) -> None:
    """Units that overflow are counted, beside those that nearly do: one value after the other in its place."""
    x = cases.make("normal", shape, "float32")
    for at, value in values:
        x.reshape(-1)[at] = value
        check(backend, x, Scheme.parse(name), KERNEL_DTYPES)
