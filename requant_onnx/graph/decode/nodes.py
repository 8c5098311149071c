"""The nodes that turn stored codes into integer levels or weights, and the initializers they read.

    index    bytes -> int32, plus the higher fields, which are looked up: a few codes together (packing.py)
    rows     index + the first table row of its zero point, where channels have their own zero points
    levels   Gather(table, index) -> Reshape;  the table holds the levels L[code - zero_point] of the codes of every index
    weights  levels * scale
    split    separates the weights of a group that is decoded together

A table is also computed in the graph, by nodes that all decodes of one kind share:  digits of 0, 1, 2, ... = codes;  codes - zero
points = k;  uniform L = k,  square root L = k * |k|,  any other L from a list.

Operators: Cast, Gather, Reshape, Add, Sub, Mul, Div, Mod, Abs, Range, Transpose, Slice, Split (https://onnx.ai/onnx/operators/).
They read initializers only, so ONNX Runtime computes them once, when it loads the model.  It keeps the results of all of them until
it has computed the last one, so levels stay int8 until the end to save memory for intermediate results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from requant_onnx.graph.decode.packing import BYTE, PACKINGS, Packing, pack
from requant_onnx.graph.decode.writer import DecodeWriter
from requant_onnx.numerics.arrays import Float32Array, UInt8Array
from requant_onnx.numerics.kinds import LevelDecode
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.quantize import QuantizedWeight

NODES_OF_ROWS = 150  # bytes of the nodes that unpack zero points

Level = type[np.int8] | type[np.int16] | type[np.int32] | type[np.float32] | type[np.uint8]
"""Element types of tables."""


def write_codes(writer: DecodeWriter, codes: UInt8Array, bits: float, middle: int) -> str:
    """Codes of less than 8 bits in their shape: uint8, or int8 after subtracting `middle` where that is not 0."""
    packing = PACKINGS[bits]
    numbers = _digits(writer, packing.base, packing.codes)
    if middle:
        numbers = writer.shared_node("Sub", numbers, writer.shared(np.int32(middle)))
    table = writer.shared_node("Cast", numbers, to=onnx.TensorProto.INT8 if middle else onnx.TensorProto.UINT8)
    return _look_up(writer, codes, packing, table)


def write_levels(writer: DecodeWriter, q: QuantizedWeight, wide: Level, *, plain: bool) -> tuple[str, Level]:
    """The levels of a weight in its shape, and their type: int8 where all of them fit, else `wide`.

    plain: whether levels of 7 bits are stored as int8, so that they need no nodes.
    """
    bits, packing = q.table.bits, PACKINGS[q.table.bits]
    window = _Window.of(q)
    if bits == BYTE or (plain and bits == BYTE - 1):
        levels = q.levels()
        if levels.min() >= -128 and levels.max() <= 127:
            return writer.own("l", levels.astype(np.int8)), np.int8
        if bits == BYTE and q.table.decode is LevelDecode.IDENTITY:
            k = writer.node("Cast", writer.own("q", q.codes), to=onnx_type(wide))
            return writer.node("Sub", k, _zero_points(writer, q, wide)), wide
    dtype = window.level_type(q.table, wide)
    if window.is_single:
        return _look_up(writer, q.codes, packing, _table(writer, q.table, window, packing, dtype)), dtype
    shape, axis = q.codes.shape, q.axis or 0
    inner, outer = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
    rows = _Rows(q, window)
    if inner % packing.block_codes == 0:  # a block holds adjacent codes of a channel
        codes = q.codes.reshape(outer, shape[axis], -1, *packing.block, packing.codes)
        lookup, table = _Lookup(writer, packing), _table(writer, q.table, window, packing, dtype)
        return writer.reshape(lookup.write(codes, table, rows), shape), dtype
    if outer % packing.block_codes == 0:  # a block holds codes of a channel, one from each part of the tensor
        apart = q.codes.reshape(packing.codes, *packing.block[::-1], -1, shape[axis], inner)
        lookup, table = _Lookup(writer, packing, leading=True), _table(writer, q.table, window, packing, dtype)
        return writer.reshape(lookup.write(_to_the_end(apart, 1 + len(packing.block)), table, rows), shape), dtype
    index = _look_up(writer, q.codes, packing, _digits(writer, packing.base, packing.codes))
    starts = rows.write(writer, packing.base, len(shape) - 1 - axis)
    table = _table(writer, q.table, window, Packing(1, packing.base), dtype)
    return writer.node("Gather", table, writer.node("Add", index, starts)), dtype


def write_scale(writer: DecodeWriter, q: QuantizedWeight, scale: Float32Array, half: bool) -> str:
    """The scales as float32, stored as float16 where `half` allows it and that is exact.  scale: scales of q, in any shape."""
    if half and q.has_half_scale:
        return writer.node("Cast", writer.own("s", scale.astype(np.float16)), to=onnx.TensorProto.FLOAT)
    return writer.own("s", scale)


@dataclass(frozen=True)
class _Window:
    """The zero points that a table has rows for: start, ..., start + count - 1.  A few windows serve all weights."""

    start: int
    count: int

    @classmethod
    def of(cls, q: QuantizedWeight) -> _Window:
        """The narrowest window with all zero points of a weight: a single one, or 1/4, 1/2 or all of them, around the middle."""
        low, high, middle = int(q.zero_point.min()), int(q.zero_point.max()), q.table.symmetric_zero_point
        if low == high:
            return cls(low, 1)
        odd = q.table.max_code + 1 - 2 * middle  # 1 if equally many levels are above and below the middle
        half = next(middle >> k for k in (2, 1, 0) if middle - (middle >> k) <= low and high < middle + (middle >> k) + odd)
        return cls(middle - half, 2 * half + odd)

    @property
    def is_single(self) -> bool:
        return self.count == 1

    def level_type(self, table: LevelTable, wide: Level) -> Level:
        return np.int8 if table.reach(np.array([self.start, self.start + self.count - 1])).max() <= 127 else wide


@dataclass(frozen=True)
class _Rows:
    """The zero points of a weight's channels, as rows of a table."""

    q: QuantizedWeight
    window: _Window

    def write(self, writer: DecodeWriter, size: int, after: int) -> str:
        """The first row of each channel, int32, (channels, 1, ...).

        size: number of rows per zero point.  after: number of dimensions after the channels.
        """
        positions = (self.q.zero_point - self.window.start).astype(np.uint8).reshape(-1, *[1] * after)
        bits = max(2, (self.window.count - 1).bit_length())
        if positions.size * (BYTE - bits) // BYTE > NODES_OF_ROWS:
            packing = PACKINGS[bits]
            table = writer.shared_node("Mul", _digits(writer, packing.base, packing.codes), writer.shared(np.int32(size)))
            return _look_up(writer, positions, packing, table)
        # OpenVINO takes a Mul directly after the Cast for a dequantization, which it does not fold
        stored = writer.node("Cast", writer.own("z", positions), to=onnx.TensorProto.INT32)
        return writer.node("Gather", _range(writer, self.window.count * size, size), stored)


