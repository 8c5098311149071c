"""Find the weights of a graph: which can be converted, and for the others the reason why not.

The channel axis is that of the output channel in the stored layout (https://onnx.ai/onnx/operators/):

    Conv          (oc, ic/group, kh, kw)   0        Gemm transB=1  (oc, ic)    0        MatMul  x @ w  (..., ic, oc)  last
    ConvTranspose (ic, oc/group, kh, kw)   1        Gemm transB=0  (ic, oc)    1                w @ x  (..., oc, ic)  last but one
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.errors import ModelError
from requant_onnx.graph.constants import (
    FLOATS,
    Root,
    find_stored,
    import_graph,
    is_standard,
    load_values,
    seen_shape,
    stored_axis,
)
from requant_onnx.graph.operands import CONVERTIBLE, constants_behind, edge_nodes, fits, from_constants, weight_operand

RECURRENT = ("LSTM", "GRU", "RNN")
QUANTIZED = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "MatMulNBits")


@dataclass(frozen=True)
class Weight:
    """A weight that can be converted.

    name: the tensor that holds the values, whose name the decoded weight takes over.  op: the operator that reads it.
    in_node: the values sit in a Constant node.  channel_axis: see above.  emit: ONNX type that its readers expect.
    channel_axis is None where the readers see no axis of the stored tensor as output channels.
    is_edge: no other weight lies before it, or none behind it (the first and last layers).
    """

    name: str
    op: str
    shape: tuple[int, ...]
    in_node: bool
    channel_axis: int | None
    emit: int
    is_edge: bool
    stored_bytes: int
    tensor: gs.Constant = field(repr=False, compare=False)

    def load(self) -> npt.NDArray[np.float32]:
        """The values as float32.  Raises ModelError when one is NaN or infinite."""
        w = load_values(self.tensor).astype(np.float32, copy=False)
        bad = w.size - np.count_nonzero(np.isfinite(w))
        if bad:
            raise ModelError(f"the weight '{self.name}' holds {bad} NaN or infinite values; repair or export the model again")
        return w


@dataclass(frozen=True)
class LeftAlone:
    """A weight that stays as it is, and why (a sentence without its subject).  bytes: stored, 0 where it is no constant."""

    name: str
    op: str
    shape: tuple[int, ...]
    reason: str
    bytes: int = 0


@dataclass(frozen=True)
class View:
    """All weights of a model in graph order."""

    weights: tuple[Weight, ...]
    left_alone: tuple[LeftAlone, ...]


def find_weights(model: onnx.ModelProto) -> View:
    """Look at every node that has a weight.  Raises ModelError when the graph cannot be followed, or a shape cannot be right."""
    graph = import_graph(model)
    bodies = [body for node in graph.nodes for body in node.subgraphs(recursive=True)]
    edges = edge_nodes(graph) or {edge for body in bodies for edge in edge_nodes(body)}
    interface = _Interface.of(model)
    weights: dict[str, Weight] = {}
    left: dict[tuple[str, str], LeftAlone] = {}
    for node in (node for each in (graph, *bodies) for node in each.nodes):
        for found in _look_at(node, interface, id(node) in edges):
            if isinstance(found, LeftAlone):
                left.setdefault((found.name, found.op), found)
            elif found.name not in weights or found.is_edge:  # shared: the first reader decides, any edge makes an edge
                weights[found.name] = replace(weights.get(found.name, found), is_edge=found.is_edge)
    for function in model.functions:
        for inner in (inner for inner in function.node if inner.op_type in CONVERTIBLE):
            reason = f"is used inside the function '{function.name}', whose opset is not that of the model"
            left.setdefault(
                (inner.name or function.name, inner.op_type), LeftAlone(inner.name or function.name, inner.op_type, (), reason)
            )
    return View(tuple(weights.values()), tuple(item for item in left.values() if item.name not in weights))


@dataclass(frozen=True)
class _Interface:
    """Names that callers of the model know.  overridable: initializers that a caller may replace (IR 4 and later).

    stored: the constants of the main graph, which alone can be replaced.  counted: constants whose bytes were told already.
    """

    outputs: frozenset[str]
    overridable: frozenset[str]
    sparse: frozenset[str]
    stored: frozenset[str]
    counted: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Interface:
        inputs = frozenset(item.name for item in model.graph.input) if model.ir_version >= 4 else frozenset()
        sparse = frozenset(item.values.name for item in model.graph.sparse_initializer)
        nodes = (node.output[0] for node in model.graph.node if node.op_type == "Constant" and node.output)
        stored = frozenset(item.name for item in model.graph.initializer) | frozenset(nodes) | sparse
        return cls(frozenset(item.name for item in model.graph.output), inputs, sparse, stored)

    def bytes_behind(self, tensor: gs.Tensor) -> int:
        """What the constants take that a tensor is computed from, 0 if from others too.  Each constant counts once."""
        found = [each for each in constants_behind(tensor) or () if id(each) not in self.counted]
        self.counted.update(id(each) for each in found)
        return sum(_bytes(each) for each in found)


def _look_at(node: gs.Node, interface: _Interface, is_edge: bool) -> Iterator[Weight | LeftAlone]:
    if is_standard(node) and node.op in CONVERTIBLE:
        yield from _weight_of(node, interface, is_edge)
    elif node.op in RECURRENT:
        yield from (
            LeftAlone(t.name, node.op, _shape(t), f"{node.op} weights are not converted", interface.bytes_behind(t))
            for t in node.inputs[1:3]
        )
    elif node.op in QUANTIZED:
        operand = node.inputs[3] if node.op.startswith("QLinear") else node.inputs[1]
        yield LeftAlone(operand.name, node.op, _shape(operand), f"is already quantized ({node.op})")


def _weight_of(node: gs.Node, interface: _Interface, is_edge: bool) -> Iterator[Weight | LeftAlone]:
    operand = weight_operand(node)
    if operand is None:
        return
    tensor = node.inputs[operand]
    root = find_stored(tensor)
    if root is None:
        reason = _why_computed(tensor)
        if reason is not None:
            yield LeftAlone(tensor.name, node.op, _shape(tensor), reason, interface.bytes_behind(tensor))
        return
    shape = tuple(int(n) for n in root.tensor.shape)
    seen = seen_shape(root)
    if seen is not None and not fits(node, seen):
        raise ModelError(
            f"the weight '{root.name}' of {node.op} '{node.name}' has a shape that does not fit its node; export the model again"
        )
    reason = _refusal(root, shape, interface)
    if reason is not None:
        yield LeftAlone(root.name, node.op, shape, reason, interface.bytes_behind(tensor))
        return
    yield Weight(
        name=root.name,
        op=node.op,
        shape=shape,
        in_node=root.in_node,
        channel_axis=_stored_channel_axis(node, operand, root),
        emit=_emitted_type(root, node.inputs[operand]),
        is_edge=is_edge,
        stored_bytes=_bytes(root.tensor),
        tensor=root.tensor,
    )


def _why_computed(tensor: gs.Tensor) -> str | None:
    """Why a weight that is no constant stays; None when it is plainly an activation (an input of the model)."""
    if not tensor.inputs:
        return "is an input of the model, not a constant"
    producer = tensor.inputs[0]
    if producer.op == "DequantizeLinear":
        return "is already quantized (DequantizeLinear)"
    if from_constants(tensor):
        return f"is decoded from other constants ({producer.op}), so it may be quantized already"
    return f"is computed by {producer.op} '{producer.name}', not a constant"


def _refusal(root: Root, shape: tuple[int, ...], interface: _Interface) -> str | None:
    if root.dtype not in FLOATS or root.edge_dtype not in FLOATS:
        name = onnx.TensorProto.DataType.Name(root.dtype) if root.dtype else "other than these"
        return f"has type {name}, and only FLOAT, FLOAT16 and BFLOAT16 are converted"
    if root.name not in interface.stored:
        return "is an output of a body of If, Loop or Scan"
    if root.name in interface.sparse:
        return "is a sparse initializer"
    if root.name in interface.outputs:
        return "is an output of the model, so its values are part of the interface"
    if root.name in interface.overridable:
        return "is also an input of the model, so a caller may replace it"
    return _unfit_shape(shape)


def _unfit_shape(shape: tuple[int, ...]) -> str | None:
    if 0 in shape:
        return "has no elements"
    return f"has {len(shape)} dimensions, and a weight has at least 2" if len(shape) < 2 else None


def _stored_channel_axis(node: gs.Node, operand: int, root: Root) -> int | None:
    seen = seen_shape(root)
    return None if seen is None or len(seen) < 2 else stored_axis(root, channel_axis(node, operand, len(seen)))


def channel_axis(node: gs.Node, operand: int, rank: int) -> int:
    """The dimension of the output channel in the stored weight (table above)."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return rank - 1 if operand == 1 else rank - 2


def _emitted_type(root: Root, edge: gs.Tensor) -> int:
    """FLOAT where all direct readers cast to it anyway, else the stored type."""
    if root.dtype == root.edge_dtype or root.casts == 0:
        return root.dtype
    source = edge
    while source.name != root.name:
        source = source.inputs[0].inputs[0]
    to_float = [node.op == "Cast" and _casts_to_float(node) for node in source.outputs]
    return int(onnx.TensorProto.FLOAT) if all(to_float) else root.dtype


def _casts_to_float(node: gs.Node) -> bool:
    return node.attrs["to"] in (onnx.TensorProto.FLOAT, np.float32)


def _bytes(tensor: gs.Constant) -> int:
    """What the values take in the file."""
    kind = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return math.prod(int(n) for n in tensor.shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def _shape(tensor: gs.Tensor) -> tuple[int, ...]:
    root = find_stored(tensor)
    shape = tensor.shape if root is None else root.tensor.shape
    return tuple(n if isinstance(n, int) else -1 for n in shape or ())
