"""The part of a model that is to run on integers, with all that it needs to know of the activations."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import onnx

from requant_onnx.choices import Granularity, Int8Speed
from requant_onnx.config import QuantConfig
from requant_onnx.convert.plan import kept_in_float
from requant_onnx.convert.report import ActivationReport, Bounds
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.integer.nodes import Bias, biases_of, min_scales_of
from requant_onnx.graph.integer.plan import IntegerPlan, plan_integers
from requant_onnx.graph.integer.worth import COSTS, FAST, SLOWER, VNNI, slower_on_integers, watched_tensors
from requant_onnx.graph.weights import View
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.activation import ActivationGrid, activation_grid
from requant_onnx.numerics.arrays import Float64Array
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import activation_sizes, watch_activations
from requant_onnx.runtimes import RUNTIMES


@dataclass(frozen=True)
class Integers:
    """grids: of each quantized activation.  biases: of the nodes that get an integer kernel.

    min_scales: least scales of weights, () or (channels,), for biases to fit int32.
    """

    plan: IntegerPlan = field(default_factory=IntegerPlan)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    biases: tuple[Bias, ...] = ()
    min_scales: dict[str, Float64Array] = field(default_factory=dict)

    def reports(self) -> tuple[ActivationReport, ...]:
        """One for each quantized activation, in graph order."""
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
    progress: Progress | None,
) -> Integers:
    """Plan the integer part and find its ranges.  excluded: weights that stay float.  Raises as `watch_activations`."""
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
    grid_of = {
        name: activation_grid(
            h,
            config.activation_range,
            calibration.headroom,
            plan.ceilings.get(name, math.inf),
            symmetric=RUNTIMES[config.runtime].symmetric,
            signed=RUNTIMES[config.runtime].signed,
        )
        for name, h in histograms.items()
    }
    grids = {tensor: grid_of[source] for tensor, source in plan.source.items()}
    per_channel = config.granularity is Granularity.PER_CHANNEL
    biases = biases_of(model, plan) if RUNTIMES[config.runtime].int32_biases else []
    return Integers(plan, grids, tuple(biases), min_scales_of(biases, grids, per_channel=per_channel))


def _fast(model: ModelGraph, weights: set[str], config: QuantConfig, calibration: Calibration) -> IntegerPlan:
    """The plan; with `int8_speed` auto without the layers that integers make slower."""
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
