"""Weight forms: how codes are stored and decoded in the graph.

    qdq      codes or their integer levels -> DequantizeLinear     which ONNX Runtime runs at every inference
    folded   levels -> Mul with the scale                          which ONNX Runtime folds to a float weight at load

Codes are packed to their true width (packing.py), or stored as UINT8 or UINT4 where that is their width and the target runtime
can read it.  https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from requant_onnx.config import Form
from requant_onnx.graph.decode import Constants, Decode, DecodeWriter, write_levels, write_unpack
from requant_onnx.numerics.quantize import QuantizedWeight

INT4_OPSET = 21  # first opset with UINT4, and with 16-bit DequantizeLinear
PACKED_OPSET = 18  # first opset with BitwiseOr
AXIS_OPSET = 13  # first opset with per-channel DequantizeLinear


@dataclass(frozen=True)
class Target:
    """What the file is written for.  opset: of the model.  narrow: whether the runtime casts from UINT4 and
    subtracts 8- and 16-bit integers (1.24.4 and later)."""

    form: Form
    opset: int
    narrow: bool

    def stores_natively(self, bits: int, exponent: float) -> bool:
        """Whether codes of this width have a tensor type that the decode can read; DequantizeLinear always reads UINT4."""
        dequantized = self.form is Form.QDQ and exponent == 1.0
        return bits == 8 or (bits == 4 and self.opset >= INT4_OPSET and (self.narrow or dequantized))


def required_opset(form: Form, bits: int, exponent: float, narrow: bool) -> int:
    """The opset that the decode of such a weight needs."""
    if bits == 8:
        return AXIS_OPSET
    return INT4_OPSET if Target(form, INT4_OPSET, narrow).stores_natively(bits, exponent) else PACKED_OPSET


def decode_of(name: str, q: QuantizedWeight, emit: int, target: Target, constants: Constants) -> Decode:
    """The decode of one weight.  name: the tensor to output.  emit: its ONNX type, FLOAT or FLOAT16."""
    writer = DecodeWriter(constants)
    cast = emit != onnx.TensorProto.FLOAT
    write = _write_folded if target.form is Form.FOLDED else _write_qdq
    result = write(writer, q, target, None if cast else name)
    if cast:
        writer.node("Cast", result, output=name, to=emit)
    return writer.finish()


def level_type(largest: int, target: Target) -> type[np.signedinteger]:
    """The narrowest integer type in which levels can be computed and dequantized."""
    if not target.narrow or target.opset < INT4_OPSET:
        return np.int32
    return np.int8 if largest <= 127 else np.int16 if largest <= 32767 else np.int32


def _write_folded(writer: DecodeWriter, q: QuantizedWeight, target: Target, output: str | None) -> str:
    levels = write_levels(writer, _write_codes(writer, q, target), q.broadcast(q.zero_point), q.table, np.float32)
    return writer.node("Mul", levels, writer.own("scale", q.broadcast(q.scale)), output=output)


def _write_qdq(writer: DecodeWriter, q: QuantizedWeight, target: Target, output: str | None) -> str:
    """DequantizeLinear of the codes of a uniform grid, else of the integer levels, which have no zero point."""
    axis = {} if q.axis is None else {"axis": q.axis}
    codes = _write_codes(writer, q, target)
    if q.table.exponent == 1.0:
        bits = q.table.bits if target.stores_natively(q.table.bits, 1.0) else 8
        inputs = [codes, writer.own("scale", q.scale), writer.own_codes("zero_point", q.zero_point, bits)]
    else:
        largest = _largest_level(q)
        dtype = level_type(largest, target)
        levels = write_levels(writer, codes, q.broadcast(q.zero_point), q.table, dtype)
        if dtype is np.int32 and largest <= 127:  # a quarter of the memory, and of what DequantizeLinear reads at every run
            levels = writer.node("Cast", levels, to=onnx.TensorProto.INT8)
        inputs = [levels, writer.own("scale", q.scale)]
    return writer.node("DequantizeLinear", *inputs, output=output, **axis)


def _write_codes(writer: DecodeWriter, q: QuantizedWeight, target: Target) -> str:
    if target.stores_natively(q.table.bits, q.table.exponent):
        return writer.own_codes("codes", q.codes, q.table.bits)
    return write_unpack(writer, q.codes, q.table.bits)


def _largest_level(q: QuantizedWeight) -> int:
    zero_point = q.zero_point.astype(np.int64)
    reach = int(np.maximum(zero_point, q.table.max_code - zero_point).max())
    return int(q.table.integers[q.table.max_code + reach])
