"""Quantize the layers of a model in their order, each on what reaches it through those before, already quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from requant_onnx.config import Refinement
from requant_onnx.convert.ladder import HELD_OUT, RefinedLayer, choose
from requant_onnx.convert.nearest import Result, measure
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.edit import tensor_proto
from requant_onnx.graph.layers import Layer, find_layers
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray
from requant_onnx.numerics.feedback import conditional_variances
from requant_onnx.numerics.moments import Moments
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.stream import Chunk, Stream, constants_to_initializers

NO_LAYER = "is read by several nodes, or by none whose product is known"


@dataclass(frozen=True)
class LayerResult:
    """A weight done, and what was chosen for it."""

    result: Result
    choice: RefinedLayer
    layer: Layer


@dataclass(frozen=True)
class Belief:
    """What the model gives with the refined weights, as far as the refinement knows.

    feed: some of the calibration inputs.  names: of outputs.  exact, refined: what they are for the feed, in float and refined.
    """

    feed: Chunk
    names: list[str]
    exact: list[GenericArray]
    refined: list[GenericArray]


@dataclass(frozen=True)
class Refined:
    """The layers that were refined; and for weights that were not, why (a sentence without its subject)."""

    layers: list[LayerResult]
    belief: Belief
    why_nearest: dict[str, str]


def quantize_layers(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    calibration: Calibration,
    refinement: Refinement,
    min_scales: Mapping[str, Float64Array],
    progress: Progress | None,
) -> Refined:
    """Refine those of the planned weights that one node alone multiplies with finite values.  The model does not change."""
    work = onnx.ModelProto()
    work.CopyFrom(model)
    constants_to_initializers(work)
    plans = {item.weight.name: item for item in planned}
    layers = find_layers(ModelGraph.of(work), plans.keys())
    chunks = calibration_chunks(model, calibration)
    exact, rounded = Stream(work, chunks), Stream(work, chunks)
    replaced: dict[str, onnx.TensorProto] = {}
    results = []
    why = dict.fromkeys(plans.keys() - {layer.weight for layer in layers}, NO_LAYER)
    for done, layer in enumerate(layers, 1):
        exact.advance(layer.index, {})
        rounded.advance(layer.index, replaced)
        plan = plans[layer.weight]
        moments = _moments(layer, exact, rounded)
        if isinstance(moments, str):
            why[layer.weight] = moments
            continue
        fitted, held = moments
        w = plan.weight.load()
        choice = choose(layer, w, (plan.grid, *plan.others), fitted, held, refinement, min_scales.get(layer.weight))
        final = replace(plan, grid=choice.grid, others=())
        result = replace(measure(final, w, choice.quantized), method=choice.method, output_errors=choice.errors)
        replaced[layer.weight] = tensor_proto(_emitted(plan, choice), layer.weight)
        if choice.bias is not None:
            replaced[layer.bias] = tensor_proto(layer.stored_bias(choice.bias), layer.bias)
        results.append(LayerResult(result, choice, layer))
        if progress is not None:
            progress(layer.weight, done, len(layers))
    for stream, weights in ((exact, {}), (rounded, replaced)):
        stream.advance(len(work.graph.node), weights)
    names = [item.name for item in model.graph.output if item.name in exact.values[0]]
    outputs = [[stream.values[0][name] for name in names] for stream in (exact, rounded)]
    return Refined(results, Belief(chunks[0], names, *outputs), why)


def _emitted(plan: PlannedWeight, choice: RefinedLayer) -> GenericArray:
    return choice.quantized.dequantize().astype(onnx.helper.tensor_dtype_to_np_dtype(plan.weight.emit))


def _moments(layer: Layer, exact: Stream, rounded: Stream) -> tuple[list[Moments], list[Moments]] | str:
    """Of the inputs to fit on, and of those held out (of all of them in both, where there are too few chunks).

    A sentence without its subject where there is nothing to fit.
    """
    if any(layer.x not in chunk for chunk in exact.values):
        return "multiplies a constant"
    shapes = [(np.shape(a[layer.x]), np.shape(b[layer.x])) for a, b in zip(exact.values, rounded.values, strict=True)]
    if any(math.prod(shape) == 0 for pair in shapes for shape in pair):
        return "gets no input at all"
    if any(float_shape != shape for float_shape, shape in shapes):
        return "gets as many inputs as the data has it, which differs between the float and the quantized model"
    outputs = targets(layer, exact, rounded)
    sums = []
    for held in (False, True):
        every = range(len(outputs))
        chunks = [k for k in every if (k % HELD_OUT == HELD_OUT - 1) is held] or list(every)
        total: list[Moments] = []
        for k in chunks:
            x, y = (np.asarray(v, np.float32) for v in (rounded.values[k][layer.x], outputs[k]))
            _add(layer, x, y, total)
        sums.append(total)
    usable = all(moments.count and moments.is_finite for moments in (*sums[0], *sums[1]))
    return (sums[0], sums[1]) if usable and all(sums) else "gets values that are not finite"


@dataclass(frozen=True)
class Probe:
    """A layer quantized alone, on some grids.

    trials: for each grid the weight and, where it changes, the bias.  importance: what the squared error of each weight counts in
    that of the layer's output, after feedback where that is asked for, 1 on average.
    """

    layer: Layer
    trials: tuple[tuple[QuantizedWeight, Float32Array | None], ...]
    importance: Float32Array


def probe_layers(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    grids: Mapping[str, Sequence[Grid]],
    chunks: Sequence[Chunk],
    refinement: Refinement,
    min_scales: Mapping[str, Float64Array],
) -> Iterator[Probe]:
    """Those of the planned weights that one node alone multiplies with finite values, on the inputs of the float model.

    grids: by weight.
    """
    work = onnx.ModelProto()
    work.CopyFrom(model)
    constants_to_initializers(work)
    plans = {item.weight.name: item for item in planned}
    stream = Stream(work, chunks)
    for layer in find_layers(ModelGraph.of(work), plans.keys()):
        stream.advance(layer.index, {})
        moments = _moments(layer, stream, stream)
        if isinstance(moments, str):
            continue
        fitted, held = moments
        item, min_scale = plans[layer.weight], min_scales.get(layer.weight)
        w = item.weight.load()
        triples = [m.centered() if layer.can_correct and refinement is not Refinement.NONE else m.uncentered() for m in fitted]
        importance = layer.importance(
            [conditional_variances(xx) if refinement.sees_outputs else np.diag(xx) for xx, _, _ in triples]
        )
        if refinement is Refinement.NONE:
            nearest = (quantize_weight(w, grid, min_scale, importance) for grid in grids[layer.weight])
            yield Probe(layer, tuple((q, None) for q in nearest), importance)
            continue
        choices = (choose(layer, w, (grid,), fitted, held, refinement, min_scale) for grid in grids[layer.weight])
        yield Probe(layer, tuple((choice.quantized, choice.bias) for choice in choices), importance)


def targets(layer: Layer, exact: Stream, rounded: Stream) -> list[Float32Array]:
    """What the layer should give for each chunk: its float output, and, where that is added to a shortcut which has been
    quantized already, what makes up for the error of the shortcut."""
    outputs = [np.asarray(y, np.float32) for y in exact.output(layer.index)]
    name = layer.added_to
    for k, (y, exact_values, rounded_values) in enumerate(zip(outputs, exact.values, rounded.values, strict=True)):
        if name in exact_values and name in rounded_values and exact_values[name].shape == y.shape:
            outputs[k] = y + np.asarray(exact_values[name], np.float32) - np.asarray(rounded_values[name], np.float32)
    return outputs


def _add(layer: Layer, x: Float32Array, y: Float32Array, total: list[Moments]) -> None:
    product = layer.product
    bias = np.zeros(product.channels, np.float32) if layer.can_correct else layer.bias_values.astype(np.float32)
    biases = bias.reshape(product.group, -1)
    for images, groups in product.places(x):
        results = product.results(y[images])
        if not total:
            total.extend(Moments.empty(g.shape[1], product.rows) for g in groups)
        for moments, inputs, wanted, group_bias in zip(total, groups, results, biases, strict=True):
            moments.add(inputs, wanted - group_bias)
