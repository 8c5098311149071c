"""The alpha of least error (REQuant, arXiv 2510.04044, range search), on the exact curve of curve.py.

1. Scan alpha = 64/64, 63/64, ... (in steps of 1/256 for short rows) and stop where the clipping error alone, which only grows as
   alpha falls, exceeds the best error so far: no skipped point can be better.
2. Scan twice around the best point (five times if rounding is not to the level of least error), each time 4 times finer: every
   weight that changes its level adds a kink to the curve, so there are many minima near its flat bottom.
3. Exact finish: between two kinks the error is a parabola in the scale.  Move to the vertex of the parabola at the best point,
   where the error is no larger, then to the vertex of the parabola there, until the error no longer decreases.

The result is the best of all points evaluated, hence never worse than the scan or than alpha = 1.  All steps are taken for many
rows of weights at once.
"""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array
from requant_onnx.numerics.curve import Curves, curves_of
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.parallel import slices
from requant_onnx.numerics.ranges import RowRanges

SCAN_POINTS = 64
FEW_WEIGHTS, MORE_POINTS = 64, 256  # rows with at most this many weights have ragged curves, and are scanned at more points
CHUNK = 256  # thresholds (over points) that the first scan evaluates before it checks the clipping error again
ROUNDS = 2  # number of finer scans
MORE_ROUNDS = 5  # the same if weights are not rounded to the level of least error, so that vertices do not help
REACH = 4  # points of a finer scan on either side; they are this many times closer than in the scan before
DESCENTS = 8  # largest number of vertices tried in succession
BATCH = 1 << 17  # weights, or thresholds of one chunk, in the rows that are searched together


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
    alphas = np.ones(len(rows))

    for part in slices(len(rows), max(1, BATCH // max(rows.shape[1], CHUNK))):
        nonzero = part.start + np.flatnonzero(ranges.step[part] > 0.0)
        if not nonzero.size:
            continue
        chosen = part if nonzero.size == part.stop - part.start else nonzero  # a slice makes no copy
        curves = curves_of(
            rows[chosen],
            RowRanges(ranges.step[chosen], ranges.zero_point[chosen]),
            table,
            None if importance is None else importance[chosen],
            objective_in_weights=objective_in_weights,
            round_in_weights=round_in_weights,
        )
        alphas[chosen] = _search(curves)
    return alphas


def scan_points(weights: int) -> int:
    """The number of points of the first scan.  weights: number of weights in a row."""
    return MORE_POINTS if weights <= FEW_WEIGHTS else SCAN_POINTS


def _search(curves: Curves) -> Float64Array:
    """The alpha of least error of each row, (rows,)."""
    alpha, best = _scan(curves)
    distance = 1 / scan_points(curves.w.shape[1])
    for _ in range(ROUNDS if curves.is_nearest else MORE_ROUNDS):
        distance /= REACH
        points = np.clip(alpha[:, None] + distance * np.arange(-REACH, REACH + 1), distance, 1.0)
        alpha, best, vertex = _better(alpha, best, points, *curves.errors_and_vertices(points))
    for _ in range(DESCENTS):
        before, points = best, vertex[:, None]
        alpha, best, vertex = _better(alpha, best, points, *curves.errors_and_vertices(points))
        if (best == before).all():
            break
    return alpha


def _scan(curves: Curves) -> tuple[Float64Array, Float64Array]:
    """The best point of the first scan, from alpha = 1 down to where clipping alone costs more: alphas and errors, (rows,)."""
    count = len(curves.steps)
    alpha, best = np.ones(count), np.full(count, np.inf)
    number = scan_points(curves.w.shape[1])
    points = np.arange(number, 0, -1) / number
    chunks = slices(number, max(1, CHUNK // curves.max_code))
    least = curves.clipping(np.broadcast_to(points[[chunk.start for chunk in chunks]], (count, len(chunks))))
    for k, chunk in enumerate(chunks):
        left = np.flatnonzero(least[:, k] <= best)
        if not left.size:
            break
        part = curves if left.size == count else curves.rows(left)
        here = np.broadcast_to(points[chunk], (left.size, chunk.stop - chunk.start))
        errors = part.errors(here)
        alpha[left], best[left], _ = _better(alpha[left], best[left], here, errors, here)
    return alpha, best


def _better(
    alpha: Float64Array, best: Float64Array, points: Float64Array, errors: Float64Array, vertices: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The better of the best point so far and the best new point, its error, and the vertex of the best new point, each (rows,).

    alpha, best: (rows,).  points, errors, vertices: (rows, points).
    """
    at = errors.argmin(1)[:, None]
    point, error, vertex = (np.take_along_axis(array, at, 1)[:, 0] for array in (points, errors, vertices))
    return np.where(error < best, point, alpha), np.minimum(error, best), vertex
