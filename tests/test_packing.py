"""Packing: every width, every length, exact counterparts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant_onnx.graph.decode.packing import pack, packed_bytes, unpack


@given(bits=st.integers(2, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_round_trip_at_the_true_size(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    fields = pack(codes, bits)
    np.testing.assert_array_equal(unpack(fields, bits, count), codes)
    assert sum(field.nbytes for field in fields) == packed_bytes(count, bits)
    assert packed_bytes(count, bits) <= count * bits / 8 + 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_whole_bytes_are_not_exceeded(bits: int) -> None:
    assert packed_bytes(80, bits) == 10 * bits
