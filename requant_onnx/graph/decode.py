"""The nodes that turn stored codes into integer levels or weights, and the initializers they read.

    unpack   fields of 4, 2 and 1 bits in bytes -> codes, uint8 (packing.py)
    levels   codes - zero_point = k;  uniform L = k,  square root L = k * |k|,  any other L from a table
    weights  L * scale

Operators: BitShift, BitwiseOr, Reshape, Slice, Cast, Sub, Abs, Mul, Gather (https://onnx.ai/onnx/operators/).  They read
initializers only, so ONNX Runtime computes them once, when it loads the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from requant_onnx.graph.edit import tensor_proto, uint4_proto
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.packing import FIELDS, pack, shifts
from requant_onnx.numerics.levels import LevelTable


@dataclass(frozen=True)
class Decode:
    """Nodes in order, the last of which outputs the weight's own name, and the initializers they read.

    shared: small constants and level tables that other decodes read too, by name; each is stored once.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    shared: dict[str, onnx.TensorProto]

    @property
    def bytes(self) -> int:
        """Size in the file, without what is shared."""
        total: int = sum(node.ByteSize() for node in self.nodes) + sum(item.ByteSize() for item in self.initializers)
        return total


class Constants:
    """Names of the decodes of one model (short, for they count), and the constants that several of them share."""

    def __init__(self, names: FreshNames) -> None:
        self.names = names
        self._weights = 0
        self._shared: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def next_weight(self) -> int:
        """A number for the next weight."""
        self._weights += 1
        return self._weights

    def shared(self, values: npt.NDArray[np.generic]) -> onnx.TensorProto:
        """The one initializer with these values."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._shared:
            self._shared[key] = tensor_proto(values, self.names.take(f"decode.c{len(self._shared)}"))
        return self._shared[key]


@dataclass
class DecodeWriter:
    """Collects the nodes and initializers of one decode."""

    constants: Constants
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    used: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prefix = f"decode.{self.constants.next_weight()}"

    def finish(self) -> Decode:
        """What was written."""
        return Decode(tuple(self.nodes), tuple(self.initializers), self.used)

    def own(self, suffix: str, values: npt.NDArray[np.generic]) -> str:
        """An initializer of this weight."""
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(tensor_proto(values, name))
        return name

    def own_codes(self, suffix: str, values: npt.NDArray[np.uint8], bits: int) -> str:
        """Values in the type of their width: UINT4 for 4 bits, else UINT8."""
        if bits != 4:
            return self.own(suffix, values)
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(uint4_proto(values, name))
        return name

    def shared(self, values: npt.NDArray[np.generic] | np.generic) -> str:
        """A constant that other decodes may read too."""
        tensor = self.constants.shared(np.asarray(values))
        self.used[tensor.name] = tensor
        return str(tensor.name)

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: int | str) -> str:
        """Append a node; returns the name of its output."""
        output = output or self.constants.names.take(f"{self._prefix}.{len(self.nodes)}")
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))  # type: ignore[arg-type]
        return output


def write_unpack(writer: DecodeWriter, codes: npt.NDArray[np.uint8], bits: int) -> str:
    """Packed fields -> codes, uint8, in the shape of the weight.  codes: what is to be packed."""
    flat = writer.shared(np.array([-1], np.int64))
    low, joined = 0, ""
    for packed, width in zip(pack(codes, bits), FIELDS[bits], strict=True):
        amounts = (8 - width - shifts(width))[:, None]
        left = writer.node("BitShift", writer.own(f"field{width}", packed), writer.shared(amounts), direction="LEFT")
        planes = writer.node("BitShift", left, writer.shared(np.uint8(8 - width)), direction="RIGHT")
        part = writer.node("Reshape", planes, flat)
        if codes.size % (8 // width):
            count = writer.shared(np.array([codes.size], np.int64))
            part = writer.node("Slice", part, writer.shared(np.array([0], np.int64)), count)
        part = writer.node("BitShift", part, writer.shared(np.uint8(low)), direction="LEFT") if low else part
        joined = writer.node("BitwiseOr", joined, part) if joined else part
        low += width
    return writer.node("Reshape", joined, writer.shared(np.array(codes.shape, np.int64)))


def write_levels(
    writer: DecodeWriter, codes: str, zero_point: npt.NDArray[np.uint8], table: LevelTable, dtype: type[np.number]
) -> str:
    """Codes -> levels of type `dtype`.  zero_point: with the rank of the weight, or scalar."""
    if table.exponent in (0.5, 1.0):
        wide = writer.node("Cast", codes, to=_onnx_type(dtype))
        k = writer.node("Sub", wide, writer.own("zero_point", zero_point.astype(dtype)))
        return k if table.exponent == 1.0 else writer.node("Mul", k, writer.node("Abs", k))
    wide = writer.node("Cast", codes, to=onnx.TensorProto.INT32)
    offset = np.asarray(zero_point.astype(np.int32) - np.int32(table.max_code))
    index = writer.node("Sub", wide, writer.own("offset", offset))
    return writer.node("Gather", writer.shared(table.integers.astype(dtype)), index)


def _onnx_type(dtype: type[np.number]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
