"""The tensors on which models are compared: the outputs, or what they were selected from.

The smallest error changes which boxes TopK or NonMaxSuppression select, and in which order, and which class ArgMax returns, so that
the difference of such outputs says nothing.  Before the selection, errors are as small as their causes.  A selection counts only
if no layer with a weight follows it: the experts and the queries that a network selects for its next layers are part of its result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import onnx

from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.constants import value_of
from requant_onnx.graph.operators import OPERATORS

SELECTIONS = frozenset(
    (
        "ArgMax",
        "ArgMin",
        "BatchedNMS_TRT",
        "EfficientNMS_TRT",
        "Hardmax",
        "NMSRotated",
        "NonMaxSuppression",
        "NonZero",
        "TopK",
        "Unique",
    )
)
DECISIONS = frozenset(
    ("And", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Round", "Sign", "Xor")
)
"""Operators that prepare a selection by comparing values, such as with a threshold."""
SHAPES = frozenset(("Shape", "Size"))  # operators whose results do not depend on the values
SMALLEST = 64  # number of elements of a weight; smaller ones convert corners of boxes, for example


def compared_tensors(graph: onnx.GraphProto) -> list[str]:
    """The outputs of a graph without those that are selected, and the tensors from which the latter are selected."""
    flow = _Flow(graph)
    outputs = [item.name for item in graph.output]
    selected = [name for name in outputs if name in flow.selected]
    sources = dict.fromkeys(name for output in selected for name in flow.sources_of(output))
    return list(dict.fromkeys([*(name for name in outputs if name not in flow.selected), *sources])) if sources else outputs


def has_tensors(graph: onnx.GraphProto, names: Collection[str]) -> bool:
    """Whether a graph computes all the named tensors."""
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
    """The flow of values in a graph.  selected: tensors that depend on a selection after the last weight."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        nodes = list(graph.node)
        stored = {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
        constants = ((node.output[0], value) for node in nodes if (value := value_of(node)) is not None)
        stored_values = [*((item.name, item) for item in graph.initializer), *constants]
        sizes = {name: math.prod(value.dims) for name, value in stored_values}
        self._inputs = {item.name for item in graph.input} - stored
        self._reads = [[*filter(None, node.input), *_captured(node)] for node in nodes]
        self._decided = {name for node in nodes if node.op_type in DECISIONS for name in node.output}
        self._producers = {name: k for k, node in enumerate(nodes) for name in node.output if name}
        self._computed = set(self._inputs)  # tensors that depend on the inputs
        for node, reads in zip(nodes, self._reads, strict=True):
            if node.op_type not in SHAPES and not self._computed.isdisjoint(reads):
                self._computed.update(filter(None, node.output))
        early: set[str] = set()  # tensors that a weight follows
        for node, reads in zip(reversed(nodes), reversed(self._reads), strict=True):
            if self._has_weight(node, sizes) or not early.isdisjoint(node.output):
                early.update(reads)
        self.selected: set[str] = set()
        for node, reads in zip(nodes, self._reads, strict=True):
            is_late = early.isdisjoint(node.output) and not self._computed.isdisjoint(node.output)
            if (is_late and _selects(node)) or not self.selected.isdisjoint(reads):
                self.selected.update(filter(None, node.output))

    def _has_weight(self, node: onnx.NodeProto, sizes: dict[str, int]) -> bool:
        if any(each.op_type in OPERATORS for body in subgraphs_of(node) for graph in all_graphs(body) for each in graph.node):
            return True
        row = OPERATORS.get(node.op_type)
        operands = [node.input[k] for k in row.weights if k < len(node.input)] if row is not None else []
        return any(name not in self._computed and sizes.get(name, SMALLEST) >= SMALLEST for name in operands)

    def sources_of(self, output: str) -> Iterator[str]:
        """The computed tensors from which a selected one is made, that are neither inputs nor selected themselves."""
        waiting, seen = [output], {output}
        while waiting:
            for name in self._reads[self._producers[waiting.pop()]]:
                if name in seen or name not in self._computed or name in self._inputs:
                    continue
                seen.add(name)
                if name in self.selected or name in self._decided:
                    waiting.append(name)
                else:
                    yield name


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the bodies of a node read; some may be of their own tensors."""
    for body in subgraphs_of(node):
        yield from filter(None, reads_in(body))


def _selects(node: onnx.NodeProto) -> bool:
    return node.op_type in SELECTIONS or any(_selects(each) for body in subgraphs_of(node) for each in body.node)
