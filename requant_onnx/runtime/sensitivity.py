"""The effect of errors in the weights on the outputs of a model, measured in ONNX Runtime on a few calibration inputs.

Outputs that are selected, such as lists of boxes, count by the tensors that they are selected from (graph/selections.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from requant_onnx.graph.constants import load_proto
from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.selections import compared_tensors, has_tensors, with_outputs
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray
from requant_onnx.runtime.sessions import open_session, run_session
from requant_onnx.runtime.stream import Chunk, constants_to_initializers

MOST_BYTES = 1 << 30  # of tensors from which outputs are selected, for all chunks
Outputs = list[list[Float64Array]]
"""The outputs for each chunk of inputs."""


def output_errors(
    model: onnx.ModelProto, replacements: Iterable[Mapping[str, Float32Array]], names: Collection[str], chunks: Sequence[Chunk]
) -> Iterator[float]:
    """The output error, relative to output power, for each set of replaced tensors.  names: all tensors in the sets."""
    work = with_outputs(model, names_to_compare(model, chunks))
    constants_to_initializers(work)
    stored: Chunk = {}
    for initializer in work.graph.initializer:
        if initializer.name in names:
            stored[initializer.name] = np.asarray(load_proto(initializer))
            kind, shape = initializer.data_type, initializer.dims
            work.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, kind, shape))
    delete_where(work.graph.initializer, [k for k, item in enumerate(work.graph.initializer) if item.name in stored])
    session = open_session(work, "the model")

    def run(feeds: Mapping[str, GenericArray]) -> Outputs:
        return [numbers_in(run_session(session, "the model", None, {**feeds, **chunk})) for chunk in chunks]

    exact = run(stored)
    for replaced in replacements:
        others = {name: values.astype(stored[name].dtype) for name, values in replaced.items()}
        yield relative_error(exact, run({**stored, **others}))


def names_to_compare(model: onnx.ModelProto, chunks: Sequence[Chunk]) -> list[str]:
    """The tensors on which models are compared: the outputs, or those from which they are selected, unless these are very large.

    chunks: the inputs, as many as will be compared.
    """
    outputs, compared = [item.name for item in model.graph.output], compared_tensors(model)
    if compared != outputs and len(chunks) > 0:
        first = outputs_of(with_outputs(model, compared), chunks[:1])[0]
        if len(chunks) * sum(y.nbytes for y in first) > MOST_BYTES:
            return outputs
    return compared


def output_error_against(reference: onnx.ModelProto, chunks: Sequence[Chunk]) -> Callable[[onnx.ModelProto], float]:
    """A function that returns the output error of another model, relative to output power.

    The other model has the same outputs; the tensors from which they are selected count if it has them, too.
    """
    outputs = [item.name for item in reference.graph.output]
    compared = names_to_compare(reference, chunks)
    exact: dict[bool, Outputs] = {}

    def error(model: onnx.ModelProto) -> float:
        has_all = has_tensors(model, compared)
        names = compared if has_all else outputs
        first, second = (each if names == outputs else with_outputs(each, names) for each in (reference, model))
        if has_all not in exact:
            exact[has_all] = outputs_of(first, chunks)
        return relative_error(exact[has_all], outputs_of(second, chunks))

    return error


def outputs_of(model: onnx.ModelProto, chunks: Sequence[Chunk]) -> Outputs:
    """The outputs of a model for each chunk of inputs."""
    session = open_session(model, "the model")
    return [numbers_in(run_session(session, "the model", None, chunk)) for chunk in chunks]


def numbers_in(outputs: Sequence[Any]) -> list[Float64Array]:
    """The numeric tensors among the outputs of a model; strings, sequences and maps have no measurable error."""
    arrays = [y for y in outputs if isinstance(y, np.ndarray) and y.dtype.kind not in "OSU"]
    return [np.asarray(y, np.float64) for y in arrays]


def relative_error(exact: Outputs, others: Outputs) -> float:
    """The squared error divided by the squared values, each summed over all chunks, averaged over the outputs.

    An output whose shape changed (such as one with a row per box found) has the error of an output of zeros.  An output that has
    NaN in `exact` says nothing and is left out; the same infinity in both is no error.
    """
    ratios = []
    for outputs, changed in zip(zip(*exact, strict=True), zip(*others, strict=True), strict=True):
        if any(np.isnan(y).any() for y in outputs):
            continue
        pairs = [_comparable(y, z) for y, z in zip(outputs, changed, strict=True)]
        power = sum(float((y**2).sum()) for y, _ in pairs)
        error = sum(float(((y - z) ** 2).sum()) for y, z in pairs)
        ratios.append(error / power if power > 0.0 else 0.0)
    return float(np.mean(ratios)) if ratios else 0.0


def _comparable(y: Float64Array, z: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Both with 0 where both have the same infinity, such as log 0; zeros for z if its shape is another."""
    if y.shape != z.shape:
        return y, np.zeros_like(y)
    same = np.isinf(y) & (y == z)
    return (np.where(same, 0.0, y), np.where(same, 0.0, z)) if same.any() else (y, z)
