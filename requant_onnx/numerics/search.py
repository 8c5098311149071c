"""The alpha of least error (REQuant, arXiv 2510.04044, range search), on the exact curve of curve.py.

1. Scan alpha = 256/256, 255/256, ... and stop where the clipping error alone, which only grows as alpha falls, exceeds the best
   error seen: no skipped point of the 256 can win.
2. Scan 16 times finer around the best point: every weight that changes its level puts a kink in the curve, and so near its
   flat bottom there are many minima.
3. Golden-section search between the neighbors of the best point, as in the paper.
4. Exact finish: between two kinks the error is a parabola in the scale; try the vertices of the pieces next to the best point.

The result is the best of all points evaluated, hence never worse than the dense scan or than alpha = 1.
"""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.compiled import compiled
from requant_onnx.numerics.curve import Curves, Row, count_below, curves_of, error_at, prepare, scales
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.ranges import RowRanges

SCAN_POINTS = 256
FINE_STEP = 1 / 4096  # distance of the points of the second scan
FINE_REACH = 32  # points of the second scan to either side at 15 thresholds; fewer with more thresholds, which cost more
TOLERANCE = 1e-5  # width of the last interval of alpha in the golden-section search
PIECES = 4096  # largest number of pieces of the curve that the exact finish examines, to either side
GOLDEN = (5**0.5 - 1) / 2


def search_alpha(
    rows: Float32Array,
    ranges: RowRanges,
    table: LevelTable,
    importance: Float32Array | None = None,
    *,
    objective_in_weights: bool = True,
    round_in_weights: bool = True,
) -> Float64Array:
    """Find the alpha in (0, 1] of least squared error of each row, (rows,) float64; 1.0 for a row of zeros.

    rows: weights, (rows, n) float32, each row sorted ascending.
    importance: factor on the squared error of each element, (rows, n) (default: 1).
    """
    curves = curves_of(
        rows, ranges, table, importance, objective_in_weights=objective_in_weights, round_in_weights=round_in_weights
    )
    return _search(curves)


