"""The weights of a model as its nodes read them, decoded or not, and the part of the graph that computes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph, from_constants
from requant_onnx.graph.operands import weight_operand
from requant_onnx.graph.operators import KERNELS, OPERATORS


@dataclass(frozen=True)
class WeightReader:
    """A node with a constant weight.

    op: the float operator, or an integer kernel that hides the weight's values.  operand: index of the weight's input.
    output: name of its float output, "" in a body.  scale: names of scale and zero point if the node itself decodes.
    """

    op: str
    node: gs.Node
    operand: int
    output: str = ""
    scale: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """The name of the tensor that it reads, after all decoding."""
        return self.node.inputs[self.operand].name

    @property
    def is_known(self) -> bool:
        """Whether the values of the weight can be determined."""
        return self.op in OPERATORS

    def channel_axis(self, rank: int) -> int:
        """The axis of the output channel, for a weight with this number of dimensions."""
        return OPERATORS[self.op].channel_axis(self.node.attrs, 1 if self.scale else self.operand, rank)


def find_readers(model: ModelGraph) -> list[WeightReader]:
    """The weight readers in graph order; those in bodies of If, Loop and Scan come last."""
    inner = [node for body in model.bodies for node in body.nodes]
    readers = [_reader(node, node.outputs[0].name if node.outputs else "") for node in model.nodes]
    return [reader for reader in (*readers, *(_reader(node, "") for node in inner)) if reader is not None]


def _reader(node: gs.Node, output: str) -> WeightReader | None:
    operand, kernel = weight_operand(node), KERNELS.get(node.op)
    if operand is not None and from_constants(node.inputs[operand]):
        return WeightReader(node.op, node, operand, output)
    if kernel is None or not from_constants(node.inputs[kernel.weight]):
        return None
    if kernel.parameters is None:
        return WeightReader(node.op, node, kernel.weight)
    parameters = [node.inputs[k] for k in kernel.parameters]
    known = all(from_constants(tensor) for tensor in parameters)
    return WeightReader(kernel.operator, node, kernel.weight, "", tuple(tensor.name for tensor in parameters)) if known else None


def constant_part(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A model without inputs whose outputs are these tensors.  names: names of tensors that are computed from constants."""
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
    initializers = [stored[name] for name in sorted(needed) if name in stored]
    graph = onnx.helper.make_graph(nodes, "constants", [], outputs, initializers)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def settled_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """The decoded counterpart of each tensor that is only quantized: tensor -> output of the DequantizeLinear.

    The tensor's own values may differ from the model's, because quantization may have replaced a Relu before it.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {item.name for item in model.graph.output}
    settled = {}
    for name, nodes in readers.items():
        codes = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == name}
        behind = [node for code in codes for node in readers.get(code, ()) if node.op_type == "DequantizeLinear"]
        if len(nodes) == len(codes) and behind and name not in outputs:
            settled[name] = str(behind[0].output[0])
    return settled
