"""The transformed range of each row of weights (REQuant, arXiv 2510.04044, with alpha removed from the zero point).

    v = transform(w),   v_min = min(0, min v),   v_max = max(0, max v)
    step = (v_max - v_min) / K,   zero_point = rint(-v_min / step)     with K + 1 levels

The quantizer for alpha has the step `alpha * step` and the *same* zero point: alpha cancels in `-alpha*v_min / (alpha*step)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant_onnx.choices import LEVELS
from requant_onnx.numerics.arrays import Float64Array, Int64Array
from requant_onnx.numerics.kinds import GridKind


@dataclass(frozen=True)
class RowRanges:
    """The ranges of rows.  step: (rows,) float64, 0 for a row of zeros.  zero_point: (rows,) int64 in 0 .. K."""

    step: Float64Array
    zero_point: Int64Array


def symmetric_zero_point(bits: float) -> int:
    """The middle code; with an even number of levels, the one with one more level below it than above.

    >>> symmetric_zero_point(1.6), symmetric_zero_point(2)
    (1, 2)
    """
    return LEVELS[bits] // 2


def row_ranges(w_min: Float64Array, w_max: Float64Array, bits: float, kind: GridKind) -> RowRanges:
    """The step at alpha = 1 and the zero point of each row.  w_min, w_max: extremes of the weights, (rows,).

    >>> from requant_onnx.numerics.kinds import SQUARE_ROOT
    >>> row_ranges(np.array([-1.0]), np.array([4.0]), 4, SQUARE_ROOT)
    RowRanges(step=array([0.2]), zero_point=array([5]))
    """
    v_min = np.minimum(kind.transform(w_min), 0.0)
    v_max = np.maximum(kind.transform(w_max), 0.0)
    step = (v_max - v_min) / (LEVELS[bits] - 1)
    divisor = np.where(step > 0.0, step, 1.0)  # a row of zeros keeps zero point 0
    return RowRanges(step, np.rint(-v_min / divisor).astype(np.int64))


def symmetric_ranges(w_min: Float64Array, w_max: Float64Array, bits: float, kind: GridKind) -> RowRanges:
    """The ranges with the symmetric zero point in every row, and the smallest step at which the levels span the row.

    >>> from requant_onnx.numerics.kinds import UNIFORM
    >>> symmetric_ranges(np.array([-1.0]), np.array([4.0]), 4, UNIFORM)
    RowRanges(step=array([0.57142857]), zero_point=array([8]))
    """
    half = symmetric_zero_point(bits)
    step = np.maximum(-kind.transform(w_min) / half, kind.transform(w_max) / (LEVELS[bits] - 1 - half))
    return RowRanges(np.maximum(step, 0.0), np.full(len(step), half, np.int64))
