from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx_graphsurgeon import Node

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    @property
    def dtype(self) -> np.dtype[Any] | int | None: ...  # an int (onnx.TensorProto.DataType) where NumPy has no such type
    @property
    def shape(self) -> Sequence[int | str | None] | None: ...  # of a dimension: its size, its name, or None

class Constant(Tensor):
    _values: npt.NDArray[Any] | LazyValues
    @property
    def values(self) -> npt.NDArray[Any]: ...
    @property
    def dtype(self) -> np.dtype[Any] | int: ...
    @property
    def shape(self) -> Sequence[int]: ...  # no tuple: while the values are lazy, it is a field of the TensorProto

class LazyValues:
    tensor: onnx.TensorProto | onnx.SparseTensorProto
    def __init__(self, tensor: onnx.TensorProto | onnx.SparseTensorProto) -> None: ...
    def load(self) -> npt.NDArray[Any]: ...
