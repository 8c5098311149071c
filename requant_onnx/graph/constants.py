"""From a tensor back to the constant that it comes from: an initializer or a Constant node, also through Identity and Cast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from requant_onnx.errors import ModelError
from requant_onnx.graph.load import first_line

PASS_THROUGH = ("Identity", "Cast")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
G_LOGGER.severity = G_LOGGER.CRITICAL  # graphsurgeon prints its warnings to standard output


@dataclass(frozen=True)
class Root:
    """Where the values of a constant tensor are stored.

    name: the tensor that holds them.  in_node: they sit in a Constant node, else in an initializer.
    tensor: the values.  dtype: their ONNX type (onnx.TensorProto.DataType), UNDEFINED where NumPy has none.
    edge_dtype: ONNX type after the Casts on the way.  casts: how many these are.
    """

    name: str
    in_node: bool
    tensor: gs.Constant
    dtype: int
    edge_dtype: int
    casts: int

    def load(self) -> npt.NDArray[np.generic]:
        """The stored values.  Raises ModelError when they do not fit the shape."""
        return load_values(self.tensor)


def load_values(tensor: gs.Constant) -> npt.NDArray[np.generic]:
    """The values of a constant.  Raises ModelError when they do not fit its shape."""
    try:
        return np.asarray(tensor.values)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the values of '{tensor.name}' do not fit its shape ({first_line(error)}); export the model again"
        ) from None


def is_standard(node: gs.Node) -> bool:
    """Whether the node is an operator of the standard domain."""
    return node.domain in (None, "", "ai.onnx")


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


def _cast_target(node: gs.Node) -> int:
    to = node.attrs["to"]
    return int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def _root(name: str, in_node: bool, tensor: gs.Constant, edge_dtype: int | None, casts: int) -> Root | None:
    try:
        dtype = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
    except (KeyError, TypeError, ValueError):  # bfloat16, float8, ...
        dtype = int(onnx.TensorProto.UNDEFINED)
    return Root(name, in_node, tensor, dtype, edge_dtype or dtype, casts)
