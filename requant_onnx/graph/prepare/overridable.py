"""Make weights constant that callers could replace: initializers that are also graph inputs, as older exporters write them.

ONNX Runtime treats such an initializer as an input that has a default value (IR 4 and later), and folds nothing that depends on it.
https://onnx.ai/onnx/repo-docs/IR.html#graphs
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import is_standard_proto
from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.holders import NORMALIZATIONS, holder_of
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.graph.prepare.expose import nodes_behind


def remove_weights_from_inputs(model: onnx.ModelProto) -> int:
    """Remove weights, biases and normalization parameters from the inputs; return their number.  Other inputs stay.

    Changes `model`.  Before IR 4 every initializer is an input, and none can be replaced.
    """
    graph = model.graph
    dims = {item.name: item.dims for item in graph.initializer}
    both = {item.name for item in graph.input} & dims.keys()
    if model.ir_version < 4 or not both:
        return 0
    producers = {output: node for node in graph.node for output in node.output}
    wanted = set()
    for node in (node for each in all_graphs(graph) for node in each.node):
        for operand, name in enumerate(node.input):
            behind = list(nodes_behind(name, producers))
            root = behind[-1].input[0] if behind else name
            if root in both and _is_parameter(node, operand, dims[root]):
                wanted.add(root)
    delete_where(graph.input, [k for k, item in enumerate(graph.input) if item.name in wanted])
    return len(wanted)


def _is_parameter(node: onnx.NodeProto, operand: int, dims: Sequence[int]) -> bool:
    if is_standard_proto(node) and (node.op_type in OPERATORS or node.op_type in NORMALIZATIONS):
        return True
    holder = holder_of(node)
    if holder is None:
        return False
    return holder.may_hold(operand, dims) or (not holder.is_table and not holder.looks_up)
