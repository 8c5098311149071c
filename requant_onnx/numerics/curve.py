"""The exact error of a quantizer as a function of alpha, from sorted weights and prefix sums.

With the weights of a row sorted and the prefix sums P of `u` (the weight, or the transformed weight), a quantizer with the
thresholds t_j and the levels m_0 .. m_K has the squared error

    sum (u - m_q)**2  =  sum u**2  -  2 A  +  B,
    A = m_K P(n) + sum_j (m_j - m_j+1) P(t_j),     B = m_K**2 n + sum_j (m_j**2 - m_j+1**2) N(t_j),

where P(t) sums and N(t) counts the elements below t: O(2**bits) for each alpha once the positions of the thresholds are
known, and these move little from one alpha to the next, so they are walked, not searched.  An element with the importance h
counts h times in every sum (a histogram's bin, or a diagonal Hessian).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.compiled import compiled
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.ranges import RowRanges


class Row(NamedTuple):
    """One row of weights with the inputs of its curve.

    w: sorted weights, (n,).  u: values whose error is measured, (n,).  prefix: running sums of h * u, (n+1,).
    counts: running sums of h, (n+1,), or (0,) where every h is 1.  squares: sum h * u**2.
    thresholds, levels: thresholds (K,) and levels (K+1,) in units of their step, K = 2**bits - 1.
    positions: index of the first element not below each threshold at the last evaluation, (K,).
    step: step at alpha = 1.  power: 1/a.  in_weights: whether u is w.
    """

    w: AnyArray
    u: AnyArray
    prefix: Float64Array
    counts: Float64Array
    squares: float
    thresholds: Float64Array
    levels: Float64Array
    positions: Int64Array
    step: float
    power: float
    in_weights: bool


class Curves(NamedTuple):
    """The inputs of the curves of all rows of a weight.

    w: sorted weights, (rows, n).  u: values whose error is measured, (rows, n).
    h: importance of each element, (rows, n), or (rows, 0) where all are 1.
    thresholds, levels: whole tables, (2K,) and (2K+1,).  steps, zero_points: (rows,).  power: 1/a.  in_weights: whether u is w.
    """

    w: AnyArray
    u: AnyArray
    h: AnyArray
    thresholds: Float64Array
    levels: Float64Array
    steps: Float64Array
    zero_points: Int64Array
    power: float
    in_weights: bool


def curves_of(
    rows: Float32Array,
    ranges: RowRanges,
    table: LevelTable,
    importance: Float32Array | None = None,
    *,
    objective_in_weights: bool,
    round_in_weights: bool,
) -> Curves:
    """Collect the inputs of the curves.

    rows: weights, (rows, n) float32, each row sorted ascending.  importance: the same shape, in the same order.
    """
    u = rows if objective_in_weights else table.kind.transform(rows)
    levels = table.weight_levels if objective_in_weights else table.transformed_levels
    thresholds = table.thresholds(round_in_weights)
    h = np.empty((len(rows), 0), np.float32) if importance is None else importance
    return Curves(rows, u, h, thresholds, levels, ranges.step, ranges.zero_point, table.kind.power, objective_in_weights)


def error_curve(
    rows: Float32Array,
    ranges: RowRanges,
    table: LevelTable,
    alphas: Float64Array,
    importance: Float32Array | None = None,
    *,
    objective_in_weights: bool = True,
    round_in_weights: bool = True,
) -> Float64Array:
    """The exact mean squared error at each alpha, (rows, points).

    rows: weights, (rows, n), each row sorted ascending.  importance: the same shape, in the same order.  alphas: (points,).
    """
    curves = curves_of(
        rows, ranges, table, importance, objective_in_weights=objective_in_weights, round_in_weights=round_in_weights
    )
    return _evaluate(curves, alphas)


@compiled
def prepare(curves: Curves, r: int, prefix: Float64Array, counts: Float64Array, positions: Int64Array) -> Row:
    """Prepare row r, with the positions of its thresholds at alpha = 1.  Fills prefix, counts and positions."""
    w, u, h = curves.w[r], curves.u[r], curves.h[r]
    total, squares = 0.0, 0.0
    prefix[0] = 0.0
    if h.size:
        counts[0] = 0.0
        for i in range(u.size):
            counts[i + 1] = counts[i] + np.float64(h[i])
    for i in range(u.size):
        value, times = np.float64(u[i]), (np.float64(h[i]) if h.size else 1.0)
        total += times * value
        squares += times * value * value
        prefix[i + 1] = total
    max_code = curves.thresholds.size // 2
    start = max_code - curves.zero_points[r]
    thresholds = curves.thresholds[start : start + max_code]
    levels = curves.levels[start : start + max_code + 1]
    scale = curves.steps[r] ** curves.power
    for j in range(max_code):
        positions[j] = np.searchsorted(w, scale * thresholds[j])
    return Row(w, u, prefix, counts, squares, thresholds, levels, positions, curves.steps[r], curves.power, curves.in_weights)


@compiled
def count_below(row: Row, position: int) -> float:
    """The sum of the importances of the first `position` elements of a row."""
    return row.counts[position] if row.counts.size else float(position)


@compiled
def scales(row: Row, alpha: float) -> tuple[float, float]:
    """The scale of the thresholds (weight space) and the scale of the levels (space of u)."""
    v_scale = alpha * row.step
    w_scale = v_scale if row.power == 1.0 else v_scale**row.power
    return w_scale, (w_scale if row.in_weights else v_scale)


@compiled
def error_at(row: Row, alpha: float) -> float:
    """The squared error minus sum h * u**2.  Updates row.positions."""
    t_scale, m_scale = scales(row, alpha)
    w, levels, n = row.w, row.levels, row.w.size
    last = levels.size - 1
    a = levels[last] * row.prefix[n]
    b = levels[last] * levels[last] * count_below(row, n)
    for j in range(last):
        t = t_scale * row.thresholds[j]
        p = row.positions[j]
        while p < n and w[p] < t:
            p += 1
        while p > 0 and w[p - 1] >= t:
            p -= 1
        row.positions[j] = p
        difference = levels[j] - levels[j + 1]
        a += difference * row.prefix[p]
        b += difference * (levels[j] + levels[j + 1]) * count_below(row, p)
    error: float = m_scale * (m_scale * b - 2.0 * a)
    return error


@compiled
def _evaluate(curves: Curves, alphas: Float64Array) -> Float64Array:
    count, n = curves.w.shape
    errors = np.zeros((count, alphas.size))
    prefix, counts = np.empty(n + 1), np.empty(n + 1 if curves.h.size else 0)
    positions = np.empty(curves.thresholds.size // 2, np.int64)
    for r in range(count):
        row = prepare(curves, r, prefix, counts, positions)
        for i in range(alphas.size):
            errors[r, i] = (row.squares + error_at(row, alphas[i])) / count_below(row, n)
    return errors
