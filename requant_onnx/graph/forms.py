"""Weight forms: how codes are stored and decoded in the graph.

    qdq      codes or their integer levels -> DequantizeLinear       which ONNX Runtime runs at every inference
    folded   codes -> levels -> Mul with the scale                   which ONNX Runtime folds to a float weight at load

Codes are packed to their true width (packing.py), or stored as UINT8 or UINT4 where that is their width and the target runtime
can read it.  What lies between codes and result is a model-local function (functions.py), stored once for all weights on a grid.
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from requant_onnx.config import Form
from requant_onnx.graph.edit import tensor_proto, uint4_proto
from requant_onnx.graph.functions import DOMAIN, FUNCTION_OPSET, Ending, decode_function
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.packing import FIELDS, pack
from requant_onnx.numerics.quantize import QuantizedWeight

INT4_OPSET = 21  # first opset with UINT4, and with 16-bit DequantizeLinear
AXIS_OPSET = 13  # first opset with per-channel DequantizeLinear


@dataclass(frozen=True)
class Target:
    """What the file is written for.  opset: of the model.  int4: whether the runtime casts from UINT4 (1.24.4 and later)."""

    form: Form
    opset: int
    int4: bool

    def stores_natively(self, bits: int) -> bool:
        """Whether codes of so many bits have a tensor type of their own."""
        return bits == 8 or (bits == 4 and self.int4)


@dataclass(frozen=True)
class Decode:
    """Nodes in order, the last of which outputs the weight's own name, the initializers they read, the function they call."""

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    function: onnx.FunctionProto | None

    @property
    def bytes(self) -> int:
        """Size in the file, without the function, which other weights share."""
        total: int = sum(node.ByteSize() for node in self.nodes) + sum(item.ByteSize() for item in self.initializers)
        return total


def required_opset(form: Form, bits: int, exponent: float, int4: bool) -> int:
    """The opset that the decode of such a weight needs."""
    if bits == 4 and int4:
        return INT4_OPSET
    plain = form is Form.QDQ and exponent == 1.0 and bits == 8
    return AXIS_OPSET if plain else FUNCTION_OPSET


def decode_of(name: str, q: QuantizedWeight, emit: int, target: Target, names: FreshNames) -> Decode:
    """The decode of one weight.  name: the tensor to output.  emit: its ONNX type, FLOAT or FLOAT16."""
    writer = _Writer(name, names, [], [])
    result = name if emit == onnx.TensorProto.FLOAT else writer.fresh("float")
    function = None
    if target.form is Form.FOLDED:
        function = _call(writer, q, Ending.WEIGHTS, target, result)
    else:
        function = _dequantize(writer, q, target, result)
    if result != name:
        writer.node("Cast", [result], name, to=emit)
    return Decode(tuple(writer.nodes), tuple(writer.initializers), function)


def level_ending(largest: int, opset: int) -> Ending:
    """The narrowest integer type that can be multiplied and dequantized at this opset."""
    if opset >= INT4_OPSET and largest <= 127:
        return Ending.INT8
    return Ending.INT16 if opset >= INT4_OPSET and largest <= 32767 else Ending.INT32


def _dequantize(writer: _Writer, q: QuantizedWeight, target: Target, result: str) -> onnx.FunctionProto | None:
    """DequantizeLinear of the codes of a uniform grid, else of the integer levels, which have no zero point."""
    function = None
    uniform, native = q.table.exponent == 1.0, target.stores_natively(q.table.bits)
    if uniform and native:
        levels = writer.codes("codes", q.codes, q.table.bits)
    else:
        levels = writer.fresh("levels")
        ending = Ending.CODES if uniform else level_ending(_largest_level(q), target.opset)
        function = _call(writer, q, ending, target, levels)
    inputs = [levels, writer.constant("scale", q.scale)]
    if uniform:
        inputs.append(writer.codes("zero_point", q.zero_point, q.table.bits if native else 8))
    writer.node("DequantizeLinear", inputs, result, **({} if q.axis is None else {"axis": q.axis}))
    return function


def _call(writer: _Writer, q: QuantizedWeight, ending: Ending, target: Target, result: str) -> onnx.FunctionProto:
    """Call the decode function of this grid.  The order of the inputs is that of functions.decode_function."""
    bits, native = q.table.bits, target.stores_natively(q.table.bits)
    padded = not native and any(q.codes.size % (8 // width) for width in FIELDS[bits])
    function = decode_function(q.table, ending, native, padded, target.opset)
    if native:
        inputs = [writer.codes("codes", q.codes, bits)]
    else:
        fields = zip(pack(q.codes, bits), FIELDS[bits], strict=True)
        inputs = [writer.constant(f"field{width}", field) for field, width in fields]
        inputs.append(writer.constant("shape", np.array(q.codes.shape, np.int64)))
    if padded:
        inputs.append(writer.constant("count", np.array([q.codes.size], np.int64)))
    if ending is not Ending.CODES:
        inputs.append(writer.constant("zero_point", q.broadcast(q.zero_point)))
    if ending is Ending.WEIGHTS:
        inputs.append(writer.constant("scale", q.broadcast(q.scale)))
    writer.node(function.name, inputs, result, domain=DOMAIN)
    return function


def _largest_level(q: QuantizedWeight) -> int:
    zero_point = q.zero_point.astype(np.int64)
    reach = int(np.maximum(zero_point, q.table.max_code - zero_point).max())
    return int(q.table.integers[q.table.max_code + reach])


@dataclass(frozen=True)
class _Writer:
    """Collects the nodes and initializers of one decode under names derived from the weight's."""

    weight: str
    names: FreshNames
    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]

    def fresh(self, suffix: str) -> str:
        return self.names.take(f"{self.weight}_{suffix}")

    def constant(self, suffix: str, values: npt.NDArray[np.generic]) -> str:
        name = self.fresh(suffix)
        self.initializers.append(tensor_proto(values, name))
        return name

    def codes(self, suffix: str, values: npt.NDArray[np.uint8], bits: int) -> str:
        """Values in the type of their width: UINT4 for 4 bits, else UINT8."""
        name = self.fresh(suffix)
        self.initializers.append(uint4_proto(values, name) if bits == 4 else tensor_proto(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> None:
        name = self.fresh(op.partition("_")[0].lower())
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))  # type: ignore[arg-type]
