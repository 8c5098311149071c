"""The integer levels of codes (REQuant, arXiv 2510.04044, with the inverse transform written as a table).

    v_hat = scale_v * k,   w_hat = restore(v_hat) = scale * L[k],   k = q - zero_point      (kinds.py)

`k` runs over -K .. K with K + 1 levels, so that one table serves every zero point 0 .. K.  If |L| must not exceed a limit (for an
int8 kernel), but L[h] does even at the symmetric zero point h, the table is rounded: rint(L[k] * limit / L[h]).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from requant_onnx.choices import LEVELS
from requant_onnx.numerics.arrays import Float64Array, Int64Array
from requant_onnx.numerics.kinds import GridKind, LevelDecode
from requant_onnx.numerics.ranges import symmetric_zero_point


@dataclass(frozen=True)
class LevelTable:
    """All levels of one grid, compared and hashed by (bits, kind, limit): tables come from `level_table` and `limited_table`.

    integers: integer levels, (2K+1,) int64, odd-symmetric, strictly increasing (unless rounded to a limit), index k + K.
    unit: divisor of the integer levels: level k is `integers[k + K] / unit` times the transformed step ** (1/a).
    limit: largest level, to which the table was rounded; None for an exact table.
    """

    bits: float
    kind: GridKind
    unit: float
    integers: Int64Array
    limit: int | None = None

    @property
    def max_code(self) -> int:
        """K, the number of levels minus 1."""
        return LEVELS[self.bits] - 1

    @property
    def decode(self) -> LevelDecode:
        """The operation that turns k into a level."""
        return self.kind.decode if self.limit is None else LevelDecode.TABLE

    @property
    def weight_levels(self) -> Float64Array:
        """The levels in weight space, in units of step ** (1/a), (2K+1,)."""
        return self.integers / self.unit

    @property
    def transformed_levels(self) -> Float64Array:
        """The levels in transformed space, in units of the step, (2K+1,): -K .. K."""
        return self.kind.transformed_levels(self.bits)

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point with equally many levels on both sides, except one extra level below it if their number is even."""
        return symmetric_zero_point(self.bits)

    def reach(self, zero_point: Int64Array) -> Int64Array:
        """The largest |level| at each zero point."""
        return np.asarray(self.integers[self.max_code + np.maximum(zero_point, self.max_code - zero_point)])

    @property
    def _key(self) -> tuple[float, GridKind, int | None]:
        return self.bits, self.kind, self.limit

    def thresholds(self, in_weight_space: bool) -> Float64Array:
        """The decision thresholds between adjacent levels, in units of step ** (1/a), (2K,).

        A threshold is the midpoint of two levels in weight space, or else the image of their midpoint in transformed space (of
        k + 1/2 for powers, as with rint).
        """
        if in_weight_space:
            return np.asarray((self.weight_levels[1:] + self.weight_levels[:-1]) / 2)
        return self.kind.restore((self.transformed_levels[1:] + self.transformed_levels[:-1]) / 2)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LevelTable) and self._key == other._key


@lru_cache(maxsize=64)
def level_table(bits: float, kind: GridKind) -> LevelTable:
    """The exact table of one grid.

    >>> from requant_onnx.numerics.kinds import PowerGrid
    >>> level_table(2, PowerGrid(0.5)).integers.tolist(), level_table(4, PowerGrid(0.75)).unit
    ([-9, -4, -1, 0, 1, 4, 9], 453521)
    """
    integers = kind.levels(bits)
    integers.setflags(write=False)
    return LevelTable(bits, kind, kind.unit(bits), integers)


@lru_cache(maxsize=64)
def limited_table(bits: float, kind: GridKind, limit: int) -> LevelTable:
    """The table of a grid with levels of at most `limit` at the symmetric zero point: the exact one if it fits, else a rounded one.

    >>> from requant_onnx.numerics.kinds import SQUARE_ROOT
    >>> limited_table(4, SQUARE_ROOT, 64).limit, limited_table(5, SQUARE_ROOT, 64).integers[31 - 16 : 31 - 12].tolist()
    (None, [-64, -56, -49, -42])
    """
    exact = level_table(bits, kind)
    largest = int(exact.integers[exact.max_code + exact.symmetric_zero_point])
    if largest <= limit:
        return exact
    integers = np.clip(np.rint(exact.integers * (limit / largest)), -limit, limit).astype(np.int64)
    integers.setflags(write=False)
    return LevelTable(bits, kind, exact.unit * limit / largest, integers, limit)
