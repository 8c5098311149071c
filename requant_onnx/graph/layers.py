"""Layers: nodes with their own weight, their biases, and the matrix products they compute (products.py)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import FLOATS, ModelGraph, Root, find_root, is_standard
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operands import bias_input, operator_of, weight_operand
from requant_onnx.graph.operators import Operator
from requant_onnx.graph.products import Product
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray


@dataclass(frozen=True)
class Layer:
    """A node with its own weight.

    index: index of the node.  weight: name of the stored tensor.  x: activation it reads.  product: matrix product of the two.
    bias: name of a bias that only this node reads, "" for none.  bias_values: (oc,), zeros for none, in the type of the node.
    added_to: the other input of an Add that is the only reader of the output, "" for none.
    """

    index: int
    op: str
    weight: str
    x: str
    product: Product
    bias: str
    bias_values: GenericArray
    added_to: str = ""

    @property
    def can_correct(self) -> bool:
        """Whether the layer has a bias that can be corrected."""
        return self.bias != ""

    def stored_bias(self, bias: Float32Array) -> GenericArray:
        """A new bias in the type of the node, (oc,), clipped to the range of half precision where that is the type."""
        dtype = self.bias_values.dtype
        largest = float(np.finfo(np.float16).max) if dtype == np.float16 else float(np.finfo(np.float32).max)
        return np.clip(bias, -largest, largest).astype(dtype)

    @property
    def biases(self) -> Float64Array:
        """The bias, (G, rows); 0 where there is none."""
        return np.asarray(self.bias_values.reshape(self.product.group, -1).astype(np.float64))

    def corrected_bias(self, difference: Float32Array, means: Float64Array) -> Float32Array | None:
        """The bias, (oc,), that cancels the shift of the output's mean caused by an error of the weights.

        difference: error of the weights, in their shape.  means: channel means of the input, (ic,).  None where they do not fit,
        are too large, or do not determine the mean of the vector that a row is multiplied by.
        """
        inputs = self.product.mean_inputs(means)
        if inputs is None:
            return None
        added = (self.product.matrices(difference).astype(np.float64) @ inputs[..., None]).ravel()
        with np.errstate(over="ignore"):
            bias = (self.bias_values.astype(np.float32) - added).astype(np.float32)
        return bias if np.isfinite(bias).all() else None

    def importance(self, powers: Float64Array) -> Float32Array:
        """The factor of each weight's squared error in that of the output: the power of its input, 1 on average.

        powers: mean square of each input, (G, n).
        """
        bounded = np.maximum(powers / max(float(np.mean(powers)), 1e-30), 1e-6).astype(np.float32)
        return self.product.tensor(np.repeat(bounded[:, None], self.product.rows, axis=1))


def find_layers(model: ModelGraph, weights: Collection[str]) -> list[Layer]:
    """The nodes that are the only reader of one of these weights, in graph order."""
    layers = []
    for index, node in enumerate(model.nodes):
        operator, root = operator_of(node), None
        if operator is not None and weight_operand(node) == 1:
            root = find_root(node.inputs[1])
        if operator is None or root is None or root.name not in weights or not _has_one_reader(root, model):
            continue
        if not (operator.fits(node.attrs, root.shape) and operator.is_product(node.attrs, root.shape)):
            continue
        product = operator.product(node.attrs, root.shape)
        bias = _bias(node, operator, product, model)
        if bias is not None:
            layers.append(Layer(index, node.op, root.name, node.inputs[0].name, product, *bias, _added_to(node)))
    return layers


def give_biases(model: ModelGraph, weights: Collection[str]) -> None:
    """Give each node that has one of these weights and can add a bias its own: zeros, or a copy.  Changes the model."""
    graph, names = model.proto.graph, FreshNames(model.proto)
    proto = {node.output[0]: node for node in graph.node if node.output}
    interface = {item.name for item in (*graph.input, *graph.output)}
    stored = {item.name for item in graph.initializer}
    for node in model.nodes:
        operator = operator_of(node)
        if operator is None or operator.bias is None:
            continue
        root = find_root(node.inputs[operator.weights[0]])
        if root is None or root.name not in weights or operator.scales_bias(node.attrs):
            continue
        bias = _bias(node, operator, operator.product(node.attrs, root.shape), model)
        target, edge = proto[node.outputs[0].name], bias_input(node)
        given = "" if edge is None else edge.name
        if bias is None or (given in stored and given not in interface and model.read_counts[given] == 1):
            continue
        name = names.take(f"{target.input[1]}_bias")
        set_initializer(graph, bias[1], name)
        del target.input[operator.bias :]
        target.input.append(name)


def _has_one_reader(root: Root, model: ModelGraph) -> bool:
    """Whether a single node reads the constant, also behind the nodes of its chain, such as a Cast."""
    return all(model.read_counts[name] == 1 for name in (root.name, *(step.outputs[0].name for step in root.chain)))


def _added_to(node: gs.Node) -> str:
    """The other input of the Add after a node, also after Adds of constants, which other tools make of a bias."""
    result = node.outputs[0]
    while len(result.outputs) == 1 and result.outputs[0].op == "Add" and is_standard(result.outputs[0]):
        others = [item for item in result.outputs[0].inputs if item is not result]
        if len(others) != 1:
            return ""
        if find_root(others[0]) is None:
            return str(others[0].name)
        result = result.outputs[0].outputs[0]
    return ""


def _bias(node: gs.Node, operator: Operator, product: Product, model: ModelGraph) -> tuple[str, GenericArray] | None:
    """The bias, (name if only this node reads it, values); None for values that are not constant or not a vector."""
    edge = bias_input(node)
    if edge is None:
        return "", np.zeros(product.channels, _float_type(node))
    root = model.find_fixed(edge)
    if root is None or root.edge_dtype not in FLOATS or root.dtype not in FLOATS or root.shape != (product.channels,):
        return None
    only_here = root.name == edge.name and model.read_counts[root.name] == 1 and not operator.scales_bias(node.attrs)
    return (root.name if only_here else ""), root.load().astype(onnx.helper.tensor_dtype_to_np_dtype(root.edge_dtype))


def _float_type(node: gs.Node) -> np.dtype[Any]:
    """The type that a node computes in: the type in which it reads its weight."""
    root = find_root(node.inputs[1])
    kind = root.edge_dtype if root is not None and root.edge_dtype in FLOATS else onnx.TensorProto.FLOAT
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
