"""Kinds of grids: how the levels of a grid are spaced, and everything that follows from it.

    v = sign(w) * |w|**a        transformed space, where the levels k are one step apart
    w = sign(v) * |v|**(1/a)    a = 1: uniform levels;  a = 1/2: the square root of REQuant (arXiv 2510.04044)

Whoever needs to know a kind asks it: no exponent is compared outside this module.  A kind that is no power is a class with the same
members, and an entry in `GridKind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.arrays import Float64Array, Int64Array

MAX_LEVEL = 1 << 24  # float32 represents every integer up to here


class LevelDecode(Enum):
    """What turns k = code - zero_point into an integer level: nothing, k * |k|, or a look-up in a table."""

    IDENTITY = "identity"
    SIGNED_SQUARE = "signed square"
    TABLE = "table"


@dataclass(frozen=True)
class PowerGrid:
    """Levels sign(k) * |k|**(1/exponent).

    >>> PowerGrid(0.5).levels(2).tolist(), PowerGrid(0.5).describe(), PowerGrid(1.0).is_uniform
    ([-9, -4, -1, 0, 1, 4, 9], 'sqrt', True)
    """

    exponent: float

    @property
    def power(self) -> float:
        """1/a: scales of weights are scales of transformed weights to this power."""
        return 1 / self.exponent

    @property
    def is_uniform(self) -> bool:
        """Whether transformed weights are the weights themselves."""
        return self.exponent == 1.0

    @property
    def decode(self) -> LevelDecode:
        """What a decode has to do, as long as no limit rounds the levels."""
        return {1.0: LevelDecode.IDENTITY, 0.5: LevelDecode.SIGNED_SQUARE}.get(self.exponent, LevelDecode.TABLE)

    def transform(self, w: npt.NDArray[np.floating]) -> Float64Array:
        """Weights, or levels, in transformed space.

        >>> PowerGrid(0.5).transform(np.array([-4.0, 9.0])).tolist()
        [-2.0, 3.0]
        """
        values: Float64Array = w.astype(np.float64)
        return values if self.is_uniform else np.asarray(np.sign(values) * np.abs(values) ** self.exponent)

    def restore(self, v: Float64Array) -> Float64Array:
        """The inverse of `transform`."""
        return np.asarray(np.sign(v) * np.abs(v) ** self.power)

    def transformed_scale(self, scale: Float64Array) -> Float64Array:
        """The step in transformed space that belongs to the scale of a weight."""
        return scale**self.exponent

    def unit(self, bits: int) -> int:
        """What integer levels are multiplied by: 1 where they are integers, else the largest with which they fit 24 bits."""
        whole = abs(self.power - round(self.power)) < 1e-9
        return 1 if whole else int(MAX_LEVEL / (2**bits - 1) ** self.power)

    def levels(self, bits: int) -> Int64Array:
        """(2K+1,) the integer levels of k = -K .. K, K = 2**bits - 1."""
        k = np.arange(1 - 2**bits, 2**bits)
        return np.rint(self.unit(bits) * np.sign(k) * np.abs(k, dtype=np.float64) ** self.power).astype(np.int64)

    def distance(self, other: PowerGrid) -> float:
        """How unlike two kinds are; 0 for the same."""
        return abs(self.exponent - other.exponent)

    def describe(self) -> str:
        """As --transform has it."""
        return {0.5: "sqrt", 1.0: "none"}.get(self.exponent, f"power:{self.exponent:g}")

    def formula(self, symbol: str) -> str:
        """The transform without its sign, for the axis of a chart.

        >>> PowerGrid(0.75).formula("w")
        '|w|^0.75'
        """
        return f"|{symbol}|^{self.exponent:.3g}"


GridKind: TypeAlias = PowerGrid
UNIFORM, SQUARE_ROOT = PowerGrid(1.0), PowerGrid(0.5)