@compiled
def _search(curves: Curves) -> Float64Array:
    count, n = curves.w.shape
    max_code = curves.thresholds.size // 2
    alphas = np.ones(count)
    prefix, counts = np.empty(n + 1), np.empty(n + 1 if curves.h.size else 0)
    positions = np.empty(max_code, np.int64)
    reach = min(FINE_REACH, FINE_REACH * 15 // max_code)
    bracket = FINE_STEP if reach * FINE_STEP * SCAN_POINTS >= 1.0 else 1 / SCAN_POINTS
    for r in range(count):
        if curves.steps[r] > 0.0:
            row = prepare(curves, r, prefix, counts, positions)
            alpha, best = _scan(row)
            alpha, best = _scan_finely(row, alpha, best, reach)
            alpha, best = _golden(row, max(0.0, alpha - bracket), min(1.0, alpha + bracket), alpha, best)
            for direction in (1, -1):
                alpha, best = _finish(row, alpha, best, direction)
            alphas[r] = alpha
    return alphas


@compiled
def _scan(row: Row) -> tuple[float, float]:
    """The best of the points i/256, from alpha = 1 down to where clipping alone costs more: (alpha, error)."""
    u, prefix, n = row.u, row.prefix, row.w.size
    low, high, low_squares, high_squares = 0, n, 0.0, 0.0
    best, best_alpha = np.inf, 1.0
    for i in range(SCAN_POINTS, 0, -1):
        m_scale = scales(row, i / SCAN_POINTS)[1]
        bottom, top = m_scale * row.levels[0], m_scale * row.levels[-1]
        while low < n and u[low] < bottom:
            low_squares += (count_below(row, low + 1) - count_below(row, low)) * np.float64(u[low]) * u[low]
            low += 1
        while high > 0 and u[high - 1] > top:
            high -= 1
            high_squares += (count_below(row, high + 1) - count_below(row, high)) * np.float64(u[high]) * u[high]
        clipping = low_squares - 2 * bottom * prefix[low] + bottom * bottom * count_below(row, low)
        clipping += high_squares - 2 * top * (prefix[n] - prefix[high]) + top * top * (count_below(row, n) - count_below(row, high))
        if clipping - row.squares > best:
            break
        error = error_at(row, i / SCAN_POINTS)
        if error < best:
            best, best_alpha = error, i / SCAN_POINTS
    return best_alpha, best


@compiled
def _scan_finely(row: Row, alpha: float, best: float, reach: int) -> tuple[float, float]:
    """The best of alpha and of `reach` points to either side, FINE_STEP apart: (alpha, error)."""
    center = alpha
    for i in range(-reach, reach + 1):
        x = center + i * FINE_STEP
        if 0.0 < x <= 1.0:
            error = error_at(row, x)
            if error < best:
                alpha, best = x, error
    return alpha, best


@compiled
def _golden(row: Row, lo: float, hi: float, alpha: float, best: float) -> tuple[float, float]:
    """Golden-section search on lo .. hi (Kiefer 1953), with one new evaluation per step.  Returns the best (alpha, error)."""
    x1, x2 = hi - GOLDEN * (hi - lo), lo + GOLDEN * (hi - lo)
    f1, f2 = error_at(row, x1), error_at(row, x2)
    while True:
        if f1 < best:
            alpha, best = x1, f1
        if f2 < best:
            alpha, best = x2, f2
        if hi - lo <= TOLERANCE:
            return alpha, best
        if f1 < f2:
            hi, x2, f2 = x2, x1, f1
            x1 = hi - GOLDEN * (hi - lo)
            f1 = error_at(row, x1)
        else:
            lo, x1, f1 = x1, x2, f2
            x2 = lo + GOLDEN * (hi - lo)
            f2 = error_at(row, x2)


@compiled
def _finish(row: Row, alpha: float, best: float, direction: int) -> tuple[float, float]:
    """Try the vertex of one piece after another, away from alpha, up (direction 1) or down (-1).

    A vertex counts when the error evaluated there is lower, so no rounding here can make the result worse.
    """
    start, largest = scales(row, alpha)[1], scales(row, 1.0)[1]
    error_at(row, alpha)  # walks the positions to alpha
    here = row.positions.copy()
    a, b = _sums(row, here)
    for _ in range(min(PIECES, max(4, row.w.size // 8 // here.size))):
        j, at = _next_kink(row, here, direction)
        if j < 0 or b <= 0.0 or start > largest:
            break
        end = at if row.in_weights else at ** (1 / row.power)
        vertex = min(largest, max(min(start, end), min(max(start, end), a / b)))
        if vertex > 0.0 and vertex * (vertex * b - 2.0 * a) < best:
            x = min(1.0, (vertex ** (1 / row.power) if row.in_weights else vertex) / row.step)
            error = error_at(row, x)
            if error < best:
                alpha, best = x, error
        start = end
        moved = 1 if (row.thresholds[j] > 0.0) == (direction > 0) else -1
        difference = row.levels[j] - row.levels[j + 1]
        a += difference * (row.prefix[here[j] + moved] - row.prefix[here[j]])
        b += difference * (row.levels[j] + row.levels[j + 1]) * (count_below(row, here[j] + moved) - count_below(row, here[j]))
        here[j] += moved
    return alpha, best


@compiled
def _sums(row: Row, positions: Int64Array) -> tuple[float, float]:
    """A and B of curve.py in units of the scale."""
    levels, last = row.levels, row.levels.size - 1
    a, b = levels[last] * row.prefix[row.w.size], levels[last] * levels[last] * count_below(row, row.w.size)
    for j in range(last):
        a += (levels[j] - levels[j + 1]) * row.prefix[positions[j]]
        b += (levels[j] - levels[j + 1]) * (levels[j] + levels[j + 1]) * count_below(row, positions[j])
    return a, b


@compiled
def _next_kink(row: Row, positions: Int64Array, direction: int) -> tuple[int, float]:
    """The threshold that next meets a weight as the scale grows (direction 1) or shrinks (-1), and the scale where it does.

    Returns (-1, 0.0) when none does.
    """
    w, c = row.w, row.thresholds
    threshold, at = -1, 0.0
    for j in range(c.size):
        moves_up = (c[j] > 0.0) == (direction > 0)
        p = positions[j] if moves_up else positions[j] - 1
        if 0 <= p < w.size and w[p] != 0.0 and c[j] != 0.0 and (w[p] > 0.0) == (c[j] > 0.0):
            scale = w[p] / c[j]
            if threshold < 0 or (scale < at) == (direction > 0):
                threshold, at = j, scale
    return threshold, at
