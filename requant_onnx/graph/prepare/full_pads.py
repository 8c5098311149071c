"""Write Pad without its `axes`, because ONNX Runtime moves Pad across layouts and fails on axes between integer kernels.

https://onnx.ai/onnx/operators/onnx__Pad.html
"""

from __future__ import annotations

import numpy as np

from requant_onnx.graph.constants import ModelGraph, is_standard
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.shapes import find_shapes


def write_full_pads(view: ModelGraph) -> None:
    """Expand the pads of each Pad with constant pads and axes to every axis.  Changes the model."""
    model = view.proto
    pads = [n for n in view.nodes if n.op == "Pad" and is_standard(n) and len(n.inputs) > 3 and n.inputs[3].name]
    if not pads:
        return
    names = FreshNames(model)
    shapes = find_shapes(model)
    nodes = {node.output[0]: node for node in model.graph.node if node.op_type == "Pad"}
    for pad in pads:
        amounts, axes = (view.find_fixed(pad.inputs[k]) for k in (1, 3))
        rank, node = len(shapes.get(pad.inputs[0].name, ())), nodes.get(pad.outputs[0].name)
        if amounts is None or axes is None or node is None or rank == 0:
            continue
        full = np.zeros((2, rank), np.int64)
        full[:, np.asarray(axes.load(), np.int64) % rank] = np.asarray(amounts.load(), np.int64).reshape(2, -1)
        name = names.take(f"{node.input[1]}_full")
        set_initializer(model.graph, full.ravel(), name)
        node.input[1] = name
        del node.input[3:]
