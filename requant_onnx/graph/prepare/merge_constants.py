"""Store equal small constants once: axes, shapes and scalars, which exporters repeat under a long name for every node.

Constants in bodies of If, Loop and Scan move to the main graph, which bodies can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from requant_onnx.files.external import is_external
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import FLOATS, value_of
from requant_onnx.graph.edit import delete_where, rename_reads
from requant_onnx.graph.names import FreshNames

MAX_ELEMENTS = 16


def merge_constants(model: onnx.ModelProto) -> None:
    """Merge integer tensors of few elements and scalar floats.  Changes the model."""
    graph, names = model.graph, FreshNames(model)
    interface = {item.name for each in all_graphs(graph) for item in (*each.input, *each.output)}
    merged: dict[tuple[int, tuple[int, ...], bytes], onnx.TensorProto] = {}
    for each in list(all_graphs(graph)):
        renamed = {}
        for name, tensor in _small(each):
            if name in interface:
                continue
            key = (tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes())
            if key not in merged:
                merged[key] = onnx.TensorProto()
                merged[key].CopyFrom(tensor)
                merged[key].name = names.take("k")
            renamed[name] = merged[key].name
        delete_where(each.initializer, [k for k, item in enumerate(each.initializer) if item.name in renamed])
        delete_where(each.node, [k for k, node in enumerate(each.node) if _is_renamed(node, renamed)])
        delete_where(each.value_info, [k for k, item in enumerate(each.value_info) if item.name in renamed])
        rename_reads(each, renamed)
    graph.initializer.extend(merged.values())


def _small(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The constants of a graph (not of its bodies) to merge."""
    constants = [(item.name, item) for item in graph.initializer]
    constants += [(node.output[0], value) for node in graph.node if (value := value_of(node)) is not None]
    for name, tensor in constants:
        fits = not tensor.dims if tensor.data_type in FLOATS else 0 < math.prod(tensor.dims) <= MAX_ELEMENTS
        if fits and tensor.data_type != onnx.TensorProto.STRING and not is_external(tensor):
            yield name, tensor


def _is_renamed(node: onnx.NodeProto, renamed: dict[str, str]) -> bool:
    return value_of(node) is not None and node.output[0] in renamed
