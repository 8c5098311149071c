"""The multiple-choice knapsack problem: one choice per item, with the least total error for every total size.

It is solved for all sizes at once, by merging one item after another into the Pareto front of sums (Nemhauser and Ullmann 1969;
multiple choice: Dyer, Kayal and Walker 1984).  The result is exact up to MAX_POINTS sums; beyond that, one sum represents others
of nearly the same size, but a result is still an actual sum, never above its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import Float64Array, Int64Array

MAX_POINTS = 20_000


@dataclass(frozen=True)
class Front:
    """The Pareto front of total sizes and total errors; `choices_at` returns the choices of a point.

    sizes: total sizes, (points,), ascending.  errors: total errors, (points,), descending.
    """

    sizes: Int64Array
    errors: Float64Array
    _steps: tuple[tuple[Int64Array, Int64Array], ...]

    def choices_at(self, point: int) -> list[int]:
        """The choice of each item at one point."""
        chosen = []
        for parents, choices in reversed(self._steps):
            chosen.append(int(choices[point]))
            point = int(parents[point])
        return chosen[::-1]

    def best_within(self, size: int) -> int | None:
        """The point of least error no larger than `size`; None if all are larger."""
        count = int(np.searchsorted(self.sizes, size, side="right"))
        return count - 1 if count else None

    def smallest_within(self, error: float) -> int | None:
        """The smallest point with an error of at most `error`; None if all have more."""
        count = int(np.count_nonzero(self.errors <= error))
        return len(self.errors) - count if count else None


def pareto_front(sizes: Sequence[Int64Array], errors: Sequence[Float64Array], max_points: int = MAX_POINTS) -> Front:
    """Compute the front of all ways to make one choice per item.

    sizes, errors: size and error of each choice, (choices,) per item.

    >>> front = pareto_front([np.array([1, 3])] * 2, [np.array([9.0, 1.0]), np.array([5.0, 2.0])])
    >>> front.sizes.tolist(), front.errors.tolist(), front.choices_at(1)
    ([2, 4, 6], [14.0, 6.0, 3.0], [1, 0])
    """
    total, error = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for choice_sizes, choice_errors in zip(sizes, errors, strict=True):
        all_sizes = np.add.outer(total, choice_sizes).ravel()
        all_errors = np.add.outer(error, choice_errors).ravel()
        kept = _thinned(_undominated(all_sizes, all_errors), all_sizes, max_points)
        total, error = all_sizes[kept], all_errors[kept]
        steps.append((kept // len(choice_sizes), kept % len(choice_sizes)))
    return Front(total, error, tuple(steps))


def _undominated(sizes: Int64Array, errors: Float64Array) -> Int64Array:
    """The indices, by ascending size, of the sums with less error than all smaller sums."""
    order = np.lexsort((errors, sizes))
    before = np.minimum.accumulate(errors[order])
    return order[np.concatenate(([True], before[1:] < before[:-1]))]


def _thinned(kept: Int64Array, sizes: Int64Array, max_points: int) -> Int64Array:
    """Keep the last sum in each of max_points ranges of sizes, which has the least error in it, and the smallest sum of all."""
    if len(kept) <= max_points:
        return kept
    kept_sizes = sizes[kept]
    cells = (kept_sizes - kept_sizes[0]) * (max_points - 1) // (kept_sizes[-1] - kept_sizes[0])
    last = np.concatenate((cells[1:] != cells[:-1], [True]))
    last[0] = True
    return kept[last]
