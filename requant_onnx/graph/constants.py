"""Trace a tensor to its constant (initializer or Constant node) through Identity, Cast and nodes that only change its shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from requant_onnx.errors import ModelError
from requant_onnx.files.external import dense_values, values_of
from requant_onnx.files.walk import reads_in
from requant_onnx.graph.reshapes import RESHAPING, Reshaped, reshaped
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.text import first_line

PASS_THROUGH = ("Identity", "Cast")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
G_LOGGER.severity = G_LOGGER.CRITICAL  # graphsurgeon prints its warnings to standard output


@dataclass(frozen=True)
class ModelGraph:
    """A model and its navigable graph, imported once.  It is a snapshot: rewriting the model makes it stale."""

    proto: onnx.ModelProto
    graph: gs.Graph

    @classmethod
    def of(cls, model: onnx.ModelProto) -> ModelGraph:
        """Import a model.  Raises ModelError when its graph cannot be traversed."""
        try:
            return cls(model, gs.import_onnx(model))
        except Exception as error:  # graphsurgeon raises exceptions of many types
            raise ModelError(f"the graph '{model.graph.name}' cannot be followed ({first_line(error)}); export it again") from None

    @property
    def nodes(self) -> list[gs.Node]:
        """The nodes of the main graph, in order."""
        return list(self.graph.nodes)

    @cached_property
    def bodies(self) -> list[gs.Graph]:
        """The bodies of If, Loop and Scan, at every depth."""
        return [body for node in self.graph.nodes for body in node.subgraphs(recursive=True)]

    @cached_property
    def overridable(self) -> frozenset[str]:
        """The initializers that are also inputs: their values are only defaults, which a caller may replace (from IR 4 on)."""
        inputs = {item.name for item in self.proto.graph.input} if self.proto.ir_version >= 4 else set()
        return frozenset(item.name for item in self.proto.graph.initializer if item.name in inputs)

    def find_fixed(self, tensor: gs.Tensor) -> Root | None:
        """The constant that a tensor comes from; None when it is computed, or when a caller may replace it."""
        root = find_root(tensor)
        return None if root is None or root.name in self.overridable else root

    @cached_property
    def constant_tensors(self) -> frozenset[int]:
        """The ids of the tensors that are constants which no caller may replace, or computed only from such constants."""
        found: set[int] = set()
        for node in (node for graph in (self.graph, *self.bodies) for node in graph.nodes):
            fixed_inputs = (
                tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and tensor.name not in self.overridable
            )
            found.update(map(id, fixed_inputs))
            fixed = all(id(tensor) in found for tensor in node.inputs if tensor.name)
            if fixed and not is_random(node.op) and not any(node.subgraphs()):
                found.update(id(tensor) for tensor in node.outputs)
        return frozenset(found)

    def computes(self, node: gs.Node) -> bool:
        """Whether the node depends on an input of the model, so that it is not part of the decode of a constant."""
        return not all(id(tensor) in self.constant_tensors for tensor in node.outputs)

    @cached_property
    def read_counts(self) -> Counter[str]:
        """The number of reads of each tensor; being an output of the model counts as one."""
        return Counter(reads_in(self.proto.graph))


@dataclass(frozen=True)
class Root:
    """The place where the values of a constant tensor are stored.

    name: tensor that holds the values.  in_node: whether it is a Constant node, not an initializer.
    tensor: the values.  dtype: their ONNX type (onnx.TensorProto.DataType), UNDEFINED where NumPy has none.
    edge: tensor that is read.  chain: nodes between the two, starting at the reader.
    """

    name: str
    in_node: bool
    tensor: gs.Constant
    dtype: int
    edge: gs.Tensor
    chain: tuple[gs.Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored values."""
        return tuple(int(n) for n in self.tensor.shape)

    @property
    def casts(self) -> list[gs.Node]:
        """The Casts in the chain, starting at the reader."""
        return [node for node in self.chain if node.op == "Cast"]

    @property
    def edge_dtype(self) -> int:
        """The ONNX type that the reader sees."""
        return cast_target(self.casts[0]) if self.casts else self.dtype

    @property
    def stored_edge(self) -> gs.Tensor:
        """The tensor that holds the values, as the first node after it reads it."""
        return self.chain[-1].inputs[0] if self.chain else self.edge

    def load(self) -> GenericArray:
        """The stored values.  Raises ModelError when they do not fit the shape."""
        return load_values(self.tensor)


def load_values(tensor: gs.Constant) -> GenericArray:
    """The values of a constant.  Raises ModelError when they do not fit its shape, or a data file cannot be read."""
    stored = tensor._values  # tensor.values would cache them
    return load_proto(stored.tensor) if isinstance(stored, LazyValues) else np.asarray(stored)


