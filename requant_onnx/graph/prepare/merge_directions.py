"""Store the weights of a bidirectional LSTM, GRU or RNN with one axis for directions and rows, so that each row gets a scale.

    W (2, rows, n)  ->  Reshape(W, (2, rows, n)),   W (2 * rows, n)

https://onnx.ai/onnx/operators/onnx__LSTM.html
"""

from __future__ import annotations

import numpy as np
from onnx import helper

from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.edit import drop_stale_types, rename_reads, set_initializer
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.names import FreshNames

DIRECTIONS = 2


def merge_directions(model: ModelGraph) -> None:
    """Merge the first two axes of every such weight that only one node reads.  Changes the model."""
    graph, names = model.proto.graph, FreshNames(model.proto)
    inputs = {item.name for item in model.proto.graph.input}
    stored = {item.name: item for item in graph.initializer if item.name not in inputs}
    wanted = []
    for node in model.nodes:
        holder = holder_of(node)
        if holder is None or not holder.is_recurrent:
            continue
        for operand in holder.weights or ():
            name = node.inputs[operand].name
            tensor = stored.get(name)
            if tensor is not None and len(tensor.dims) == 3 and tensor.dims[0] == DIRECTIONS and model.read_counts[name] == 1:
                wanted.append((tensor, name))
    for tensor, name in wanted:
        shape = tuple(tensor.dims)
        tensor.dims[:] = [shape[0] * shape[1], shape[2]]
        axes, whole = names.take(f"{name}_shape"), names.take(f"{name}_directions")
        set_initializer(graph, np.array(shape, np.int64), axes)
        rename_reads(graph, {name: whole})
        graph.node.insert(0, helper.make_node("Reshape", [name, axes], [whole]))  # the name of a weight stays, for layer rules
    drop_stale_types(graph, [name for _, name in wanted])
