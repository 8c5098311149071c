"""Packing: every width, every length, exact counterparts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant_onnx.choices import LEVELS
from requant_onnx.graph.decode.packing import PACKINGS, digits, pack, unpack


@given(bits=st.sampled_from(list(PACKINGS)), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_round_trip_at_the_true_size(bits: float, count: int, seed: int) -> None:
    packing = PACKINGS[bits]
    codes = np.random.default_rng(seed).integers(0, packing.base, (count, *packing.block, packing.codes)).astype(np.uint8)
    parts = pack(codes, packing)
    np.testing.assert_array_equal(unpack(parts, packing), codes)
    assert sum(part.nbytes for part in parts) == packing.bytes_of(codes.size)


@pytest.mark.parametrize("bits", PACKINGS)
def test_an_index_has_the_bits_of_its_codes_and_no_more(bits: float) -> None:
    packing = PACKINGS[bits]
    index = 8 + sum(packing.fields)
    assert packing.base == LEVELS[bits]
    assert packing.size <= 2**index
    assert round(index / packing.codes, 2) == bits
    assert packing.block_codes * index // packing.codes % 8 == 0
    assert int(bits) != bits or packing.size == 2**index


@pytest.mark.parametrize("bits", PACKINGS)
def test_every_index_is_read_back(bits: float) -> None:
    """Including the largest, in each position of a block."""
    packing = PACKINGS[bits]
    codes = np.resize(digits(packing.base, packing.codes)[::-1].astype(np.uint8), (packing.size, *packing.block, packing.codes))
    np.testing.assert_array_equal(unpack(pack(codes, packing), packing), codes)


@pytest.mark.parametrize("bits", PACKINGS)
def test_no_table_is_large_and_no_width_has_room_for_another_level(bits: float) -> None:
    packing = PACKINGS[bits]
    assert packing.size <= 2**14
    assert (packing.base + 1) ** packing.codes > 2 ** (8 + sum(packing.fields))
