"""The part of a graph that runs on 8-bit integers: which activations are quantized, and which nodes work on them.

    weighted   Conv, Gemm, MatMul with a converted weight      int8 weight, uint8 activation -> QLinearConv, QGemm, QLinearMatMul
    generic    Add, Mul, Concat, pools, Sigmoid, LeakyRelu     if all their inputs are uint8 and their result is needed as uint8
    moves      MaxPool, Reshape, Slice, Pad, ...               on the codes themselves, because values only move

A Relu, or a Clip from 0, after the first two kinds needs no node, because codes start at 0 (the zero point is the type's minimum).
Every other node works on floats.  https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph, find_root, from_constants, is_standard
from requant_onnx.graph.operands import bias_input, operator_of, weight_operand
from requant_onnx.graph.operators import OPERATORS

GENERIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
MOVES = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Pad", "Identity")


@dataclass(frozen=True)
class WeightedNode:
    """A node that multiplies by an int8 weight.

    output: its first output.  weight: name of the stored tensor.  x: activation it reads.  bias: tensor it adds, "" for none.
    """

    output: str
    weight: str
    x: str
    bias: str


@dataclass
class IntegerPlan:
    """The nodes on integers.  weighted: nodes with a weight.  moves: first outputs of the nodes that move codes.

    source: quantized tensor -> the tensor that has its range (itself, or the one that moves derive it from).
    floats: quantized tensors that a float node computes (or the caller provides), so that float readers keep the float.
    ceilings: quantized tensor -> the upper bound of a Clip absorbed into it, which no range may exceed.
    why_not: converted weight that stays float -> reason (a sentence without its subject).
    results: first output of a node on integers -> the tensor with its result, after an activation function that needs no node.
    """

    weighted: list[WeightedNode] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    ceilings: dict[str, float] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, list[WeightedNode]]:
        """The nodes that read each integer weight."""
        readers: dict[str, list[WeightedNode]] = {}
        for node in self.weighted:
            readers.setdefault(node.weight, []).append(node)
        return readers


def plan_integers(model: ModelGraph, weights: Collection[str], generic: Collection[str] = GENERIC) -> IntegerPlan:
    """Plan the conversion.  weights: the converted tensors.  generic: operators without a weight that may run on integers."""
    graph = model.graph
    plan = IntegerPlan()
    outputs = {id(tensor) for tensor in graph.outputs}
    weighted = _weighted_nodes(model, weights, plan.why_not)
    results = _Results(outputs, {id(node) for node in graph.nodes if not _is_set_by_callers(model, node)})
    able = _able(graph, weighted, results, generic)
    wanted = _wanted(graph, weighted, able, results)
    for node in graph.nodes:
        if id(node) in weighted:
            plan.weighted.append(weighted[id(node)])
            _carry(plan, node.inputs[0])
        elif id(node) in able and id(results.of(node)) in wanted:
            if node.op in MOVES:
                plan.moves.append(node.outputs[0].name)
        else:
            continue
        result = results.of(node)
        plan.results[node.outputs[0].name] = result.name
        if result is not node.outputs[0] and result.inputs[0].op == "Clip":
            plan.ceilings[result.name] = _ceiling(result.inputs[0])
        if node.op in MOVES:
            plan.source[result.name] = plan.source[node.inputs[0].name]
        elif id(result) in wanted:
            plan.source[result.name] = result.name
    return plan


def _carry(plan: IntegerPlan, tensor: gs.Tensor) -> None:
    """Quantize the input of a weighted node even where a float node computes it."""
    if tensor.name not in plan.source:
        plan.source[tensor.name] = tensor.name
        plan.floats.add(tensor.name)


def _is_set_by_callers(model: ModelGraph, node: gs.Node) -> bool:
    """Whether a caller may replace the bounds of a Clip, or the values of a Pad."""
    return node.op in ("Clip", "Pad") and any(
        (root := find_root(tensor)) is not None and root.name in model.overridable for tensor in node.inputs[1:]
    )


class _Results:
    """The tensors with the nodes' results: after a Relu or a Clip from 0 that is a node's only reader.

    nodes: ids of the nodes of the main graph whose parameters no caller may replace.
    """

    def __init__(self, outputs: set[int], nodes: set[int]) -> None:
        self._outputs, self.nodes = outputs, nodes

    def of(self, node: gs.Node) -> gs.Tensor:
        result = node.outputs[0]
        if node.op in MOVES or len(result.outputs) != 1 or id(result) in self._outputs:
            return result
        reader = result.outputs[0]
        return reader.outputs[0] if id(reader) in self.nodes and _rectifies(reader) else result


def _rectifies(node: gs.Node) -> bool:
    if node.op == "Relu" and is_standard(node):
        return True
    if node.op != "Clip" or not is_standard(node):
        return False
    low = find_root(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
    return low is not None and bool(np.all(low.load() == 0)) and _ceiling(node) > 0.0


def _ceiling(clip: gs.Node) -> float:
    """The upper bound of a Clip; 0 where it is not constant."""
    if len(clip.inputs) < 3 or not clip.inputs[2].name:
        return math.inf
    high = find_root(clip.inputs[2])
    return float(np.min(high.load())) if high is not None else 0.0


def _weighted_nodes(model: ModelGraph, weights: Collection[str], why_not: dict[str, str]) -> dict[int, WeightedNode]:
    """The nodes with weights, by id.  A weight counts only if all its readers can work on integers."""
    weighted: dict[int, WeightedNode] = {}
    axes: dict[str, int] = {}
    for node in model.nodes:
        for operand, tensor in enumerate(node.inputs):
            root = find_root(tensor)
            if root is None or root.name not in weights:
                continue
            reason = _why_not_weighted(model, node, operand, len(root.shape))
            if reason is None and axes.setdefault(root.name, axis := _channel_axis(node, len(root.shape))) != axis:
                reason = "is read along two axes"
            if reason is None:
                bias = bias_input(node)
                names = (node.outputs[0].name, root.name, node.inputs[0].name)
                weighted[id(node)] = WeightedNode(*names, "" if bias is None else bias.name)
            elif node.op not in ("Cast", "Identity"):  # not yet the actual reader
                why_not.setdefault(root.name, reason)
    return {key: node for key, node in weighted.items() if node.weight not in why_not}


def _why_not_weighted(model: ModelGraph, node: gs.Node, operand: int, rank: int) -> str | None:
    operator = operator_of(node)
    if operator is None or operator.kernel is None:
        return f"is read by {node.op}, for which ONNX Runtime has no integer kernel"
    if weight_operand(node) != operand or operand != 1:
        return f"is not the second operand of {node.op}"
    if from_constants(node.inputs[0]):
        return "is multiplied with a constant"
    bias = bias_input(node)
    refusal = operator.refusal(node.attrs, bias is not None, rank)
    if refusal:
        return refusal
    return "is added to a bias that is not a constant vector" if bias is not None and not _is_vector(model, bias, node) else None


def _channel_axis(node: gs.Node, rank: int) -> int:
    """The axis of the output channels in the weight at input 1."""
    return OPERATORS[node.op].channel_axis(node.attrs, 1, rank)


def _is_vector(model: ModelGraph, bias: gs.Tensor, node: gs.Node) -> bool:
    """Whether the bias has one constant value per output channel."""
    root, weight = model.find_fixed(bias), find_root(node.inputs[1])
    if root is None or weight is None or root.dtype != onnx.TensorProto.FLOAT:
        return False
    return root.shape == (weight.shape[_channel_axis(node, len(weight.shape))],)


def _able(graph: gs.Graph, weighted: dict[int, WeightedNode], results: _Results, generic: Collection[str]) -> set[int]:
    """The ids of nodes whose result can be integers, and of those results."""
    able: set[int] = set()
    for node in graph.nodes:
        if id(node) in weighted or (is_standard(node) and id(node) in results.nodes and _follows(node, able, generic)):
            able.update((id(node), id(results.of(node))))
    return able


def _follows(node: gs.Node, able: set[int], generic: Collection[str]) -> bool:
    """Whether a node without a weight can work on integers, given its inputs."""
    if node.op in generic:
        if set(node.attrs.get("dilations", (1,))) != {1}:  # QLinearAveragePool has no dilations
            return False
        return all(id(tensor) in able for tensor in node.inputs)
    if node.op not in MOVES or not node.inputs or id(node.inputs[0]) not in able or len(node.outputs) != 1:
        return False
    return node.op != "Pad" or (_pads_with_zero(node) and len(node.inputs) < 4)  # ONNX Runtime fails on Pad with axes


def _pads_with_zero(node: gs.Node) -> bool:
    value = find_root(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    given = len(node.inputs) > 2 and node.inputs[2].name != ""
    return node.attrs.get("mode", "constant") != "constant" or not given or (value is not None and not np.any(value.load()))


def _wanted(graph: gs.Graph, weighted: dict[int, WeightedNode], able: set[int], results: _Results) -> set[int]:
    """The ids of the tensors needed as integers: read by a weighted node, or by one whose own result is needed as integers."""
    wanted: set[int] = set()
    for node in reversed(graph.nodes):
        if id(node) in weighted:
            wanted.add(id(node.inputs[0]))
            if not OPERATORS[node.op].float_results:
                wanted.add(id(results.of(node)))
        elif id(node) in able and id(results.of(node)) in wanted:
            wanted.update(id(tensor) for tensor in (node.inputs[:1] if node.op in MOVES else node.inputs))
    return wanted
