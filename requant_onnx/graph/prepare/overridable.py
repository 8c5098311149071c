"""Make weights constant that callers could replace: initializers that are also graph inputs, as older exporters write them.

ONNX Runtime treats such an initializer as an input that has a default value (IR 4 and later), and folds nothing that depends on it.
An input that has a default value for another reason, such as the initial state of an LSTM or a mask, stays an input.
https://onnx.ai/onnx/repo-docs/IR.html#graphs
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from requant_onnx.files.walk import all_graphs, subgraphs_of
from requant_onnx.graph.constants import FLOATS, is_random, is_standard_proto, value_of
from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.holders import NORMALIZATIONS, Holder, holder_of
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.graph.prepare.expose import nodes_behind


def remove_weights_from_inputs(model: onnx.ModelProto) -> int:
    """Remove weights, biases and normalization parameters from the inputs; return their number.  Other inputs stay.

    Changes `model`.  Before IR 4 every initializer is an input, and none can be replaced.
    """
    graph = model.graph
    if model.ir_version < 4 or not {item.name for item in graph.input} & {item.name for item in graph.initializer}:
        return 0
    values = _Values.of(graph)
    wanted = {name for each in all_graphs(graph) for node in each.node for name in values.replaced(node)}
    delete_where(graph.input, [k for k, item in enumerate(graph.input) if item.name in wanted])
    return len(wanted)


@dataclass(frozen=True)
class _Values:
    """The stored values of a graph.  stored: all initializers.  inputs: the names of those that are inputs too.

    producers: the node that computes a tensor.  sources: the initializers and constants that a tensor is computed from, unless it
    depends on anything else.
    all_listed: whether all matrices are inputs, as older exporters write them, so that this does not mean that callers set them.
    """

    stored: dict[str, onnx.TensorProto]
    inputs: frozenset[str]
    producers: dict[str, onnx.NodeProto]
    sources: dict[str, frozenset[str]]
    all_listed: bool

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Values:
        stored = {item.name: item for item in graph.initializer}
        sources = {name: frozenset((name,)) for name in stored}
        for node in graph.node:
            read = [sources.get(name) for name in node.input if name]
            if None not in read and not is_random(node.op_type) and next(subgraphs_of(node), None) is None:
                behind = frozenset().union(*(each for each in read if each is not None)) if read else frozenset(node.output)
                sources.update((name, behind) for name in node.output if name)
        inputs = frozenset(item.name for item in graph.input) & stored.keys()
        constants = {node.output[0]: value for node in graph.node if (value := value_of(node)) is not None}
        operands = {name for node in graph.node if node.op_type in OPERATORS for name in node.input}
        constants = {name: value for name, value in constants.items() if name in operands}  # no exporter lists others
        matrices = {name for name, value in {**stored, **constants}.items() if len(value.dims) > 1 and value.data_type in FLOATS}
        producers = {output: node for node in graph.node for output in node.output if output}
        return cls(stored, inputs, producers, sources, matrices <= inputs)

    def replaced(self, node: onnx.NodeProto) -> Iterator[str]:
        """The inputs of the model that are weights or other parameters of a node."""
        for operand in self._parameters(node):
            name = node.input[operand] if operand < len(node.input) else ""
            behind = self.sources.get(name, frozenset()) if self.all_listed else self._chain(name)
            yield from (each for each in behind & self.inputs if 0 not in self.stored[each].dims)

    def _chain(self, name: str) -> set[str]:
        """The root of a tensor, and the shapes and axes on the way from there."""
        return {self._root(name), *(other for step in nodes_behind(name, self.producers) for other in step.input[1:])}

    def _root(self, name: str) -> str:
        steps = list(nodes_behind(name, self.producers))
        return steps[-1].input[0] if steps else name

    def _parameters(self, node: onnx.NodeProto) -> Collection[int]:
        """The operands of a node that are weights, biases or parameters of a normalization, if they are stored."""
        holder = holder_of(node)
        if is_standard_proto(node) and node.op_type in OPERATORS:
            row = OPERATORS[node.op_type]
            return {*self._weight(node, row.weights), *(() if row.bias is None else (row.bias,))}
        if is_standard_proto(node) and node.op_type in NORMALIZATIONS:
            return range(1, len(node.input))
        if holder is None or (holder.is_table and not self.all_listed):
            return ()
        found = [k for k in range(len(node.input)) if self._is_held(node, holder, k)]
        return self._weight(node, found[::-1]) if holder.multiplies_either else found

    def _weight(self, node: onnx.NodeProto, operands: Collection[int]) -> list[int]:
        """The operand that is the weight; an input that is multiplied by a fixed weight is an activation with a default value."""
        known = [k for k in operands if k < len(node.input) and node.input[k] in self.sources]
        fixed = [k for k in known if self.inputs.isdisjoint(self.sources[node.input[k]])]
        return (fixed or known)[:1]

    def _is_held(self, node: onnx.NodeProto, holder: Holder, operand: int) -> bool:
        """Whether an operand is a weight, or a vector that is added to results, such as a bias."""
        value = self.stored.get(self._root(node.input[operand]))
        if value is None:
            return False
        is_vector = len(value.dims) == 1 and value.data_type in FLOATS
        takes_vectors = not holder.is_table and not holder.looks_up
        return holder.may_hold(operand, value.dims) or (takes_vectors and (is_vector or holder.is_parameter(operand)))
