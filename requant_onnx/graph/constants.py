"""From a tensor back to the constant that it comes from: an initializer or a Constant node, also through Identity and Cast,
and through nodes that only give it another shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from requant_onnx.errors import ModelError
from requant_onnx.files.external import values_of
from requant_onnx.graph.reshapes import RESHAPING, Reshaped, reshaped
from requant_onnx.text import first_line

PASS_THROUGH = ("Identity", "Cast")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
G_LOGGER.severity = G_LOGGER.CRITICAL  # graphsurgeon prints its warnings to standard output


@dataclass(frozen=True)
class Root:
    """Where the values of a constant tensor are stored.

    name: the tensor that holds them.  in_node: they sit in a Constant node, else in an initializer.
    tensor: the values.  dtype: their ONNX type (onnx.TensorProto.DataType), UNDEFINED where NumPy has none.
    edge_dtype: ONNX type after the Casts on the way.  casts: how many these are.  reshapes: of the way, from the reader on.
    """

    name: str
    in_node: bool
    tensor: gs.Constant
    dtype: int
    edge_dtype: int
    casts: int
    reshapes: tuple[gs.Node, ...] = ()

    def load(self) -> npt.NDArray[np.generic]:
        """The stored values.  Raises ModelError when they do not fit the shape."""
        return load_values(self.tensor)


def load_values(tensor: gs.Constant) -> npt.NDArray[np.generic]:
    """The values of a constant.  Raises ModelError when they do not fit its shape."""
    stored = tensor._values  # tensor.values would keep them
    return load_proto(stored.tensor) if isinstance(stored, LazyValues) else np.asarray(stored)


def load_proto(tensor: onnx.TensorProto) -> npt.NDArray[np.generic]:
    """The values of a tensor.  Raises ModelError when they do not fit its shape."""
    try:
        return values_of(tensor)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the values of '{tensor.name}' do not fit its shape ({first_line(error)}); export the model again"
        ) from None


def is_standard(node: gs.Node) -> bool:
    """Whether the node is an operator of the standard domain."""
    return node.domain in (None, "", "ai.onnx")


def is_standard_proto(node: onnx.NodeProto) -> bool:
    """Whether the node is an operator of the standard domain."""
    return node.domain in ("", "ai.onnx")


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The model as a graph to navigate.  Raises ModelError when it cannot be followed."""
    try:
        return gs.import_onnx(model)
    except Exception as error:  # graphsurgeon raises many types, its own and others'
        raise ModelError(f"the graph '{model.graph.name}' cannot be followed ({first_line(error)}); export it again") from None


def find_root(tensor: gs.Tensor) -> Root | None:
    """The constant behind a tensor, or None when it is computed."""
    edge_dtype, casts = None, 0
    while True:
        if isinstance(tensor, gs.Constant):
            return _root(tensor.name, False, tensor, edge_dtype, casts)
        if not tensor.inputs:
            return None
        producer = tensor.inputs[0]
        if producer.op == "Constant" and isinstance(producer.attrs.get("value"), gs.Constant):
            return _root(tensor.name, True, producer.attrs["value"], edge_dtype, casts)
        if producer.op not in PASS_THROUGH or not is_standard(producer):
            return None
        if producer.op == "Cast":
            if _cast_target(producer) not in FLOATS:  # a cast to integers changes the values
                return None
            edge_dtype, casts = edge_dtype or _cast_target(producer), casts + 1
        tensor = producer.inputs[0]


def find_stored(tensor: gs.Tensor) -> Root | None:
    """As find_root, but also through nodes that only give the constant another shape."""
    reshapes: list[gs.Node] = []
    edge_dtype, casts = None, 0
    while True:
        root = find_root(tensor)
        if root is not None:
            return replace(root, edge_dtype=edge_dtype or root.edge_dtype, casts=casts + root.casts, reshapes=tuple(reshapes))
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or producer.op not in (*PASS_THROUGH, *RESHAPING) or not is_standard(producer):
            return None
        if producer.op in RESHAPING:
            reshapes.append(producer)
        elif producer.op == "Cast":
            if _cast_target(producer) not in FLOATS:
                return None
            edge_dtype, casts = edge_dtype or _cast_target(producer), casts + 1
        tensor = producer.inputs[0]


def seen_shape(root: Root) -> tuple[int, ...] | None:
    """The shape that the reader sees; None where it cannot be followed."""
    steps = _steps(root)
    return None if steps is None else steps[-1].shape


def stored_axis(root: Root, axis: int) -> int | None:
    """The axis of the stored tensor that becomes `axis` of what the reader sees; None where it is no axis of its own."""
    steps = _steps(root) or []
    for before, step in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        if step.permutation is not None:
            axis = step.permutation[axis]
            continue
        size, outer = step.shape[axis], math.prod(step.shape[:axis])
        same = [k for k, n in enumerate(before.shape) if n == size and math.prod(before.shape[:k]) == outer]
        if not same:
            return None
        axis = same[0]
    return axis


def _steps(root: Root) -> list[Reshaped] | None:
    """What the stored tensor becomes on its way to the reader, itself first."""
    steps = [Reshaped(tuple(int(n) for n in root.tensor.shape))]
    for node in reversed(root.reshapes):
        operand = find_root(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
        step = reshaped(node.op, steps[-1].shape, node.attrs, None if operand is None else operand.load())
        if step is None:
            return None
        steps.append(step)
    return steps


def _cast_target(node: gs.Node) -> int:
    to = node.attrs["to"]
    return int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def _root(name: str, in_node: bool, tensor: gs.Constant, edge_dtype: int | None, casts: int) -> Root | None:
    if isinstance(tensor.dtype, int):  # one that NumPy lacks: bfloat16, float8, ...
        return Root(name, in_node, tensor, int(tensor.dtype), edge_dtype or int(tensor.dtype), casts)
    try:
        dtype = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
    except (KeyError, TypeError, ValueError):
        dtype = int(onnx.TensorProto.UNDEFINED)
    return Root(name, in_node, tensor, dtype, edge_dtype or dtype, casts)
