"""Replace weights by their decodes.  This module makes no decisions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

import onnx

from requant_onnx.config import METADATA_KEY
from requant_onnx.graph.decode.writer import Decode, Scales
from requant_onnx.graph.edit import delete_where, drop_stale_types


def replace_weights(model: onnx.ModelProto, names: Collection[str], decodes: Iterable[Decode]) -> dict[str, Scales]:
    """Replace the named initializers and Constant nodes by decodes that output them.  Changes `model`, but not the readers.

    Returns the scales of tables that were replaced by levels: their readers must be changed (lookup.py).
    """
    graph = model.graph
    delete_where(graph.initializer, [k for k, item in enumerate(graph.initializer) if item.name in names])
    drop_stale_types(graph, names)  # a float16 weight may have become float32
    kept = [node for node in graph.node if not (node.op_type == "Constant" and node.output[0] in names)]
    shared: dict[str, onnx.TensorProto] = {}
    scales: dict[str, Scales] = {}
    decoders: list[onnx.NodeProto] = []
    shared_nodes: dict[str, onnx.NodeProto] = {}
    for decode in decodes:
        graph.initializer.extend(decode.initializers)
        decoders += decode.nodes
        shared.update(decode.shared)
        shared_nodes.update(decode.shared_nodes)
        scales.update(decode.scales)
    graph.initializer.extend(shared.values())
    del graph.node[:]
    graph.node.extend([*shared_nodes.values(), *decoders, *kept])
    return scales


def settings_of(model: onnx.ModelProto) -> dict[str, object] | None:
    """The settings with which a model was converted; None if it was not, and {} if they cannot be read."""
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def set_metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    """Set one entry of metadata_props; the others stay."""
    entry = next((entry for entry in model.metadata_props if entry.key == key), None)
    if entry is None:
        entry = model.metadata_props.add(key=key)
    entry.value = value
