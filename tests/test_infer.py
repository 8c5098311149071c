"""Grids are recovered from decoded values."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import laplace

from requant_onnx.numerics.infer import infer_grid
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.quantize import Grid, quantize_weight, to_rows


@pytest.mark.parametrize(("bits", "limit"), [(2, None), (3, 64), (4, 64), (4, None), (5, 127), (6, None), (8, None)])
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.75, 2 / 3])
@pytest.mark.parametrize("axis", [None, 0])
def test_grids_of_our_own_are_found(bits: int, exponent: float, limit: int | None, axis: int | None) -> None:
    q = quantize_weight(laplace(8, 64, 3, 3), Grid(bits, PowerGrid(exponent), axis, limit=limit, half_scales=True))
    found = infer_grid(to_rows(q.dequantize(), axis))
    assert found is not None
    assert found.table.bits <= bits
    if len(np.unique(q.codes)) > 2 ** (bits - 1):
        assert found.table is q.table
        np.testing.assert_allclose(found.scale, q.scale.reshape(-1), rtol=1e-5)


def test_rows_of_zeros_have_no_scale() -> None:
    found = infer_grid(np.array([[0, 0, 0], [1, -1, 0.5]], np.float32))
    assert found is not None
    assert found.scale.tolist() == [0.0, 0.5]


def test_halves_are_recognized() -> None:
    q = quantize_weight(laplace(8, 64), Grid(4, PowerGrid(1.0), 0))
    rounded = q.dequantize().astype(np.float16).astype(np.float32)
    assert infer_grid(rounded) is None
    found = infer_grid(rounded, half=True)
    assert found is not None
    assert found.table.bits == 4


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), laplace(2, 900), np.array([[1.0, 2.7182818, 3.1415927, 1.1, 0.123, 4.4]])])
def test_what_is_not_quantized_has_no_grid(rows: np.ndarray) -> None:
    assert infer_grid(rows.astype(np.float32)) is None
