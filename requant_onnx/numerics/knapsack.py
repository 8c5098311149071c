"""Multiple-choice knapsack: one choice for each item, the least total error for every total size.

Solved for all sizes at once, by merging one item after another into the front of sums of which no other is both smaller and
better (Nemhauser and Ullmann 1969; multiple choice: Dyer, Kayal and Walker 1984).  Exact up to MAX_POINTS sums; beyond, sums of
nearly one size stand for each other, and a result is still a real sum, never above its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import Float64Array, Int64Array

MAX_POINTS = 20_000


@dataclass(frozen=True)
class Front:
    """Every total worth having.  sizes: (points,) ascending; errors: (points,) descending; choices by `choices_at`."""

    sizes: Int64Array
    errors: Float64Array
    _steps: tuple[tuple[Int64Array, Int64Array], ...]

    def choices_at(self, point: int) -> list[int]:
        """The choice of each item at one point."""
        found = []
        for parents, choices in reversed(self._steps):
            found.append(int(choices[point]))
            point = int(parents[point])
        return found[::-1]

    def best_within(self, size: int) -> int | None:
        """The point of least error no larger than `size`; None if all are larger."""
        count = int(np.searchsorted(self.sizes, size, side="right"))
        return count - 1 if count else None

    def smallest_within(self, error: float) -> int | None:
        """The smallest point with an error of at most `error`; None if all have more."""
        count = int(np.count_nonzero(self.errors <= error))
        return len(self.errors) - count if count else None


def pareto_front(sizes: Sequence[Int64Array], errors: Sequence[Float64Array], max_points: int = MAX_POINTS) -> Front:
    """The front of all ways to take one choice for each item.  sizes, errors: (choices,) of each item.

    >>> front = pareto_front([np.array([1, 3])] * 2, [np.array([9.0, 1.0]), np.array([5.0, 2.0])])
    >>> front.sizes.tolist(), front.errors.tolist(), front.choices_at(1)
    ([2, 4, 6], [14.0, 6.0, 3.0], [1, 0])
    """
    total, error = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for own_sizes, own_errors in zip(sizes, errors, strict=True):
        all_sizes = np.add.outer(total, own_sizes).ravel()
        all_errors = np.add.outer(error, own_errors).ravel()
        kept = _thinned(_undominated(all_sizes, all_errors), all_sizes, max_points)
        total, error = all_sizes[kept], all_errors[kept]
        steps.append((kept // len(own_sizes), kept % len(own_sizes)))
    return Front(total, error, tuple(steps))


def _undominated(sizes: Int64Array, errors: Float64Array) -> Int64Array:
    """Indices by ascending size, of those with less error than all before."""
    order = np.lexsort((errors, sizes))
    before = np.minimum.accumulate(errors[order])
    return order[np.concatenate(([True], before[1:] < before[:-1]))]


def _thinned(kept: Int64Array, sizes: Int64Array, max_points: int) -> Int64Array:
    """Of each of max_points ranges of sizes the last, which has the least error, and the smallest of all."""
    if len(kept) <= max_points:
        return kept
    own = sizes[kept]
    cells = (own - own[0]) * (max_points - 1) // (own[-1] - own[0])
    last = np.concatenate((cells[1:] != cells[:-1], [True]))
    last[0] = True
    return kept[last]
