"""Compute weights that the graph derives from float constants: weight normalization, slices and joins of constants, scaled weights.

A decode of integer codes is no such weight.  What tells the two apart is size: computing a weight has to take away at least as many
floats as it adds, and codes are no floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.errors import RequantError
from requant_onnx.files.load import is_large
from requant_onnx.graph.constants import FLOATS, ModelGraph, ancestors, dtype_of, find_stored
from requant_onnx.graph.edit import delete_where, drop_stale_types, set_initializer
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.operands import bias_input, operator_of
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.graph.prepare.expose import expose_weights
from requant_onnx.graph.prepare.overridable import remove_weights_from_inputs
from requant_onnx.graph.readers import constant_part
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtime.sessions import open_session, run_session


@dataclass(frozen=True)
class Exposed:
    """A model whose weights are constants of the main graph.  overridable: how many of them callers could replace before."""

    graph: ModelGraph
    overridable: int


def exposed(model: onnx.ModelProto, keep_inputs: bool = False) -> Exposed:
    """Bring the weights of a model to where they can be converted.  May change the model given.

    keep_inputs: whether initializers that are inputs of the graph too stay so.
    Raises ModelError when the graph cannot be followed.
    """
    overridable = 0 if keep_inputs else remove_weights_from_inputs(model)
    graph = ModelGraph.of(expose_weights(model))
    return Exposed(ModelGraph.of(graph.proto) if fold_constants(graph) else graph, overridable)


@dataclass(frozen=True)
class _Family:
    """Weights that share constants, and all that they are computed from."""

    weights: tuple[gs.Tensor, ...]
    behind: dict[int, gs.Tensor]


def fold_constants(model: ModelGraph) -> int:
    """Replace every weight that is computed from float constants by its values; returns how many.  Changes the model.

    A weight stays where ONNX Runtime cannot compute it, and where the file would grow.
    """
    if is_large(model.proto):
        return 0
    folded: list[str] = []
    gone: set[int] = set()
    for family in _families(_computed_weights(model)):
        values = _values(model.proto, [tensor.name for tensor in family.weights])
        doomed = _unneeded(model, family)
        floats = sum(_elements(each) for each in family.behind.values() if id(each) in doomed)
        if values is None or sum(each.size for each in values) > floats:
            continue
        for tensor, each in zip(family.weights, values, strict=True):
            set_initializer(model.proto.graph, each, tensor.name)
            folded.append(tensor.name)
        gone |= doomed
    _delete(model, gone, folded)
    return len(folded)


def _computed_weights(model: ModelGraph) -> Iterator[gs.Tensor]:
    """Weights and biases that nodes of the main graph compute from constants."""
    outputs = {id(tensor) for tensor in model.graph.outputs}
    for node in model.nodes:
        if not model.computes(node):
            continue
        for tensor in _operands(node):
            computed = id(tensor) in model.constant_tensors and tensor.inputs and id(tensor) not in outputs
            if computed and find_stored(tensor) is None and not isinstance(tensor, gs.Constant):
                yield tensor


def _operands(node: gs.Node) -> Iterator[gs.Tensor]:
    operator, holder = operator_of(node), holder_of(node)
    if operator is not None:
        yield from (node.inputs[k] for k in OPERATORS[node.op].weights)
        bias = bias_input(node)
        yield from () if bias is None else (bias,)
    elif holder is not None and not holder.is_table:
        yield from (tensor for k, tensor in enumerate(node.inputs) if holder.weights is None or k in holder.weights)


def _families(weights: Iterable[gs.Tensor]) -> list[_Family]:
    """The weights by what they are computed from; those that share a constant or a node are one family."""
    families: list[_Family] = []
    for tensor in {id(each): each for each in weights}.values():
        behind = {id(each): each for each in ancestors(tensor)}
        related = [family for family in families if behind.keys() & family.behind.keys()]
        families = [family for family in families if not any(family is each for each in related)]
        for each in related:
            behind.update(each.behind)
        families.append(_Family((*(weight for each in related for weight in each.weights), tensor), behind))
    return families


def _values(model: onnx.ModelProto, names: Sequence[str]) -> list[GenericArray] | None:
    """What ONNX Runtime computes; None where it computes no floats that a weight may have."""
    try:
        session = open_session(constant_part(model, names), "the model")
        values = [np.asarray(each) for each in run_session(session, "the model", None, {})]
    except (RequantError, KeyError):
        return None
    return values if all(each.dtype.kind == "f" and each.ndim for each in values) else None


def _unneeded(model: ModelGraph, family: _Family) -> set[int]:
    """ids of the tensors behind a family that nothing else reads, once its weights are stored."""
    outputs = {id(tensor) for graph in (model.graph, *model.bodies) for tensor in graph.outputs}
    doomed: set[int] = set()
    weights = {id(tensor) for tensor in family.weights}
    changed = True
    while changed:
        changed = False
        for key, tensor in family.behind.items():
            if key in doomed or key in outputs:
                continue
            readers = [reader for reader in tensor.outputs if reader.outputs]
            if key in weights or (readers and all(_is_doomed(reader, doomed) for reader in readers)):
                doomed.add(key)
                changed = True
    return doomed


def _is_doomed(node: gs.Node, doomed: set[int]) -> bool:
    return all(id(tensor) in doomed for tensor in node.outputs if tensor.name)


def _elements(tensor: gs.Tensor) -> int:
    """Floats that a constant stores; 0 for one that is computed, and for integers."""
    value = tensor if isinstance(tensor, gs.Constant) else tensor.inputs[0].attrs.get("value") if tensor.inputs else None
    if not isinstance(value, gs.Constant):
        return 0
    return math.prod(int(n) for n in value.shape) if dtype_of(value) in FLOATS else 0


def _delete(model: ModelGraph, gone: set[int], folded: Sequence[str]) -> None:
    """Delete the nodes that gave tensors which are gone, and the constants among these.  Changes the model."""
    if not folded:
        return
    graph = model.proto.graph
    nodes = [k for k, node in enumerate(model.nodes) if node.outputs and _is_doomed(node, gone)]
    names = {
        tensor.name for node in model.nodes for tensor in node.inputs if id(tensor) in gone and isinstance(tensor, gs.Constant)
    }
    delete_where(graph.node, nodes)
    delete_where(graph.initializer, [k for k, item in enumerate(graph.initializer) if item.name in names - set(folded)])
    drop_stale_types(graph, folded)
