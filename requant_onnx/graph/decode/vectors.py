"""Biases and other vectors as float16, all in one tensor with one Cast and one Split, because separate nodes would be larger.

    float16 (n,) -> Cast to float32 -> Split

ONNX Runtime computes this once, when it loads the model.  https://onnx.ai/onnx/operators/onnx__Split.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import is_standard_proto, load_proto, value_of
from requant_onnx.graph.decode.writer import Decode, DecodeWriter
from requant_onnx.graph.holders import NORMALIZATIONS
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.reshapes import RESHAPING
from requant_onnx.graph.weights import step_of
from requant_onnx.numerics.arrays import Float32Array

PART = 1 / 16  # largest share of a layer's squared weight error that rounding its bias may add
SAFE = 1e-3  # largest relative error (RMS); float16 rounding stays below it unless a value is out of range
HEADER, MIN_RESHAPED = 8, 64  # bytes around name and values of an initializer; size from which a vector pays for a Reshape
RECURRENT = frozenset(("LSTM", "GRU", "RNN"))  # their biases are (directions, n)
READERS = frozenset(("Conv", "ConvTranspose", "Gemm", "Add", "Sub", "Mul", "PRelu", "STFT", *NORMALIZATIONS)) | RECURRENT
"""The operators that add or multiply by a vector and do not need it in its stored form."""
SUMMING = frozenset(("Conv", "ConvTranspose", "Gemm", "Add", "Sub", "STFT")) | RECURRENT
"""The operators that add the values of a vector to others, or sum products with them, so that small values matter less."""
BIAS, MEAN = 2, 3  # inputs of a normalization that are only added
FEWEST_STEPS = 8  # distinct values that are not in steps by chance
OF_ANGLES = frozenset(["Sin", "Cos"])
TO_ANGLES = (
    frozenset(RESHAPING)
    | frozenset(("Add", "Sub", "Mul", "Div", "Neg", "MatMul", "Einsum"))
    | frozenset(("Concat", "Slice", "Split", "Gather", "Expand", "Tile", "Cast", "Identity"))
)
"""The operators through which an angle may pass on its way to one of OF_ANGLES."""


def halvable(model: onnx.ModelProto, names: set[str], errors: Mapping[str, float]) -> dict[str, Float32Array]:
    """The float32 vectors of the main graph that can be float16, by name.

    names: candidates.  errors: bias -> squared error that quantized weights cause in the output of its layer, for inputs of
    power 1.
    """
    graph = model.graph
    readers, angles = _readers(graph), _angles(graph)
    fixed = {item.name for each in all_graphs(graph) for item in each.output} | {item.name for item in graph.input}
    values = {node.output[0]: value_of(node) for node in graph.node if node.output}
    stored = {
        **{item.name: item for item in graph.initializer},
        **{name: value for name, value in values.items() if value is not None},
    }
    vectors = {}
    for name in sorted(names & stored.keys() - fixed - angles):
        read_by, tensor = readers.get(name, frozenset({""})), stored[name]
        if tensor.data_type == onnx.TensorProto.FLOAT and read_by <= READERS and _is_vector(tensor.dims, read_by <= RECURRENT):
            numbers = load_proto(tensor).astype(np.float32)
            if _fits(numbers, errors.get(name), summed=read_by <= SUMMING):
                vectors[name] = numbers
    return vectors


def _readers(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """The operators that read each tensor, also through nodes that change no value.

    "" stands for an operator of another domain, and "Add" also for a normalization that adds the tensor.
    """
    direct: dict[str, list[onnx.NodeProto]] = {}
    nodes = [node for each in all_graphs(graph) for node in each.node]
    for node in nodes:
        for name in node.input:
            direct.setdefault(name, []).append(node)
    found: dict[str, frozenset[str]] = {}
    for name in (name for node in reversed(nodes) for name in (*node.output, *node.input)):
        ops: set[str] = set()
        for node in direct.get(name, ()):
            through = is_standard_proto(node) and node.op_type in (*RESHAPING, "Identity") and node.input[0] == name
            ops |= found.get(node.output[0], {""}) if through else {_role(node, name)}
        found[name] = frozenset(ops or {""})
    return found


def _role(node: onnx.NodeProto, name: str) -> str:
    if not is_standard_proto(node):
        return ""
    added = node.op_type in NORMALIZATIONS and all(k in (BIAS, MEAN) for k, read in enumerate(node.input) if read == name)
    return "Add" if added else node.op_type


def _angles(graph: onnx.GraphProto) -> set[str]:
    """The tensors from which angles are computed.  Large positions multiply the errors of the frequencies of a rotary embedding."""
    angles: set[str] = set()
    for node in reversed([node for each in all_graphs(graph) for node in each.node]):
        if node.op_type in OF_ANGLES or (node.op_type in TO_ANGLES and not angles.isdisjoint(node.output)):
            angles.update(node.input)
    return angles


def _is_vector(dims: Sequence[int], recurrent: bool) -> bool:
    if recurrent and len(dims) == 2:
        return math.prod(dims) >= MIN_RESHAPED
    return sum(n > 1 for n in dims) == 1 and min(dims) > 0 and (len(dims) == 1 or max(dims) >= MIN_RESHAPED)


def _fits(values: Float32Array, error: float | None, *, summed: bool) -> bool:
    """Whether float16 is precise enough.

    error: see `halvable`; None for a vector that may contain positions.  summed: whether small values matter less than large ones.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(values - values.astype(np.float16).astype(np.float32))
    added = float(np.square(difference, dtype=np.float64).sum())
    if not added <= SAFE**2 * float(np.square(values, dtype=np.float64).sum()):  # infinite, or NaN
        return False
    if not summed and (difference > SAFE * np.abs(values)).any():
        return False
    return added == 0.0 or (added <= PART * error if error is not None else not _in_steps(values))


def _in_steps(values: Float32Array) -> bool:
    """Whether all values are whole numbers, or in steps of one size, as positions and indices are, which may be compared."""
    distinct = np.unique(values.astype(np.float64))
    return bool((distinct == np.rint(distinct)).all()) or (distinct.size >= FEWEST_STEPS and step_of(distinct) is not None)


def decode_vectors(writer: DecodeWriter, vectors: Mapping[str, Float32Array]) -> Decode | None:
    """The decode of all vectors together, which outputs them under their names; None where it saves nothing."""
    if not vectors:
        return None
    joined = np.concatenate([values.ravel() for values in vectors.values()]).astype(np.float16)
    numbers = writer.node("Cast", writer.own("v", joined), to=onnx.TensorProto.FLOAT)
    flat: list[str | None] = [name if values.ndim == 1 else None for name, values in vectors.items()]
    pieces = writer.split(numbers, [values.size for values in vectors.values()], 0, flat)
    for (name, values), piece in zip(vectors.items(), pieces, strict=True):
        if piece != name:
            writer.node("Reshape", piece, writer.shared(np.array(values.shape, np.int64)), output=name)
    decode = writer.finish()
    before = sum(values.nbytes + len(name) + HEADER for name, values in vectors.items())
    return decode if decode.bytes + decode.shared_bytes < before else None


def shorten_names(model: onnx.ModelProto, names: FreshNames, vectors: Iterable[str]) -> None:
    """Give vectors short names, because each name is in the file at least twice.  Changes the model."""
    short = {name: names.take("b") for name in vectors}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            for tensors in (node.input, node.output):
                for k, name in enumerate(tensors):
                    if len(short.get(name, name)) < len(name):
                        tensors[k] = short[name]
