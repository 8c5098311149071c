"""The tensors on which models are compared: the outputs, or what they were selected from.

The smallest error changes which boxes TopK or NonMaxSuppression select, and in which order, and which class ArgMax returns, so that
the difference of such outputs says nothing.  Before the selection, errors are as small as their causes.  A selection counts only
if it depends on weights, and no layer with a weight follows it: the experts and the queries that a network selects for its next
layers are part of its result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import onnx

from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.constants import value_of
from requant_onnx.graph.holders import MIN_TABLE, holder_of
from requant_onnx.graph.operators import OPERATORS

SELECTIONS = {
    "ArgMax": 0,
    "ArgMin": 0,
    "BatchedNMS_TRT": 0,
    "EfficientNMS_TRT": 0,
    "Hardmax": 0,
    "NMSRotated": 0,
    "NonMaxSuppression": 0,
    "NonZero": 0,
    "TopK": 1,
    "Unique": 0,
}
"""The index of the first output that is selected; the values of TopK change as little as its inputs."""
DECISIONS = frozenset(
    ("And", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Round", "Sign", "Xor")
)
"""Operators that prepare a selection by comparing values, such as with a threshold."""
MASKS = frozenset(("Where",))  # operators that replace values by large constants before a selection
SHAPES = frozenset(("Shape", "Size"))  # operators whose results do not depend on the values
SMALLEST = 64  # number of elements of a weight; smaller ones convert corners of boxes, for example
COORDINATES = 8  # largest row of a table of anchors; rows of embeddings are longer


def compared_tensors(model: onnx.ModelProto) -> list[str]:
    """The outputs of a model without those that are selected, and the tensors from which the latter are selected."""
    flow, compared = _Flow(model), []
    for item in model.graph.output:
        sources = [*flow.sources_of(item.name)] if item.name in flow.selected else []
        compared += sources or [item.name]
    return list(dict.fromkeys(compared))


def has_tensors(model: onnx.ModelProto, names: Collection[str]) -> bool:
    """Whether a model computes all the named tensors."""
    graph = model.graph
    return {name for node in graph.node for name in node.output}.issuperset(set(names) - {item.name for item in graph.output})


def with_outputs(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of a model with the named tensors as outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    old = {item.name: item for item in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(old.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return copy


class _Flow:
    """The flow of values in a model.  selected: tensors that depend on a selection after the last weight."""

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        self._functions = {(each.domain, each.name) for each in model.functions}
        self._shapes = _stored_shapes(model.graph, nodes)
        self._reads = [[*filter(None, node.input), *_captured(node)] for node in nodes]
        self._makers = {name: k for k, node in enumerate(nodes) for name in node.output if name}
        self._masks = {name for node in nodes if node.op_type in MASKS for name in node.output}
        sparse = {item.values.name for item in model.graph.sparse_initializer}
        self._computed = {item.name for item in model.graph.input} - self._shapes.keys() - sparse  # depend on the inputs
        self._learned: set[str] = set()  # of these, those that depend on weights
        self._decided: set[str] = set()  # of these, those that follow only from decisions
        weighty = [self._follow(node, reads) for node, reads in zip(nodes, self._reads, strict=True)]
        early: set[str] = set()  # tensors that a weight follows
        for k in reversed(range(len(nodes))):
            if weighty[k] or not early.isdisjoint(nodes[k].output):
                early.update(self._reads[k])
        self.selected: set[str] = set()
        for node, reads, has_weight in zip(nodes, self._reads, weighty, strict=True):
            if not self.selected.isdisjoint(reads):
                self.selected.update(filter(None, node.output))
            elif not has_weight and early.isdisjoint(node.output) and not self._learned.isdisjoint(reads):
                self.selected.update(filter(None, _selected_outputs(node)))

    def _follow(self, node: onnx.NodeProto, reads: Sequence[str]) -> bool:
        """Note what the outputs of a node depend on.  Returns whether it has a weight."""
        has_weight = self._has_weight(node)
        if node.op_type in SHAPES or self._computed.isdisjoint(reads):
            return has_weight
        made = [name for name in node.output if name]
        self._computed.update(made)
        learned = self._learned.intersection(reads)
        if has_weight or learned:
            self._learned.update(made)
        if learned and not has_weight and (node.op_type in DECISIONS or self._decided.issuperset(learned)):
            self._decided.update(made)
        return has_weight

    def _has_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a node, or one in its bodies, multiplies by a weight, looks up embeddings, or calls a function."""
        if (node.domain, node.op_type) in self._functions:
            return True
        if any(self._has_weight(each) for body in subgraphs_of(node) for graph in all_graphs(body) for each in graph.node):
            return True
        row, holder = OPERATORS.get(node.op_type), holder_of(node)
        if row is None and (holder is None or holder.is_table):
            return False
        held = row.weights if row is not None else None if holder is None else holder.weights
        names = [name for k, name in enumerate(node.input) if name and (held is None or k in held)]
        shapes = [self._shapes.get(name, (SMALLEST,)) for name in names if name not in self._computed]
        if holder is not None and holder.looks_up:
            return any(math.prod(shape) >= MIN_TABLE and shape[-1] > COORDINATES for shape in shapes)
        return any(math.prod(shape) >= SMALLEST for shape in shapes)

    def sources_of(self, output: str) -> Iterator[str]:
        """The tensors that depend on weights, and from which a selected tensor is made."""
        waiting, seen = [output], {output}
        while waiting:
            for name in self._reads[self._makers[waiting.pop()]]:
                if name in seen or name not in self._learned:
                    continue
                seen.add(name)
                if name in self.selected or name in self._decided or name in self._masks:
                    waiting.append(name)
                else:
                    yield name


def _stored_shapes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> dict[str, tuple[int, ...]]:
    constants = ((node.output[0], value) for node in nodes if (value := value_of(node)) is not None)
    return {name: tuple(value.dims) for name, value in (*((item.name, item) for item in graph.initializer), *constants)}


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the bodies of a node read; some may be of their own tensors."""
    for body in subgraphs_of(node):
        yield from filter(None, reads_in(body))


def _selected_outputs(node: onnx.NodeProto) -> Sequence[str]:
    """The outputs that a node, or one in its bodies, selects."""
    if any(each.op_type in SELECTIONS for body in subgraphs_of(node) for graph in all_graphs(body) for each in graph.node):
        return list(node.output)
    first = SELECTIONS.get(node.op_type)
    return () if first is None else list(node.output)[first:]
