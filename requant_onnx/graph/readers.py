"""The weights of a model as its nodes see them, decoded or not, and the part of the graph that computes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import import_graph, is_standard
from requant_onnx.graph.operands import CONVERTIBLE, from_constants, weight_operand
from requant_onnx.graph.weights import channel_axis

DECODING = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul", "QGemm": "Gemm"}
"""Integer kernel whose inputs 3 to 5 are weight, scale and zero point -> the operator that it stands for."""
BARE = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits")
"""Integer kernels whose input 1 is a weight that is decoded elsewhere, or packed."""


@dataclass(frozen=True)
class Reader:
    """A node with a constant weight.

    weight: name of the tensor that it reads, behind all decoding.  output: name of the float that it gives, "" in a body.
    scale: names of scale and zero point where the node itself decodes.  bare: the weight's values cannot be told.
    """

    op: str
    weight: str
    output: str
    node: gs.Node
    scale: tuple[str, ...] = ()
    bare: bool = False

    @property
    def operand(self) -> int:
        """Which input of the node the weight is."""
        if self.scale:
            return 3
        return 1 if self.bare else weight_operand(self.node) or 0

    def channel_axis(self, rank: int) -> int:
        """The dimension of the output channel, of a weight with so many dimensions."""
        if self.scale:
            by_row = self.op == "Conv" or (self.op == "Gemm" and self.node.attrs.get("transB", 0))
            return 0 if by_row else rank - 1
        return channel_axis(self.node, self.operand, rank)


def find_readers(model: onnx.ModelProto) -> list[Reader]:
    """In graph order; those in bodies of If, Loop and Scan behind all others."""
    nodes = list(import_graph(model).nodes)
    inner = [each for node in nodes for body in node.subgraphs(recursive=True) for each in body.nodes]
    found = [_reader(node, node.outputs[0].name if node.outputs else "") for node in nodes]
    return [reader for reader in (*found, *(_reader(node, "") for node in inner)) if reader is not None]


def _reader(node: gs.Node, output: str) -> Reader | None:
    if node.op in CONVERTIBLE and is_standard(node):
        operand = weight_operand(node)
        if operand is not None and from_constants(node.inputs[operand]):
            return Reader(node.op, node.inputs[operand].name, output, node)
    elif node.op in DECODING and all(from_constants(tensor) for tensor in node.inputs[3:6]):
        weight, *scale = (tensor.name for tensor in node.inputs[3:6])
        return Reader(DECODING[node.op], weight, "", node, tuple(scale))
    elif node.op in BARE and from_constants(node.inputs[1]):
        return Reader(node.op, node.inputs[1].name, "", node, bare=True)
    return None


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


def settled_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor that is only rounded to integers -> what becomes of it behind DequantizeLinear.

    Its own values are not those of the model: a Relu in front may have been left to the rounding.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {item.name for item in model.graph.output}
    found = {}
    for name, nodes in readers.items():
        codes = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == name}
        behind = [node for code in codes for node in readers.get(code, ()) if node.op_type == "DequantizeLinear"]
        if len(nodes) == len(codes) and behind and name not in outputs:
            found[name] = str(behind[0].output[0])
    return found
