"""Quantize the layers of a model in order, each on inputs that have passed through the layers quantized before it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from requant_onnx.choices import LEVELS, Refinement
from requant_onnx.convert.ladder import HELD_OUT, Evidence, RefinedLayer, choose
from requant_onnx.convert.nearest import Result, measure
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.schedule import RUN_SHARE, Clock, Cost, Schedule
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.edit import tensor_proto
from requant_onnx.graph.layers import Layer, find_layers
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray, Int64Array
from requant_onnx.numerics.factor import factor
from requant_onnx.numerics.moments import Moments, Sample
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight, to_rows
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.stream import Chunk, Lanes, Stream, constants_to_initializers

PLACES_PER_INPUT, PLACES, GROUPED_PLACES = 20, 1 << 15, 1 << 13  # fewest places sampled: per input, in total, with groups
STEPS = 1000  # number of steps of the progress
SECONDS_A_LAYER, SECONDS_A_ROW, SECONDS_A_WEIGHT = 0.04, 2.4e-4, 7.6e-7  # estimated time of a layer, fitted to four nets;
SECONDS_AN_INPUT, SECONDS_A_PRODUCT = 4e-9, 2e-10  # per element of an input at a place, and per product of rows with moments
NO_TIME = "was not reached within the time limit"
NO_LAYER = "is read by several nodes, or by no node with a known product"


@dataclass(frozen=True)
class LayerResult:
    """A quantized weight, the choice made for it, and its layer."""

    result: Result
    choice: RefinedLayer
    layer: Layer


@dataclass(frozen=True)
class ExpectedOutputs:
    """The outputs that the refinement expects of the model with refined weights.

    feed: the first chunk of calibration inputs.  names: names of the outputs.
    exact, refined: outputs for the feed, in float and with refined weights.
    """

    feed: Chunk
    names: list[str]
    exact: list[GenericArray]
    refined: list[GenericArray]


@dataclass(frozen=True)
class Refined:
    """The refined layers.  why_nearest: for each weight that was not refined, the reason (a sentence without its subject).

    expected: expected outputs; None if the model was not run to its end.  note: sentence on what the time limit left out, or "".
    """

    layers: list[LayerResult]
    expected: ExpectedOutputs | None
    why_nearest: dict[str, str]
    note: str


def quantize_layers(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    calibration: Calibration,
    refinement: Refinement,
    min_scales: Mapping[str, Float64Array],
    clock: Clock,
    progress: Progress | None,
) -> Refined:
    """Refine the planned weights that a single node multiplies with finite values.  The model does not change.

    min_scales: least scales by weight, (oc,) or (1,).  Raises as `calibration_chunks`.
    If the time of the clock does not suffice, some layers get only a correction of their biases, or nothing.
    """
    work = onnx.ModelProto()
    work.CopyFrom(model)
    constants_to_initializers(work)
    plans = {item.weight.name: item for item in planned}
    layers = find_layers(ModelGraph.of(work), plans.keys())
    chunks = calibration_chunks(model, calibration)
    lanes = Lanes(work, chunks, 2, [layer.index for layer in layers], calibration.memory, clock.left * RUN_SHARE)
    exact, rounded = lanes.runs
    costs = [_cost(layer, plans[layer.weight], seconds, clock) for layer, seconds in zip(layers, lanes.seconds, strict=True)]
    schedule = Schedule(clock, costs)
    replaced: dict[str, onnx.TensorProto] = {}
    results = []
    why = dict.fromkeys(plans.keys() - {layer.weight for layer in layers}, NO_LAYER)
    for number, layer in enumerate(layers):
        if schedule.is_over:
            why.update((left.weight, NO_TIME) for left in layers[number:])
            break
        started = time.perf_counter()
        lanes.advance(layer.index, ({}, replaced))
        ran = time.perf_counter()
        plan, rung = plans[layer.weight], refinement if schedule.is_full(number) else Refinement.BIAS
        evidence = _evidence(layer, exact, rounded, number + 1, rung)
        if isinstance(evidence, str):
            why[layer.weight] = evidence
        else:
            results.append(_quantized(layer, plan, evidence, rung, min_scales.get(layer.weight)))
            replaced.update(_replacements(plan, results[-1]))
        schedule.done(number, ran - started, time.perf_counter() - ran)
        if progress is not None:
            progress(layer.weight, round(STEPS * schedule.fraction(number)), STEPS)
    expected = None if schedule.is_over else _expected(work, chunks[0], (exact, rounded), replaced)
    return Refined(results, expected, why, _left_out(clock, schedule, len(layers)))


def _quantized(
    layer: Layer, plan: PlannedWeight, evidence: Evidence, refinement: Refinement, min_scale: Float64Array | None
) -> LayerResult:
    w = plan.weight.load()
    grids = (plan.grid, *plan.others)
    choice = choose(layer, w, grids, evidence, refinement, min_scale, offset=plan.offset(), given=plan.given)
    final = replace(plan, grid=choice.grid, others=())
    result = replace(measure(final, w, choice.quantized), method=choice.method, output_errors=choice.errors)
    return LayerResult(result, choice, layer)


def _replacements(plan: PlannedWeight, done: LayerResult) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The weight and, if it changes, the bias, as later layers see them, by name."""
    layer, choice = done.layer, done.choice
    yield layer.weight, tensor_proto(_emitted(plan, choice), layer.weight)
    if choice.bias is not None:
        yield layer.bias, tensor_proto(layer.stored_bias(choice.bias), layer.bias)


