"""A writer for decodes: nodes and initializers of one weight or group, and those that the decodes of a model share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from requant_onnx.graph.edit import proto_of_4_bits, tensor_proto
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.arrays import GenericArray, UInt8Array


@dataclass(frozen=True)
class Scales:
    """The scales of a table that is looked up as levels.

    name: name of the tensor.  by_entry: whether scales are looked up like the levels.
    emit: ONNX type that the readers of the table expect.
    """

    name: str
    by_entry: bool
    emit: int


@dataclass(frozen=True)
class Decode:
    """Nodes in order, which output the weights under their own names, and the initializers they read.

    shared, shared_nodes: constants and nodes that other decodes read too, by tensor name, in order; each is stored once.
    scales: table -> its scales, for tables whose levels are looked up before they are decoded (lookup.py).
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    shared: dict[str, onnx.TensorProto]
    shared_nodes: dict[str, onnx.NodeProto] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The size in the file without shared constants and nodes."""
        return _size((*self.nodes, *self.initializers))

    @property
    def shared_bytes(self) -> int:
        """The size in the file of constants and nodes that other decodes may read too."""
        return sum(self.shared_sizes().values())

    def shared_sizes(self) -> dict[str, int]:
        """The sizes in the file of shared constants and nodes, by what they compute, regardless of names."""
        identity: dict[str, str] = {}
        sizes = {}
        for name, tensor in self.shared.items():
            identity[name] = _digest(tensor)
            sizes[identity[name]] = tensor.ByteSize()
        for name, node in self.shared_nodes.items():
            identity[name] = _digest(node, identity)
            sizes[identity[name]] = node.ByteSize()
        return sizes


def _digest(item: onnx.NodeProto | onnx.TensorProto, inputs: Mapping[str, str] | None = None) -> str:
    content = type(item).FromString(item.SerializeToString())
    if isinstance(content, onnx.TensorProto):
        content.name = ""
    else:
        content.output[0] = ""
        content.input[:] = [(inputs or {})[each] for each in content.input]
    return hashlib.sha256(content.SerializeToString()).hexdigest()


def _size(items: Sequence[onnx.NodeProto | onnx.TensorProto]) -> int:
    total: int = sum(item.ByteSize() for item in items)
    return total


class Constants:
    """The names of a model's decodes (short, because they take space), and the constants that several of them share."""

    def __init__(self, names: FreshNames) -> None:
        self.names = names
        self._decodes = 0
        self._initializers: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._nodes: dict[bytes, onnx.NodeProto] = {}
        self.by_name: dict[str, onnx.TensorProto | onnx.NodeProto] = {}

    def next_decode(self) -> int:
        """The number of the next decode."""
        self._decodes += 1
        return self._decodes

    def initializer(self, values: GenericArray) -> str:
        """The name of the single initializer with these values."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._initializers:
            name = self._next_name()
            self.by_name[name] = self._initializers[key] = tensor_proto(values, name)
        return str(self._initializers[key].name)

    def node(self, op: str, inputs: Sequence[str], attributes: Mapping[str, int]) -> str:
        """The output of the single shared node that computes this."""
        node = helper.make_node(op, inputs, [""], **attributes)  # type: ignore[arg-type]
        key = node.SerializeToString()
        if key not in self._nodes:
            node.output[0] = self._next_name()
            self.by_name[node.output[0]] = self._nodes[key] = node
        return str(self._nodes[key].output[0])

    def _next_name(self) -> str:
        return self.names.take(f"c{len(self.by_name)}")


@dataclass
class DecodeWriter:
    """A collector of the nodes and initializers of one decode."""

    constants: Constants
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    used: dict[str, onnx.TensorProto] = field(default_factory=dict)
    used_nodes: dict[str, onnx.NodeProto] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prefix = f"d{self.constants.next_decode()}"

    def finish(self) -> Decode:
        """The finished decode."""
        return Decode(tuple(self.nodes), tuple(self.initializers), self.used, self.used_nodes, self.scales)

    def own(self, suffix: str, values: GenericArray) -> str:
        """An initializer of this decode: q for codes, l for levels, s for scales, z for zero points, v for vectors."""
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(tensor_proto(values, name))
        return name

    def own_codes(self, suffix: str, values: UInt8Array, bits: float, middle: int = 0) -> str:
        """Values in the type of their width: UINT4 for 4 bits, else UINT8; INT4 or INT8, minus `middle`, where that is not 0."""
        if bits != 4:
            return self.own(suffix, (values.astype(np.int16) - middle).astype(np.int8) if middle else values)
        name = self.constants.names.take(f"{self._prefix}.{suffix}")
        self.initializers.append(proto_of_4_bits(values - np.uint8(middle), name, signed=middle > 0))
        return name

    def shared(self, values: GenericArray | np.generic) -> str:
        """A constant that other decodes may read too."""
        name = self.constants.initializer(np.asarray(values))
        self.used[name] = self.constants.by_name[name]
        return name

    def shared_node(self, op: str, *inputs: str, **attributes: int) -> str:
        """The result of a node that other decodes may read too; it reads only shared tensors."""
        name = self.constants.node(op, inputs, attributes)
        self.used_nodes[name] = self.constants.by_name[name]
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: int | str) -> str:
        """Append a node and return the name of its output."""
        output = output or self._next_name()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))  # type: ignore[arg-type]
        return output

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """Append a Reshape, whose shape is a shared constant."""
        return self.node("Reshape", tensor, self.shared(np.array(shape, np.int64)))

    def split(self, tensor: str, sizes: Sequence[int], axis: int, outputs: Sequence[str | None]) -> list[str]:
        """Split a tensor along `axis`; a piece without a name gets one."""
        if len(sizes) == 1:
            return [tensor]
        names = [output or self._next_name(k) for k, output in enumerate(outputs)]
        inputs = [tensor, self.shared(np.array(sizes, np.int64))]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=axis or None))  # None is not written; 0 is the default
        return names

    def _next_name(self, piece: int = 0) -> str:
        return self.constants.names.take(f"{self._prefix}.{len(self.nodes)}" + (f".{piece}" if piece else ""))
