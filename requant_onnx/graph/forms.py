"""How codes are stored and decoded in the graph, all in standard operators.

    uniform      codes -> DequantizeLinear(scale, zero_point)
    square root  codes -> Cast, Sub zero_point = k -> k * |k| -> DequantizeLinear(scale)
    any other    codes -> Cast, Sub (zero_point - K) -> Gather from the integer levels -> DequantizeLinear(scale)

ONNX Runtime folds the integer operators when it loads the model; DequantizeLinear runs at every inference.
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from requant_onnx.graph.edit import tensor_proto, uint4_proto
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.quantize import QuantizedWeight

INT4_OPSET = 21  # first opset with UINT4, and with 16-bit DequantizeLinear
AXIS_OPSET = 13  # first opset with per-channel DequantizeLinear


@dataclass(frozen=True)
class Decode:
    """Nodes in order, the last of which outputs the weight's own name, and the initializers they read.

    shared: a level table that other decodes read too; it is stored once.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    shared: onnx.TensorProto | None = None

    @property
    def bytes(self) -> int:
        """Size in the file, without what is shared."""
        total: int = sum(node.ByteSize() for node in self.nodes) + sum(item.ByteSize() for item in self.initializers)
        return total


def required_opset(bits: int) -> int:
    """The opset that the decode of a weight of so many bits needs."""
    return INT4_OPSET if bits <= 4 else AXIS_OPSET


class DecodeWriter:
    """Writes the decodes of one model: fresh names, and one level table for all weights on the same grid."""

    def __init__(self, opset: int, names: FreshNames) -> None:
        self.opset, self.names = opset, names
        self._tables: dict[LevelTable, onnx.TensorProto] = {}

    def table(self, table: LevelTable) -> onnx.TensorProto:
        """The initializer that holds the integer levels of a grid."""
        if table not in self._tables:
            name = self.names.take(f"levels_{table.bits}bit_power_{table.exponent:.3g}")
            self._tables[table] = tensor_proto(table.integers.astype(np.int32), name)
        return self._tables[table]


def decode_of(name: str, q: QuantizedWeight, emit: int, writer: DecodeWriter) -> Decode:
    """The decode of one weight.  name: the tensor to output.  emit: its ONNX type, FLOAT or FLOAT16."""
    builder = _Builder(name, writer.names)
    shared = None if q.table.exponent in (0.5, 1.0) else writer.table(q.table)
    codes = builder.codes("codes", q.codes, q.table.bits)
    target = name if emit == onnx.TensorProto.FLOAT else builder.fresh("float")
    if q.table.exponent == 1.0:
        zero_point = builder.codes("zero_point", q.zero_point, q.table.bits)
        levels, inputs = codes, [builder.constant("scale", q.scale), zero_point]
    else:
        levels = _table_levels(builder, codes, q, shared.name) if shared else _sqrt_levels(builder, codes, q, writer.opset)
        inputs = [builder.constant("scale", q.scale)]
    axis = {} if q.axis is None else {"axis": q.axis}
    builder.node("DequantizeLinear", [levels, *inputs], output=target, **axis)
    if target != name:
        builder.node("Cast", [target], output=name, to=emit)
    return Decode(tuple(builder.nodes), tuple(builder.initializers), shared)


def level_type(largest: int, opset: int) -> type[np.signedinteger]:
    """The narrowest integer type that can be multiplied and dequantized at this opset."""
    if opset >= INT4_OPSET and largest <= 127:
        return np.int8
    return np.int16 if opset >= INT4_OPSET and largest <= 32767 else np.int32


def _sqrt_levels(builder: _Builder, codes: str, q: QuantizedWeight, opset: int) -> str:
    zero_point = q.zero_point.astype(np.int64)
    reach = int(np.maximum(zero_point, q.table.max_code - zero_point).max())
    dtype = level_type(reach * reach, opset)
    offset = builder.constant("zero_point", np.asarray(q.broadcast(zero_point.astype(dtype))))
    wide = builder.node("Cast", [codes], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    k = builder.node("Sub", [wide, offset])
    return builder.node("Mul", [k, builder.node("Abs", [k])])


def _table_levels(builder: _Builder, codes: str, q: QuantizedWeight, table: str) -> str:
    offset = q.broadcast(np.asarray(q.zero_point.astype(np.int32) - np.int32(q.table.max_code)))
    wide = builder.node("Cast", [codes], to=onnx.TensorProto.INT32)
    index = builder.node("Sub", [wide, builder.constant("offset", offset)])
    return builder.node("Gather", [table, index])


class _Builder:
    """Collects the nodes and initializers of one decode under names derived from the weight's."""

    def __init__(self, weight: str, names: FreshNames) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._weight, self._names = weight, names

    def fresh(self, suffix: str) -> str:
        return self._names.take(f"{self._weight}_{suffix}")

    def constant(self, suffix: str, values: npt.NDArray[np.generic]) -> str:
        name = self.fresh(suffix)
        self.initializers.append(tensor_proto(values, name))
        return name

    def codes(self, suffix: str, values: npt.NDArray[np.uint8], bits: int) -> str:
        """Codes in the type they are stored in: UINT4 up to 4 bits, else UINT8."""
        name = self.fresh(suffix)
        self.initializers.append(uint4_proto(values, name) if bits <= 4 else tensor_proto(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str | None = None, **attributes: int) -> str:
        """Append a node; returns the name of its output."""
        name = self.fresh(op)
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))  # type: ignore[arg-type]
        return output
