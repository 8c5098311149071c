"""Packing: every width, every length, exact counterparts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant_onnx.graph.decode.packing import FIELDS, pack, unpack


@given(bits=st.integers(2, 7), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_round_trip_at_the_true_size(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    fields = pack(codes, bits)
    np.testing.assert_array_equal(unpack(fields, bits, count), codes)
    assert [field.nbytes for field in fields] == [-(-count * width // 8) for width in FIELDS[bits]]


@pytest.mark.parametrize("bits", FIELDS)
def test_whole_bytes_are_not_exceeded(bits: int) -> None:
    assert sum(field.nbytes for field in pack(np.zeros(80, np.uint8), bits)) == 10 * bits
