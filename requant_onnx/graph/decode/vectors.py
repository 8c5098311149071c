"""Biases and other vectors as float16: all of them in one tensor, one Cast and one Split, for a node each would cost what is saved.

    float16 (n,) -> Cast to float32 -> Split

ONNX Runtime computes this once, when it loads the model.  https://onnx.ai/onnx/operators/onnx__Split.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx

from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import is_standard_proto, load_proto
from requant_onnx.graph.decode.nodes import Decode, DecodeWriter
from requant_onnx.numerics.arrays import Float32Array

PART = 1 / 16  # of the squared error of a layer's weights, which rounding its bias may add at most
SAFE = 1e-3  # of the values, on average: more than float16 rounds by, where no value is beyond its range
HEADER, MIN_RESHAPED = 8, 64  # bytes around name and values of an initializer; size of a vector that is worth a Reshape
NORMALIZATIONS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
READERS = frozenset(("Conv", "ConvTranspose", "Gemm", "Add", "Sub", "Mul", "PRelu", "LSTM", "GRU", "RNN", *NORMALIZATIONS))
"""What adds or multiplies with a vector and does not need it stored as it is."""


def halvable(model: onnx.ModelProto, names: Collection[str], errors: Mapping[str, float]) -> dict[str, Float32Array]:
    """The float32 vectors of the main graph that can be float16, by name.

    names: the initializers that may be.  errors: bias -> squared error that quantized weights cause in the output of its layer, for
    inputs of power 1.
    """
    graph = model.graph
    readers: dict[str, set[str]] = {}
    for node in (node for each in all_graphs(graph) for node in each.node):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type if is_standard_proto(node) else "")
    fixed = {item.name for each in all_graphs(graph) for item in each.output} | {item.name for item in graph.input}
    vectors = {}
    for item in graph.initializer:
        usable = item.name in names and item.name not in fixed and readers.get(item.name, {""}) <= READERS
        if usable and item.data_type == onnx.TensorProto.FLOAT and _is_vector(item.dims):
            values = load_proto(item).astype(np.float32)
            if _fits(values, errors.get(item.name)):
                vectors[item.name] = values
    return vectors


def _is_vector(dims: Sequence[int]) -> bool:
    return sum(n > 1 for n in dims) == 1 and min(dims) > 0 and (len(dims) == 1 or max(dims) >= MIN_RESHAPED)


def _fits(values: Float32Array, error: float | None) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        difference = values - values.astype(np.float16).astype(np.float32)
    added = float(np.square(difference, dtype=np.float64).sum())
    if not added <= SAFE**2 * float(np.square(values, dtype=np.float64).sum()):  # infinite, or NaN
        return False
    return error is None or added <= PART * error


def decode_vectors(writer: DecodeWriter, vectors: Mapping[str, Float32Array]) -> Decode | None:
    """The decode of all vectors together; None where it saves nothing."""
    if not vectors:
        return None
    joined = np.concatenate([values.ravel() for values in vectors.values()]).astype(np.float16)
    numbers = writer.node("Cast", writer.own("vectors", joined), to=onnx.TensorProto.FLOAT)
    flat: list[str | None] = [name if values.ndim == 1 else None for name, values in vectors.items()]
    pieces = writer.split(numbers, [values.size for values in vectors.values()], 0, flat)
    for (name, values), piece in zip(vectors.items(), pieces, strict=True):
        if piece != name:
            writer.node("Reshape", piece, writer.shared(np.array(values.shape, np.int64)), output=name)
    decode = writer.finish()
    before = sum(values.nbytes + len(name) + HEADER for name, values in vectors.items())
    shared = sum(item.ByteSize() for item in decode.shared.values())
    return decode if decode.bytes + shared < before else None
