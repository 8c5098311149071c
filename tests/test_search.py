"""The error curve is exact; the search finds its minimum; the curve is convex around it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from conftest import OWN_MODEL, laplace
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from requant_onnx.files.load import load_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.weights import find_weights
from requant_onnx.numerics.curve import error_curve
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import Grid, quantize_weight, to_rows
from requant_onnx.numerics.ranges import RowRanges, row_ranges
from requant_onnx.numerics.search import search_alpha

CURVE_TOLERANCE = 1e-9  # sum u**2 - 2A + B cancels: float64's 1e-16 times the ratio of signal to error, below 1e6 here
SEARCH_TOLERANCE = 1e-6  # of the error, relative to the best point of the scan, as the search guarantees
RAGGEDNESS = 1e-3  # every weight that changes its level adds a kink to the curve; the search stops at one (5e-4 measured)
ALPHAS = np.arange(1, 257) / 256  # the points of the scan for short rows, as here
EXPONENTS = (1.0, 0.5, 2 / 3)
SPACES = ((True, True), (True, False), (False, True), (False, False))
rows_strategy = hnp.arrays(np.float32, (2, 40), elements=st.floats(-4, 4, width=32))


def sorted_rows(w: np.ndarray, bits: int, exponent: float) -> tuple[np.ndarray, RowRanges]:
    rows = np.sort(w, axis=1)
    return rows, row_ranges(rows[:, 0].astype(np.float64), rows[:, -1].astype(np.float64), bits, PowerGrid(exponent))


def brute_force(w: np.ndarray, bits: int, exponent: float, alpha: float, in_weights: bool, round_in_weights: bool) -> np.ndarray:
    """The error by definition (arXiv 2510.04044): quantize every weight of every row, and average the squared error."""
    v = PowerGrid(exponent).transform(w)
    v_min, v_max = np.minimum(v.min(1), 0.0)[:, None], np.maximum(v.max(1), 0.0)[:, None]
    scale = alpha * (v_max - v_min) / (2**bits - 1)
    zero_point = np.rint(-alpha * v_min / scale)
    v_levels = scale * (np.arange(2**bits) - zero_point)  # (rows, 2**bits)
    w_levels = np.sign(v_levels) * np.abs(v_levels) ** (1 / exponent)
    points, levels = (w.astype(np.float64), w_levels) if round_in_weights else (v, v_levels)
    nearest = np.abs(points[:, :, None] - levels[:, None, :]).argmin(2)
    truth, choice = (w.astype(np.float64), w_levels) if in_weights else (v, v_levels)
    return np.asarray(((np.take_along_axis(choice, nearest, 1) - truth) ** 2).mean(1))


@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_curve_equals_quantizing_every_weight(bits: int, exponent: float, spaces: tuple[bool, bool]) -> None:
    rows, ranges = sorted_rows(laplace(3, 500), bits, exponent)
    alphas = np.array([1.0, 0.81, 0.5, 0.07])
    curve = error_curve(
        rows, ranges, level_table(bits, PowerGrid(exponent)), alphas, objective_in_weights=spaces[0], round_in_weights=spaces[1]
    )
    expected = np.stack([brute_force(rows, bits, exponent, alpha, *spaces) for alpha in alphas], axis=1)
    np.testing.assert_allclose(curve, expected, rtol=CURVE_TOLERANCE)


@settings(deadline=None)
@given(w=rows_strategy, bits=st.integers(2, 8), exponent=st.sampled_from(EXPONENTS), spaces=st.sampled_from(SPACES))
def test_search_is_never_worse_than_the_scan(w: np.ndarray, bits: int, exponent: float, spaces: tuple[bool, bool]) -> None:
    rows, ranges = sorted_rows(w, bits, exponent)
    table = level_table(bits, PowerGrid(exponent))
    search = partial(search_alpha, objective_in_weights=spaces[0], round_in_weights=spaces[1])
    curve = partial(error_curve, objective_in_weights=spaces[0], round_in_weights=spaces[1])
    alpha = search(rows, ranges, table)
    assert ((alpha > 0.0) & (alpha <= 1.0)).all()
    scan = curve(rows, ranges, table, ALPHAS).min(1)
    found = np.array([curve(rows[[r]], _row(ranges, r), table, alpha[[r]])[0, 0] for r in range(len(rows))])
    energy = (PowerGrid(exponent).transform(rows) ** 2).mean(1) if not spaces[0] else (rows.astype(np.float64) ** 2).mean(1)
    assert (found <= scan * (1 + SEARCH_TOLERANCE) + 1e-12 * energy).all()  # 1e-12: cancellation where the error is near zero


@settings(deadline=None)
@given(w=rows_strategy, counts=hnp.arrays(np.int64, 40, elements=st.integers(1, 5)), bits=st.integers(2, 8))
def test_importance_counts_an_element_several_times(w: np.ndarray, counts: np.ndarray, bits: int) -> None:
    rows, ranges = sorted_rows(w, bits, 1.0)
    table, importance = level_table(bits, PowerGrid(1.0)), np.tile(counts.astype(np.float32), (2, 1))
    repeated = np.repeat(rows, counts, axis=1)
    expected = error_curve(repeated, ranges, table, ALPHAS)
    energy = (repeated.astype(np.float64) ** 2).mean(1, keepdims=True)
    assert (abs(error_curve(rows, ranges, table, ALPHAS, importance) - expected) <= 1e-12 * energy).all()
    alpha = search_alpha(rows, ranges, table, importance)
    found = np.array([error_curve(repeated[[r]], _row(ranges, r), table, alpha[[r]])[0, 0] for r in range(2)])
    assert (found <= expected.min(1) * (1 + SEARCH_TOLERANCE) + 1e-12 * energy[:, 0]).all()


def _row(ranges: RowRanges, r: int) -> RowRanges:
    return RowRanges(ranges.step[[r]], ranges.zero_point[[r]])


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_search_reaches_the_minimum_of_a_fine_scan(bits: int, axis: int | None) -> None:
    rows, ranges = sorted_rows(to_rows(laplace(8, 3000), axis), bits, 0.5)
    table = level_table(bits, PowerGrid(0.5))
    alpha = search_alpha(rows, ranges, table, objective_in_weights=True, round_in_weights=True)
    for r in range(len(rows)):
        near = np.clip(alpha[r] + np.linspace(-1 / 256, 1 / 256, 2001), 1e-3, 1.0)
        curve = error_curve(rows[[r]], _row(ranges, r), table, np.append(near, alpha[r]))[0]
        assert curve[-1] <= curve.min() * (1 + RAGGEDNESS)


def real_layers() -> list[np.ndarray]:
    """The largest layers of our ResNet-20: 36,864 weights each (small ones have a curve of many kinks)."""
    weights = [weight.load().reshape(1, -1) for weight in find_weights(ModelGraph.of(load_model(OWN_MODEL))).weights]
    return [w for w in weights if w.size == 64 * 64 * 9]


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("source", ["gaussian", "laplace", "real"])
def test_curve_is_convex_around_its_minimum(source: str, exponent: float) -> None:
    """REQuant's claim (arXiv 2510.04044) of local convexity: a parabola with a minimum fits the curve within 2/64 of the best."""
    generator = np.random.default_rng(5)
    samples = {"gaussian": [generator.normal(size=(1, 50_000))], "laplace": [generator.laplace(size=(1, 50_000))]}
    for w in samples.get(source) or real_layers():
        rows, ranges = sorted_rows(w.astype(np.float32), 4, exponent)
        table = level_table(4, PowerGrid(exponent))
        best = search_alpha(rows, ranges, table, objective_in_weights=True, round_in_weights=True)[0]
        at = np.linspace(-2 / 64, 2 / 64, 65)
        curve = error_curve(rows, ranges, table, min(best, 1 - 2 / 64) + at)[0]
        parabola = np.polyfit(at, curve, 2)
        assert parabola[0] > 0.0
        assert np.var(curve - np.polyval(parabola, at)) < 0.2 * np.var(curve)  # at most 10 % measured


@settings(deadline=None)
@given(w=rows_strategy, bits=st.integers(2, 8), exponent=st.sampled_from(EXPONENTS), alpha=st.floats(0.05, 1.0))
def test_nearest_level_in_weight_space_is_never_worse(w: np.ndarray, bits: int, exponent: float, alpha: float) -> None:
    rows, ranges = sorted_rows(w, bits, exponent)
    table, at = level_table(bits, PowerGrid(exponent)), np.array([alpha])
    nearest = error_curve(rows, ranges, table, at, round_in_weights=True)
    rounded = error_curve(rows, ranges, table, at, round_in_weights=False)
    energy = (rows.astype(np.float64) ** 2).mean(1, keepdims=True)
    assert (nearest <= rounded + 1e-12 * energy).all()  # 1e-12: cancellation, as above


def test_search_beats_max_range_where_there_is_something_to_win() -> None:
    w = laplace(64, 576)
    errors = [((quantize_weight(w, Grid(4, PowerGrid(1.0), 0, search)).dequantize() - w) ** 2).mean() for search in (True, False)]
    assert errors[0] < 0.8 * errors[1]  # 0.76 measured
