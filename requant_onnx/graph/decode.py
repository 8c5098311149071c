"""The nodes that turn stored codes into integer levels or weights, and the initializers they read.

    unpack   fields of 4, 2 and 1 bits in bytes -> codes, uint8 (packing.py)
    levels   codes - zero_point = k;  uniform L = k,  square root L = k * |k|,  any other L from a table
    weights  L * scale
    split    the weights of a group, decoded together, apart

Operators: BitShift, BitwiseOr, Reshape, Slice, Cast, Sub, Abs, Mul, Gather, Split (https://onnx.ai/onnx/operators/).  They read
initializers only, so ONNX Runtime computes them once, when it loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from requant_onnx.graph.edit import tensor_proto, uint4_proto
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.packing import FIELDS, pack, shifts
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.quantize import QuantizedWeight


@dataclass(frozen=True)
class Decode:
    """Nodes in order, which output the weights under their own names, and the initializers they read.

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
        self._decodes = 0
        self._shared: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def next_decode(self) -> int:
        """A number for the next decode."""
        self._decodes += 1
        return self._decodes

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
        self._prefix = f"decode.{self.constants.next_decode()}"

    def finish(self) -> Decode:
        """What was written."""
        return Decode(tuple(self.nodes), tuple(self.initializers), self.used)

    def own(self, suffix: str, values: npt.NDArray[np.generic]) -> str:
        """An initializer of this decode."""
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
        output = output or self._next_name()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))  # type: ignore[arg-type]
        return output

    def split(self, tensor: str, sizes: Sequence[int], axis: int, outputs: Sequence[str | None]) -> list[str]:
        """Cut a tensor into pieces along `axis`; a piece without a name gets one."""
        if len(sizes) == 1:
            return [tensor]
        names = [output or self._next_name(k) for k, output in enumerate(outputs)]
        inputs = [tensor, self.shared(np.array(sizes, np.int64))]
        self.nodes.append(helper.make_node("Split", inputs, names, **({"axis": axis} if axis else {})))
        return names

    def _next_name(self, piece: int = 0) -> str:
        return self.constants.names.take(f"{self._prefix}.{len(self.nodes)}" + (f".{piece}" if piece else ""))


def write_unpack(writer: DecodeWriter, codes: npt.NDArray[np.uint8], bits: int) -> str:
    """Packed fields -> codes, uint8, in their shape.  codes: what is to be packed."""
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


def write_levels(writer: DecodeWriter, codes: str, q: QuantizedWeight, dtype: type[np.number]) -> str:
    """Codes -> levels of type `dtype`."""
    by_table = q.table.limit is not None or q.table.exponent not in (0.5, 1.0)
    wide = np.int32 if by_table else dtype
    k = writer.node("Sub", writer.node("Cast", codes, to=onnx_type(wide)), _write_zero_point(writer, q, wide))
    if by_table:
        return writer.node("Gather", writer.shared(_from_the_middle(q.table).astype(dtype)), k)
    return k if q.table.exponent == 1.0 else writer.node("Mul", k, writer.node("Abs", k))


def write_scale(writer: DecodeWriter, q: QuantizedWeight, scale: npt.NDArray[np.float32]) -> str:
    """The scales as float32, stored as float16 where that holds them exactly.  scale: those of q, of any shape."""
    if q.has_half_scale:
        return writer.node("Cast", writer.own("scale", scale.astype(np.float16)), to=onnx.TensorProto.FLOAT)
    return writer.own("scale", scale)


def _write_zero_point(writer: DecodeWriter, q: QuantizedWeight, dtype: type[np.number]) -> str:
    if (q.zero_point == q.zero_point.flat[0]).all():
        return writer.shared(q.zero_point.flat[0].astype(dtype))
    return writer.node("Cast", writer.own("zero_point", q.broadcast(q.zero_point)), to=onnx_type(dtype))


def _from_the_middle(table: LevelTable) -> npt.NDArray[np.int64]:
    """L[0 .. K], L[-K .. -1]: Gather counts a negative index from the end."""
    return np.roll(table.integers, -table.max_code)


def onnx_type(dtype: type[np.number]) -> int:
    """The ONNX type of a NumPy type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
