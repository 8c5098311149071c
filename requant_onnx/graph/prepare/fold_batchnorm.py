"""Fold an inference BatchNormalization into the Conv or ConvTranspose before it.

    y = gamma * (conv(x, W) + b - mean) / sqrt(var + epsilon) + beta
      = conv(x, f * W) + f * (b - mean) + beta,   f = gamma / sqrt(var + epsilon)

https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.files.walk import reads_in
from requant_onnx.graph.constants import FLOATS, ModelGraph, Root, find_root, is_standard
from requant_onnx.graph.edit import delete_where, drop_stale_types, drop_unread, set_initializer
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operands import operator_of
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.numerics.arrays import Float64Array, GenericArray


@dataclass(frozen=True)
class _Fold:
    """A BatchNormalization that can be folded.  conv, norm: indices of the nodes.  values: new weight and bias of the Conv."""

    conv: int
    norm: int
    weight: Root
    bias: Root | None
    new_weight: GenericArray
    new_bias: GenericArray


def fold_batchnorm(view: ModelGraph, former: dict[str, str] | None = None) -> int:
    """Fold every BatchNormalization that follows a Conv with constant parameters; return their number.  Changes the model.

    former: dictionary to which the names of new weights are added, with the names of the weights that they are made from.
    """
    model, graph = view.proto, view.graph
    index = {id(node): k for k, node in enumerate(graph.nodes)}
    names = FreshNames(model)
    inputs = {item.name for item in model.graph.input}
    norm_nodes = [node for node in graph.nodes if node.op == "BatchNormalization" and is_standard(node)]
    folds = [_plan(graph, node, index, inputs) for node in norm_nodes]
    stale: list[str] = []
    norms = []
    for fold in folds:
        if fold is not None:
            stale += _apply(model.graph, fold, names)
            norms.append(fold.norm)
            weight = model.graph.node[fold.conv].input[1]
            if former is not None and weight != fold.weight.name:
                former[weight] = fold.weight.name
    delete_where(model.graph.node, norms)
    drop_unread(model.graph, stale)
    return len(norms)


def _plan(graph: gs.Graph, norm: gs.Node, index: dict[int, int], inputs: set[str]) -> _Fold | None:
    """The fold of this BatchNormalization, or None when it must stay.  inputs: tensors that a caller may set."""
    producers = norm.inputs[0].inputs
    operator = operator_of(producers[0]) if producers and id(producers[0]) in index else None
    if operator is None or not operator.channels_second:
        return None
    conv, between = producers[0], norm.inputs[0]
    trains = norm.attrs.get("training_mode", 0) or not norm.attrs.get("spatial", 1)
    used_elsewhere = len(between.outputs) != 1 or any(between is output for output in graph.outputs)
    if trains or used_elsewhere or len([output for output in norm.outputs if output.name]) != 1:
        return None
    read = [tensor for tensor in (*norm.inputs[1:5], *conv.inputs[1:3]) if tensor.name]  # an absent bias has no name
    roots = [find_root(tensor) for tensor in read]
    if any(root is None or root.edge_dtype not in FLOATS or root.name in inputs for root in roots):
        return None
    parameters = [root.load().astype(np.float64) for root in roots if root is not None]
    weight, bias = roots[4], (roots[5] if len(roots) > 5 else None)
    assert weight is not None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.edge_dtype)
    folded = _folded(conv, parameters, norm.attrs.get("epsilon", 1e-5), dtype)
    if folded is None:
        return None
    return _Fold(index[id(conv)], index[id(norm)], weight, bias, *folded)


def _folded(
    conv: gs.Node, parameters: list[Float64Array], epsilon: float, dtype: npt.DTypeLike
) -> tuple[GenericArray, GenericArray] | None:
    """The new weight and bias; None when parameters do not fit the weight, have a negative variance, or give infinite values."""
    gamma, beta, mean, var, weight = parameters[:5]
    bias = parameters[5] if len(parameters) > 5 else np.zeros_like(mean)
    if weight.ndim < 2:
        return None
    operator = OPERATORS[conv.op]
    if not operator.fits(conv.attrs, weight.shape):
        return None
    product = operator.product(conv.attrs, weight.shape)
    consistent = all(values.shape == (product.channels,) for values in (gamma, beta, mean, var, bias))
    if not consistent or not (var + epsilon > 0.0).all():
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        factor = gamma / np.sqrt(var + epsilon)
        rows = product.matrices(weight) * factor.reshape(product.group, -1, 1)
        folded = (product.tensor(rows).astype(dtype), (factor * (bias - mean) + beta).astype(dtype))
    return folded if all(np.isfinite(values.astype(np.float32)).all() for values in folded) else None


def _apply(graph: onnx.GraphProto, fold: _Fold, names: FreshNames) -> list[str]:
    """Store the new weight and bias, and connect the Conv to them and to the output of the BatchNormalization.

    Returns the tensors that may now be unread.
    """
    conv, norm = graph.node[fold.conv], graph.node[fold.norm]
    reads = list(reads_in(graph))
    overridable = {item.name for item in graph.input}

    def in_place(root: Root | None, edge: str) -> bool:
        return root is not None and not root.in_node and root.name == edge and reads.count(edge) == 1 and edge not in overridable

    old = [conv.input[1], conv.input[2] if len(conv.input) > 2 else ""]
    weight = old[0] if in_place(fold.weight, old[0]) else names.take(f"{old[0]}_folded")
    bias = old[1] if in_place(fold.bias, old[1]) else names.take(f"{old[0]}_bias")
    set_initializer(graph, fold.new_weight, weight)
    set_initializer(graph, fold.new_bias, bias)
    del conv.input[1:]
    conv.input.extend([weight, bias])
    drop_stale_types(graph, [conv.output[0]])
    conv.output[0] = norm.output[0]
    return [name for name in (*old, *norm.input[1:]) if name]
