"""Compute weights that the graph derives from float constants: weight normalization, slices and joins of constants, scaled weights.

A decode of integer codes is not such a weight.  Size distinguishes the two: computing a weight must remove at least as many floats
as it adds, and codes are not floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.errors import RequantError
from requant_onnx.files.load import is_large
from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.constants import FLOATS, ModelGraph, ancestors, dtype_of, find_stored, load_values
from requant_onnx.graph.edit import delete_where, set_initializer, tensor_proto
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operands import bias_input, operator_of
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.graph.prepare.expose import expose_weights
from requant_onnx.graph.prepare.overridable import remove_weights_from_inputs
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtime.sessions import open_cpu_session, run_session


@dataclass(frozen=True)
class Exposed:
    """A model whose weights are constants of the main graph.  overridable: number of them that callers could replace before."""

    graph: ModelGraph
    overridable: int


def exposed(model: onnx.ModelProto, keep_inputs: bool = False) -> Exposed:
    """Move the weights of a model to where they can be converted.  May change the given model.

    keep_inputs: whether initializers that are also graph inputs stay inputs.
    Raises ModelError when the graph cannot be traversed.
    """
    overridable = 0 if keep_inputs else remove_weights_from_inputs(model)
    graph = ModelGraph.of(expose_weights(model))
    return Exposed(ModelGraph.of(graph.proto) if fold_constants(graph) else graph, overridable)


@dataclass(frozen=True)
class _Family:
    """Weights that share constants, and all tensors that they are computed from."""

    weights: tuple[gs.Tensor, ...]
    behind: dict[int, gs.Tensor]


@dataclass(frozen=True)
class _Places:
    """The places of the navigated graph's nodes in the model: id of a node -> its message, and the graph that contains it."""

    nodes: dict[int, onnx.NodeProto]
    graphs: dict[int, onnx.GraphProto]

    @classmethod
    def of(cls, model: ModelGraph) -> _Places:
        places = cls({}, {})
        places._add(model.proto.graph, model.graph)
        return places

    def _add(self, proto: onnx.GraphProto, graph: gs.Graph) -> None:
        for message, node in zip(proto.node, graph.nodes, strict=True):
            self.nodes[id(node)], self.graphs[id(node)] = message, proto
            for body, inner in zip(subgraphs_of(message), node.subgraphs(), strict=True):
                self._add(body, inner)


def fold_constants(model: ModelGraph) -> int:
    """Replace every weight that is computed from float constants by its values; return their number.  Changes the model.

    A weight is skipped if ONNX Runtime cannot compute it, or if the file would grow.
    """
    weights = [] if is_large(model.proto) else list(_computed_weights(model))
    if not weights:
        return 0
    places, names = _Places.of(model), FreshNames(model.proto)
    folded = 0
    gone: set[int] = set()
    for family in _families(weights):
        values = _values(model, places, family)
        doomed = _unneeded(model, family)
        floats = sum(_elements(each) for each in family.behind.values() if id(each) in doomed)
        distinct = {(each.shape, each.tobytes()): each for each in values or ()}
        if values is None or sum(each.size for each in distinct.values()) > floats:
            continue
        stored: dict[object, str] = {}
        for tensor, each in zip(family.weights, values, strict=True):
            key = (each.shape, each.tobytes())
            if key not in stored:
                stored[key] = names.take(f"{tensor.name}_folded")
                set_initializer(model.proto.graph, each, stored[key])
            _redirect(tensor, stored[key], places)
        folded += len(family.weights)
        gone |= doomed
    _delete(model, gone, places)
    return folded


def _computed_weights(model: ModelGraph) -> Iterator[gs.Tensor]:
    """The weights and biases that nodes compute from constants."""
    graphs = (model.graph, *model.bodies)
    outputs = {id(tensor) for graph in graphs for tensor in graph.outputs}
    for node in (node for graph in graphs for node in graph.nodes):
        if not model.computes(node):
            continue
        for tensor in _operands(node):
            computed = id(tensor) in model.constant_tensors and tensor.inputs and id(tensor) not in outputs
            if computed and find_stored(tensor) is None:
                yield tensor


def _operands(node: gs.Node) -> Iterator[gs.Tensor]:
    operator, holder = operator_of(node), holder_of(node)
    if operator is not None:
        yield from (node.inputs[k] for k in OPERATORS[node.op].weights)
        bias = bias_input(node)
        yield from () if bias is None else (bias,)
    elif holder is not None and not holder.is_table:
        yield from (node.inputs[k] for k in range(len(node.inputs)) if holder.is_parameter(k))


