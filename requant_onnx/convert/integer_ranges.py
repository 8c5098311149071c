"""The part of a model that will run on integers, and the grids of its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import onnx

from requant_onnx.choices import ActivationRange, Granularity, Int8Speed, Refinement
from requant_onnx.config import QuantConfig
from requant_onnx.convert.plan import kept_in_float
from requant_onnx.convert.report import ActivationReport, Bounds
from requant_onnx.convert.schedule import Clock
from requant_onnx.files.load import is_large
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.integer.nodes import Bias, biases_of, min_scales_of
from requant_onnx.graph.integer.plan import GENERIC, IntegerPlan, plan_integers
from requant_onnx.graph.integer.worth import COSTS, FAST, SLOWER, VNNI, slower_on_integers, watched_tensors
from requant_onnx.graph.weights import View
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.activation import ActivationGrid, Histogram, activation_grid
from requant_onnx.numerics.arrays import Float64Array
from requant_onnx.progress import Progress
from requant_onnx.runtime.activation_loss import activation_loss
from requant_onnx.runtime.activation_ranges import alphas_by_output
from requant_onnx.runtime.feeds import activation_sizes, calibration_chunks, watch_activations
from requant_onnx.runtimes import RUNTIMES

LOSS_INPUTS = 16  # inputs on which the loss from 8-bit activations is measured
RANGE_INPUTS, FEWEST_INPUTS, TRIALS = 64, 4, 5  # most and fewest inputs on which ranges are compared; approximate trials per range
RANGE_ELEMENTS = 1 << 34  # largest number of activation elements computed for that: about half a minute
RANGE_SHARE = 0.3  # share of the time left for that
MARGIN_DB = 1.0  # added to the smallest allowed SQNR, as a margin for the errors of the weights


@dataclass(frozen=True)
class Integers:
    """The integer part of a model.  plan: its nodes and tensors.  grids: grid of each quantized activation, by tensor.

    biases: biases of nodes with an integer kernel; none if the runtime does not store them as int32.
    min_scales: least scales of weights for which these biases fit int32, (oc,) or (1,), by weight.
    """

    plan: IntegerPlan = field(default_factory=IntegerPlan)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    biases: tuple[Bias, ...] = ()
    min_scales: dict[str, Float64Array] = field(default_factory=dict)

    def reports(self) -> tuple[ActivationReport, ...]:
        """The reports of all quantized activations, in graph order."""
        return tuple(
            ActivationReport(tensor, Bounds(grid.low, grid.high), float(grid.scale), int(grid.zero_point))
            for tensor, grid in self.grids.items()
        )


def watch_integers(
    model: ModelGraph,
    view: View,
    config: QuantConfig,
    calibration: Calibration,
    excluded: Collection[str],
    clock: Clock,
    progress: Progress | None,
) -> Integers:
    """Plan the integer part and choose the ranges of its activations on calibration inputs.  Raises as `watch_activations`.

    excluded: weights that are not planned for integer kernels.
    """
    eligible = {
        w.name
        for w in view.weights
        if w.emit == onnx.TensorProto.FLOAT
        and kept_in_float(w, config) is None
        and FORMS[config.of_layer(w.names, w.op).form].on_integers
    }
    plan = _fast(model, eligible.difference(excluded), config, calibration)
    if not plan.weighted:
        return Integers(plan)
    report = None if progress is None else (lambda done, total: progress("watching activations", done, total))
    histograms = watch_activations(model.proto, sorted(set(plan.source.values())), calibration, report)
    grid_of = _grids(model.proto, histograms, plan, config, calibration, _while_time_is_left(clock, progress))
    unfit = _unfit(model.proto, grid_of, config, calibration)
    if unfit:
        plan = _without(model, plan, unfit, config)
    grids = {tensor: grid_of[source] for tensor, source in plan.source.items() if source in grid_of}
    per_channel = config.granularity is Granularity.PER_CHANNEL
    biases = biases_of(model, plan) if RUNTIMES[config.runtime].int32_biases else []
    return Integers(plan, grids, tuple(biases), min_scales_of(biases, grids, per_channel=per_channel))


def _while_time_is_left(clock: Clock, progress: Progress | None) -> Callable[[int, int], bool]:
    """A function that reports progress and returns whether the comparison of ranges may take more time."""
    end = clock.elapsed + RANGE_SHARE * clock.left

    def goes_on(done: int, total: int) -> bool:
        if progress is not None:
            progress("choosing activation ranges", done, total)
        return clock.elapsed < end

    return goes_on


def _grids(
    model: onnx.ModelProto,
    histograms: Mapping[str, Histogram],
    plan: IntegerPlan,
    config: QuantConfig,
    calibration: Calibration,
    goes_on: Callable[[int, int], bool],
) -> dict[str, ActivationGrid]:
    """The grid of each watched activation.

    Noise has a narrower range than images and does not show what may be clipped, so the `output` method becomes `minmax` on it.
    """
    row, method = RUNTIMES[config.runtime], config.activation_range
    if method is ActivationRange.OUTPUT and calibration.is_noise:
        method = ActivationRange.MIN_MAX

    def grid_at(name: str, alpha: float | None = None) -> ActivationGrid:
        ceiling = plan.ceilings.get(name, math.inf)
        kinds = {"symmetric": row.symmetric, "signed": row.signed}
        return activation_grid(histograms[name], method, calibration.headroom, ceiling, alpha, **kinds)

    grids = {name: grid_at(name) for name in histograms}
    given = len(calibration.feeds) or calibration.count if calibration.images is None else len(calibration.images)
    calibration = replace(calibration, count=min(calibration.count, given))
    count = _inputs_for_ranges(histograms, calibration) if method is ActivationRange.OUTPUT and not is_large(model) else 0
    if not count:
        return grids
    starts = {name: min(1.0, float(grid.scale / grid_at(name, 1.0).scale)) for name, grid in grids.items()}
    every = calibration_chunks(model, calibration)
    chunks = every[:: math.ceil(len(every) / max(1, len(every) * count // calibration.count))]
    corrected = config.refinement is not Refinement.NONE
    alphas = alphas_by_output(model, starts, grid_at, chunks, corrected=corrected, goes_on=goes_on)
    return {name: grid_at(name, alpha) for name, alpha in alphas.items()}


def _inputs_for_ranges(histograms: Mapping[str, Histogram], calibration: Calibration) -> int:
    """The number of inputs on which ranges are compared; reduced, or 0, if that would take too long."""
    elements = sum(h.seen for h in histograms.values()) // calibration.count
    most = RANGE_ELEMENTS // max(1, TRIALS * len(histograms) * elements // 2)
    return 0 if most < FEWEST_INPUTS else min(most, RANGE_INPUTS, calibration.count)


def _unfit(
    model: onnx.ModelProto,
    grids: Mapping[str, ActivationGrid],
    config: QuantConfig,
    calibration: Calibration,
) -> set[str]:
    """The activations to leave in float: those that cost most alone, until the outputs keep `int8_min_sqnr` with the rest."""
    if not math.isfinite(config.int8_min_sqnr) or is_large(model):
        return set()
    chunks = calibration_chunks(model, replace(calibration, count=min(calibration.count, LOSS_INPUTS)))
    loss, allowed = activation_loss(model, grids, chunks), 10 ** (-(config.int8_min_sqnr + MARGIN_DB) / 10)
    left, unfit = set(grids), set[str]()
    if loss(left) <= allowed:
        return unfit
    order = sorted(left, key=lambda name: loss({name}))
    while order and not loss(left) <= allowed:  # NaN too
        for _ in range(max(1, len(order) // 10)):
            unfit.add(order.pop())
        left -= unfit
    return unfit


def _without(model: ModelGraph, plan: IntegerPlan, unfit: set[str], config: QuantConfig) -> IntegerPlan:
    """The plan without the weights whose nodes read or output unfit activations."""
    reads = {node.weight for node in plan.weighted if plan.source.get(node.x, node.x) in unfit}
    gives = {node.weight for node in plan.weighted if plan.source.get(plan.results.get(node.output, node.output)) in unfit}
    without = plan_integers(model, set(plan.weights) - reads - gives, GENERIC if config.int8_speed is Int8Speed.ALL else FAST)
    limit = f"{config.int8_min_sqnr:g} dB (--int8-min-sqnr)"
    why = f"reads or outputs activations that would reduce the output SQNR below {limit} in 8 bits"
    without.why_not.update({**plan.why_not, **dict.fromkeys(set(plan.weights) - set(without.weights), why)})
    return without


def _fast(model: ModelGraph, weights: set[str], config: QuantConfig, calibration: Calibration) -> IntegerPlan:
    """The plan; with `int8_speed` auto, without layers that would be slower on integers."""
    if config.int8_speed is Int8Speed.ALL:
        return plan_integers(model, weights)
    plan, slower, sizes = plan_integers(model, weights, FAST), set[str](), dict[str, int]()
    if plan.weighted:
        sizes = activation_sizes(model.proto, sorted(watched_tensors(plan)), calibration)
    while more := slower_on_integers(model, plan, sizes, COSTS.get(config.runtime, VNNI)):
        slower |= more
        plan = plan_integers(model, weights - slower, FAST)
    plan.why_not.update(dict.fromkeys(slower, SLOWER))
    return plan