def _expected(
    work: onnx.ModelProto, feed: Chunk, runs: tuple[Stream, Stream], replaced: Mapping[str, onnx.TensorProto]
) -> ExpectedOutputs:
    for stream, weights in zip(runs, ({}, replaced), strict=True):
        stream.advance(len(work.graph.node), weights)
    names = [item.name for item in work.graph.output if item.name in runs[0].values[0]]
    return ExpectedOutputs(feed, names, *([stream.values[0][name] for name in names] for stream in runs))


def _left_out(clock: Clock, schedule: Schedule, layers: int) -> str:
    """A sentence on what was not done for lack of time; "" if everything was done."""
    if schedule.full == layers:
        return ""
    nearest = layers - schedule.full - schedule.least
    return (
        f"within the time limit of {clock.limit:g} s, {schedule.full} of {layers} layers were refined, {schedule.least} got only a "
        f"bias correction, and {nearest} were rounded to nearest levels; a higher limit gives a better file"
    )


def _cost(layer: Layer, plan: PlannedWeight, running: float, clock: Clock) -> Cost:
    """The estimated seconds for a layer, and the gain from refining it: its relative weight error, or 0 without a time limit."""
    product = layer.product
    n, rows = math.prod(product.shape) // product.channels, product.group * product.rows
    places = GROUPED_PLACES if product.group > 1 else max(PLACES, PLACES_PER_INPUT * n)
    least = SECONDS_A_LAYER + SECONDS_A_ROW / 5 * rows + SECONDS_AN_INPUT * product.group * places * n
    full = SECONDS_A_ROW * rows + SECONDS_A_WEIGHT * rows * n + SECONDS_A_PRODUCT * n**2 * rows
    gain = 0.0 if clock.limit is None else _error_at_full_range(plan)
    return Cost(running, least, least + full, gain)


def _error_at_full_range(plan: PlannedWeight) -> float:
    """The squared error of uniform levels over the full range, step**2 / 12, relative to the power of the weights; at most 1."""
    rows = to_rows(plan.weight.load(), plan.grid.axis)
    step = np.ptp(rows, 1).astype(np.float64) / (LEVELS[plan.grid.bits] - 1)
    power = np.square(rows, dtype=np.float64).mean()
    return float(min(1.0, (step**2).mean() / 12 / power)) if power > 0.0 else 0.0


def _emitted(plan: PlannedWeight, choice: RefinedLayer) -> GenericArray:
    return plan.decoded(choice.quantized).astype(onnx.helper.tensor_dtype_to_np_dtype(plan.weight.emit))


