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
import onnx
from onnx import helper

from requant_onnx.graph.decode.packing import FIELDS, pack, shifts
from requant_onnx.graph.edit import tensor_proto, uint4_proto
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.arrays import Float32Array, GenericArray, Int64Array, UInt8Array
from requant_onnx.numerics.kinds import LevelDecode
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.quantize import QuantizedWeight


@dataclass(frozen=True)
class Scales:
    """The scales of a table that is looked up as levels.

    name: of the tensor.  by_entry: whether they are looked up like the levels.
    emit: ONNX type that the readers of the table expect.
    """

    name: str
    by_entry: bool
    emit: int


@dataclass(frozen=True)
class Decode:
    """Nodes in order, which output the weights under their own names, and the initializers they read.

    shared: small constants and level tables that other decodes read too, by name; each is stored once.
    scales: of tables whose levels are looked up before they are decoded (lookup.py), by name.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    shared: dict[str, onnx.TensorProto]
    scales: dict[str, Scales] = field(default_factory=dict)

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

    def shared(self, values: GenericArray) -> onnx.TensorProto:
        """The one initializer with these values."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._shared:
            self._shared[key] = tensor_proto(values, self.names.take(f"d.c{len(self._shared)}"))
        return self._shared[key]


@dataclass
class DecodeWriter:
    """Collects the nodes and initializers of one decode."""

    constants: Constants
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    used: dict[str, onnx.TensorProto] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prefix = f"d{self.constants.next_decode()}"

    def finish(self) -> Decode:
        """What was written."""
        return Decode(tuple(self.nodes), tuple(self.initializers), self.used, self.scales)

    def own(self, suffix: str, values: GenericArray) -> str:
        """An initializer of this decode."""
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(tensor_proto(values, name))
        return name

    def own_codes(self, suffix: str, values: UInt8Array, bits: int) -> str:
        """Values in the type of their width: UINT4 for 4 bits, else UINT8."""
        if bits != 4:
            return self.own(suffix, values)
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(uint4_proto(values, name))
        return name

    def shared(self, values: GenericArray | np.generic) -> str:
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
        self.nodes.append(helper.make_node("Split", inputs, names, axis=axis or None))  # None: not written, 0 is the default
        return names

    def _next_name(self, piece: int = 0) -> str:
        return self.constants.names.take(f"{self._prefix}.{len(self.nodes)}" + (f".{piece}" if piece else ""))


def write_unpack(writer: DecodeWriter, parts: Sequence[UInt8Array], bits: int) -> list[str]:
    """Packed fields -> uint8 tensors in their shapes.  parts: what is to be packed, one behind the other."""
    size = sum(part.size for part in parts)
    shapes = [writer.shared(np.array(part.shape, np.int64)) for part in parts]
    low, joined = 0, ""
    for packed, width in zip(pack(np.concatenate([part.ravel() for part in parts]), bits), FIELDS[bits], strict=True):
        amounts = (8 - width - shifts(width))[:, None]
        left = writer.node("BitShift", writer.own(f"field{width}", packed), writer.shared(amounts), direction="LEFT")
        planes = writer.node("BitShift", left, writer.shared(np.uint8(8 - width)), direction="RIGHT")
        finished = len(parts) == 1 and size % (8 // width) == 0
        field = writer.node("Reshape", planes, shapes[0] if finished else writer.shared(np.array([-1], np.int64)))
        if size % (8 // width):
            field = writer.node("Slice", field, writer.shared(np.array([0], np.int64)), writer.shared(np.array([size], np.int64)))
        if len(parts) == 1 and not finished:
            field = writer.node("Reshape", field, shapes[0])
        field = writer.node("BitShift", field, writer.shared(np.uint8(low)), direction="LEFT") if low else field
        joined = writer.node("BitwiseOr", joined, field) if joined else field
        low += width
    if len(parts) == 1:
        return [joined]
    pieces = writer.split(joined, [part.size for part in parts], 0, [None] * len(parts))
    return [writer.node("Reshape", piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def packs_zero_point(q: QuantizedWeight) -> bool:
    """Whether the zero points take less room packed behind the codes than by themselves: nodes to part them are 100 bytes."""
    return not _is_uniform(q) and q.zero_point.size * (8 - q.table.bits) / 8 > 100


def write_levels(writer: DecodeWriter, codes: str, zero_point: str, q: QuantizedWeight, dtype: type[np.number]) -> str:
    """Codes -> levels of type `dtype`.  zero_point: where it has been unpacked to, "" to store it here."""
    by_table = q.table.decode is LevelDecode.TABLE
    wide = np.int32 if by_table else dtype
    if _is_uniform(q):
        offset = writer.shared(q.zero_point.flat[0].astype(wide))
    else:
        offset = writer.node("Cast", zero_point or writer.own("zero_point", q.broadcast(q.zero_point)), to=onnx_type(wide))
    k = writer.node("Sub", writer.node("Cast", codes, to=onnx_type(wide)), offset)
    if by_table:
        table = _from_the_middle(q.table).astype(dtype)
        return writer.node("Gather", writer.own("levels", table) if q.table.kind.is_learned else writer.shared(table), k)
    return k if q.table.decode is LevelDecode.IDENTITY else writer.node("Mul", k, writer.node("Abs", k))


def write_scale(writer: DecodeWriter, q: QuantizedWeight, scale: Float32Array) -> str:
    """The scales as float32, stored as float16 where that holds them exactly.  scale: those of q, of any shape."""
    if q.has_half_scale:
        return writer.node("Cast", writer.own("scale", scale.astype(np.float16)), to=onnx.TensorProto.FLOAT)
    return writer.own("scale", scale)


def _is_uniform(q: QuantizedWeight) -> bool:
    return bool((q.zero_point == q.zero_point.flat[0]).all())


def _from_the_middle(table: LevelTable) -> Int64Array:
    """L[0 .. K], L[-K .. -1]: Gather counts a negative index from the end."""
    return np.roll(table.integers, -table.max_code)


def onnx_type(dtype: type[np.number]) -> int:
    """The ONNX type of a NumPy type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
