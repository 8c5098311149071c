"""Ranges of activations: a histogram that grows as values stream in, and the 8-bit grid chosen from it.

    x_hat = scale * (q - zero_point),   q = clip(rint(x / scale) + zero_point, 0, 255)

over [alpha * min, alpha * max], as for weights.  Zero is exact at every alpha, so zeros are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from requant_onnx.choices import ActivationRange
from requant_onnx.numerics.arrays import Float32Array, Int64Array
from requant_onnx.numerics.kinds import UNIFORM
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.parallel import slices
from requant_onnx.numerics.ranges import RowRanges, row_ranges, symmetric_ranges
from requant_onnx.numerics.search import search_alpha

HALF = 1 << 13  # bins on either side of zero
CHUNK = 1 << 18  # values counted at once
BITS = 8
PERCENTILE = 99.99  # percentile of all values, zeros included


@dataclass(frozen=True)
class ActivationGrid:
    """A grid with the codes 0 .. 255, or -128 .. 127.

    scale: step between levels, float32, positive.  zero_point: code of zero, uint8, or int8 for signed codes.
    """

    scale: np.float32
    zero_point: np.uint8 | np.int8

    @property
    def low(self) -> float:
        """The smallest value."""
        return float(self.scale) * (int(np.iinfo(self.zero_point.dtype).min) - int(self.zero_point))

    @property
    def high(self) -> float:
        """The largest value."""
        return float(self.scale) * (int(np.iinfo(self.zero_point.dtype).max) - int(self.zero_point))

    def rounded(self, x: Float32Array) -> Float32Array:
        """Values on the grid, of any shape."""
        bounds, zero_point = np.iinfo(self.zero_point.dtype), np.float32(self.zero_point)
        codes = np.clip(np.rint(x / self.scale) + zero_point, bounds.min, bounds.max)
        return np.asarray((codes - zero_point) * self.scale, np.float32)


@dataclass
class Histogram:
    """Counts of values in bins of equal width; when a value lies outside all bins, pairs of bins are joined until it does not.

    counts: numbers of values in the bins [k * width, (k + 1) * width), k = -HALF .. HALF - 1, (2 * HALF,); zeros are not counted.
    width: width of a bin, 0 before the first value.  low, high: extremes, zero included.  seen: number of values, zeros included.
    """

    counts: Int64Array = field(default_factory=lambda: np.zeros(2 * HALF, np.int64))
    width: float = 0.0
    low: float = 0.0
    high: float = 0.0
    seen: int = 0

    def add(self, x: Float32Array) -> None:
        """Count all values of an array of any shape; they must be finite.

        >>> h = Histogram()
        >>> h.add(np.array([0.0, 1.0, -3.0], np.float32))
        >>> h.low, h.high, int(h.counts.sum()), h.seen
        (-3.0, 1.0, 2, 3)
        """
        x = np.ravel(x)
        if x.size == 0:
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.seen += x.size
        largest = max(-self.low, self.high)
        if largest == 0.0:
            return
        if self.width == 0.0:
            self.width = 2.0 ** np.ceil(np.log2(largest / HALF))
        while largest >= self.width * HALF:
            self.counts = _joined(self.counts)
            self.width *= 2
        for part in slices(x.size, CHUNK):
            self.counts += _counted(x[part], 1.0 / self.width)

    def centers(self) -> tuple[Float32Array, Float32Array]:
        """The middles and counts of all bins that are not empty, ascending."""
        (filled,) = np.nonzero(self.counts)
        middles = np.clip((filled - HALF + 0.5) * self.width, self.low, self.high)
        return middles.astype(np.float32), self.counts[filled].astype(np.float32)


def activation_grid(
    histogram: Histogram,
    method: ActivationRange,
    headroom: float = 1.0,
    ceiling: float = np.inf,
    alpha: float | None = None,
    *,
    symmetric: bool = False,
    signed: bool = False,
) -> ActivationGrid:
    """Choose the grid for the counted values; its scale is 1 when all are zero.

    headroom: factor on the range, if values larger than the counted ones are expected.  ceiling: upper bound of the range.
    alpha: factor on the range of all values; None to derive it by `method`.
    symmetric: whether the zero point is in the middle.  signed: whether codes are -128 .. 127.
    """
    low, high = histogram.low, histogram.high
    if method is ActivationRange.PERCENTILE:
        low, high = _percentile(histogram)
    make_ranges = symmetric_ranges if symmetric else row_ranges
    ranges = make_ranges(np.array([low]), np.array([high]), BITS, UNIFORM)
    if alpha is None:
        alpha = least_squares_alpha(histogram, ranges) if method.minimizes_error else 1.0
    scale = np.float32(headroom * alpha * ranges.step[0])
    codes_above = 255 - int(ranges.zero_point[0])
    if float(scale) * codes_above > ceiling:
        scale = np.nextafter(np.float32(ceiling / codes_above), np.float32(0))
    code = int(ranges.zero_point[0])
    zero_point = np.int8(code - 128) if signed else np.uint8(code)
    return ActivationGrid(scale if scale > 0.0 else np.float32(1.0), zero_point)


def least_squares_alpha(histogram: Histogram, ranges: RowRanges) -> float:
    """The factor on a range, in (0, 1], at which the counted values have the least squared error."""
    middles, counts = histogram.centers()
    return float(search_alpha(middles[None], ranges, level_table(BITS, UNIFORM), counts[None])[0])


def _percentile(histogram: Histogram) -> tuple[float, float]:
    """The bounds that leave (100 - PERCENTILE) percent of the values outside, on either side."""
    middles, counts = histogram.centers()
    if not middles.size:
        return 0.0, 0.0
    outside = histogram.seen * (1 - PERCENTILE / 100)
    below, above = np.cumsum(counts, dtype=np.float64), np.cumsum(counts[::-1], dtype=np.float64)[::-1]
    low, high = middles[np.argmax(below > outside)], middles[len(middles) - 1 - np.argmax(above[::-1] > outside)]
    return min(0.0, float(low)), max(0.0, float(high))


def _joined(counts: Int64Array) -> Int64Array:
    """Join pairs of bins: bin k becomes part of bin k // 2, so that zero stays an edge."""
    joined = np.zeros_like(counts)
    joined[HALF // 2 : HALF // 2 + HALF] = counts.reshape(-1, 2).sum(1)
    return joined


def _counted(x: Float32Array, inverse_width: float) -> Int64Array:
    """The number of values in each bin, (2 * HALF,), without zeros.  x: (n,)."""
    bins = np.clip(np.floor(x * np.float64(inverse_width)), -HALF, HALF - 1).astype(np.int64) + HALF
    counts = np.bincount(bins, minlength=2 * HALF)
    counts[HALF] -= x.size - np.count_nonzero(x)
    return counts
