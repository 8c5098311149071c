"""The exact error of a quantizer as a function of alpha, from sorted weights and prefix sums.

With the weights of a row sorted and the prefix sums P of `u` (the weight, or the transformed weight), a quantizer with the
thresholds t_j and the levels m_0 .. m_K has the squared error

    sum (u - m_q)**2  =  sum u**2  -  2 A  +  B,
    A = m_K P(n) + sum_j (m_j - m_j+1) P(t_j),     B = m_K**2 n + sum_j (m_j**2 - m_j+1**2) N(t_j),

where P(t) sums and N(t) counts the elements below t: one binary search for each of the K thresholds, regardless of the number
of weights.  An element of importance h counts h times in every sum (a histogram's bin, or a diagonal Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.parallel import slices
from requant_onnx.numerics.ranges import RowRanges

LONG = 1 << 18  # number of weights in a row from which memory matters more than time


@dataclass(frozen=True)
class Curves:
    """The error curves of rows of weights.

    w: sorted weights, (rows, n), float64, or float32 for long rows.  u: values whose error is measured, (rows, n).
    h: importance of each element, (rows, n), or None if all are 1.
    sums, squares: running sums of h * u and h * u**2, (rows, n+1); squares are None for long rows.
    total: sums of h * u**2, (rows, 1).
    counts: running sums of h, (rows, n+1), or None if h is None.
    thresholds, levels: whole tables, (2K,) and (2K+1,), in units of their scale.
    start: first level of each row, (rows,).  steps: steps at alpha = 1, (rows,).  power: 1/a.  in_weights: whether u is w.
    is_nearest: whether a weight is rounded to the level of least error.
    """

    w: AnyArray
    u: AnyArray
    h: Float64Array | None
    sums: Float64Array
    squares: Float64Array | None
    total: Float64Array
    counts: Float64Array | None
    thresholds: Float64Array
    levels: Float64Array
    start: Int64Array
    steps: Float64Array
    power: float
    in_weights: bool
    is_nearest: bool

    @property
    def max_code(self) -> int:
        """K, the number of levels minus 1."""
        return self.thresholds.size // 2

    @property
    def totals(self) -> tuple[Float64Array, Float64Array]:
        """The sums of h * u**2 and of h of each row, each (rows, 1)."""
        return self.total, _take(self.counts, self.w.shape[1])

    def rows(self, chosen: Int64Array) -> Curves:
        """The curves of some of the rows.  chosen: indices, (m,)."""
        names = ("w", "u", "h", "sums", "squares", "total", "counts", "start", "steps")
        arrays: dict[str, Any] = {name: None if getattr(self, name) is None else getattr(self, name)[chosen] for name in names}
        return replace(self, **arrays)

    def errors(self, alphas: Float64Array) -> Float64Array:
        """The squared error minus sum h * u**2 at each alpha, (rows, points).  alphas: (rows, points), positive."""
        a, b = self._a_and_b(alphas)
        return self._error(self.level_scale(alphas), a, b)

    def errors_and_vertices(self, alphas: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The result of `errors`, and the alpha of least error, at most 1, if no weight changed its level; both (rows, points)."""
        a, b = self._a_and_b(alphas)
        scales = self.level_scale(alphas)
        best = np.divide(a, b, out=scales.copy(), where=(a > 0.0) & (b > 0.0))
        vertices = (best ** (1 / self.power) if self.in_weights else best) / self.steps[:, None]
        return self._error(scales, a, b), np.minimum(vertices, 1.0)

    def clipping(self, alphas: Float64Array) -> Float64Array:
        """The part of `errors` caused by elements outside the range, (rows, points); it only grows as alpha falls."""
        scales = self.level_scale(alphas)
        edges = scales * self.levels[self.start, None], scales * self.levels[self.start + self.max_code, None]
        low, high = (_positions(self.u, edge) for edge in edges)
        clipped = -self.total
        for edge, at, last in ((edges[0], 0, low), (edges[1], high, self.w.shape[1])):
            sums, counts = (_take(array, last) - _take(array, at) for array in (self.sums, self.counts))
            clipped = clipped + self._squares_between(at, last) - 2 * edge * sums + edge**2 * counts
        return clipped

    def _squares_between(self, first: Int64Array | int, last: Int64Array | int) -> Float64Array:
        """The sums of h * u**2 of the elements first .. last of each row, (rows, points)."""
        if self.squares is not None:
            return np.asarray(_take(self.squares, last) - _take(self.squares, first))
        starts, ends = np.broadcast_arrays(first, last)
        found = np.empty(starts.shape)
        for r, k in np.ndindex(found.shape):
            piece = slice(int(starts[r, k]), int(ends[r, k]))
            found[r, k] = _energy(self.u[r, piece], None if self.h is None else self.h[r, piece])
        return found

    def level_scale(self, alphas: Float64Array) -> Float64Array:
        """The scale of the levels, in the space of u."""
        scales = alphas * self.steps[:, None]
        return np.asarray(scales**self.power) if self.in_weights else scales

    def _a_and_b(self, alphas: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The A and B of the module docstring, in units of the scale, each (rows, points)."""
        scales = (alphas * self.steps[:, None]) ** self.power
        return self._by_weights(scales) if self.w.shape[1] < self.max_code else self._by_thresholds(scales)

    def _by_thresholds(self, scales: Float64Array) -> tuple[Float64Array, Float64Array]:
        """A and B from the position of each threshold among the weights."""
        windows = self.start[:, None] + np.arange(self.max_code)
        thresholds = self.thresholds[windows][:, :, None] * scales[:, None, :]
        below = _positions(self.w, thresholds.reshape(len(scales), -1))
        low, high = self.levels[windows], self.levels[windows + 1]
        parts = []
        for array, lows, highs in ((self.sums, low, high), (self.counts, low * low, high * high)):
            at = _take(array, below).reshape(thresholds.shape)
            parts.append(((lows - highs)[:, None] @ at)[:, 0] + highs[:, -1:] * _take(array, self.w.shape[1]))
        return parts[0], parts[1]

    def _by_weights(self, scales: Float64Array) -> tuple[Float64Array, Float64Array]:
        """A and B from the position of each weight among the thresholds: faster for few weights in a row."""
        scaled = self.w[:, None, :] / np.where(scales > 0.0, scales, np.inf)[:, :, None]
        positions = self.thresholds.searchsorted(scaled.ravel(), side="right").reshape(scaled.shape)
        start = self.start[:, None, None]
        levels = self.levels.take(np.clip(positions, start, start + self.max_code))
        u, h = (self.u, 1.0) if self.h is None else (self.h * self.u, self.h[:, None, :])
        return (levels @ u[:, :, None])[:, :, 0], (levels * levels * h).sum(2)

    @staticmethod
    def _error(scales: Float64Array, a: Float64Array, b: Float64Array) -> Float64Array:
        return np.asarray(scales * (scales * b - 2.0 * a))


def curves_of(
    rows: Float32Array,
    ranges: RowRanges,
    table: LevelTable,
    importance: Float32Array | None = None,
    *,
    objective_in_weights: bool,
    round_in_weights: bool,
) -> Curves:
    """Collect the sums of the curves.

    rows: weights, (rows, n) float32, each row sorted ascending.  importance: the same shape, in the same order.
    """
    w: AnyArray = rows if rows.shape[1] > LONG else rows.astype(np.float64)
    u = w if objective_in_weights else table.kind.transform(rows)
    h = None if importance is None else importance.astype(np.float64)
    weighted = u if h is None else h * u
    squares = _running(weighted * u.astype(np.float64)) if rows.shape[1] <= LONG else None
    of_row = [_energy(row, None if h is None else h[r]) for r, row in enumerate(u)] if squares is None else squares[:, -1]
    return Curves(
        w=w,
        u=u,
        h=h,
        sums=_running(weighted),
        squares=squares,
        total=np.asarray(of_row, np.float64)[:, None],
        counts=None if h is None else _running(h),
        thresholds=table.thresholds(round_in_weights),
        levels=table.weight_levels if objective_in_weights else table.transformed_levels,
        start=table.max_code - ranges.zero_point,
        steps=ranges.step,
        power=table.kind.power,
        in_weights=objective_in_weights,
        is_nearest=table.kind.is_uniform or objective_in_weights == round_in_weights,
    )


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
    errors = curves.errors(np.broadcast_to(alphas, (len(rows), alphas.size)))
    squares, counts = curves.totals
    return np.asarray((squares + errors) / counts)


def _running(values: AnyArray) -> Float64Array:
    """Running sums from 0, (rows, n+1)."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    for piece in slices(values.shape[1], LONG):  # NumPy converts what it sums to float64
        np.cumsum(values[:, piece], axis=1, dtype=np.float64, out=sums[:, piece.start + 1 : piece.stop + 1])
        sums[:, piece.start + 1 : piece.stop + 1] += sums[:, piece.start, None]
    return sums


def _energy(values: AnyArray, times: AnyArray | None) -> float:
    """The weighted sum of squares of a row, in pieces that need little memory."""
    total = 0.0
    for piece in slices(values.size, LONG):
        part = values[piece].astype(np.float64)
        total += float(part @ part if times is None else (part * times[piece]) @ part)
    return total


def _positions(rows: AnyArray, bounds: Float64Array) -> Int64Array:
    """The number of elements of each sorted row below each of its bounds, (rows, bounds)."""
    if rows.dtype == np.float32:  # an element is below a bound if it is below the smallest float32 that is not below the bound
        with np.errstate(over="ignore"):
            rounded = bounds.astype(np.float32)
        bounds = np.where(rounded < bounds, np.nextafter(rounded, np.float32(np.inf)), rounded)
    positions = np.empty(bounds.shape, np.int64)
    for row, wanted, found in zip(rows, bounds, positions, strict=True):
        found[:] = row.searchsorted(wanted)
    return positions


def _take(sums: Float64Array | None, positions: Int64Array | int) -> AnyArray:
    """The running sums of each row at positions, (rows, positions); None: the running sums of ones."""
    if sums is None or isinstance(positions, int):
        return np.asarray(positions if sums is None else sums[:, positions, None])
    return np.asarray(sums.take(positions + np.arange(len(sums))[:, None] * sums.shape[1]))