def load_proto(tensor: onnx.TensorProto | onnx.SparseTensorProto) -> GenericArray:
    """The values of a tensor.  Raises ModelError when they do not fit its shape."""
    sparse = isinstance(tensor, onnx.SparseTensorProto)
    name = tensor.values.name if sparse else tensor.name
    try:
        return dense_values(tensor) if sparse else values_of(tensor)
    except ModelError:  # the data file cannot be read
        raise
    except (IndexError, TypeError, ValueError) as error:
        raise ModelError(f"the values of '{name}' do not fit its shape ({first_line(error)}); export the model again") from None


def is_random(op: str) -> bool:
    """Whether an operator returns different values in every run."""
    return op.startswith(("Random", "Bernoulli", "Multinomial"))


def is_standard(node: gs.Node) -> bool:
    """Whether the node is an operator of the standard domain."""
    return node.domain in (None, "", "ai.onnx")


def is_standard_proto(node: onnx.NodeProto) -> bool:
    """Whether the node is an operator of the standard domain."""
    return node.domain in ("", "ai.onnx")


def value_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node; None for any other node, and for a Constant whose value is not a tensor."""
    if node.op_type != "Constant" or not is_standard_proto(node) or not node.output:
        return None
    return next((item.t for item in node.attribute if item.name == "value" and item.HasField("t")), None)


def find_root(tensor: gs.Tensor) -> Root | None:
    """The constant that a tensor comes from, or None when it is computed."""
    return _walk_back(tensor, PASS_THROUGH)


def find_stored(tensor: gs.Tensor) -> Root | None:
    """As `find_root`, but also through nodes that only change the shape of the constant."""
    return _walk_back(tensor, (*PASS_THROUGH, *RESHAPING))


def _walk_back(edge: gs.Tensor, through: Collection[str]) -> Root | None:
    """The constant before nodes of these operators; a Cast to integers ends the search, because it changes values."""
    tensor = edge
    chain: list[gs.Node] = []
    while True:
        if isinstance(tensor, gs.Constant):
            return Root(tensor.name, False, tensor, dtype_of(tensor), edge, tuple(chain))
        if not tensor.inputs:
            return None
        producer = tensor.inputs[0]
        value = producer.attrs.get("value")
        if producer.op == "Constant" and isinstance(value, gs.Constant):
            return Root(tensor.name, True, value, dtype_of(value), edge, tuple(chain))
        if producer.op not in through or not is_standard(producer):
            return None
        if producer.op == "Cast" and cast_target(producer) not in FLOATS:
            return None
        chain.append(producer)
        tensor = producer.inputs[0]


def ancestors(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The tensor and all tensors it is computed from, each once."""
    waiting, seen = [tensor], set()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting.extend(behind for node in each.inputs for behind in node.inputs if behind.name)  # an omitted input has none


def constants_behind(tensor: gs.Tensor) -> list[gs.Constant] | None:
    """The constants that the tensor is computed from; None if it also depends on anything else."""
    constants: list[gs.Constant] = []
    for each in ancestors(tensor):
        if isinstance(each, gs.Constant):
            constants.append(each)
        elif not each.inputs or is_random(each.inputs[0].op) or any(each.inputs[0].subgraphs()):  # bodies can read any tensor
            return None
        else:
            constants += [value for value in each.inputs[0].attrs.values() if isinstance(value, gs.Constant)]
    return constants


def from_constants(tensor: gs.Tensor) -> bool:
    """Whether the tensor is computed only from constants, as a weight that is decoded in the graph is."""
    return constants_behind(tensor) is not None


def seen_shape(root: Root) -> tuple[int, ...] | None:
    """The shape that the reader sees; None where it cannot be determined."""
    steps = _steps(root)
    return None if steps is None else steps[-1].shape


def stored_axis(root: Root, axis: int) -> int | None:
    """The axis of the stored tensor that becomes `axis` of what the reader sees; None where no single axis does."""
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
    """The shapes of the stored tensor on its way to the reader, the stored shape first."""
    steps = [Reshaped(root.shape)]
    for node in reversed([node for node in root.chain if node.op in RESHAPING]):
        operand = find_root(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
        step = reshaped(node.op, steps[-1].shape, node.attrs, None if operand is None else operand.load())
        if step is None:
            return None
        steps.append(step)
    return steps


def cast_target(node: gs.Node) -> int:
    """The ONNX type of a Cast's output."""
    to = node.attrs["to"]
    return int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def dtype_of(tensor: gs.Constant) -> int:
    """The ONNX type; UNDEFINED where NumPy has none that ONNX knows."""
    if isinstance(tensor.dtype, int):  # a type that NumPy lacks: bfloat16, float8, ...
        return int(tensor.dtype)
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
    except (KeyError, TypeError, ValueError):
        return int(onnx.TensorProto.UNDEFINED)
