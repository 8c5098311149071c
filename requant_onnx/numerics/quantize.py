"""Weights to codes and back:  w_hat = scale * L[q - zero_point]  (levels.py),  scale = (alpha * step)**(1/a) / unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int32Array, UInt8Array
from requant_onnx.numerics.kinds import UNIFORM, GridKind
from requant_onnx.numerics.levels import LevelTable, level_table, limited_table
from requant_onnx.numerics.price import RATE, REACH, ZERO, round_by_price
from requant_onnx.numerics.ranges import RowRanges, row_ranges, symmetric_ranges
from requant_onnx.numerics.rounding import decode_rows, encode_rows
from requant_onnx.numerics.search import search_alpha

T = TypeVar("T", bound=np.generic)
TINIEST_HALF, SMALLEST_HALF, LARGEST_HALF = np.float32(2.0**-24), 2.0**-14, 65504.0  # float16; it loses digits below 2**-14
SMALLEST_TINY = 2.0**-21  # float16 rounds it by 6 % at most
SMALLEST_STEP = 2.0**-126  # float32 without loss
SCALES_AN_OCTAVE = 4
LARGE_SCALE = 2.0**-10  # the lost digits, 2**-25 times 127 levels, are 0.4 % of such a step


@dataclass(frozen=True)
class Grid:
    """The settings with which `quantize_weight` quantizes one weight tensor.

    axis: dimension with one scale per index (per-channel), or None (per-tensor).
    search: whether alpha is searched; else it is 1.  objective_in_weights, round_in_weights: see config.Space.
    limit: largest level (for an int8 kernel); None for no limit.
    half_scales: whether the scales of channels are rounded to float16, if the loss is negligible.
    tiny_scales: whether scales down to 2**-21 are rounded even so: in a weight that corrects another, the digits that are lost do
    not matter.
    symmetric: whether every zero point is the middle one.
    step: value of a level if bits of codes count too (price.py): uniform levels that reach as far as the weights do; of the other
    settings, only axis and half_scales then matter.  None: levels by the range of the weights.
    """

    bits: float
    kind: GridKind
    axis: int | None
    search: bool = True
    objective_in_weights: bool = True
    round_in_weights: bool = True
    limit: int | None = None
    half_scales: bool = False
    symmetric: bool = False
    step: float | None = None
    tiny_scales: bool = False

    @classmethod
    def by_step(cls, step: float, axis: int | None, *, half_scales: bool) -> Grid:
        """The grid with levels one step apart, for codes that will be compressed."""
        return cls(8, UNIFORM, axis, search=False, half_scales=half_scales, symmetric=True, step=step)


@dataclass(frozen=True)
class QuantizedWeight:
    """The codes of a weight with the parameters that decode them.

    codes: uint8, values 0 .. K (levels.py), the shape of the weight.
    scale, zero_point, alpha: float32 (positive, unless mirrored), uint8 and float64, each () or (channels,) along `axis`.
    """

    codes: UInt8Array
    scale: Float32Array
    zero_point: UInt8Array
    alpha: Float64Array
    axis: int | None
    table: LevelTable

    @property
    def has_half_scale(self) -> bool:
        """Whether there is more than one scale, and float16 holds each exactly."""
        return bool(self.scale.size > 1 and (_to_half(self.scale) == self.scale).all())

    def mirrored(self) -> QuantizedWeight:
        """The same weights with one zero point for all channels, if negating some scales makes that possible; else unchanged.

        Levels are odd: L[q - z] = -L[(K - q) - (K - z)].
        """
        k, zero_point = self.table.max_code, self.zero_point.astype(np.int64)
        low = zero_point < k - zero_point
        if not np.ptp(zero_point) or np.ptp(np.where(low, k - zero_point, zero_point)):
            return self
        codes = np.where(self.broadcast(low), np.uint8(k) - self.codes, self.codes)
        one = np.where(low, k - zero_point, zero_point).astype(np.uint8)
        return replace(self, codes=codes, zero_point=one, scale=np.where(low, -self.scale, self.scale))

    def broadcast(self, parameter: npt.NDArray[T]) -> npt.NDArray[T]:
        """A scale or zero point with the rank of the weight: (oc,) -> (oc, 1, 1, 1)."""
        if self.axis is None:
            return parameter
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)

    def levels(self) -> Int32Array:
        """The integer levels L[q - zero_point], in the shape of the weight."""
        k = self.codes.astype(np.int32) - self.broadcast(self.zero_point).astype(np.int32)
        return np.asarray(self.table.integers.astype(np.int32)[k + np.int32(self.table.max_code)])

    def dequantize(self) -> Float32Array:
        """The decoded weights w_hat, rounded as by ONNX's DequantizeLinear: one float32 product of level and scale."""
        start = self.table.max_code - self.zero_point.astype(np.int64).reshape(-1, 1)
        windows = self.table.integers[start + np.arange(self.table.max_code + 1)].astype(np.float32)
        values = windows * self.scale.reshape(-1, 1)
        return from_rows(decode_rows(to_rows(self.codes, self.axis), values), self.codes.shape, self.axis)


