"""The loops of the search and of rounding, compiled by Numba; search.py and quantize.py say what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])
SCAN_POINTS = 256
TOLERANCE = 1e-5  # of alpha; the curve is smooth at its minimum, so the error there is within 1e-6 of the exact one
GOLDEN = (5**0.5 - 1) / 2


def compiled(function: F) -> F:
    """numba.njit without the GIL, cached on disk where Numba finds a place to write."""
    try:
        return cast("F", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # "no locator available": nothing is writable, so it is compiled in every process
        return cast("F", numba.njit(nogil=True)(function))


@compiled
def _prefix_sums(u: Values, prefix: FloatArray) -> float:
    """Fill prefix (n+1,) with the running sums of u (n,); return sum u**2."""
    total = 0.0
    squares = 0.0
    prefix[0] = 0.0
    for i in range(u.size):
        value = np.float64(u[i])
        total += value
        squares += value * value
        prefix[i + 1] = total
    return squares


@compiled
def _error(
    w: Values, prefix: FloatArray, thresholds: FloatArray, levels: FloatArray, t_scale: float, m_scale: float, positions: IntArray
) -> float:
    """Squared error less sum u**2.  Moves `positions` (K,) to the first element not below each threshold."""
    n = w.size
    last = levels.size - 1
    a = levels[last] * prefix[n]
    b = levels[last] * levels[last] * n
    for j in range(last):
        t = t_scale * thresholds[j]
        p = positions[j]
        while p < n and w[p] < t:
            p += 1
        while p > 0 and w[p - 1] >= t:
            p -= 1
        positions[j] = p
        difference = levels[j] - levels[j + 1]
        a += difference * prefix[p]
        b += difference * (levels[j] + levels[j + 1]) * p
    error: float = m_scale * (m_scale * b - 2.0 * a)
    return error


@compiled
def _scales(alpha: float, step: float, power: float, in_weights: bool) -> tuple[float, float]:
    """Scale of the thresholds (weight space) and scale of the levels (space of the objective)."""
    v_scale = alpha * step
    w_scale = v_scale if power == 1.0 else v_scale**power
    return w_scale, (w_scale if in_weights else v_scale)


@compiled
def _start(w: Values, thresholds: FloatArray, t_scale: float, positions: IntArray) -> None:
    """Set `positions` by binary search."""
    for j in range(thresholds.size):
        positions[j] = np.searchsorted(w, t_scale * thresholds[j])


@compiled
def _scan(
    w: Values,
    u: Values,
    prefix: FloatArray,
    squares: float,
    c: FloatArray,
    m: FloatArray,
    step: float,
    power: float,
    in_weights: bool,
    positions: IntArray,
) -> tuple[int, float]:
    """Best of the points i/256, from alpha = 1 down to where clipping alone costs more.  Returns (i, error)."""
    n = w.size
    low, high, low_squares, high_squares = 0, n, 0.0, 0.0
    best, best_i = np.inf, SCAN_POINTS
    for i in range(SCAN_POINTS, 0, -1):
        t_scale, m_scale = _scales(i / SCAN_POINTS, step, power, in_weights)
        bottom, top = m_scale * m[0], m_scale * m[-1]
        while low < n and u[low] < bottom:
            low_squares += np.float64(u[low]) * u[low]
            low += 1
        while high > 0 and u[high - 1] > top:
            high -= 1
            high_squares += np.float64(u[high]) * u[high]
        clipping = low_squares - 2 * bottom * prefix[low] + bottom * bottom * low
        clipping += high_squares - 2 * top * (prefix[n] - prefix[high]) + top * top * (n - high)
        if clipping - squares > best:
            break
        error = _error(w, prefix, c, m, t_scale, m_scale, positions)
        if error < best:
            best, best_i = error, i
    return best_i, best


@compiled
def _golden(
    w: Values,
    prefix: FloatArray,
    c: FloatArray,
    m: FloatArray,
    step: float,
    power: float,
    in_weights: bool,
    positions: IntArray,
    lo: float,
    hi: float,
    alpha: float,
    best: float,
) -> float:
    """Golden-section search on lo .. hi (Kiefer 1953), one new evaluation a step.  Returns the best alpha seen."""
    x1, x2 = hi - GOLDEN * (hi - lo), lo + GOLDEN * (hi - lo)
    t_scale, m_scale = _scales(x1, step, power, in_weights)
    f1 = _error(w, prefix, c, m, t_scale, m_scale, positions)
    t_scale, m_scale = _scales(x2, step, power, in_weights)
    f2 = _error(w, prefix, c, m, t_scale, m_scale, positions)
    while True:
        if f1 < best:
            alpha, best = x1, f1
        if f2 < best:
            alpha, best = x2, f2
        if hi - lo <= TOLERANCE:
            return alpha
        if f1 < f2:
            hi, x2, f2 = x2, x1, f1
            x1 = hi - GOLDEN * (hi - lo)
            t_scale, m_scale = _scales(x1, step, power, in_weights)
            f1 = _error(w, prefix, c, m, t_scale, m_scale, positions)
        else:
            lo, x1, f1 = x1, x2, f2
            x2 = lo + GOLDEN * (hi - lo)
            t_scale, m_scale = _scales(x2, step, power, in_weights)
            f2 = _error(w, prefix, c, m, t_scale, m_scale, positions)


@compiled
def search_rows(
    rows: Values,
    u_rows: Values,
    levels: FloatArray,
    thresholds: FloatArray,
    steps: FloatArray,
    zero_points: IntArray,
    power: float,
    in_weights: bool,
) -> FloatArray:
    """The alpha of each row; see search.search_alpha.  levels, thresholds: the whole tables."""
    count, n = rows.shape
    max_code = thresholds.size // 2
    alphas = np.ones(count)
    prefix = np.empty(n + 1)
    positions = np.empty(max_code, np.int64)
    for r in range(count):
        if steps[r] == 0.0:
            continue
        w, u, start = rows[r], u_rows[r], max_code - zero_points[r]
        c, m = thresholds[start : start + max_code], levels[start : start + max_code + 1]
        squares = _prefix_sums(u, prefix)
        _start(w, c, _scales(1.0, steps[r], power, in_weights)[0], positions)
        i, best = _scan(w, u, prefix, squares, c, m, steps[r], power, in_weights, positions)
        lo, hi = (i - 1) / SCAN_POINTS, min(1.0, (i + 1) / SCAN_POINTS)
        alphas[r] = _golden(w, prefix, c, m, steps[r], power, in_weights, positions, lo, hi, i / SCAN_POINTS, best)
    return alphas


@compiled
def curve_rows(
    rows: Values,
    u_rows: Values,
    levels: FloatArray,
    thresholds: FloatArray,
    steps: FloatArray,
    zero_points: IntArray,
    power: float,
    in_weights: bool,
    alphas: FloatArray,
) -> FloatArray:
    """The error at each alpha; see search.error_curve."""
    count, n = rows.shape
    max_code = thresholds.size // 2
    curve = np.zeros((count, alphas.size))
    prefix = np.empty(n + 1)
    positions = np.empty(max_code, np.int64)
    for r in range(count):
        start = max_code - zero_points[r]
        c, m = thresholds[start : start + max_code], levels[start : start + max_code + 1]
        squares = _prefix_sums(u_rows[r], prefix)
        _start(rows[r], c, _scales(1.0, steps[r], power, in_weights)[0], positions)
        for i in range(alphas.size):
            t_scale, m_scale = _scales(alphas[i], steps[r], power, in_weights)
            curve[r, i] = (squares + _error(rows[r], prefix, c, m, t_scale, m_scale, positions)) / n
    return curve


@compiled
def encode_rows(rows: Values, scales: FloatArray, zero_points: IntArray, thresholds: FloatArray) -> npt.NDArray[np.uint8]:
    """The code of each weight: how many of its row's thresholds are not above it.  Returns (rows, n) uint8."""
    count, n = rows.shape
    max_code = thresholds.size // 2
    codes = np.empty((count, n), np.uint8)
    row_thresholds = np.empty(max_code)
    for r in range(count):
        start = max_code - zero_points[r]
        for j in range(max_code):
            row_thresholds[j] = scales[r] * thresholds[start + j]
        for i in range(n):
            w = rows[r, i]
            code = 0
            width = (max_code + 1) >> 1
            while width > 0:
                code += width if row_thresholds[code + width - 1] <= w else 0
                width >>= 1
            codes[r, i] = code
    return codes


@compiled
def decode_rows(codes: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The value of each code.  codes: (rows, n) uint8.  values: (rows, 2**bits) float32.  Returns (rows, n) float32."""
    count, n = codes.shape
    decoded = np.empty((count, n), np.float32)
    for r in range(count):
        for i in range(n):
            decoded[r, i] = values[r, codes[r, i]]
    return decoded
