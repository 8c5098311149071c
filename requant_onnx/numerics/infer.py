"""Infer the grid of quantized weights from their values alone, so that files from any tool can be analyzed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from requant_onnx.choices import LEVELS
from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import LevelTable, level_table, limited_table

KINDS = tuple(PowerGrid(exponent) for exponent in (1.0, 1 / 2, 3 / 4, 2 / 3, 1 / 3))
LIMITS = (64, 127)  # largest absolute values of int8 weights
MAX_LEVELS = 256
TOLERANCE, HALF_TOLERANCE = 1e-4, 7e-4  # relative to a level, for products rounded to float32 and to float16
SAMPLED = 4  # rows with the most levels, which are tried first


@dataclass(frozen=True)
class InferredGrid:
    """A grid that contains all rows.

    table: level table.  scale: value of one integer level, (rows,) float64; 0 for a row of zeros.
    """

    table: LevelTable
    scale: Float64Array


def infer_grid(rows: Float32Array, *, half: bool = False) -> InferredGrid | None:
    """Find the grid with the fewest bits, and then of the simplest kind, that contains all rows; None if there is none.

    rows: decoded weights, (rows, n), one row per scale.  half: whether they were rounded to float16.

    >>> grid = infer_grid(np.array([[-0.5, 0.0, 1.0, 0.5], [0.0, 0.75, 1.5, 0.0]], np.float32))
    >>> grid.table.bits, grid.table.kind.describe(), grid.scale.tolist()
    (2, 'none', [0.5, 0.75])
    """
    levels = [np.unique(row.astype(np.float64)) for row in rows]
    levels = [values[values != 0.0] for values in levels]
    most = max(values.size for values in levels)
    if most == 0 or most >= MAX_LEVELS:
        return None
    sampled = sorted(levels, key=len)[-SAMPLED:]
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    for table in _tables(most + 1):  # plus zero
        if all(_scale(values, table, tolerance) is not None for values in sampled):
            scales = [_scale(values, table, tolerance) for values in levels]
            if None not in scales:
                return InferredGrid(table, np.array(scales, np.float64))
    return None


def _tables(fewest: int) -> Iterator[LevelTable]:
    """Tables with at least this number of levels."""
    for bits in (width for width, levels in LEVELS.items() if levels >= fewest):
        for kind in KINDS:
            yield level_table(bits, kind)
            yield from (table for limit in LIMITS if (table := limited_table(bits, kind, limit)).limit is not None)


def _scale(levels: Float64Array, table: LevelTable, tolerance: float) -> float | None:
    """The largest value of one integer level at which all values are levels of the table and span at most its codes, or None.

    levels: distinct values of a row, without zero.
    """
    if levels.size == 0:
        return 0.0
    integers = np.unique(table.integers)
    scales = np.abs(levels).max() / integers[integers > 0]
    smallest = levels[np.argmin(np.abs(levels))]
    for scale in scales[_places(smallest / scales, integers, tolerance) >= 0]:
        places = _places(levels / scale, integers, tolerance)
        if places.min() >= 0 and np.ptp(np.append(places, np.searchsorted(integers, 0))) <= table.max_code:
            return float(scale)
    return None


def _places(values: Float64Array, integers: Int64Array, tolerance: float) -> Int64Array:
    """The index of each value in the sorted `integers`, -1 for a value that is not one of them."""
    above = np.clip(np.searchsorted(integers, values), 1, integers.size - 1)
    places = above - (integers[above] - values > values - integers[above - 1])
    near = integers[places]
    return np.where(np.abs(near - values) <= tolerance * np.maximum(np.abs(near), 1), places, -1)
