"""Remove everything that no runtime needs from a finished model.

These are types that shape inference can restore, attributes with default values, uninformative node names, and references to the
exporter's source code: a tenth of the size of small files of few bits.
https://onnx.ai/onnx/api/shape_inference.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx
from onnx.shape_inference import InferenceError, infer_shapes

from requant_onnx.files.load import is_large, opset_of
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import is_standard_proto
from requant_onnx.graph.edit import compact, delete_where

KNOWN_BY_SHAPE = 1024  # bytes; inference does not read the values of larger initializers

Test = Callable[[onnx.AttributeProto], bool]


def _all(value: int) -> Test:
    return lambda attribute: bool(attribute.ints) and set(attribute.ints) == {value}


WINDOWS = {"strides": _all(1), "dilations": _all(1), "pads": _all(0)}
"""Attributes of window operators whose default depends on the rank and is therefore not in the schema."""
WINDOWED = frozenset(("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"))


def slim(model: onnx.ModelProto) -> None:
    """Remove what no runtime needs.  Changes the model, but not its results."""
    opset = opset_of(model)
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            tensor.CopyFrom(compact(tensor))
        for item in graph.value_info:
            del item.metadata_props[:]
        for node in graph.node:
            if is_standard_proto(node):
                node.ClearField("doc_string")
                del node.metadata_props[:]
                if node.output and _says_nothing(node.name, node):
                    node.ClearField("name")
                _drop_defaults(node, opset)
    _drop_inferred(model)


def _says_nothing(name: str, node: onnx.NodeProto) -> bool:
    """Whether the name of a node repeats its output, or is its operator with a number, as exporters name nodes."""
    name = name.removeprefix("node_")
    return node.output[0].startswith(name) or re.fullmatch(rf"{node.op_type}(_\d+)?", name, re.IGNORECASE) is not None


def _drop_defaults(node: onnx.NodeProto, opset: int) -> None:
    try:
        known: Mapping[str, onnx.defs.OpSchema.Attribute] = onnx.defs.get_schema(node.op_type, opset).attributes
    except onnx.defs.SchemaError:  # a function of the model
        return
    doomed = []
    for k, attribute in enumerate(node.attribute):
        default = known[attribute.name].default_value if attribute.name in known else onnx.AttributeProto()
        stated = bool(default.name) and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(attribute)
        by_rank = node.op_type in WINDOWED and attribute.name in WINDOWS and WINDOWS[attribute.name](attribute)
        if stated or by_rank:
            doomed.append(k)
    delete_where(node.attribute, doomed)


def _drop_inferred(model: onnx.ModelProto) -> None:
    """Drop the value_info whose type and shape inference restores."""
    if is_large(model):
        return
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for graph in all_graphs(bare.graph):
        del graph.value_info[:]
        for item in graph.initializer:
            if len(item.raw_data) > KNOWN_BY_SHAPE:
                item.ClearField("raw_data")
    try:
        inferred = infer_shapes(bare)
    except InferenceError:
        return
    for graph, found in zip(all_graphs(model.graph), all_graphs(inferred.graph), strict=True):
        types = {item.name: item.type for item in found.value_info}
        delete_where(graph.value_info, [k for k, item in enumerate(graph.value_info) if types.get(item.name) == item.type])
