"""Find the grid that quantized weights lie on, from their values alone: any tool's file can be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import LevelTable, level_table, limited_table

KINDS = tuple(PowerGrid(exponent) for exponent in (1.0, 1 / 2, 3 / 4, 2 / 3, 1 / 3))
LIMITS = (64, 127)  # of int8 weights
MAX_LEVELS = 256
TOLERANCE, HALF_TOLERANCE = 1e-4, 7e-4  # of a level: products rounded to float32, or to float16
SAMPLED = 4  # rows by which a grid is chosen, those with the most levels


@dataclass(frozen=True)
class InferredGrid:
    """table: of the levels.  scale: (rows,) float64, what one integer level is worth; 0 for a row of zeros."""

    table: LevelTable
    scale: Float64Array


def infer_grid(rows: Float32Array, *, half: bool = False) -> InferredGrid | None:
    """The grid of fewest bits and then the simplest kind on which all rows lie; None where there is none.

    rows: (rows, n) decoded weights, one row a scale.  half: they were rounded to float16.

    >>> grid = infer_grid(np.array([[-0.5, 0.0, 1.0, 0.5], [0.0, 0.75, 1.5, 0.0]], np.float32))
    >>> grid.table.bits, grid.table.kind.describe(), grid.scale.tolist()
    (2, 'none', [0.5, 0.75])
    """
    levels = [np.unique(row.astype(np.float64)) for row in rows]
    levels = [own[own != 0.0] for own in levels]
    most = max(own.size for own in levels)
    if most == 0 or most >= MAX_LEVELS:
        return None
    sampled = sorted(levels, key=len)[-SAMPLED:]
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    for table in _tables(max(2, int(most).bit_length())):  # with zero there are most + 1 levels
        if all(_scale(own, table, tolerance) is not None for own in sampled):
            scales = [_scale(own, table, tolerance) for own in levels]
            if None not in scales:
                return InferredGrid(table, np.array(scales, np.float64))
    return None


def _tables(fewest: int) -> Iterator[LevelTable]:
    for bits in range(fewest, 9):
        for kind in KINDS:
            yield level_table(bits, kind)
            yield from (table for limit in LIMITS if (table := limited_table(bits, kind, limit)).limit is not None)


def _scale(levels: Float64Array, table: LevelTable, tolerance: float) -> float | None:
    """What an integer level is worth (the most it can be), where these values are levels of a table and span no more codes than it
    has; None where they are not.  levels: without zero."""
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
    """Where in the sorted `integers` each value is, -1 where it is none of them."""
    above = np.clip(np.searchsorted(integers, values), 1, integers.size - 1)
    places = above - (integers[above] - values > values - integers[above - 1])
    near = integers[places]
    return np.where(np.abs(near - values) <= tolerance * np.maximum(np.abs(near), 1), places, -1)
