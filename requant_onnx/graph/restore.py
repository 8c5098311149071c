"""Remove quantization from a graph: pairs of QuantizeLinear and DequantizeLinear on activations are dropped, lookups read floats.

    x -> QuantizeLinear -> codes -> DequantizeLinear -> t                x, under the name t
    x -> QuantizeLinear -> codes -> MaxPool, ... -> DequantizeLinear -> t     x -> MaxPool, ... -> t
    the same, where other tools have removed a Relu because codes begin at 0  x -> Clip to the range of codes -> t
    Gather(levels, i) -> Cast -> Mul with Gather(scales, i) -> t         Gather(levels * scales, i), under the name t

Decodes of constants remain; convert/restore.py computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from requant_onnx.files.walk import all_graphs, subgraphs_of
from requant_onnx.graph.constants import is_random, is_standard_proto
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.graph.edit import delete_where, drop_stale_types, rename_reads, set_initializer
from requant_onnx.graph.integer.plan import MOVES
from requant_onnx.graph.names import FreshNames

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PREFIX = "int8."  # of the names that our int8 form generates
NARROW = frozenset(
    kind for name, kind in TensorProto.DataType.items() if name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
)
"""Types in which codes are stored."""


@dataclass(frozen=True)
class Constants:
    """The part of the main graph that depends only on initializers.

    nodes: positions of the nodes.  tensors: names of their outputs.  decodes: the outputs that are computed from codes.
    """

    nodes: frozenset[int]
    tensors: frozenset[str]
    decodes: frozenset[str]


def constants_of(graph: onnx.GraphProto) -> Constants:
    """Find the nodes that read only constants."""
    inputs = {item.name for item in graph.input}
    stored = {item.name: item.data_type for item in graph.initializer if item.name not in inputs}
    known, coded = set(stored), {name for name, kind in stored.items() if kind in NARROW}
    half = {name for name, kind in stored.items() if kind == TensorProto.FLOAT16}
    nodes, computed = set(), set()
    for index, node in enumerate(graph.node):
        if any(subgraphs_of(node)) or is_random(node.op_type) or not known.issuperset(name for name in node.input if name):
            continue
        nodes.add(index)
        known.update(node.output)
        computed.update(node.output)
        decodes = node.op_type == DEQUANTIZE or (node.op_type == "Cast" and node.input[0] in half)
        if decodes or coded.intersection(node.input):
            coded.update(node.output)
    return Constants(frozenset(nodes), frozenset(computed), frozenset(coded & computed))


def restore_activations(model: onnx.ModelProto) -> int:
    """Make quantized activations floats, except those that integer kernels read; return their number.  Changes the model."""
    graph = model.graph
    constant = constants_of(graph)
    known = constant.tensors | {item.name for item in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for each in all_graphs(graph):
        for node in each.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
    outputs = {item.name for item in graph.output}
    sources = [node for node in graph.node if _is(node, QUANTIZE) and node.input[0] not in known]
    groups = [(source, found) for source in sources if (found := _behind(source.output[0], readers, outputs)) is not None]
    _drop_codes(model, groups, outputs)
    return len(groups)


def _is(node: onnx.NodeProto, op: str) -> bool:
    return node.op_type == op and is_standard_proto(node)


def _behind(codes: str, readers: dict[str, list[onnx.NodeProto]], outputs: set[str]) -> list[onnx.NodeProto] | None:
    """The nodes from these codes up to where they are decoded; None if any other node reads them."""
    found, left = [], [codes]
    while left:
        name = left.pop()
        if name in outputs:
            return None
        for node in readers.get(name, ()):
            if not is_standard_proto(node) or node.input[0] != name or node.op_type not in (DEQUANTIZE, *MOVES):
                return None
            found.append(node)
            left += [] if node.op_type == DEQUANTIZE else [node.output[0]]
    return found


def _drop_codes(model: onnx.ModelProto, groups: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]], outputs: set[str]) -> None:
    graph, names = model.graph, FreshNames(model)
    makers = {name: node for node in graph.node for name in node.output}
    ours = settings_of(model) is not None
    made = set(makers)
    renamed: dict[str, str] = {}  # old name -> the tensor that replaces it
    final: dict[str, str] = {}  # float tensor -> its final name
    doomed, copies = [], []
    for source, behind in groups:
        bounds = None if ours else _rectified(graph, source, makers.get(source.input[0]))
        if bounds is None:
            doomed.append(source)
            renamed[source.output[0]] = source.input[0]
        else:
            _clip(graph, source, bounds, names)
            renamed[source.output[0]] = source.output[0]
            made.add(source.output[0])
        for node in behind:
            if node.op_type == DEQUANTIZE:
                doomed.append(node)
                tensor, after = renamed.get(node.input[0], node.input[0]), node.output[0]
                if tensor not in final and tensor in made - outputs and tensor.startswith(PREFIX) and not after.startswith(PREFIX):
                    final[tensor] = after  # restores the old name of the tensor
                elif after in outputs:
                    copies.append(helper.make_node("Identity", [final.get(tensor, tensor)], [after]))
                else:
                    renamed[after] = tensor
            elif node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
                zero = names.take(f"{node.output[0]}_zero")
                set_initializer(graph, np.zeros((), np.float32), zero)
                node.input[2] = zero
    gone = {id(node) for node in doomed}
    delete_where(graph.node, [k for k, node in enumerate(graph.node) if id(node) in gone])
    for node in graph.node:
        node.output[:] = [final.get(name, name) for name in node.output]
    rename_reads(graph, {**final, **{old: final.get(new, new) for old, new in renamed.items()}})
    graph.node.extend(copies)
    drop_stale_types(graph, [*renamed, *(name for node in doomed for name in (*node.input, *node.output))])


def _rectified(graph: onnx.GraphProto, source: onnx.NodeProto, maker: onnx.NodeProto | None) -> tuple[float, float] | None:
    """The range of codes that replace a Relu or Clip: it begins at 0, and no Relu or Clip is before the codes."""
    stored = {item.name: item for item in graph.initializer}
    scale, zero = (stored.get(name) for name in source.input[1:3]) if len(source.input) > 2 else (None, None)
    if maker is None or maker.op_type in ("Relu", "Clip") or scale is None or zero is None:
        return None
    low, zero_point = np.iinfo(numpy_helper.to_array(zero).dtype), int(numpy_helper.to_array(zero).ravel()[0])
    return (0.0, float(numpy_helper.to_array(scale).ravel()[0]) * (low.max - low.min)) if zero_point == low.min else None


def _clip(graph: onnx.GraphProto, source: onnx.NodeProto, bounds: tuple[float, float], names: FreshNames) -> None:
    """Turn a QuantizeLinear into a Clip."""
    limits = [names.take(f"{source.output[0]}_{end}") for end in ("low", "high")]
    for name, value in zip(limits, bounds, strict=True):
        set_initializer(graph, np.asarray(value, np.float32), name)
    source.op_type = "Clip"
    source.input[1:] = limits
    del source.attribute[:]


def restore_lookups(model: onnx.ModelProto) -> None:
    """Make lookups of levels read floats, by decoding whole tables.  Changes the model."""
    graph, names = model.graph, FreshNames(model)
    constant = constants_of(graph)
    known = constant.tensors | {item.name for item in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in graph.node for name in node.output}
    added: list[onnx.NodeProto] = []
    doomed: list[onnx.NodeProto] = []
    for gather in graph.node:
        if not _is(gather, "Gather") or gather.input[0] not in constant.decodes:
            continue
        cast = _only(readers.get(gather.output[0], []), "Cast")
        product = cast and _only(readers.get(cast.output[0], []), "Mul")
        if cast is None or product is None:
            continue
        scale = product.input[1 - list(product.input).index(cast.output[0])]
        maker = makers.get(scale)
        if maker is not None and _is(maker, "Gather") and maker.input[0] in known and maker.input[1] == gather.input[1]:
            doomed.append(maker)
            scale = maker.input[0]
        if scale not in known:
            continue
        levels, numbers = gather.input[0], names.take(f"{gather.input[0]}_numbers")
        table = names.take(f"{levels}_float")
        to = next(item.i for item in cast.attribute if item.name == "to")
        added += [helper.make_node("Cast", [levels], [numbers], to=to), helper.make_node("Mul", [numbers, scale], [table])]
        gather.input[0], gather.output[0] = table, product.output[0]
        doomed += [cast, product]
    gone = {id(node) for node in doomed}
    rest = [node for node in graph.node if id(node) not in gone]
    decodes = [node for k, node in enumerate(graph.node) if k in constant.nodes and id(node) not in gone]
    others = [node for node in rest if not any(node is each for each in decodes)]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*decodes, *added, *others)]
    del graph.node[:]
    graph.node.extend(ordered)


def _only(nodes: list[onnx.NodeProto], op: str) -> onnx.NodeProto | None:
    return nodes[0] if len(nodes) == 1 and _is(nodes[0], op) else None
