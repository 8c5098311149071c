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

from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.constants import is_random, is_standard_proto, value_of
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.graph.edit import delete_where, drop_stale_types, list_only_inputs, rename_reads, set_initializer
from requant_onnx.graph.integer.plan import MOVES
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.arrays import GenericArray

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PREFIX = "int8."  # of the names that our int8 form generates
NARROW = frozenset(
    kind for name, kind in TensorProto.DataType.items() if name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
)
"""Types in which codes are stored."""
ENDS = {
    kind: (0, 2**bits - 1) if name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for name, kind in TensorProto.DataType.items()
    for bits in (2, 4, 8, 16)
    if name in (f"INT{bits}", f"UINT{bits}")
}
"""The smallest and the largest code of each integer type."""


@dataclass(frozen=True)
class Constants:
    """The part of the main graph that depends only on initializers.

    nodes: positions of the nodes.  tensors: names of their outputs.  decodes: the outputs that are computed from codes.
    """

    nodes: frozenset[int]
    tensors: frozenset[str]
    decodes: frozenset[str]


def fix_grids(model: onnx.ModelProto) -> None:
    """Make codes, scales and zero points constant that are also inputs, as some exporters list them.  Changes the model.

    Where every input has a stored value, codes may be data with a default value, and remain inputs.
    """
    list_only_inputs(model)
    graph = model.graph
    stored = {item.name for item in graph.initializer}
    has_data = any(item.name not in stored for item in graph.input)
    fixed = set()
    for node in graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):  # also those of com.microsoft
            fixed.update(node.input[0 if node.op_type == DEQUANTIZE and has_data else 1 :])
    fixed &= stored
    delete_where(graph.input, [k for k, item in enumerate(graph.input) if item.name in fixed])


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
    _decode_outside_bodies(model)
    constant = constants_of(graph)
    known = constant.tensors | {item.name for item in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {item.name for item in graph.output}
    visible = outputs.union(*(reads_in(body) for node in graph.node for body in subgraphs_of(node)))
    sources = [node for node in graph.node if _is(node, QUANTIZE) and node.input[0] not in known]
    groups = [(source, found) for source in sources if (found := _behind(source.output[0], readers, visible)) is not None]
    _drop_codes(model, groups, outputs)
    return len(groups)


def _decode_outside_bodies(model: onnx.ModelProto) -> None:
    """Decode activations in the main graph where bodies of If, Loop and Scan decode them.  Changes the model."""
    graph, names = model.graph, FreshNames(model)
    sources = {node.output[0]: node for node in graph.node if _is(node, QUANTIZE)}
    decodes: dict[str, onnx.NodeProto] = {}  # by the codes
    for node in (node for body in all_graphs(graph) if body is not graph for node in body.node):
        source = sources.get(node.input[0]) if _is(node, DEQUANTIZE) else None
        if source is None or node.input[1:] != source.input[1:]:
            continue
        if source.output[0] not in decodes:
            decode = decodes[source.output[0]] = onnx.NodeProto.FromString(node.SerializeToString())
            decode.output[0] = names.take(f"{source.output[0]}_decoded")
        node.op_type = "Identity"
        node.input[:] = [decodes[source.output[0]].output[0]]
        del node.attribute[:]
    for codes, decode in decodes.items():
        graph.node.insert(list(graph.node).index(sources[codes]) + 1, decode)


def _is(node: onnx.NodeProto, op: str) -> bool:
    return node.op_type == op and is_standard_proto(node)


def _behind(codes: str, readers: dict[str, list[onnx.NodeProto]], visible: set[str]) -> list[onnx.NodeProto] | None:
    """The nodes from these codes up to where they are decoded; None if any other node reads them.

    readers: nodes of the main graph by what they read.  visible: outputs of the model, and tensors that bodies read.
    """
    found, left = [], [codes]
    while left:
        name = left.pop()
        if name in visible:
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
    stored = _stored(graph)
    ours = settings_of(model) is not None
    made = set(makers)
    renamed: dict[str, str] = {}  # old name -> the tensor that replaces it
    final: dict[str, str] = {}  # float tensor -> its final name
    doomed, copies = [], []
    for source, behind in groups:
        bounds = None if ours else _rectified(stored, source, makers.get(source.input[0]))
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
                filling = names.take(f"{node.output[0]}_filling")
                set_initializer(graph, _decoded(stored, source, node.input[2]), filling)
                node.input[2] = filling
    gone = {id(node) for node in doomed}
    delete_where(graph.node, [k for k, node in enumerate(graph.node) if id(node) in gone])
    for node in graph.node:
        node.output[:] = [final.get(name, name) for name in node.output]
    rename_reads(graph, {**final, **{old: final.get(new, new) for old, new in renamed.items()}})
    graph.node.extend(copies)
    drop_stale_types(
        graph, [*renamed, *(name for _, behind in groups for node in behind for name in (*node.input[:1], *node.output))]
    )


def _stored(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initializers and the values of Constant nodes, by name."""
    values = {node.output[0]: value for node in graph.node if (value := value_of(node)) is not None}
    return {**{item.name: item for item in graph.initializer}, **values}


def _grid(stored: dict[str, onnx.TensorProto], source: onnx.NodeProto) -> tuple[GenericArray, int, int] | None:
    """The scale, the zero point and the type of the codes of a QuantizeLinear; None if they are not constant."""
    scale, *zeros = (stored.get(name) for name in source.input[1:3] if name)
    if scale is None or None in zeros:
        return None
    if zeros and zeros[0] is not None:
        return numpy_helper.to_array(scale), int(numpy_helper.to_array(zeros[0]).ravel()[0]), zeros[0].data_type
    kind = next((item.i for item in source.attribute if item.name == "output_dtype" and item.i), TensorProto.UINT8)
    return numpy_helper.to_array(scale), 0, kind


def _decoded(stored: dict[str, onnx.TensorProto], source: onnx.NodeProto, code: str) -> GenericArray:
    """The float that a constant code stands for, in the type of the activations; 0 if it is not known."""
    grid, value = _grid(stored, source), stored.get(code)
    if grid is None:
        return np.zeros((), np.float32)
    scale, zero, _ = grid
    difference = 0 if value is None else int(numpy_helper.to_array(value).ravel()[0]) - zero
    return np.asarray(float(scale.ravel()[0]) * difference).astype(scale.dtype)


def _rectified(
    stored: dict[str, onnx.TensorProto], source: onnx.NodeProto, maker: onnx.NodeProto | None
) -> tuple[GenericArray, GenericArray] | None:
    """The range of codes that replace a Relu or Clip: it begins at 0, and no Relu or Clip is before the codes."""
    grid = _grid(stored, source)
    if maker is None or maker.op_type in ("Relu", "Clip") or grid is None:
        return None
    scale, zero, kind = grid
    low, high = ENDS.get(kind, (None, 0))  # codes of other types are floats, which have no smallest one
    if zero != low:
        return None
    with np.errstate(over="ignore"):  # infinity is no limit, as it should be
        return np.zeros((), scale.dtype), np.asarray(float(scale.max()) * (high - zero)).astype(scale.dtype)


def _clip(graph: onnx.GraphProto, source: onnx.NodeProto, bounds: tuple[GenericArray, GenericArray], names: FreshNames) -> None:
    """Turn a QuantizeLinear into a Clip."""
    limits = [names.take(f"{source.output[0]}_{end}") for end in ("low", "high")]
    for name, value in zip(limits, bounds, strict=True):
        set_initializer(graph, value, name)
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
