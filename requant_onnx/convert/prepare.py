"""Prepare a conversion: normalize the graph, find the weights, measure the ranges of activations, and plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import onnx

from requant_onnx.choices import Refinement
from requant_onnx.config import QuantConfig
from requant_onnx.convert.integer_ranges import Integers, watch_integers
from requant_onnx.convert.plan import Plan, kept_in_float, opset_for, plan_conversion
from requant_onnx.convert.schedule import Clock
from requant_onnx.files.load import is_large, materialize, opset_of
from requant_onnx.graph.channel_means import channel_means
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import FORMS, Target
from requant_onnx.graph.edit import floats_to_tensors
from requant_onnx.graph.float_constants import FloatConstant, float_constants
from requant_onnx.graph.layers import find_layers, give_biases
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.prepare.full_pads import write_full_pads
from requant_onnx.graph.prepare.merge_constants import merge_constants
from requant_onnx.graph.prepare.merge_directions import merge_directions
from requant_onnx.graph.prepare.opset import raise_opset
from requant_onnx.graph.prepare.transpose_gemm import transpose_gemm
from requant_onnx.graph.weights import find_weights
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float64Array
from requant_onnx.progress import Progress
from requant_onnx.rules import check_matches
from requant_onnx.runtime.fold_constants import exposed
from requant_onnx.runtimes import RUNTIMES


@dataclass(frozen=True)
class Origin:
    """The original model.  overridable: number of weights that callers could replace.  constants: all float constants it stores."""

    source: onnx.ModelProto
    opset: int
    overridable: int
    constants: list[FloatConstant]


@dataclass(frozen=True)
class Prepared:
    """A model ready for its weights to be quantized, and what was decided about it.

    graph: normalized model.  folded: number of folded BatchNormalization nodes.  refining: calibration, if it refines the rounding.
    means: without calibration, the channel means, (channels,), of activations, as BatchNormalization determines them.
    clock: clock of the whole conversion.
    """

    origin: Origin
    graph: ModelGraph
    config: QuantConfig
    folded: int
    integers: Integers
    plan: Plan
    refining: Calibration | None
    means: Mapping[str, Float64Array]
    clock: Clock

    @property
    def model(self) -> onnx.ModelProto:
        """The normalized model."""
        return self.graph.proto

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for users on changes to the graph."""
        count = self.origin.overridable
        return (
            (f"{count} weights and biases were also graph inputs, and callers can no longer replace them; see --keep-inputs",)
            if count
            else ()
        )

    @property
    def target(self) -> Target:
        """The runtime and opset that the file is written for."""
        row = RUNTIMES[self.config.runtime]
        return Target(opset_of(self.model), row.native4, row.signed, row.half, row.grouped)


def prepare(
    source: onnx.ModelProto,
    config: QuantConfig,
    calibration: Calibration | None,
    excluded: Collection[str],
    clock: Clock,
    progress: Progress | None,
) -> Prepared:
    """Carry out all steps before the quantization of the weights.

    source: original model, which does not change.  excluded: weights that are not planned for integer kernels.
    Raises ConfigError if a layer rule matches no weight; in the int8 form, also as `watch_activations`.
    """
    opset, work = opset_of(source), onnx.ModelProto()
    work.CopyFrom(source)
    if calibration is not None and not is_large(work):  # calibration runs the model from memory
        materialize(work)
    floats_to_tensors(work)
    start = exposed(work, config.keep_inputs)
    given, view = start.graph, find_weights(start.graph)
    check_matches(config.rules, [(weight.names, weight.op) for weight in view.weights])
    origin = Origin(source, opset, start.overridable, float_constants(given.proto))
    refining = calibration if config.refinement is not Refinement.NONE else None
    if not view.weights:
        return Prepared(origin, given, config, 0, Integers(), plan_conversion(view, config), refining, {}, clock)
    form = FORMS[config.form]
    analytic = refining is None and config.refinement is not Refinement.NONE
    means = channel_means(given) if analytic else {}
    former: dict[str, str] = {}
    folded = fold_batchnorm(given, former)
    merge_directions(given)
    merge_constants(given.proto)
    model = ModelGraph.of(raise_opset(given.proto, opset_for(config)))
    wanted = {w.name for w in find_weights(model).renamed(former).weights if kept_in_float(w, config) is None}
    if form.on_integers:
        write_full_pads(model)
    give_biases(
        model, wanted if refining is not None else {layer.weight for layer in find_layers(model, wanted) if layer.x in means}
    )
    if form.transposes_gemm:
        transpose_gemm(model, wanted, former)
    model = ModelGraph.of(model.proto)
    view = find_weights(model).renamed(former)
    integers = Integers()
    if form.on_integers and calibration is not None:
        integers = watch_integers(model, view, config, calibration, excluded, clock, progress)
    plan = plan_conversion(view, config, integers.plan.weights)
    return Prepared(origin, model, config, folded, integers, plan, refining, means, clock)


def copied(prepared: Prepared) -> Prepared:
    """A copy that `write` may change while the original stays the same."""
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    return replace(prepared, graph=replace(prepared.graph, proto=model))
