# Types of the part of onnx-graphsurgeon that is used here: to read graphs.  What builds and changes them is left out on purpose.
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx_graphsurgeon.ir.tensor import Constant as Constant
from onnx_graphsurgeon.ir.tensor import Tensor as Tensor

class Node:
    op: str
    name: str
    attrs: Mapping[str, Any]  # numbers, str, or lists of them; a Constant for a tensor; a Graph for a body
    inputs: list[Tensor]
    outputs: list[Tensor]
    domain: str | None
    def subgraphs(self, recursive: bool = False) -> Iterator[Graph]: ...

class Graph:
    name: str
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]

def import_onnx(onnx_model: onnx.ModelProto) -> Graph: ...
