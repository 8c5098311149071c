"""Put decodes in the place of weights.  No decisions here: it does what it is given."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.forms import Decode
from requant_onnx.graph.functions import DOMAIN

FUNCTION_IR = 8  # first IR version with model-local functions


def replace_weights(model: onnx.ModelProto, decodes: Mapping[str, Decode]) -> None:
    """Replace each named initializer or Constant node by its decode.  Changes `model`; readers keep the name they read."""
    graph = model.graph
    delete_where(graph.initializer, [k for k, item in enumerate(graph.initializer) if item.name in decodes])
    for decode in decodes.values():
        graph.initializer.extend(decode.initializers)
    kept = [node for node in graph.node if not (node.op_type == "Constant" and node.output[0] in decodes)]
    decoders = [node for decode in decodes.values() for node in decode.nodes]
    del graph.node[:]
    graph.node.extend(decoders + kept)
    _add_functions(model, {decode.function.name: decode.function for decode in decodes.values() if decode.function is not None})


def _add_functions(model: onnx.ModelProto, functions: Mapping[str, onnx.FunctionProto]) -> None:
    if functions:
        model.functions.extend(functions.values())
        model.opset_import.add(domain=DOMAIN, version=1)
        model.ir_version = max(model.ir_version, FUNCTION_IR)


def set_metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    """Set one entry of metadata_props; the others stay."""
    entry = next((entry for entry in model.metadata_props if entry.key == key), None)
    if entry is None:
        entry = model.metadata_props.add(key=key)
    entry.value = value
