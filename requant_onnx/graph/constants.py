"""From a tensor back to the constant that it comes from: an initializer or a Constant node, also through Identity and Cast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.errors import ModelError
from requant_onnx.graph.load import first_line

PASS_THROUGH = ("Identity", "Cast")


@dataclass(frozen=True)
class Root:
    """Where the values of a constant tensor are stored.

    name: the tensor that holds them.  in_node: they sit in a Constant node, else in an initializer.
    tensor: the values.  edge_dtype: ONNX type after the Casts on the way (onnx.TensorProto.DataType).
    casts: Cast nodes on the way.
    """

    name: str
    in_node: bool
    tensor: gs.Constant
    edge_dtype: int
    casts: int

    @property
    def dtype(self) -> int:
        """ONNX type of the stored values."""
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.tensor.dtype)))

    def load(self) -> npt.NDArray[np.generic]:
        """The stored values."""
        return np.asarray(self.tensor.values)


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
        if producer.op not in PASS_THROUGH or producer.domain not in (None, ""):
            return None
        if producer.op == "Cast":
            edge_dtype, casts = edge_dtype or _cast_target(producer), casts + 1
        tensor = producer.inputs[0]


def _cast_target(node: gs.Node) -> int:
    to = node.attrs["to"]
    return int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def _root(name: str, in_node: bool, tensor: gs.Constant, edge_dtype: int | None, casts: int) -> Root | None:
    try:
        dtype = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
    except (KeyError, TypeError, ValueError):  # a type NumPy has no name for
        return None
    return Root(name, in_node, tensor, edge_dtype or dtype, casts)
