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

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.kernels import FloatArray, Values, curve_rows, search_rows
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.ranges import RowRanges, transform


def search_alpha(
    rows: npt.NDArray[np.float32], ranges: RowRanges, table: LevelTable, *, objective_in_weights: bool, round_in_weights: bool
) -> FloatArray:
    """The alpha in (0, 1] of least squared error of each row.

    rows: (rows, n) float32, each row sorted ascending.  Returns (rows,) float64; 1.0 for a row of zeros.
    """
    u, levels, thresholds = _curve_terms(rows, table, objective_in_weights, round_in_weights)
    power = 1 / table.exponent
    return search_rows(rows, u, levels, thresholds, ranges.step, ranges.zero_point, power, objective_in_weights)


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
    return curve_rows(rows, u, levels, thresholds, ranges.step, ranges.zero_point, power, objective_in_weights, alphas)


def _curve_terms(
    rows: npt.NDArray[np.float32], table: LevelTable, objective_in_weights: bool, round_in_weights: bool
) -> tuple[Values, FloatArray, FloatArray]:
    """u (rows, n), its levels (2K+1,), the thresholds (2K,), the latter two in units of their step."""
    thresholds = table.thresholds(round_in_weights)
    if objective_in_weights:
        return rows, table.weight_levels, thresholds
    return transform(rows, table.exponent), table.transformed_levels, thresholds