def decoded_sum(stages: Sequence[QuantizedWeight]) -> Float32Array:
    """The sum of one or more decoded weights of the same shape, added in float32 and in order, as a graph adds them."""
    total = stages[0].dequantize()
    for stage in stages[1:]:
        total = total + stage.dequantize()
    return total


def quantize_weight(
    w: Float32Array,
    grid: Grid,
    min_scale: Float64Array | None = None,
    importance: Float32Array | None = None,
) -> QuantizedWeight:
    """Quantize a weight of any shape with at least one element; all values finite.

    min_scale: smallest allowed scales, () or (channels,), for kernels whose bias has them as steps; default: none.
    importance: factor on the squared error of each weight in the search, positive, in the shape of w (default: 1).

    >>> from requant_onnx.numerics.kinds import SQUARE_ROOT
    >>> q = quantize_weight(np.array([-1.0, 0.0, 0.45, 4.0], np.float32), Grid(4, SQUARE_ROOT, axis=None, search=False))
    >>> q.codes.tolist(), int(q.zero_point), q.dequantize().tolist()
    ([0, 5, 8, 15], 5, [-1.0, 0.0, 0.35999998450279236, 4.0])
    """
    rows = to_rows(w, grid.axis)
    if grid.step is not None:
        return _quantize_by_step(rows, w.shape, grid, grid.step, None if importance is None else to_rows(importance, grid.axis))
    grid = replace(grid, kind=grid.kind.fitted(rows, grid.bits))
    table, ranges = _levels_and_ranges(rows, grid)
    weights = None if importance is None else to_rows(importance, grid.axis)
    alpha = _search(rows, ranges, table, grid, weights) if grid.search else np.ones(len(rows))
    least = 0.0 if min_scale is None else np.ravel(min_scale)
    scale = np.maximum((alpha * ranges.step) ** grid.kind.power / table.unit, least).astype(np.float32)
    smallest = np.min(scale, where=scale > 0.0, initial=np.float32(1.0))
    scale = np.where(scale > 0.0, scale, smallest)  # a row of zeros (or of a scale that underflows) stays at its zero point
    if grid.half_scales and _fits_half(scale, SMALLEST_TINY if grid.tiny_scales else SMALLEST_HALF):
        scale = half_scale(scale)
    thresholds = table.thresholds(grid.round_in_weights)
    codes = encode_rows(rows, scale.astype(np.float64) * table.unit, ranges.zero_point, thresholds)
    shape = () if grid.axis is None else (len(rows),)
    return QuantizedWeight(
        codes=from_rows(codes, w.shape, grid.axis),
        scale=scale.reshape(shape),
        zero_point=ranges.zero_point.astype(np.uint8).reshape(shape),
        alpha=alpha.reshape(shape),
        axis=grid.axis,
        table=table,
    )


