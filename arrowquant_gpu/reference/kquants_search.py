"""The scales of the sub-blocks of ggml's K-quants: the searches of llama.cpp, ggml/src/ggml-quants.c, operation by
operation. docs/numerics_kquants.md.

Weights come as `x` [n, sub-blocks], weight number first, so that a line here is one float32 operation in each sub-block
at once. A sum starts at 0 and adds the n terms in their order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .weights import F32

Floats = NDArray[Any]  # of float32

# Sub-blocks whose largest magnitude is below this count as zeros; ggml's GROUP_MAX_EPS.
SMALLEST = F32(1e-15)


class Fit(NamedTuple):
    """How ggml fits a scale and a minimum to codes 0 .. top: `make_qkx2_quants`.

    The tries number 0 .. tries divide the range into first + 0.1 * try + top steps.
    """

    top: int
    first: float
    tries: int
    absolute: bool  # errors count by magnitude, else by square


def total(terms: Floats) -> Floats:
    """Sum over the first axis, from 0, one term after the other."""
    summed: Floats = functools.reduce(np.add, terms, np.zeros(terms.shape[1:], F32))
    return summed


def nearest(v: Floats, low: float, high: float) -> Floats:
    """Whole numbers nearest to `v`, ties to even, from `low` to `high`; `low` for NaN."""
    rounded: Floats = np.rint(np.fmin(np.fmax(v, F32(low)), F32(high)))
    return rounded


def divide(a: Floats | np.float32, b: Floats, where: NDArray[np.bool_]) -> Floats:
    """a / b there, 0 elsewhere."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), F32), where=where)


def magnitude_weights(x: Floats) -> Floats:
    """What an error counts for in Q2_K: |x|."""
    return np.abs(x)


def raised_weights(x: Floats) -> Floats:
    """What an error counts for in Q4_K and Q5_K: the root mean square of the sub-block, plus |x|."""
    weights: Floats = np.sqrt(total(x * x) / F32(len(x))) + np.abs(x)
    return weights


def scale_and_minimum(x: Floats, w: Floats, fit: Fit) -> tuple[Floats, Floats]:
    """(scale, -minimum) of each sub-block: x is about scale * code + minimum, minimum <= 0, errors weighted by `w`.

    Each try rounds with one step, solves for the best scale and minimum of these codes, and is kept if its error is
    below all before. A minimum that is kept counts for the steps of later tries.
    """

    def codes(iscale: Floats, minimum: Floats) -> Floats:
        return nearest(iscale * (x - minimum), 0, fit.top)

    def error(scale: Floats, minimum: Floats, q: Floats) -> Floats:
        difference = scale * q + minimum - x
        return total(w * (np.abs(difference) if fit.absolute else difference * difference))

    sum_w, sum_x = total(w), total(w * x)
    minimum, highest = np.fmin(functools.reduce(np.fmin, x), F32(0)), functools.reduce(np.fmax, x)
    flat, lowest = highest == minimum, minimum
    iscale = F32(fit.top) / (highest - minimum)
    scale = F32(1) / iscale
    best = error(scale, minimum, codes(iscale, minimum))
    for k in range(fit.tries + 1):
        steps = F32(fit.first) + F32(0.1) * F32(k) + F32(fit.top)
        q = codes(steps / (highest - minimum), minimum)
        wq = w * q
        sum_q, sum_q2, sum_xq = total(wq), total(wq * q), total(wq * x)
        det = sum_w * sum_q2 - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / det
        new_minimum = (sum_q2 * sum_x - sum_q * sum_xq) / det
        new_scale = np.where(new_minimum > 0, sum_xq / sum_q2, new_scale)
        new_minimum = np.where(new_minimum > 0, F32(0), new_minimum)
        new_error = error(new_scale, new_minimum, q)
        better = (det > 0) & (new_error < best)
        best = np.where(better, new_error, best)
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
    return np.where(flat, F32(0), scale), -np.where(flat, lowest, minimum)


def first_largest(x: Floats) -> Floats:
    """The weight of the largest magnitude of each sub-block, with its sign; the first of several; 0 for zeros."""
    largest = np.zeros(x.shape[1:], F32)
    for xi in x:
        largest = np.where(np.abs(xi) > np.abs(largest), xi, largest)
    return largest


def _quotient(sum_xq: Floats, sum_q2: Floats) -> Floats:
    """sum_xq / sum_q2 where there are codes, else 0. One that is not a number is infinite: its terms overflowed."""
    scale = divide(sum_xq, sum_q2, sum_q2 > 0)
    return np.where(np.isnan(scale), F32(np.inf), scale)


def scale_by_tries(x: Floats, top: int) -> Floats:
    """The scale of each sub-block for codes -top .. top - 1, errors weighted by x * x: `make_qx_quants`.

    The first try gives the largest weight the code -top, 18 more use 0.1 to 0.9 of a step more and less.
    """
    wx = x * x * x
    largest = first_largest(x)

    def sums(steps: np.float32) -> tuple[Floats, Floats]:
        q = nearest(-steps / largest * x, -top, top - 1)
        return total(wx * q), total(x * x * q * q)

    sum_xq, sum_q2 = sums(F32(top))
    scale = _quotient(sum_xq, sum_q2)
    best = scale * sum_xq
    for k in (*range(-9, 0), *range(1, 10)):
        sum_xq, sum_q2 = sums(F32(top) + F32(0.1) * F32(k))
        better = (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2)
        scale = np.where(better, _quotient(sum_xq, sum_q2), scale)
        best = np.where(better, scale * sum_xq, best)
    return np.where(np.abs(largest) < SMALLEST, F32(0), scale)


def scale_by_descent(x: Floats, top: int) -> Floats:
    """The scale of each sub-block for codes -top .. top - 1, errors weighted by x * x: `make_q3_quants`.

    Five rounds; in each, one weight after the other takes the code that fits the others best, if the sum improves.
    As in ggml, weights whose sum of products is negative stay as they are.
    """
    largest = first_largest(x)
    q = nearest(F32(-top) / largest * x, -top, top - 1)
    w, wx = x * x, x * x * x
    sum_xq, sum_q2 = total(wx * q), total(w * q * q)
    for _ in range(5):
        for i in range(len(x)):
            others_xq, others_q2 = sum_xq - wx[i] * q[i], sum_q2 - w[i] * q[i] * q[i]
            new = nearest(x[i] * others_q2 / others_xq, -top, top - 1)
            new_xq, new_q2 = others_xq + wx[i] * new, others_q2 + w[i] * new * new
            better = (others_xq > 0) & (new != q[i]) & (new_q2 > 0)
            better &= new_xq * new_xq * sum_q2 > sum_xq * sum_xq * new_q2
            q[i] = np.where(better, new, q[i])
            sum_xq, sum_q2 = np.where(better, new_xq, sum_xq), np.where(better, new_q2, sum_q2)
    return np.where(np.abs(largest) < SMALLEST, F32(0), _quotient(sum_xq, sum_q2))
