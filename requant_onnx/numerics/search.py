"""The exact error curve over alpha and its minimum (REQuant, arXiv 2510.04044, section on range search).

With the weights of a row sorted and the prefix sums P of `u` (the weight, or the transformed weight), a quantizer with the
thresholds t_j and the levels m_0 .. m_K has the squared error

    sum (u - m_q)**2  =  sum u**2  -  2 A  +  B,
    A = m_K P(n) + sum_j (m_j - m_j+1) P(t_j),     B = m_K**2 n + sum_j (m_j**2 - m_j+1**2) N(t_j),

where P(t) sums and N(t) counts the elements below t: O(2**bits) for each alpha once the positions of the thresholds are
known, and these move little from one alpha to the next, so they are walked, not searched.

The minimum: evaluate alpha = 256/256, 255/256, ... and stop where the clipping error alone (it only grows as alpha falls)
exceeds the best error seen, so no skipped point of the 256 can win; then golden-section search between the neighbours of
the best point.  The result is the best of all points evaluated, hence never worse than the dense scan or than alpha = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.ranges import RowRanges, transform

FloatArray = npt.NDArray[np.float64]
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


def search_alpha(
    rows: npt.NDArray[np.float32], ranges: RowRanges, table: LevelTable, *, objective_in_weights: bool, round_in_weights: bool
) -> FloatArray:
    """The alpha in (0, 1] of least squared error of each row.

    rows: (rows, n) float32, each row sorted ascending.  Returns (rows,) float64; 1.0 for a row of zeros.
    """
    u, levels, thresholds = _curve_terms(rows, table, objective_in_weights, round_in_weights)
    power = 1 / table.exponent
    return cast("FloatArray", _search_rows(rows, u, levels, thresholds, ranges.step, ranges.zero_point, power, objective_in_weights))


def error_curve(
    rows: npt.NDArray[np.float32],
    ranges: RowRanges,
    table: LevelTable,
    alphas: FloatArray,
    *,
    objective_in_weights: bool = True,
    round_in_weights: bool = True,
) -> FloatArray:
    """The exact mean squared error at each alpha.  rows: (rows, n), sorted.  alphas: (points,).  Returns (rows, points)."""
    u, levels, thresholds = _curve_terms(rows, table, objective_in_weights, round_in_weights)
    power = 1 / table.exponent
    return cast(
        "FloatArray",
        _curve_rows(rows, u, levels, thresholds, ranges.step, ranges.zero_point, power, objective_in_weights, alphas),
    )


def _curve_terms(
    rows: npt.NDArray[np.float32], table: LevelTable, objective_in_weights: bool, round_in_weights: bool
) -> tuple[npt.NDArray[Any], FloatArray, FloatArray]:
    """u (rows, n), its levels (2K+1,), the thresholds (2K,), the latter two in units of their step."""
    thresholds = table.thresholds(round_in_weights)
    if objective_in_weights:
        return rows, table.weight_levels, thresholds
    return transform(rows, table.exponent), table.transformed_levels, thresholds


@compiled
def _prefix_sums(u, prefix):  # type: ignore[no-untyped-def]
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
def _error(w, prefix, thresholds, levels, t_scale, m_scale, positions):  # type: ignore[no-untyped-def]
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
    return m_scale * (m_scale * b - 2.0 * a)


@compiled
def _scales(alpha, step, power, in_weights):  # type: ignore[no-untyped-def]
    """Scale of the thresholds (weight space) and scale of the levels (space of the objective)."""
    v_scale = alpha * step
    w_scale = v_scale if power == 1.0 else v_scale**power
    return w_scale, (w_scale if in_weights else v_scale)


@compiled
def _start(w, thresholds, t_scale, positions):  # type: ignore[no-untyped-def]
    for j in range(thresholds.size):
        positions[j] = np.searchsorted(w, t_scale * thresholds[j])


@compiled
def _scan(w, u, prefix, squares, c, m, step, power, in_weights, positions):  # type: ignore[no-untyped-def]
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
def _golden(w, prefix, c, m, step, power, in_weights, positions, lo, hi, alpha, best):  # type: ignore[no-untyped-def]
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
def _search_rows(rows, u_rows, levels, thresholds, steps, zero_points, power, in_weights):  # type: ignore[no-untyped-def]
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
def _curve_rows(rows, u_rows, levels, thresholds, steps, zero_points, power, in_weights, alphas):  # type: ignore[no-untyped-def]
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
