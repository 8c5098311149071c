"""Packing: every width, every length, exact counterparts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant_onnx.graph.decode.packing import PACKINGS, Packing, pack, unpack


@given(bits=st.integers(2, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_round_trip_at_the_true_size(bits: int, count: int, seed: int) -> None:
    packing = PACKINGS[bits]
    codes = np.random.default_rng(seed).integers(0, 2**bits, (count, *packing.block, packing.codes)).astype(np.uint8)
    parts = pack(codes, packing)
    np.testing.assert_array_equal(unpack(parts, packing), codes)
    assert sum(part.nbytes for part in parts) * 8 == codes.size * bits


@pytest.mark.parametrize("bits", PACKINGS)
def test_an_index_has_the_bits_of_its_codes_and_no_more(bits: int) -> None:
    packing = PACKINGS[bits]
    assert packing.base == 2**bits
    assert 8 + sum(packing.fields) == bits * packing.codes
    assert packing.block_codes * bits % 8 == 0


def test_five_ternary_codes_fit_a_byte() -> None:
    """Packing is by digits, not by bits."""
    packing = Packing(5, 3)
    codes = np.random.default_rng(0).integers(0, 3, (20, 5)).astype(np.uint8)
    assert sum(part.nbytes for part in pack(codes, packing)) == 20
    np.testing.assert_array_equal(unpack(pack(codes, packing), packing), codes)
