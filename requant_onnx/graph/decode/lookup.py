"""Look up codes before decoding them, because a table after DequantizeLinear would be decoded as a whole in every run.

    y = Gather(decode(codes), indices)  ->  y = Cast(Gather(levels, indices)) * Gather(scale, indices)

https://onnx.ai/onnx/operators/onnx__Gather.html
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import FLOATS, cast_target, is_standard
from requant_onnx.graph.decode.writer import Scales
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.names import FreshNames


def decode_after_lookup(model: onnx.ModelProto, scales: Mapping[str, Scales]) -> None:
    """Make every reader of these tables, which are now levels, decode what it looks up.  Changes `model`.

    scales: table -> its scales, in a shape that broadcasts against it.
    """
    if not scales:
        return
    names = FreshNames(model)
    for graph in all_graphs(model.graph):
        nodes = []
        for node in graph.node:
            nodes.append(node)
            table = node.input[0] if node.input else ""
            if table in scales:
                nodes += _decoded(node, scales[table], names)
        if len(nodes) > len(graph.node):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)


def _decoded(node: onnx.NodeProto, scale: Scales, names: FreshNames) -> list[onnx.NodeProto]:
    """The nodes that decode after a lookup; the last takes over its output.  Changes the node."""
    result, axis = node.output[0], next((item.i for item in node.attribute if item.name == "axis"), 0)
    levels, numbers, factors, product = (
        names.take(f"{node.input[0]}_{part}") for part in ("levels", "numbers", "scales", "product")
    )
    node.output[0] = levels
    is_float = scale.emit == onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Cast", [levels], [numbers], to=onnx.TensorProto.FLOAT)]
    if scale.by_entry:
        nodes.append(helper.make_node("Gather", [scale.name, node.input[1]], [factors], axis=axis))
    factor = factors if scale.by_entry else scale.name
    nodes.append(helper.make_node("Mul", [numbers, factor], [result if is_float else product]))
    return nodes if is_float else [*nodes, helper.make_node("Cast", [product], [result], to=scale.emit)]


def looks_up_codes(node: gs.Node) -> bool:
    """Whether a node looks up entries of integer levels computed from constants; nodes after it decode the rest."""
    holder, producers = holder_of(node), node.inputs[0].inputs
    looks_up = holder is not None and holder.looks_up and is_standard(node)
    return looks_up and bool(producers) and producers[0].op == "Cast" and cast_target(producers[0]) not in FLOATS
