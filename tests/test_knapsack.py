"""The knapsack compared with brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant_onnx.numerics.knapsack import pareto_front

CHOICE = st.tuples(st.integers(0, 30), st.integers(0, 30))
ITEMS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def arrays(items: list[list[tuple[int, int]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [np.array([s for s, _ in item]) for item in items], [np.array([float(e) for _, e in item]) for item in items]


@given(ITEMS, st.integers(0, 150), st.integers(0, 150))
def test_it_is_optimal_for_every_size_and_error(items: list[list[tuple[int, int]]], size: int, error: int) -> None:
    front = pareto_front(*arrays(items))
    sums = [(sum(s for s, _ in way), sum(e for _, e in way)) for way in itertools.product(*items)]
    point = front.best_within(size)
    best = min((e for s, e in sums if s <= size), default=None)
    assert (None if point is None else front.errors[point]) == best
    point = front.smallest_within(error)
    smallest = min((s for s, e in sums if e <= error), default=None)
    assert (None if point is None else front.sizes[point]) == smallest


@given(ITEMS)
def test_the_choices_are_the_point(items: list[list[tuple[int, int]]]) -> None:
    front = pareto_front(*arrays(items))
    assert (np.diff(front.sizes) > 0).all()
    assert (np.diff(front.errors) < 0).all()
    for point in range(len(front.sizes)):
        taken = [item[choice] for item, choice in zip(items, front.choices_at(point), strict=True)]
        assert (sum(s for s, _ in taken), sum(e for _, e in taken)) == (front.sizes[point], front.errors[point])


@pytest.mark.parametrize("points", [10, 200])
def test_a_thinned_front_is_near_the_exact_one(points: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [np.sort(rng.integers(100, 10_000, 7)) for _ in range(6)]
    errors = [np.sort(rng.random(7))[::-1] for _ in range(6)]
    exact, thinned = pareto_front(sizes, errors), pareto_front(sizes, errors, points)
    assert len(thinned.sizes) <= points + 1
    assert thinned.sizes[0] == exact.sizes[0]
    assert thinned.errors[-1] == exact.errors[-1]
    for size in np.linspace(exact.sizes[0], exact.sizes[-1], 20):
        full, ours = exact.best_within(int(size)), thinned.best_within(int(size))
        assert full is not None
        assert ours is not None
        assert thinned.sizes[ours] <= size
        assert exact.errors[full] <= thinned.errors[ours] <= exact.errors[full] + 0.75 * 20 / points
