"""Codes of less than 8 bits, stored at their true size in uint8 tensors: several codes form an index, which a table decodes.

    bits            2    3    4    5    6    7       8        1.6  2.33    2.67  3.33  3.67    4.5   5.5
    levels          4    8    16   32   64   128     256      3    5       6     10    12      22    45
    codes an index  4    4    2    2    2    2       1        5    6       3     3     3       2     2
    fields          8    8,4  8    8,2  8,4  8,4,2   8        8    8,4,2   8     8,2   8,2,1   8,1   8,2,1

The index of the codes c_0, c_1, ... is c_0 + B * c_1 + B**2 * c_2 + ... with B levels.  Its lowest 8 bits are stored as one byte,
the higher bits as fields of 4, 2 and 1 bits; other bytes hold 2, 4 or 8 of these, the first in the lowest bits.  Indices that
fill a byte of every field form a block: 2 for 3 and 6 bits, 4 for 5 and 7, 8 for 4.5.  A table has at most 2**14 entries,
because runtimes compute it when they load a model, and keep it.  Within this limit, 7 levels, for example, take as much as 8.

A decode is a lookup by Gather, which all runtimes compute alike; bit operators differ (OpenVINO's BitShift saturates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from requant_onnx.choices import LEVELS
from requant_onnx.numerics.arrays import Int32Array, UInt8Array

BYTE = 8


@dataclass(frozen=True)
class Packing:
    """The storage of codes of one width.

    codes: number of codes per index.  base: number of distinct codes.  fields: number of bits in each field above the lowest 8.

    >>> PACKINGS[1.6].bytes_of(1000), PACKINGS[2.33].bytes_of(1000)
    (200, 291)
    """

    codes: int
    base: int
    fields: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of distinct indices."""
        return int(self.base**self.codes)

    def bytes_of(self, count: int) -> int:
        """The approximate bytes of a number of codes."""
        return count * (BYTE + sum(self.fields)) // (BYTE * self.codes)

    @property
    def shifts(self) -> tuple[int, ...]:
        """The lowest bit of each field in the index."""
        return tuple(accumulate(self.fields[:-1], initial=BYTE)) if self.fields else ()

    @property
    def block(self) -> tuple[int, ...]:
        """The shape of a block of indices: a byte of field k covers the last k + 1 dimensions."""
        a_byte = [1, *(BYTE // width for width in self.fields)]
        return tuple(more // fewer for fewer, more in pairwise(a_byte))[::-1]

    @property
    def block_codes(self) -> int:
        """The number of codes in a block."""
        return self.codes * math.prod(self.block)

    def prefix(self, field: int) -> tuple[int, ...]:
        """The shape of one field's bytes in a block."""
        return self.block[: len(self.fields) - field - 1]


PACKINGS: dict[float, Packing] = {
    1.6: Packing(5, LEVELS[1.6]),
    2: Packing(4, LEVELS[2]),
    2.33: Packing(6, LEVELS[2.33], (4, 2)),
    2.67: Packing(3, LEVELS[2.67]),
    3: Packing(4, LEVELS[3], (4,)),
    3.33: Packing(3, LEVELS[3.33], (2,)),
    3.67: Packing(3, LEVELS[3.67], (2, 1)),
    4: Packing(2, LEVELS[4]),
    4.5: Packing(2, LEVELS[4.5], (1,)),
    5: Packing(2, LEVELS[5], (2,)),
    5.5: Packing(2, LEVELS[5.5], (2, 1)),
    6: Packing(2, LEVELS[6], (4,)),
    7: Packing(2, LEVELS[7], (4, 2)),
    8: Packing(1, LEVELS[8]),
}
"""The packings by number of bits."""


def pack(codes: UInt8Array, packing: Packing) -> tuple[UInt8Array, ...]:
    """The lowest bytes of the indices, (..., *packing.block), then the bytes of each field, (..., *packing.prefix(field)).

    codes: (..., *packing.block, packing.codes), below `packing.base`.

    >>> [part.tolist() for part in pack(np.array([[1, 2, 3, 7], [5, 0, 0, 1]], np.uint8), PACKINGS[3])]
    [[209, 5], 46]
    """
    kind = np.uint8 if packing.size <= 256 else np.uint16  # keeps the memory for large weights low
    index = codes[..., 0].astype(kind)
    for place in range(1, packing.codes):
        index += codes[..., place].astype(kind) * kind(packing.base**place)
    lead = index.shape[: index.ndim - len(packing.block)]
    parts = [index if kind is np.uint8 else (index & kind(255)).astype(np.uint8)]
    for k, (width, shift) in enumerate(zip(packing.fields, packing.shifts, strict=True)):
        values = (index >> kind(shift) & kind(2**width - 1)).reshape(*lead, *packing.prefix(k), BYTE // width)
        parts.append((values << np.arange(0, BYTE, width, dtype=kind)).sum(-1, dtype=kind).astype(np.uint8))
    return tuple(parts)


def unpack(parts: Sequence[UInt8Array], packing: Packing) -> UInt8Array:
    """The inverse of `pack`."""
    low, *fields = parts
    index = low.astype(np.int32)
    for packed, shift, width in zip(fields, packing.shifts, packing.fields, strict=True):
        index += digits(2**width, BYTE // width)[packed].reshape(low.shape) << shift
    return digits(packing.base, packing.codes)[index].astype(np.uint8)


def digits(base: int, count: int) -> Int32Array:
    """The digits of each number below base**count, the least significant first, (base**count, count)."""
    return np.asarray(np.arange(base**count)[:, None] // base ** np.arange(count) % base, np.int32)
