"""All float constants of a model, to account for all its bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import onnx

from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import FLOATS, value_of
from requant_onnx.graph.weights import SkippedWeight

VECTOR = "is a vector or a scalar, not a weight"


@dataclass(frozen=True)
class FloatConstant:
    """A float tensor stored in the model.  op: operator of its first reader, "output" for an output, "" for none."""

    name: str
    op: str
    shape: tuple[int, ...]
    bytes: int


def float_constants(model: onnx.ModelProto) -> list[FloatConstant]:
    """Initializers, sparse initializers and values of Constant nodes, in the main graph, in bodies of nodes and in functions."""
    graphs = list(all_graphs(model.graph))
    nodes = [node for holder in (*graphs, *model.functions) for node in holder.node]
    readers = {item.name: "output" for graph in graphs for item in graph.output}
    readers |= {name: node.op_type for node in reversed(nodes) for name in node.input}
    found = [_of(item.name, item, readers) for graph in graphs for item in graph.initializer]
    found += [_of(item.values.name, item.values, readers) for graph in graphs for item in graph.sparse_initializer]
    values = ((node.output[0], value_of(node)) for node in nodes if node.output)
    found += [_of(name, value, readers) for name, value in values if value is not None]
    return [each for each in found if each is not None]


def _of(name: str, tensor: onnx.TensorProto, readers: dict[str, str]) -> FloatConstant | None:
    if tensor.data_type not in FLOATS:
        return None
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    shape = tuple(tensor.dims)
    return FloatConstant(name, readers.get(name, ""), shape, math.prod(shape) * size)


def unconverted(
    constants: Iterable[FloatConstant], converted: Collection[str], skipped: Collection[SkippedWeight]
) -> Iterator[SkippedWeight]:
    """The constants that are neither converted nor skipped for another reason."""
    named = {item.name for item in skipped} | set(converted)
    for each in constants:
        if each.name not in named and each.bytes:
            yield SkippedWeight(each.name, each.op, each.shape, _why(each), each.bytes)


def _why(constant: FloatConstant) -> str:
    if sum(n > 1 for n in constant.shape) < 2:
        return VECTOR
    if constant.op in ("output", ""):
        return "is an output of the model" if constant.op else "is read by no node"
    return f"is read by {constant.op}, whose constants are not converted"
