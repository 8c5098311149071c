"""Codes of 2 to 7 bits at their true size in uint8 tensors, and the ONNX nodes that unpack them.

A code of 2 to 7 bits is cut into fields of 4, 2 and 1 bits, low bits first; each field has a tensor of its own, 8/f fields of f
bits in a byte.  Fields are laid out in planes: with m = ceil(n / (8/f)) bytes, byte j holds the fields of the codes j, j + m,
j + 2m, ..., the first in the lowest bits, so that unpacking is one shift by a column of amounts and a reshape:

    bits    2    3      4    5      6      7
    fields  2    2, 1   4    4, 1   4, 2   4, 2, 1

BitShift takes uint8 from opset 11 on (https://onnx.ai/onnx/operators/onnx__BitShift.html): a shift to the left drops the fields
above, one to the right those below.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from requant_onnx.numerics.arrays import UInt8Array

FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def pack(codes: UInt8Array, bits: int) -> tuple[UInt8Array, ...]:
    """One tensor of bytes a field.  codes: any shape, below 2**bits.

    >>> [field.tolist() for field in pack(np.array([1, 2, 3, 7, 5], np.uint8), 3)]
    [[29, 14], [24]]
    """
    return tuple(_pack_field(codes.ravel() >> low, width) for low, width in _slices(bits))


def unpack(fields: tuple[UInt8Array, ...], bits: int, count: int) -> UInt8Array:
    """The inverse of `pack`.  Returns (count,)."""
    codes = np.zeros(count, np.uint8)
    for packed, (low, width) in zip(fields, _slices(bits), strict=True):
        planes = packed[None, :] >> shifts(width)[:, None] & np.uint8(2**width - 1)
        codes |= planes.reshape(-1)[:count] << low
    return codes


def _pack_field(values: UInt8Array, width: int) -> UInt8Array:
    a_byte = 8 // width
    size = -(-values.size // a_byte)
    planes = np.zeros(size * a_byte, np.uint8)
    planes[: values.size] = values & np.uint8(2**width - 1)
    shifted = planes.reshape(a_byte, size) << shifts(width)[:, None]
    return np.asarray(np.bitwise_or.reduce(shifted, axis=0), np.uint8)


def shifts(width: int) -> UInt8Array:
    """How far each plane of fields lies above the lowest bit of its byte."""
    return np.arange(0, 8, width, dtype=np.uint8)


def _slices(bits: int) -> tuple[tuple[np.uint8, int], ...]:
    """(lowest bit, width) of each field."""
    widths = FIELDS[bits]
    return tuple((np.uint8(end - width), width) for end, width in zip(accumulate(widths), widths, strict=True))
