"""The searches of reference/kquants_search.py, WIDE sub-blocks side by side, each in a lane.

`x` is the address of n rows of WIDE float32: row i has weight i of every sub-block. `spare` is the address of three
such squares of up to MOST rows, which are written: what a weight counts for, and the codes of a try.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .cpu_kernels import _part
from .cpu_kquants_vectors import (
    WIDE,
    below,
    both,
    choose,
    differ,
    either,
    every,
    load_wide,
    magnitude,
    negated,
    root,
    same,
    somewhere,
    store_wide,
    whole,
)
from .cpu_vectors import add, clamp, div, larger, mul, smaller, sub

MOST = 32  # weights of the longest sub-block
ROW = 4 * WIDE
SQUARE = MOST * ROW

ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)
SMALLEST, INFINITE = np.float32(1e-15), np.float32(np.inf)


@_part
def weigh_by_magnitude(x: int, n: int, weights: int) -> None:
    for i in range(n):
        store_wide(weights + i * ROW, magnitude(load_wide(x + i * ROW)))


@_part
def weigh_raised(x: int, n: int, weights: int) -> None:
    squares = every(ZERO)
    for i in range(n):
        xi = load_wide(x + i * ROW)
        squares = add(squares, mul(xi, xi))
    mean = root(div(squares, every(np.float32(n))))
    for i in range(n):
        store_wide(weights + i * ROW, add(mean, magnitude(load_wide(x + i * ROW))))


@_part
def _error(x: int, n: int, weights: int, codes: int, scale: Any, minimum: Any, absolute: int) -> Any:
    error = every(ZERO)
    if absolute:
        for i in range(n):
            difference = sub(add(mul(scale, load_wide(codes + i * ROW)), minimum), load_wide(x + i * ROW))
            error = add(error, mul(load_wide(weights + i * ROW), magnitude(difference)))
    else:
        for i in range(n):
            difference = sub(add(mul(scale, load_wide(codes + i * ROW)), minimum), load_wide(x + i * ROW))
            error = add(error, mul(load_wide(weights + i * ROW), mul(difference, difference)))
    return error


@_part
def scale_and_minimum(
    x: int, n: int, top: int, first: Any, tries: int, absolute: int, weights: int, codes: int, scales: int, minima: int
) -> None:
    """Scales and negated minima, WIDE float32 each. `weights` are there, `codes` is written."""
    none, highest_code = every(ZERO), every(np.float32(top))
    lowest = highest = load_wide(x)
    sum_w, sum_x = none, none
    for i in range(n):
        xi, wi = load_wide(x + i * ROW), load_wide(weights + i * ROW)
        lowest, highest = smaller(xi, lowest), larger(xi, highest)
        sum_w, sum_x = add(sum_w, wi), add(sum_x, mul(wi, xi))
    lowest = smaller(lowest, none)
    minimum = lowest
    iscale = div(highest_code, sub(highest, minimum))
    scale = div(every(ONE), iscale)
    for i in range(n):
        xi = load_wide(x + i * ROW)
        store_wide(codes + i * ROW, whole(clamp(mul(iscale, sub(xi, minimum)), none, highest_code)))
    best = _error(x, n, weights, codes, scale, minimum, absolute)
    for k in range(tries + 1):
        steps = first + TENTH * np.float32(k) + np.float32(top)
        iscale = div(every(steps), sub(highest, minimum))
        sum_q, sum_q2, sum_xq = none, none, none
        for i in range(n):
            xi = load_wide(x + i * ROW)
            q = whole(clamp(mul(iscale, sub(xi, minimum)), none, highest_code))
            store_wide(codes + i * ROW, q)
            wq = mul(load_wide(weights + i * ROW), q)
            sum_q, sum_q2, sum_xq = add(sum_q, wq), add(sum_q2, mul(wq, q)), add(sum_xq, mul(wq, xi))
        det = sub(mul(sum_w, sum_q2), mul(sum_q, sum_q))
        new_scale = div(sub(mul(sum_w, sum_xq), mul(sum_x, sum_q)), det)
        new_minimum = div(sub(mul(sum_q2, sum_x), mul(sum_q, sum_xq)), det)
        positive = below(none, new_minimum)
        new_scale = choose(positive, div(sum_xq, sum_q2), new_scale)
        new_minimum = choose(positive, none, new_minimum)
        error = _error(x, n, weights, codes, new_scale, new_minimum, absolute)
        better = both(below(none, det), below(error, best))
        best = choose(better, error, best)
        scale, minimum = choose(better, new_scale, scale), choose(better, new_minimum, minimum)
    flat = same(highest, lowest)
    store_wide(scales, choose(flat, none, scale))
    store_wide(minima, negated(choose(flat, lowest, minimum)))


@_part
def _first_largest(x: int, n: int) -> Any:
    largest = every(ZERO)
    for i in range(n):
        xi = load_wide(x + i * ROW)
        largest = choose(below(magnitude(largest), magnitude(xi)), xi, largest)
    return largest


@_part
def _quotient(sum_xq: Any, sum_q2: Any) -> Any:
    scale = choose(below(every(ZERO), sum_q2), div(sum_xq, sum_q2), every(ZERO))
    return choose(same(scale, scale), scale, every(INFINITE))


@_part
def scale_by_tries(x: int, n: int, top: int, squares: int, cubes: int, scales: int) -> None:
    """Scales, WIDE float32. `squares` and `cubes` are written."""
    for i in range(n):
        xi = load_wide(x + i * ROW)
        store_wide(squares + i * ROW, mul(xi, xi))
        store_wide(cubes + i * ROW, mul(mul(xi, xi), xi))
    largest = _first_largest(x, n)
    none, low, high = every(ZERO), every(np.float32(-top)), every(np.float32(top - 1))
    scale, best = none, none
    for t in range(19):  # 0, -9 .. -1, 1 .. 9
        k = 0 if t == 0 else t - 10 if t < 10 else t - 9
        iscale = div(every(-(np.float32(top) + TENTH * np.float32(k))), largest)
        sum_xq, sum_q2 = none, none
        for i in range(n):
            q = whole(clamp(mul(iscale, load_wide(x + i * ROW)), low, high))
            sum_xq = add(sum_xq, mul(load_wide(cubes + i * ROW), q))
            sum_q2 = add(sum_q2, mul(mul(load_wide(squares + i * ROW), q), q))
        new_scale = _quotient(sum_xq, sum_q2)
        if t == 0:
            scale, best = new_scale, mul(new_scale, sum_xq)
        else:
            better = both(below(none, sum_q2), below(mul(best, sum_q2), mul(sum_xq, sum_xq)))
            scale = choose(better, new_scale, scale)
            best = choose(better, mul(new_scale, sum_xq), best)
    store_wide(scales, choose(below(magnitude(largest), every(SMALLEST)), none, scale))


@_part
def scale_by_descent(x: int, n: int, top: int, squares: int, cubes: int, codes: int, scales: int) -> None:
    """Scales, WIDE float32. `squares`, `cubes` and `codes` are written."""
    largest = _first_largest(x, n)
    none, low, high = every(ZERO), every(np.float32(-top)), every(np.float32(top - 1))
    iscale = div(low, largest)
    sum_xq, sum_q2 = none, none
    for i in range(n):
        xi = load_wide(x + i * ROW)
        w = mul(xi, xi)
        wx = mul(w, xi)
        q = whole(clamp(mul(iscale, xi), low, high))
        store_wide(squares + i * ROW, w)
        store_wide(cubes + i * ROW, wx)
        store_wide(codes + i * ROW, q)
        sum_xq, sum_q2 = add(sum_xq, mul(wx, q)), add(sum_q2, mul(mul(w, q), q))
    for _ in range(5):
        changed = same(every(ONE), none)
        for i in range(n):
            xi, w, wx = load_wide(x + i * ROW), load_wide(squares + i * ROW), load_wide(cubes + i * ROW)
            q = load_wide(codes + i * ROW)
            others_xq, others_q2 = sub(sum_xq, mul(wx, q)), sub(sum_q2, mul(mul(w, q), q))
            new = whole(clamp(div(mul(xi, others_q2), others_xq), low, high))
            new_xq, new_q2 = add(others_xq, mul(wx, new)), add(others_q2, mul(mul(w, new), new))
            better = both(below(none, others_xq), below(none, new_q2))
            gain = below(mul(mul(sum_xq, sum_xq), new_q2), mul(mul(new_xq, new_xq), sum_q2))
            better = both(better, both(differ(new, q), gain))
            store_wide(codes + i * ROW, choose(better, new, q))
            sum_xq, sum_q2 = choose(better, new_xq, sum_xq), choose(better, new_q2, sum_q2)
            changed = either(changed, better)
        if not somewhere(changed):
            break
    scale = _quotient(sum_xq, sum_q2)
    store_wide(scales, choose(below(magnitude(largest), every(SMALLEST)), none, scale))