def _evidence(layer: Layer, exact: Stream, rounded: Stream, number: int, refinement: Refinement) -> Evidence | str:
    """The calibration data of a layer, or, if there is nothing to fit, the reason (a sentence without its subject).

    With too few chunks to hold out any, all are used for both.  number: number of the layer, which seeds the choice of places.
    """
    if any(layer.x not in chunk for chunk in exact.values):
        return "multiplies a constant"
    shapes = [(np.shape(a[layer.x]), np.shape(b[layer.x])) for a, b in zip(exact.values, rounded.values, strict=True)]
    if any(math.prod(shape) == 0 for pair in shapes for shape in pair):
        return "gets no input"
    if any(float_shape != shape for float_shape, shape in shapes):
        return "gets a number of inputs that depends on the data, and differs between the float and the quantized model"
    held = [k for k in range(len(shapes)) if k % HELD_OUT == HELD_OUT - 1]
    fitted = [k for k in range(len(shapes)) if k not in held]
    product = layer.product
    columns = math.prod(product.shape) // product.channels
    few = product.group > 1
    places = max(PLACES_PER_INPUT * columns, GROUPED_PLACES if few else PLACES) // max(1, len(fitted))
    moments, sample = Moments.empty(product.group, columns, product.rows), Sample()
    added = 0.0 if layer.can_correct else layer.biases.astype(np.float32)[:, None]
    for k, y in enumerate(targets(layer, exact, rounded)):
        x = np.asarray(rounded.values[k][layer.x], np.float32)
        chosen = _chosen(product.count(y), places, number, k)
        inputs, results = product.inputs(x, chosen), product.results(y, chosen)
        if k in fitted:
            (moments.add if refinement.sees_outputs else moments.add_means)(inputs, results - added)
        if k in held or not held:
            sample.add(inputs, results)
    usable = moments.count and moments.is_finite and sample.is_finite
    return Evidence(moments, sample) if usable else "gets inputs that are not finite"


def _chosen(total: int, count: int, *seed: int) -> Int64Array:
    """At most `count` of `total` places, ascending: one chosen at random from each of `count` equal parts."""
    if total <= count:
        return np.arange(total)
    edges = np.linspace(0, total, count + 1)
    return np.asarray(edges[:-1] + np.random.default_rng(seed).random(count) * np.diff(edges), np.int64)


@dataclass(frozen=True)
class Probe:
    """A layer of which only the weight is quantized.

    trials: for each grid, the quantized weight and, if it changes, the bias.
    importance: factor on the squared error of each element in the layer's output error, 1 on average, in the shape of the weight;
    if the refinement includes feedback, only of errors that feedback cannot compensate for.
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
    """Probe the planned weights that a single node multiplies with finite values, on the activations of the float model.

    grids: grids to try, by weight.  min_scales: least scales by weight, (oc,) or (1,).
    """
    work = onnx.ModelProto()
    work.CopyFrom(model)
    constants_to_initializers(work)
    plans = {item.weight.name: item for item in planned}
    stream = Stream(work, chunks)
    for number, layer in enumerate(find_layers(ModelGraph.of(work), plans.keys()), 1):
        stream.advance(layer.index, {})
        evidence = _evidence(layer, stream, stream, number, Refinement.DESCENT)
        if isinstance(evidence, str):
            continue
        item, min_scale = plans[layer.weight], min_scales.get(layer.weight)
        w = item.weight.load()
        moments = evidence.pair(layer.can_correct and refinement is not Refinement.NONE)
        variances = factor(moments[0]).variances() if refinement.sees_outputs else np.diagonal(moments[0], axis1=1, axis2=2)
        importance = layer.importance(variances.astype(np.float64))
        if refinement is Refinement.NONE:
            nearest = (quantize_weight(w, grid, min_scale, importance) for grid in grids[layer.weight])
            yield Probe(layer, tuple((q, None) for q in nearest), importance)
            continue
        choices = [
            choose(layer, w, (grid,), evidence, refinement, min_scale, (moments[0].copy(), moments[1]))
            for grid in grids[layer.weight]
        ]
        yield Probe(layer, tuple((choice.quantized, choice.bias) for choice in choices), importance)


def targets(layer: Layer, exact: Stream, rounded: Stream) -> Iterator[Float32Array]:
    """The target output of a layer for each chunk: its float output; if a shortcut is added to this, minus the error of the
    quantized shortcut."""
    name = layer.added_to
    for output, exact_values, rounded_values in zip(exact.output(layer.index), exact.values, rounded.values, strict=True):
        y = np.asarray(output, np.float32)
        if name in exact_values and name in rounded_values and exact_values[name].shape == y.shape:
            y = y + np.asarray(exact_values[name], np.float32) - np.asarray(rounded_values[name], np.float32)
        yield y