@dataclass(frozen=True)
class _Lookup:
    """The lookup of blocks: bytes -> index -> table entry of its codes.

    leading: whether the dimensions of a block come first, in reverse, not last.
    """

    writer: DecodeWriter
    packing: Packing
    leading: bool = False

    def write(self, codes: UInt8Array, table: str, rows: _Rows | None = None) -> str:
        """The entries of the table, (..., *block, codes per index).

        codes: (..., *block, codes per index); with `rows`, the channels are the second to last dimension of the "...".
        """
        low, *fields = pack(codes, self.packing)
        index = self._bytes(low, self.packing.block)
        for k, packed in enumerate(fields):
            last = rows if k == len(fields) - 1 else None  # the last field has the fewest bytes
            place = self._with_rows(self._bytes(packed, self.packing.prefix(k)), last, 256, self.packing.prefix(k))
            index = self.writer.node("Add", index, self._gather(*self._field(k, last), place))
        if not fields:
            index = self._with_rows(index, rows, self.packing.size, ())
        return self._gather(table, 1 if self.packing.codes > 1 else 0, index)

    def _bytes(self, packed: UInt8Array, block: Sequence[int]) -> str:
        if self.leading:
            packed = np.ascontiguousarray(_to_the_front(packed, len(block)))
        return self.writer.node("Cast", self.writer.own("q", packed), to=onnx.TensorProto.INT32)

    def _with_rows(self, index: str, rows: _Rows | None, size: int, block: Sequence[int]) -> str:
        if rows is None:
            return index
        return self.writer.node("Add", index, rows.write(self.writer, size, 1 + (0 if self.leading else len(block))))

    def _field(self, k: int, rows: _Rows | None) -> tuple[str, int]:
        """The table of a field, and the dimensions of its entries, which are its part of the indices that share a byte."""
        width, writer = self.packing.fields[k], self.writer
        shape = self.packing.block[len(self.packing.prefix(k)) :]
        values = writer.shared_node(
            "Mul", _digits(writer, 2**width, BYTE // width), writer.shared(np.int32(2 ** self.packing.shifts[k]))
        )
        if rows is not None:
            starts = np.arange(rows.window.count, dtype=np.int32)[:, None, None] * np.int32(self.packing.size)
            values = writer.shared_node("Add", values, writer.shared(starts))
        if rows is not None or len(shape) > 1:
            values = writer.shared_node("Reshape", values, writer.shared(np.array([-1, *shape], np.int64)))
        return values, len(shape)

    def _gather(self, table: str, dims: int, index: str) -> str:
        if self.leading and dims:
            return self.writer.node("Gather", self.writer.shared_node("Transpose", table), index, axis=dims)
        return self.writer.node("Gather", table, index)


def _to_the_end(values: UInt8Array, count: int) -> UInt8Array:
    """Move the first dimensions, in reverse, to the end."""
    return np.moveaxis(values, range(count), range(-1, -1 - count, -1))


def _to_the_front(values: UInt8Array, count: int) -> UInt8Array:
    """The inverse of `_to_the_end`."""
    return np.moveaxis(values, range(-1, -1 - count, -1), range(count))


def _look_up(writer: DecodeWriter, codes: UInt8Array, packing: Packing, table: str) -> str:
    """The table entries of the codes, in their shape; a block holds adjacent codes, and the last block is padded."""
    if packing.codes == 1:
        return _Lookup(writer, packing).write(codes[..., None], table)
    missing = -codes.size % packing.block_codes
    filled = np.append(codes.ravel(), np.zeros(missing, np.uint8)) if missing else codes
    blocks = filled.reshape(-1, *packing.block, packing.codes)
    return _cut(writer, _Lookup(writer, packing).write(blocks, table), missing, codes.shape)


def _cut(writer: DecodeWriter, tensor: str, excess: int, shape: Sequence[int]) -> str:
    """The elements of a tensor except the last `excess`, in this shape."""
    if excess:
        ends = [writer.shared(np.array([k], np.int64)) for k in (0, math.prod(shape))]
        tensor = writer.node("Slice", writer.reshape(tensor, (-1,)), *ends)
    return tensor if excess and len(shape) == 1 else writer.reshape(tensor, shape)


def _zero_points(writer: DecodeWriter, q: QuantizedWeight, dtype: Level) -> str:
    if _Window.of(q).is_single:
        return writer.shared(q.zero_point.flat[0].astype(dtype))
    return writer.node("Cast", writer.own("z", q.broadcast(q.zero_point)), to=onnx_type(dtype))


def _rows(writer: DecodeWriter, q: QuantizedWeight, window: _Window, size: int, shape: Sequence[int]) -> str:
    """The first table row for the zero point of each channel, (channels,) in `shape`, int32.

    size: number of rows per zero point.
    """
    positions = (q.zero_point - window.start).astype(np.uint8)
    bits = max(2, (window.count - 1).bit_length())
    if positions.size * (BYTE - bits) // BYTE > NODES_OF_ROWS:
        packing = PACKINGS[bits]
        table = writer.shared_node("Mul", _digits(writer, packing.base, packing.codes), writer.shared(np.int32(size)))
        return _look_up(writer, positions.reshape([len(positions) if n == -1 else n for n in shape]), packing, table)
    stored = writer.own("z", positions.reshape(shape))
    return writer.node("Mul", writer.node("Cast", stored, to=onnx.TensorProto.INT32), writer.shared(np.int32(size)))


def _table(writer: DecodeWriter, table: LevelTable, window: _Window, packing: Packing, dtype: Level) -> str:
    """The levels of the codes of each index, for each zero point of the window.

    Shape (window.count * packing.size, packing.codes), without the last dimension where an index is a code.
    """
    codes = _range(writer, packing.base)
    middle = table.max_code if table.decode is LevelDecode.TABLE else 0
    starts = np.arange(window.start, window.start + window.count, dtype=np.int32) - middle
    k = writer.shared_node("Sub", codes, writer.shared(starts[0] if window.is_single else starts[:, None]))
    if table.decode is LevelDecode.TABLE:
        levels = writer.shared_node("Gather", writer.shared(table.integers.astype(dtype)), k)
    else:
        if table.decode is not LevelDecode.IDENTITY:
            k = writer.shared_node("Mul", k, writer.shared_node("Abs", k))
        levels = k if dtype is np.int32 else writer.shared_node("Cast", k, to=onnx_type(dtype))
    if packing.codes > 1:
        levels = writer.shared_node(
            "Gather", levels, _digits(writer, packing.base, packing.codes), axis=0 if window.is_single else 1
        )
    if window.is_single:
        return levels
    rows = (-1,) if packing.codes == 1 else (-1, packing.codes)
    return writer.shared_node("Reshape", levels, writer.shared(np.array(rows, np.int64)))


def _digits(writer: DecodeWriter, base: int, count: int) -> str:
    """The digits of each number below base**count, the least significant first, (base**count, count), int32."""
    numbers = writer.shared_node("Reshape", _range(writer, base**count), writer.shared(np.array([-1, 1], np.int64)))
    places = writer.shared(base ** np.arange(count, dtype=np.int32))
    return writer.shared_node("Mod", writer.shared_node("Div", numbers, places), writer.shared(np.int32(base)))


def _range(writer: DecodeWriter, end: int, step: int = 1) -> str:
    """0, step, 2 * step, ... below `end`, int32."""
    return writer.shared_node("Range", *(writer.shared(np.int32(k)) for k in (0, end, step)))


def onnx_type(dtype: Level) -> int:
    """The ONNX type of a NumPy type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