def _families(weights: Iterable[gs.Tensor]) -> list[_Family]:
    """The weights in families: weights that share a constant or a node belong to the same family."""
    families: list[_Family] = []
    for tensor in {id(each): each for each in weights}.values():
        behind = {id(each): each for each in ancestors(tensor)}
        related = [family for family in families if behind.keys() & family.behind.keys()]
        families = [family for family in families if not any(family is each for each in related)]
        for each in related:
            behind.update(each.behind)
        families.append(_Family((*(weight for each in related for weight in each.weights), tensor), behind))
    return families


def _values(model: ModelGraph, places: _Places, family: _Family) -> list[GenericArray] | None:
    """The values of the weights, computed by ONNX Runtime; None if that fails or they are not float arrays."""
    names = {key: f"t{number}" for number, key in enumerate(family.behind)}
    nodes: list[onnx.NodeProto] = []
    needed = {id(node) for tensor in family.behind.values() for node in tensor.inputs}
    for node in (node for graph in (model.graph, *model.bodies) for node in graph.nodes if id(node) in needed):
        message = onnx.NodeProto()
        message.CopyFrom(places.nodes[id(node)])
        message.input[:] = [names[id(tensor)] if tensor.name else "" for tensor in node.inputs]  # "" for an omitted input
        message.output[:] = [names.get(id(tensor), f"unused{len(nodes)}_{k}") for k, tensor in enumerate(node.outputs)]
        nodes.append(message)
    try:
        constants = [tensor for tensor in family.behind.values() if isinstance(tensor, gs.Constant)]
        initializers = [tensor_proto(load_values(tensor), names[id(tensor)]) for tensor in constants]
        outputs = [onnx.ValueInfoProto(name=names[id(tensor)]) for tensor in family.weights]
        graph = onnx.helper.make_graph(nodes, "constants", [], outputs, initializers)
        part = onnx.helper.make_model(graph, opset_imports=model.proto.opset_import, ir_version=model.proto.ir_version)
        part.functions.extend(model.proto.functions)
        values = [np.asarray(each) for each in run_session(open_cpu_session(part, "the model"), "the model", None, {})]
    except (RequantError, KeyError, TypeError, ValueError):  # types that NumPy lacks
        return None
    return values if all(each.dtype.kind == "f" and each.ndim for each in values) else None


def _unneeded(model: ModelGraph, family: _Family) -> set[int]:
    """The ids of a family's weights, and of tensors that only they depend on."""
    outputs = {id(tensor) for graph in (model.graph, *model.bodies) for tensor in graph.outputs}
    doomed = {id(tensor) for tensor in family.weights}
    grew = True
    while grew:
        grew = False
        for key, tensor in family.behind.items():
            readers = [reader for reader in tensor.outputs if reader.outputs]
            if key not in doomed | outputs and readers and all(_is_doomed(reader, doomed) for reader in readers):
                doomed.add(key)
                grew = True
    return doomed


def _is_doomed(node: gs.Node, doomed: set[int]) -> bool:
    return all(id(tensor) in doomed for tensor in node.outputs if tensor.name)


def _elements(tensor: gs.Tensor) -> int:
    """The number of floats that a constant stores; 0 for a computed tensor, and for integers."""
    value = tensor if isinstance(tensor, gs.Constant) else tensor.inputs[0].attrs.get("value") if tensor.inputs else None
    if not isinstance(value, gs.Constant):
        return 0
    return math.prod(int(n) for n in value.shape) if dtype_of(value) in FLOATS else 0


def _redirect(tensor: gs.Tensor, name: str, places: _Places) -> None:
    """Make all readers of a tensor read another one."""
    for reader in tensor.outputs:
        message = places.nodes.get(id(reader))
        for k, read in enumerate(reader.inputs):
            if read is tensor and message is not None:
                message.input[k] = name


def _delete(model: ModelGraph, gone: set[int], places: _Places) -> None:
    """Delete the nodes whose outputs are all in `gone`, and the constants in `gone`.  Changes the model."""
    nodes = [node for graph in (model.graph, *model.bodies) for node in graph.nodes]
    for node in nodes:
        if node.outputs and _is_doomed(node, gone):
            graph, message = places.graphs[id(node)], places.nodes[id(node)]
            graph.node.remove(message)
    constants = {tensor.name for node in nodes for tensor in node.inputs if id(tensor) in gone and isinstance(tensor, gs.Constant)}
    unread = constants - set(reads_in(model.proto.graph))
    for graph in all_graphs(model.proto.graph):
        delete_where(graph.initializer, [k for k, item in enumerate(graph.initializer) if item.name in unread])
