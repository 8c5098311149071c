"""Weights to codes and back:  w_hat = scale * L[q - zero_point]  (levels.py),  scale = (alpha * step)**(1/a) / unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.levels import LevelTable, level_table
from requant_onnx.numerics.ranges import RowRanges, row_ranges
from requant_onnx.numerics.rounding import decode_rows, encode_rows
from requant_onnx.numerics.search import search_alpha

T = TypeVar("T", bound=np.generic)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """How one weight tensor is to be quantized: the decision that `quantize_weight` carries out.

    axis: the dimension with one scale an index (per-channel), or None (per-tensor).
    search: False takes alpha = 1.  objective_in_weights, round_in_weights: see config.Space.
    """

    bits: int
    exponent: float
    axis: int | None
    search: bool = True
    objective_in_weights: bool = True
    round_in_weights: bool = True


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes with all that is needed to decode them.

    codes: uint8, shape of the weight, values 0 .. 2**bits - 1.
    scale: float32, positive, and zero_point: uint8, both () or (channels,) along `axis`; alpha: float64, the same shape.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8]
    alpha: FloatArray
    axis: int | None
    table: LevelTable

    def broadcast(self, parameter: npt.NDArray[T]) -> npt.NDArray[T]:
        """A scale or zero point with the rank of the weight: (oc,) -> (oc, 1, 1, 1)."""
        if self.axis is None:
            return parameter
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """w_hat, rounded as ONNX's DequantizeLinear rounds it: one float32 product of level and scale."""
        start = self.table.max_code - self.zero_point.astype(np.int64).reshape(-1, 1)
        windows = self.table.integers[start + np.arange(self.table.max_code + 1)].astype(np.float32)
        values = windows * self.scale.reshape(-1, 1)
        return from_rows(decode_rows(to_rows(self.codes, self.axis), values), self.codes.shape, self.axis)


def quantize_weight(w: npt.NDArray[np.float32], grid: Grid) -> QuantizedWeight:
    """Quantize a weight of any shape with at least one element; all values finite.

    >>> q = quantize_weight(np.array([-1.0, 0.0, 0.45, 4.0], np.float32), Grid(4, 0.5, axis=None, search=False))
    >>> q.codes.tolist(), int(q.zero_point), q.dequantize().tolist()
    ([0, 5, 8, 15], 5, [-1.0, 0.0, 0.35999998450279236, 4.0])
    """
    table = level_table(grid.bits, grid.exponent)
    rows = to_rows(w, grid.axis)
    ranges = row_ranges(rows.min(1).astype(np.float64), rows.max(1).astype(np.float64), grid.bits, grid.exponent)
    alpha = _search(rows, ranges, table, grid) if grid.search else np.ones(len(rows))
    scale = ((alpha * ranges.step) ** (1 / grid.exponent) / table.unit).astype(np.float32)
    scale = np.where(scale > 0.0, scale, np.float32(1.0))  # a row of zeros (or below float32) stays at its zero point
    thresholds = table.thresholds(grid.round_in_weights)
    codes = encode_rows(rows, scale.astype(np.float64) * table.unit, ranges.zero_point, thresholds, 1 / grid.exponent)
    shape = () if grid.axis is None else (len(rows),)
    return QuantizedWeight(
        codes=from_rows(codes, w.shape, grid.axis),
        scale=scale.reshape(shape),
        zero_point=ranges.zero_point.astype(np.uint8).reshape(shape),
        alpha=alpha.reshape(shape),
        axis=grid.axis,
        table=table,
    )


def to_rows(w: npt.NDArray[T], axis: int | None) -> npt.NDArray[T]:
    """(oc, ic, kh, kw), axis 0 -> (oc, ic*kh*kw); axis None -> (1, oc*ic*kh*kw).  Always C-contiguous."""
    if axis is None:
        return np.ascontiguousarray(w.reshape(1, -1))
    return np.ascontiguousarray(np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1))


def from_rows(rows: npt.NDArray[T], shape: tuple[int, ...], axis: int | None) -> npt.NDArray[T]:
    """The inverse of `to_rows`."""
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))


def _search(rows: npt.NDArray[np.float32], ranges: RowRanges, table: LevelTable, grid: Grid) -> FloatArray:
    return search_alpha(
        np.sort(rows, axis=1),
        ranges,
        table,
        objective_in_weights=grid.objective_in_weights,
        round_in_weights=grid.round_in_weights,
    )