def _quantize_by_step(
    rows: Float32Array, shape: tuple[int, ...], grid: Grid, step: float, importance: Float32Array | None
) -> QuantizedWeight:
    """Quantize to codes that are cheap to store; rows whose errors count more get a smaller step.

    rows: rows of the weight.  shape: shape of the weight.  importance: in the shape of rows, 1 on average.
    """
    counts = np.ones((1, 1)) if importance is None else importance.astype(np.float64)
    least = np.abs(rows).max(1, keepdims=True).astype(np.float64) / REACH
    wanted = np.maximum(step / np.sqrt(counts.mean(1, keepdims=True)), least)
    if grid.axis is not None:  # a few distinct values for all channels, because they compress well
        wanted = step * np.exp2(np.ceil(SCALES_AN_OCTAVE * np.log2(wanted / step)) / SCALES_AN_OCTAVE)
    scale = np.maximum(wanted, SMALLEST_STEP).astype(np.float32)
    if grid.half_scales and _fits_half(scale):
        scale = half_scale(scale)
    codes = round_by_price(rows.astype(np.float64), scale.astype(np.float64), counts, RATE * step**2)
    size = () if grid.axis is None else (len(rows),)
    zeros, ones = np.full(size, ZERO, np.uint8), np.ones(size)
    return QuantizedWeight(from_rows(codes, shape, grid.axis), scale.reshape(size), zeros, ones, grid.axis, level_table(8, UNIFORM))


def _levels_and_ranges(rows: Float32Array, grid: Grid) -> tuple[LevelTable, RowRanges]:
    """The level table and the ranges of the rows; symmetric ranges in each row whose levels would exceed the limit."""
    w_min, w_max = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
    make_ranges = symmetric_ranges if grid.symmetric else row_ranges
    ranges = make_ranges(w_min, w_max, grid.bits, grid.kind)
    if grid.limit is None:
        return level_table(grid.bits, grid.kind), ranges
    table = limited_table(grid.bits, grid.kind, grid.limit)
    symmetric = symmetric_ranges(w_min, w_max, grid.bits, grid.kind)
    if table.limit is not None:
        return table, symmetric
    fits = table.reach(ranges.zero_point) <= grid.limit
    step = np.where(fits, ranges.step, symmetric.step)
    return table, RowRanges(step, np.where(fits, ranges.zero_point, symmetric.zero_point))


def _fits_half(scale: Float32Array, least: float = SMALLEST_HALF) -> bool:
    """Whether there are several scales and float16 holds them with negligible loss.  least: the smallest for which it does."""
    digits = scale.min() >= least or scale.max() >= LARGE_SCALE
    return bool(scale.size > 1 and digits and scale.max() <= LARGEST_HALF)


def half_scale(scale: Float32Array) -> Float32Array:
    """Round scales to float16, but never to zero."""
    return _to_half(np.maximum(scale, TINIEST_HALF))


def _to_half(scale: Float32Array) -> Float32Array:
    with np.errstate(over="ignore"):  # a scale that overflows is not equal to its float16 value
        return scale.astype(np.float16).astype(np.float32)


def to_rows(w: npt.NDArray[T], axis: int | None) -> npt.NDArray[T]:
    """Reshape (oc, ic, kh, kw) to (oc, ic*kh*kw) for axis 0, to (1, oc*ic*kh*kw) for axis None.  Always C-contiguous."""
    if axis is None:
        return np.ascontiguousarray(w.reshape(1, -1))
    return np.ascontiguousarray(np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1))


def from_rows(rows: npt.NDArray[T], shape: tuple[int, ...], axis: int | None) -> npt.NDArray[T]:
    """The inverse of `to_rows`."""
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))


def _search(rows: Float32Array, ranges: RowRanges, table: LevelTable, grid: Grid, importance: Float32Array | None) -> Float64Array:
    if importance is None:
        rows = np.sort(rows, axis=1)
    else:
        order = np.argsort(rows, axis=1)
        rows, importance = np.take_along_axis(rows, order, 1), np.take_along_axis(importance, order, 1)
    spaces = {"objective_in_weights": grid.objective_in_weights, "round_in_weights": grid.round_in_weights}
    return search_alpha(rows, ranges, table, importance, **spaces)
