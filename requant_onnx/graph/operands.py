"""The weight operand of a node, and the position of the node in the network."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph, find_root, from_constants, is_standard
from requant_onnx.graph.operators import OPERATORS, Operator
from requant_onnx.numerics.arrays import GenericArray

LARGEST_FIXED, LARGEST_COUNT, EXACTLY = 1024, 127, 1e-6  # elements, multiples and relative error of a handwritten kernel


def operator_of(node: gs.Node) -> Operator | None:
    """The row of a node's operator; None where its weights are not converted."""
    return OPERATORS.get(node.op) if is_standard(node) else None


def weight_operand(node: gs.Node) -> int | None:
    """The index of the input that is the weight; None for another operator, and for a product of two computed tensors."""
    operator = operator_of(node)
    if operator is None:
        return None
    if len(operator.weights) == 1:
        return operator.weights[0]
    constant = (k for k in operator.weights if find_root(node.inputs[k]) is not None or from_constants(node.inputs[k]))
    return next(constant, None)


def bias_input(node: gs.Node) -> gs.Tensor | None:
    """The bias that a node with a weight adds to its product; None if it adds none."""
    operator = operator_of(node)
    if operator is None or operator.bias is None or len(node.inputs) <= operator.bias:
        return None
    return node.inputs[operator.bias] if node.inputs[operator.bias].name else None


def is_fixed_kernel(values: GenericArray) -> bool:
    """Whether a small weight was written by hand: integer multiples of one number, as in 0..15, one-hot and low-pass kernels.

    >>> is_fixed_kernel(np.arange(16)), is_fixed_kernel(np.array([1, 2, 1]) / 4), is_fixed_kernel(np.array([0.3, 0.7]))
    (True, True, False)
    """
    if values.size > LARGEST_FIXED:
        return False
    sizes = np.unique(np.abs(values.astype(np.float64)))
    sizes = sizes[sizes > 0.0]
    if not sizes.size or not np.isfinite(sizes).all():
        return False
    counts = sizes / sizes[0]
    return bool(counts[-1] <= LARGEST_COUNT and (np.abs(counts - np.rint(counts)) < EXACTLY * counts).all())


def _is_trained(node: gs.Node) -> bool:
    """Whether a node has a weight that was not written by hand."""
    operand = weight_operand(node)
    root = None if operand is None else find_root(node.inputs[operand])
    if root is None or math.prod(root.shape) > LARGEST_FIXED:
        return operand is not None
    return not is_fixed_kernel(root.load())


def edge_nodes(graph: gs.Graph) -> set[int]:
    """The ids of the nodes with a trained weight that have no other such node before them, or none after them."""
    weighted = {id(node) for node in graph.nodes if _is_trained(node)}
    behind: set[int] = set()  # tensors computed from the output of a weighted node
    first = set()
    for node in graph.nodes:
        reached = any(id(tensor) in behind for tensor in reads_of(node))
        if id(node) in weighted and not reached:
            first.add(id(node))
        if reached or id(node) in weighted:
            behind.update(id(tensor) for tensor in node.outputs)
    ahead: set[int] = set()  # tensors that a weighted node is computed from
    last = set()
    for node in reversed(graph.nodes):
        needed = any(id(tensor) in ahead for tensor in node.outputs)
        if id(node) in weighted and not needed:
            last.add(id(node))
        if needed or id(node) in weighted:
            ahead.update(id(tensor) for tensor in reads_of(node))
    return first | last


def reads_of(node: gs.Node) -> Iterator[gs.Tensor]:
    """The inputs of a node, and of all nodes in its bodies."""
    yield from node.inputs
    for body in node.subgraphs(recursive=True):
        for inner in body.nodes:
            yield from inner.inputs


def matmuls_with_int8_activations(model: ModelGraph) -> tuple[str, ...]:
    """The weights that ONNX Runtime 1.26 and later multiplies by activations rounded to int8 (MatMulNBits, accuracy level 4).

    DequantizeLinear reads their codes directly, in a layout that MatMulNBits supports.
    """
    weights = [node.inputs[1] for node in model.nodes if node.op in OPERATORS and OPERATORS[node.op].reads_blocks(node.attrs)]
    decoded = [tensor for tensor in weights if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear"]
    return tuple(tensor.name for tensor in decoded if find_root(tensor.inputs[0].inputs[0]) is not None)
