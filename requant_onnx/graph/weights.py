"""Find the weights of a graph that can be converted, and the reasons why the others cannot.

The channel axis is that of the output channel in the stored layout (operators.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.errors import ModelError
from requant_onnx.graph.constants import (
    FLOATS,
    ModelGraph,
    Root,
    cast_target,
    constants_behind,
    find_stored,
    load_values,
    seen_shape,
    stored_axis,
)
from requant_onnx.graph.holders import Holder, holder_of
from requant_onnx.graph.operands import LARGEST_FIXED, edge_nodes, is_fixed_kernel, operator_of, weight_operand
from requant_onnx.graph.operators import KERNELS, OPERATORS
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray

LATTICE, LATTICE_POINTS = 1e-3, 1 << 14  # tolerance, in steps, of multiples of a step in float32, and their maximum number
PIECE, LARGEST_TABLE = 1 << 18, 1 << 26  # values compared at a time; elements of a table that is not read, as it has words
MASK_VALUES, SIMILAR = 3, 1 / 2  # distinct values of a mask; squared difference of neighbors as a share of that of any two


@dataclass(frozen=True)
class Weight:
    """A weight that can be converted.

    name: tensor that holds the values; the decoded weight takes over its name.  op: operator that reads it.
    emit: ONNX type that its readers expect.
    channel_axis: see above; None where the readers see no axis of the stored tensor as output channels.
    is_edge: whether no other weight is before it, or none is after it (the first and last layers).
    is_table: whether its values reach results directly, see holders.py.
    lookup_axis: axis along which all its readers look up entries, None if one reads it whole.
    readers: names of the nodes that read it, if they have a name.
    former: name of the tensor that a rewrite made it from, "" if none did.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    channel_axis: int | None
    emit: int
    is_edge: bool
    stored_bytes: int
    tensor: gs.Constant = field(repr=False, compare=False)
    is_table: bool = False
    lookup_axis: int | None = None
    readers: tuple[str, ...] = ()
    former: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a user may refer to it."""
        return (self.name, *((self.former,) if self.former else ()), *self.readers)

    def load(self) -> Float32Array:
        """The values as float32.  Raises ModelError when one is NaN or infinite."""
        with np.errstate(over="ignore"):
            w = load_values(self.tensor).astype(np.float32, copy=False)
        bad = w.size - np.count_nonzero(np.isfinite(w))
        if bad:
            raise ModelError(f"the weight '{self.name}' contains {bad} NaN or infinite values; fix the model, or export it again")
        return w


@dataclass(frozen=True)
class SkippedWeight:
    """A skipped weight.  reason: why (a sentence without its subject).  bytes: stored bytes, 0 if it is not a constant."""

    name: str
    op: str
    shape: tuple[int, ...]
    reason: str
    bytes: int = 0


@dataclass(frozen=True)
class View:
    """All weights of a model in graph order."""

    weights: tuple[Weight, ...]
    skipped: tuple[SkippedWeight, ...]

    def renamed(self, former: Mapping[str, str]) -> View:
        """The same weights, with their names before rewrites.  former: name of a new tensor -> name of the one it was made from."""
        return replace(self, weights=tuple(replace(weight, former=former.get(weight.name, "")) for weight in self.weights))


def find_weights(model: ModelGraph) -> View:
    """Find the weights of all nodes.  Raises ModelError when a shape is invalid."""
    graphs = (model.graph, *model.bodies)
    edges = edge_nodes(model.graph) or {edge for body in model.bodies for edge in edge_nodes(body)}
    interface = _Interface.of(model)
    weights: dict[str, Weight] = {}
    skipped: dict[tuple[str, str], tuple[SkippedWeight, gs.Tensor | None]] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        for item, tensor in _look_at(model, node, interface, id(node) in edges):
            if isinstance(item, SkippedWeight):
                skipped.setdefault((item.name, item.op), (item, tensor))
            else:
                weights[item.name] = _merged(weights.get(item.name, item), item)
    left = [*_with_bytes(skipped.values()), *_in_functions(model.proto)]
    sparse = {item.values.name: 4 * math.prod(item.values.dims) for item in model.proto.graph.sparse_initializer}
    left = [replace(item, bytes=sparse.get(item.name, item.bytes)) for item in left]
    return View(tuple(weights.values()), tuple(item for item in left if item.name not in weights))


def _merged(first: Weight, other: Weight) -> Weight:
    """A weight that is read twice: it is as the first reader sees it, an edge if either is, and a table if either is."""
    whole = first.lookup_axis if first.lookup_axis == other.lookup_axis else None
    readers = tuple(dict.fromkeys((*first.readers, *other.readers)))
    edge, table = first.is_edge or other.is_edge, first.is_table or other.is_table
    return replace(first, is_edge=edge, is_table=table, lookup_axis=whole, readers=readers)


def _with_bytes(skipped: Iterable[tuple[SkippedWeight, gs.Tensor | None]]) -> Iterator[SkippedWeight]:
    """The skipped weights with the bytes of their stored floats, each counted once; 0 for computed weights."""
    counted: set[str] = set()
    for item, tensor in skipped:
        root = None if tensor is None else find_stored(tensor)
        stored = root is not None and root.dtype in FLOATS and root.name not in counted
        counted.update(() if root is None else (root.name,))
        yield replace(item, bytes=_bytes(root.tensor)) if stored and root is not None else item


def _in_functions(model: onnx.ModelProto) -> Iterator[SkippedWeight]:
    """The weights in functions that were not inlined, as skipped weights."""
    seen: set[tuple[str, str]] = set()
    for function in model.functions:
        reason = f"is used in the function '{function.name}', whose opset differs from that of the model"
        for node in function.node:
            key = (node.name or function.name, node.op_type)
            if node.op_type in OPERATORS and key not in seen:
                seen.add(key)
                yield SkippedWeight(*key, (), reason)


@dataclass(frozen=True)
class _Interface:
    """Tensors visible to callers of the model.  overridable: initializers that a caller may replace (IR 4 and later).

    outputs: outputs of the model, and constants that reach one through nodes that keep their values.
    stored: the constants of the main graph; only these can be replaced.
    """

    outputs: frozenset[str]
    overridable: frozenset[str]
    sparse: frozenset[str]
    stored: frozenset[str]

    @classmethod
    def of(cls, model: ModelGraph) -> _Interface:
        graph = model.proto.graph
        sparse = frozenset(item.values.name for item in graph.sparse_initializer)
        nodes = (node.output[0] for node in graph.node if node.op_type == "Constant" and node.output)
        stored = frozenset(item.name for item in graph.initializer) | frozenset(nodes) | sparse
        roots = (find_stored(tensor) for tensor in model.graph.outputs)
        outputs = {item.name for item in graph.output} | {root.name for root in roots if root is not None}
        return cls(frozenset(outputs), model.overridable, sparse, stored)


def _look_at(
    model: ModelGraph, node: gs.Node, interface: _Interface, is_edge: bool
) -> Iterator[tuple[Weight | SkippedWeight, gs.Tensor | None]]:
    """The weights of a node, or why they are skipped, each with the tensor that the node reads; None for an integer kernel."""
    if operator_of(node) is not None:
        yield from _weight_of(node, interface, is_edge)
    elif node.op in KERNELS:
        tensor = node.inputs[KERNELS[node.op].weight]
        yield SkippedWeight(tensor.name, node.op, _shape(tensor), f"is already quantized ({node.op})"), None
    else:
        holder = holder_of(node)
        if holder is not None and model.computes(node):
            yield from _held_by(node, holder, interface)


def _weight_of(node: gs.Node, interface: _Interface, is_edge: bool) -> Iterator[tuple[Weight | SkippedWeight, gs.Tensor]]:
    operator, operand = OPERATORS[node.op], weight_operand(node)
    if operand is None:
        return
    tensor = node.inputs[operand]
    root = find_stored(tensor)
    if root is None:
        reason = _why_computed(tensor, interface)
        if reason is not None:
            yield SkippedWeight(tensor.name, node.op, _shape(tensor), reason), tensor
        return
    seen = seen_shape(root)
    if seen is not None and not operator.fits(node.attrs, seen):
        raise ModelError(
            f"the weight '{root.name}' of {node.op} '{node.name}' has a shape that does not fit its node; export the model again"
        )
    reason = _refusal(root, interface) or _why_fixed(root)
    if reason is not None:
        yield SkippedWeight(root.name, node.op, root.shape, reason), tensor
        return
    axis = None if seen is None or len(seen) < 2 else operator.channel_axis(node.attrs, operand, len(seen))
    yield replace(_weight(root, node, axis), is_edge=is_edge), tensor


def _held_by(node: gs.Node, holder: Holder, interface: _Interface) -> Iterator[tuple[Weight | SkippedWeight, gs.Tensor]]:
    """The weights of an operator that computes no known product."""
    for operand, tensor in enumerate(node.inputs):
        root = find_stored(tensor) if tensor.name else None
        seen = None if root is None else seen_shape(root)
        if root is None or not holder.may_hold(operand, root.shape if seen is None else seen):
            continue
        reason = _refusal(root, interface) or _why_exact(root, holder)
        if reason is not None:
            yield SkippedWeight(root.name, node.op, root.shape, reason), tensor
            continue
        axis = None if seen is None else holder.channel_axis(node.attrs, operand, len(seen))
        weight = _weight(root, node, axis)
        if holder.is_recurrent and len(root.shape) == 2:  # directions and rows share an axis (merge_directions.py)
            weight = replace(weight, channel_axis=0)
        lookup_axis = weight.channel_axis if not root.chain and _is_lookup(tensor, holder) else None
        yield replace(weight, is_table=holder.is_table, lookup_axis=lookup_axis), tensor


def _is_lookup(tensor: gs.Tensor, holder: Holder) -> bool:
    """Whether all readers look up entries, so that codes can be looked up before they are decoded."""
    rows = [holder_of(reader) for reader in tensor.outputs]
    direct = all(reader.inputs[0] is tensor and tensor not in reader.inputs[1:] for reader in tensor.outputs)
    return holder.looks_up and holder.domain == "" and direct and all(row is holder for row in rows)


def _weight(root: Root, node: gs.Node, axis: int | None) -> Weight:
    """The weight of a node.  axis: axis of the output channels, as the node sees the weight."""
    return Weight(
        name=root.name,
        op=node.op,
        shape=root.shape,
        channel_axis=None if axis is None else stored_axis(root, axis),
        emit=_emitted_type(root),
        is_edge=False,
        stored_bytes=_bytes(root.tensor),
        tensor=root.tensor,
        readers=(node.name,) if node.name else (),
    )


def _why_exact(root: Root, holder: Holder) -> str | None:
    """Why values that reach results directly, or are looked up, must stay exact; None if they need not."""
    if not (holder.is_table or (holder.looks_up and math.prod(root.shape) <= LARGEST_TABLE)):
        return None
    loaded = root.load()
    if not np.isfinite(loaded).all():
        return "contains infinite values or NaN, as masks do"
    values = _few_values(loaded.ravel())
    if values is None:
        return None
    if values.size == 1:  # which a table of any bits represents exactly
        return None if holder.looks_up else "has the same value everywhere"
    step = step_of(values)
    if step is None or (holder.looks_up and _has_words(loaded, values)):
        return None
    return f"has values in steps of {step:.6g}, as coordinates and masks do, which must stay exact"


def _few_values(loaded: GenericArray) -> Float64Array | None:
    """The distinct values, ascending; None where they are many, as in a table of words, which is not sorted as a whole."""
    seen = np.zeros(0)
    for start in range(0, loaded.size, PIECE):
        seen = np.union1d(seen, loaded[start : start + PIECE].astype(np.float64))
        if seen.size > LATTICE_POINTS:
            return None
    return seen


def _has_words(table: GenericArray, values: Float64Array) -> bool:
    """Whether a table in steps is one of words that another tool quantized: neighbors differ as much as any two entries.

    values: its distinct values.  About PIECE elements are compared.
    """
    if values.size <= MASK_VALUES or (values == np.rint(values)).all():
        return False
    rows = np.moveaxis(table, int(np.argmax(table.shape)), 0)
    rows = rows[: max(2, len(rows) * PIECE // rows.size)].astype(np.float64)
    variance, differences = rows.var(0), np.square(np.diff(rows, axis=0)).mean(0) / 2
    return not (differences < SIMILAR * variance).any()


def step_of(values: Float64Array) -> float | None:
    """The step of which all differences of these ascending values are multiples; None if they have none.

    It is the mean step, because the smallest difference has the largest relative error in float32.

    >>> step_of(np.array([0.0, 0.5, 2.0])), step_of(np.array([0.0, 0.3, 1.0]))
    (0.5, None)
    """
    gaps = np.diff(values)
    counts = np.rint(gaps / gaps.min()).cumsum()
    step = float((values[-1] - values[0]) / counts[-1])
    fits = counts[-1] < LATTICE_POINTS and abs(values[1:] - values[0] - counts * step).max() < LATTICE * step
    return step if fits else None


def _why_fixed(root: Root) -> str | None:
    """Why a small handwritten kernel stays exact; None for others."""
    small = math.prod(root.shape) <= LARGEST_FIXED
    return "has whole multiples of one number, as fixed kernels do" if small and is_fixed_kernel(root.load()) else None


def _why_computed(tensor: gs.Tensor, interface: _Interface) -> str | None:
    """Why a weight that is not a constant is skipped; None if it is clearly an activation (an input of the model)."""
    if not tensor.inputs:
        return "is an input of the model, not a constant"
    producer = tensor.inputs[0]
    if producer.op == "DequantizeLinear":
        return "is already quantized (DequantizeLinear)"
    constants = constants_behind(tensor)
    if constants is not None and any(each.name in interface.overridable for each in constants):
        return f"is computed from inputs of the model ({producer.op}), so a caller may replace it"
    if constants is not None:
        return f"is decoded from other constants ({producer.op}), so it may be quantized already"
    return f"is computed by {producer.op} '{producer.name}', not a constant"


def _refusal(root: Root, interface: _Interface) -> str | None:
    if root.dtype not in FLOATS or root.edge_dtype not in FLOATS:
        name = onnx.TensorProto.DataType.Name(root.dtype) if root.dtype else "other than these"
        return f"has type {name}, but only FLOAT, FLOAT16, BFLOAT16 and DOUBLE are converted"
    if root.name not in interface.stored:
        return "is an output of a body of If, Loop or Scan"
    if root.name in interface.sparse:
        return "is a sparse initializer"
    if root.name in interface.outputs:
        return "is an output of the model, so its values are part of the interface"
    if root.name in interface.overridable:
        return "is also an input of the model, so a caller may replace it"
    return _unfit_shape(root.shape)


def _unfit_shape(shape: tuple[int, ...]) -> str | None:
    if 0 in shape:
        return "has no elements"
    return f"has {len(shape)} dimensions, but a weight has at least 2" if len(shape) < 2 else None


def _emitted_type(root: Root) -> int:
    """FLOAT where all direct readers cast to it anyway, else the stored type."""
    if root.dtype == root.edge_dtype or not root.casts:
        return root.dtype
    to_float = [node.op == "Cast" and cast_target(node) == onnx.TensorProto.FLOAT for node in root.stored_edge.outputs]
    return int(onnx.TensorProto.FLOAT) if all(to_float) else root.dtype


def _bytes(tensor: gs.Constant) -> int:
    """The size of the values in the file, in bytes."""
    kind = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return math.prod(int(n) for n in tensor.shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def _shape(tensor: gs.Tensor) -> tuple[int, ...]:
    root = find_stored(tensor)
    shape = tensor.shape if root is None else root.shape
    return tuple(n if isinstance(n, int) else -1 for n in shape or ())
