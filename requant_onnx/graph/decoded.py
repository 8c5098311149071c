"""The weights of a model as its nodes see them, decoded or not, and the part of the graph that computes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import import_graph, is_standard
from requant_onnx.graph.operands import CONVERTIBLE, from_constants, weight_operand
from requant_onnx.graph.weights import channel_axis


@dataclass(frozen=True)
class Reader:
    """A node of the main graph with a constant weight.

    weight: name of the tensor that it reads, behind all decoding; output: name of what it gives.
    """

    op: str
    weight: str
    output: str
    node: gs.Node

    def channel_axis(self, rank: int) -> int:
        """The dimension of the output channel, of a weight with so many dimensions."""
        operand = weight_operand(self.node)
        return channel_axis(self.node, 1 if operand is None else operand, rank)


def find_readers(model: onnx.ModelProto) -> list[Reader]:
    """In graph order."""
    found = []
    for node in import_graph(model).nodes:
        operand = weight_operand(node) if node.op in CONVERTIBLE and is_standard(node) else None
        if operand is not None and from_constants(node.inputs[operand]):
            found.append(Reader(node.op, node.inputs[operand].name, node.outputs[0].name, node))
    return found


def constant_part(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A model without inputs whose outputs are these tensors.  names: of tensors that are computed from constants."""
    stored = {item.name: item for item in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    behind, needed = list(names), set()
    while behind:
        name = behind.pop()
        if name not in needed:
            needed.add(name)
            behind.extend(makers[name].input if name in makers else ())
    nodes = [node for node in model.graph.node if needed.intersection(node.output)]
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    own = [stored[name] for name in sorted(needed) if name in stored]
    graph = onnx.helper.make_graph(nodes, "constants", [], outputs, own)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
