"""Codes, levels and scales: hand-made cases and properties."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import laplace
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import Grid, from_rows, quantize_weight, to_rows

weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-100, 100, width=32))
grids = st.builds(
    Grid,
    bits=st.integers(2, 8),
    kind=st.sampled_from([PowerGrid(exponent) for exponent in (1.0, 0.5, 0.75, 1 / 3)]),
    axis=st.sampled_from([None, 0, 1]),
    search=st.booleans(),
    objective_in_weights=st.booleans(),
    round_in_weights=st.booleans(),
)


def test_uniform_grid_by_hand() -> None:
    """2 bits, -1 .. 2: step 1, zero point 1, levels -1 0 1 2."""
    q = quantize_weight(np.array([[-1.0, -0.4, 0.6, 2.0]], np.float32), Grid(2, PowerGrid(1.0), None, search=False))
    assert (q.codes.tolist(), float(q.scale), int(q.zero_point)) == ([[0, 1, 2, 3]], 1.0, 1)
    assert q.dequantize().tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_square_root_grid_by_hand() -> None:
    """2 bits, 0 .. 9: step 1 in sqrt space, levels 0 1 4 9; 2.4 is nearer to 1, 2.6 to 4 (sqrt space would say 2.25)."""
    w = np.array([[0.0, 2.4, 2.6, 9.0]], np.float32)
    assert quantize_weight(w, Grid(2, PowerGrid(0.5), None, search=False)).codes.tolist() == [[0, 1, 2, 3]]
    assert quantize_weight(w, Grid(2, PowerGrid(0.5), None, search=False, round_in_weights=False)).codes.tolist() == [[0, 2, 2, 3]]


@pytest.mark.slow
@settings(deadline=None)
@given(w=weights, grid=grids)
def test_codes_are_in_range_and_zero_is_exact(w: np.ndarray, grid: Grid) -> None:
    q = quantize_weight(w, grid)
    assert q.codes.shape == w.shape
    assert q.codes.max() < 2**grid.bits
    assert (q.scale > 0).all()
    assert (q.dequantize()[w == 0.0] == 0.0).all()


@settings(deadline=None)
@given(w=weights, grid=grids)
def test_decoded_weights_are_levels_times_the_scale(w: np.ndarray, grid: Grid) -> None:
    q = quantize_weight(w, grid)
    values = q.dequantize().astype(np.float64) / q.broadcast(q.scale)
    levels = q.table.integers[q.table.max_code + q.codes.astype(int) - q.broadcast(q.zero_point).astype(int)]
    np.testing.assert_allclose(values, levels, rtol=2**-23)  # two float32 roundings


@settings(deadline=None)
@given(w=weights, grid=grids)
def test_every_channel_is_quantized_by_itself(w: np.ndarray, grid: Grid) -> None:
    if grid.axis is None:
        return
    whole = quantize_weight(w, grid).dequantize()
    alone = quantize_weight(w.take([0], grid.axis), grid).dequantize()
    np.testing.assert_array_equal(whole.take([0], grid.axis), alone)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_rows_round_trip(axis: int | None) -> None:
    w = laplace(3, 4, 5)
    rows = to_rows(w, axis)
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(from_rows(rows, w.shape, axis), w)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 1e30, 1e-42])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_constant_weights(value: float, exponent: float) -> None:
    w = np.full((2, 3), value, np.float32)
    np.testing.assert_allclose(quantize_weight(w, Grid(4, PowerGrid(exponent), 0)).dequantize(), w, rtol=1e-6, atol=1e-41)


def test_a_channel_of_zeros_stays_zero_beside_others() -> None:
    w = laplace(4, 20)
    w[2] = 0.0
    q = quantize_weight(w, Grid(4, PowerGrid(0.5), 0))
    assert (q.dequantize()[2] == 0.0).all()
    assert q.alpha[2] == 1.0


def test_one_element() -> None:
    assert quantize_weight(np.array([[0.3]], np.float32), Grid(2, PowerGrid(0.5), None)).dequantize()[0, 0] == pytest.approx(
        0.3, rel=1e-6
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("exponent", [1.0, 0.5, 1 / 3, 0.4, 0.75, 0.99])
def test_level_tables_are_odd_increasing_and_exact_in_float32(bits: int, exponent: float) -> None:
    integers = level_table(bits, PowerGrid(exponent)).integers
    assert (integers == -integers[::-1]).all()
    assert (np.diff(integers) > 0).all()
    assert (integers.astype(np.float32) == integers).all()


def test_square_levels_of_4_bits_fit_int8_for_the_usual_zero_points() -> None:
    """k runs over -11 .. 11 for zero points 4 .. 11."""
    assert level_table(4, PowerGrid(0.5)).integers[15 + 11] == 121
