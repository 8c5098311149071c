"""Which operand of an operator is its weight, and where the operator lies in the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import find_root, import_graph, is_standard

CONVERTIBLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weight_operand(node: gs.Node) -> int | None:
    """The index of the input that is the weight; None for a product of two computed tensors."""
    if node.op != "MatMul":
        return 1
    return next((k for k in (1, 0) if find_root(node.inputs[k]) is not None or from_constants(node.inputs[k])), None)


def fits(node: gs.Node, shape: Sequence[int]) -> bool:
    """Whether a weight of this shape, as the node reads it, and the node's attributes can be true together."""
    if node.op not in ("Conv", "ConvTranspose"):
        return node.op != "Gemm" or len(shape) == 2
    kernel, group = tuple(shape[2:]), node.attrs.get("group", 1)
    steps = [node.attrs.get(name, (1,) * len(kernel)) for name in ("strides", "dilations")]
    pads = node.attrs.get("pads", (0,) * 2 * len(kernel))
    return (
        len(kernel) >= 1
        and group >= 1
        and shape[0] % group == 0
        and tuple(node.attrs.get("kernel_shape", kernel)) == kernel
        and all(len(values) == len(kernel) and min(values) >= 1 for values in steps)
        and len(pads) == 2 * len(kernel)
    )


def from_constants(tensor: gs.Tensor) -> bool:
    """Whether the tensor is computed from constants only: a weight that is decoded in the graph."""
    return constants_behind(tensor) is not None


def constants_behind(tensor: gs.Tensor) -> list[gs.Constant] | None:
    """The constants that the tensor is computed from; None where it is computed from others too."""
    found: list[gs.Constant] = []
    behind, seen = [tensor], set()
    while behind:
        each = behind.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, gs.Constant):
            found.append(each)
        elif not each.inputs or any(each.inputs[0].subgraphs()):  # bodies read what they like
            return None
        else:
            found += [value for value in each.inputs[0].attrs.values() if isinstance(value, gs.Constant)]
            behind.extend(each.inputs[0].inputs)
    return found


def edge_nodes(graph: gs.Graph) -> set[int]:
    """ids of the nodes with a weight that have no other one before them, or none behind them."""
    weighted = {
        id(node) for node in graph.nodes if node.op in CONVERTIBLE and is_standard(node) and weight_operand(node) is not None
    }
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


def matmuls_with_int8_activations(model: onnx.ModelProto) -> tuple[str, ...]:
    """Weights that ONNX Runtime 1.26 and later multiplies with activations rounded to int8 (MatMulNBits, accuracy level 4).

    These are codes straight behind DequantizeLinear in the layout of MatMul: (ic, oc).
    """
    matmuls = (n for n in import_graph(model).nodes if n.op == "MatMul" or (n.op == "Gemm" and not n.attrs.get("transB", 0)))
    decoded = [node.inputs[1] for node in matmuls if node.inputs[1].inputs and node.inputs[1].inputs[0].op == "DequantizeLinear"]
    return tuple(tensor.name for tensor in decoded if find_root(tensor.inputs[0].inputs[0]) is not None)
