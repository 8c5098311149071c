"""The same weight in two models, found by the output of its node, by its name, or by its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx

from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.readers import WeightReader, constant_part, find_readers, settled_tensors
from requant_onnx.numerics.arrays import Float32Array, GenericArray
from requant_onnx.numerics.quantize import to_rows
from requant_onnx.runtime.fold_constants import exposed
from requant_onnx.runtime.sessions import open_cpu_session, run_session


class SameTensor(NamedTuple):
    """The names of one tensor in two models."""

    reference: str
    candidate: str


@dataclass(frozen=True)
class Pair:
    """A weight of the candidate and its counterpart, as one row per channel.

    w: reference, (channels, n).  w_hat: candidate, of a different shape if its channels are on another axis.
    half: whether the candidate's is float16.  output: output of the two nodes, for comparison; None if unknown.
    replaces: name of a stored tensor of the reference (`Pairing.reference`), and the candidate's values for it; None if none.
    """

    shape: tuple[int, ...]
    w: Float32Array
    w_hat: Float32Array
    half: bool
    output: SameTensor | None
    replaces: tuple[str, Float32Array] | None = None


class Pairing(NamedTuple):
    """Every weight of the candidate with its counterpart.  reference: with exposed weights and BatchNormalization folded."""

    pairs: list[tuple[WeightReader, Pair | None]]
    reference: onnx.ModelProto


@dataclass(frozen=True)
class _Weight:
    """A weight as its node reads it, decoded."""

    reader: WeightReader
    values: GenericArray

    @property
    def kind(self) -> tuple[object, ...]:
        return self.reader.op, tuple(sorted(self.values.shape))

    @property
    def rows(self) -> Float32Array:
        return to_rows(self.values.astype(np.float32), self.reader.channel_axis(self.values.ndim))


def find_pairs(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> Pairing:
    """Pair every weight of the candidate with its counterpart in the reference, None if it has none.

    The reference is searched both unchanged and with BatchNormalization folded.  Raises ModelError if a model does not load.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(reference)
    view = exposed(copy).graph
    known = last = _weights(view.proto, find_readers(view))
    if fold_batchnorm(view):
        last = _weights(view.proto, find_readers(ModelGraph.of(view.proto)))
        known = known + last
    stored = {item.name for item in view.proto.graph.initializer}
    final = {weight.reader.weight: weight.values for weight in last if weight.reader.weight in stored}
    readers = find_readers(ModelGraph.of(candidate))
    decoded = {id(weight.reader): weight for weight in _weights(candidate, readers)}
    names = _Outputs(_made(reference), _made(candidate), settled_tensors(candidate))
    pairs: list[tuple[WeightReader, Pair | None]] = []
    for reader in readers:
        weight = decoded.get(id(reader))
        counterpart = None if weight is None else _counterpart(weight, known)
        pairs.append((reader, None if weight is None or counterpart is None else _pair(counterpart, weight, names, final)))
    return Pairing(pairs, view.proto)


def _counterpart(weight: _Weight, known: Sequence[_Weight]) -> _Weight | None:
    """The weight of the reference whose node has the same output, or that has the same name, or else the most similar values."""
    alike = [other for other in known if other.kind == weight.kind]
    by_output = (other for other in alike if weight.reader.output and other.reader.output == weight.reader.output)
    by_name = [other for other in alike if other.reader.weight == weight.reader.weight]  # unchanged and folded: use the nearer
    return next(by_output, None) or _nearest(weight, by_name) or next(iter(by_name), None) or _nearest(weight, alike)


def _nearest(weight: _Weight, alike: Sequence[_Weight]) -> _Weight | None:
    """The weight with the least difference, if that is smaller than the weight itself."""
    best, least, rows = None, 1.0, weight.rows
    for other in alike:
        w = other.rows
        power = float(np.square(w, dtype=np.float64).sum())
        if w.shape == rows.shape and power:
            error = float(np.square(rows.astype(np.float64) - w).sum()) / power
            best, least = (other, error) if error < least else (best, least)
    return best


@dataclass(frozen=True)
class _Outputs:
    """The tensors that the two models compute.  settled: tensor of the candidate -> its decoded value after quantization."""

    reference: frozenset[str]
    candidate: frozenset[str]
    settled: Mapping[str, str]

    def of(self, counterpart: WeightReader, reader: WeightReader) -> SameTensor | None:
        """The output of the two nodes, if both models compute it."""
        for name in (counterpart.output, reader.output):
            if name in self.reference and name in self.candidate:
                return SameTensor(name, self.settled.get(name, name))
        return None


def _made(model: onnx.ModelProto) -> frozenset[str]:
    return frozenset(name for node in model.graph.node for name in node.output if name)


def _pair(counterpart: _Weight, weight: _Weight, names: _Outputs, final: Mapping[str, GenericArray]) -> Pair:
    half, name = weight.values.dtype.itemsize == 2, counterpart.reader.weight
    same = name in final and weight.values.shape == final[name].shape and np.array_equal(final[name], counterpart.values)
    replaces = (name, weight.values.astype(np.float32)) if same else None
    output = names.of(counterpart.reader, weight.reader)
    return Pair(tuple(counterpart.values.shape), counterpart.rows, weight.rows, half, output, replaces)


def _weights(model: onnx.ModelProto, readers: Sequence[WeightReader]) -> list[_Weight]:
    """The weights whose values can be computed."""
    there = {item.name for item in model.graph.initializer} | _made(model)
    usable = [reader for reader in readers if reader.is_known and there.issuperset((reader.weight, *reader.scale))]
    names = list(dict.fromkeys(name for reader in usable for name in (reader.weight, *reader.scale)))
    if not names:
        return []
    session = open_cpu_session(constant_part(model, names), "the model")
    values = dict(zip(names, map(np.asarray, run_session(session, "the model", None, {})), strict=True))
    return list(_decoded(usable, values))


def _decoded(readers: Sequence[WeightReader], values: Mapping[str, GenericArray]) -> Iterator[_Weight]:
    for reader in readers:
        w = values[reader.weight]
        if reader.scale:
            axis = reader.channel_axis(w.ndim)
            scale, zero_point = (_along(values[name].astype(np.float32), w.ndim, axis) for name in reader.scale)
            w = (w.astype(np.float32) - zero_point) * scale
        yield _Weight(reader, w)


def _along(values: Float32Array, rank: int, axis: int) -> Float32Array:
    """A scalar, or (oc,), in a shape that broadcasts along an axis."""
    return values.reshape([-1 if k == axis else 1 for k in range(rank)])
