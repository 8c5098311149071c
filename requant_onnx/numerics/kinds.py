"""Kinds of grids: how the levels of a grid are spaced, and everything that follows from it.

    v = sign(w) * |w|**a        transformed space, where the levels k are one step apart
    w = sign(v) * |v|**(1/a)    a = 1: uniform levels;  a = 1/2: the square root of REQuant (arXiv 2510.04044)

Other modules use the members of a kind: no exponent is compared outside this module.  To add a kind that is not a power, write a
class with the same members and add it to `GridKind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from requant_onnx.choices import LEVELS
from requant_onnx.numerics.arrays import Float64Array, Int64Array

MAX_LEVEL = 1 << 24  # float32 represents every integer up to here


class LevelDecode(Enum):
    """The operation that turns k = code - zero_point into an integer level: none, k * |k|, or a table lookup."""

    IDENTITY = "identity"
    SIGNED_SQUARE = "signed square"
    TABLE = "table"


@dataclass(frozen=True)
class PowerGrid:
    """The levels sign(k) * |k|**(1/exponent).

    >>> PowerGrid(0.5).levels(2).tolist(), PowerGrid(0.5).describe(), PowerGrid(1.0).is_uniform
    ([-9, -4, -1, 0, 1, 4, 9], 'sqrt', True)
    """

    exponent: float

    @property
    def power(self) -> float:
        """1/a; a scale of weights is a scale of transformed weights to this power."""
        return 1 / self.exponent

    @property
    def is_uniform(self) -> bool:
        """Whether transformed weights are the weights themselves."""
        return self.exponent == 1.0

    @property
    def decode(self) -> LevelDecode:
        """The operation of a decode, unless a limit rounds the levels."""
        return {1.0: LevelDecode.IDENTITY, 0.5: LevelDecode.SIGNED_SQUARE}.get(self.exponent, LevelDecode.TABLE)

    def transform(self, w: npt.NDArray[np.floating]) -> Float64Array:
        """Transform weights or levels.

        >>> PowerGrid(0.5).transform(np.array([-4.0, 9.0])).tolist()
        [-2.0, 3.0]
        """
        values: Float64Array = w.astype(np.float64)
        return values if self.is_uniform else np.asarray(np.sign(values) * np.abs(values) ** self.exponent)

    def restore(self, v: Float64Array) -> Float64Array:
        """The inverse of `transform`."""
        return np.asarray(np.sign(v) * np.abs(v) ** self.power)

    def transformed_scale(self, scale: Float64Array) -> Float64Array:
        """The step in transformed space for a scale of weights."""
        return scale**self.exponent

    def unit(self, bits: float) -> int:
        """The factor of integer levels: 1 if the levels are integers, else the largest that keeps them within 24 bits."""
        whole = abs(self.power - round(self.power)) < 1e-9
        return 1 if whole else int(MAX_LEVEL / (LEVELS[bits] - 1) ** self.power)

    def fitted(self, rows: npt.NDArray[np.floating], bits: float) -> PowerGrid:  # noqa: ARG002
        """The kind fitted to these weights, if its levels are learned; else itself.  rows: (rows, n)."""
        return self

    def transformed_levels(self, bits: float) -> Float64Array:
        """The levels in transformed space in units of the step, -K .. K, (2K+1,)."""
        return np.arange(1 - LEVELS[bits], LEVELS[bits], dtype=np.float64)

    def levels(self, bits: float) -> Int64Array:
        """The integer levels of k = -K .. K, (2K+1,), K = LEVELS[bits] - 1."""
        k = np.arange(1 - LEVELS[bits], LEVELS[bits])
        return np.rint(self.unit(bits) * np.sign(k) * np.abs(k, dtype=np.float64) ** self.power).astype(np.int64)

    def distance(self, other: PowerGrid) -> float:
        """The difference between two kinds; 0 if they are equal."""
        return abs(self.exponent - other.exponent)

    def describe(self) -> str:
        """The name of the kind, as --transform accepts it."""
        return {0.5: "sqrt", 1.0: "none"}.get(self.exponent, f"power:{self.exponent:g}")

    def formula(self, symbol: str) -> str:
        """The transform without its sign, for the axis of a chart.

        >>> PowerGrid(0.75).formula("w")
        '|w|^0.75'
        """
        return f"|{symbol}|^{self.exponent:.3g}"


GridKind: TypeAlias = PowerGrid
UNIFORM, SQUARE_ROOT = PowerGrid(1.0), PowerGrid(0.5)
