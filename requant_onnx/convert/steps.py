"""The steps of one conversion: prepare (normalize, find the weights, watch activations, plan), quantize, write."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import onnx

from requant_onnx.config import METADATA_KEY, NARROW_ORT, QuantConfig, Refinement
from requant_onnx.convert.integer_ranges import Integers, watch_integers
from requant_onnx.convert.layerwise import Belief, quantize_layers
from requant_onnx.convert.nearest import Result, quantize_all
from requant_onnx.convert.plan import Plan, PlannedWeight, kept_in_float, opset_for, plan_conversion
from requant_onnx.convert.report import QuantReport, WeightReport
from requant_onnx.errors import ModelError
from requant_onnx.files.load import is_large, opset_of
from requant_onnx.graph.channel_means import channel_means
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import FORMS, Coded, Target, bytes_of_each, decode_of, group_weights
from requant_onnx.graph.decode.lookup import decode_after_lookup
from requant_onnx.graph.decode.nodes import Constants, Decode
from requant_onnx.graph.decode.replace import replace_weights, set_metadata
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.integer.nodes import quantize_activations
from requant_onnx.graph.layers import find_layers, give_biases
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.prepare.expose import expose_weights
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.prepare.full_pads import write_full_pads
from requant_onnx.graph.prepare.merge_directions import merge_directions
from requant_onnx.graph.prepare.opset import raise_opset
from requant_onnx.graph.prepare.transpose_gemm import transpose_gemm
from requant_onnx.graph.weights import SkippedWeight, find_weights
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float64Array, GenericArray
from requant_onnx.progress import Progress
from requant_onnx.runtime.sensitivity import numbers_in, relative_error
from requant_onnx.runtime.sessions import load_session, run_session
from requant_onnx.text import decibels

T = TypeVar("T")
Built = tuple[onnx.ModelProto, QuantReport]
DOUBT, ROUNDING = 0.25, 1e-6  # of the squared error of outputs, relative to it and to their power: float32 sums in other orders
Biases = Mapping[str, GenericArray]


@dataclass(frozen=True)
class Prepared:
    """A model ready for its weights to be quantized, and what was decided about it.

    source: as it was given; graph: normalized.  opset: of the source.  folded: BatchNormalizations.  refining: the calibration,
    if rounding is to follow it.  means: without it, what BatchNormalization says of the means of activations.
    """

    source: onnx.ModelProto
    graph: ModelGraph
    config: QuantConfig
    opset: int
    folded: int
    integers: Integers
    plan: Plan
    refining: Calibration | None
    means: Mapping[str, Float64Array]

    @property
    def model(self) -> onnx.ModelProto:
        """The normalized model."""
        return self.graph.proto

    @property
    def target(self) -> Target:
        """What the file is written for."""
        return Target(opset_of(self.model), _is_narrow(self.config))


def prepare(
    source: onnx.ModelProto,
    config: QuantConfig,
    calibration: Calibration | None,
    excluded: Collection[str],
    progress: Progress | None,
) -> Prepared:
    """Prepare everything up to the weights themselves.

    source: does not change.  excluded: weights that integer kernels are not planned for.
    """
    opset, work = opset_of(source), onnx.ModelProto()
    work.CopyFrom(source)
    given = ModelGraph.of(expose_weights(work))
    view = find_weights(given)
    refining = calibration if config.refinement is not Refinement.NONE else None
    if not view.weights:
        return Prepared(source, given, config, opset, 0, Integers(), plan_conversion(view, config), refining, {})
    form = FORMS[config.form]
    analytic = refining is None and config.refinement is not Refinement.NONE
    means = channel_means(given) if analytic else {}
    folded = fold_batchnorm(given)
    merge_directions(given)
    model = ModelGraph.of(raise_opset(given.proto, opset_for(config, _is_narrow(config))))
    wanted = {w.name for w in find_weights(model).weights if not kept_in_float(w, config)}
    if form.on_integers:
        write_full_pads(model)
    give_biases(
        model, wanted if refining is not None else {layer.weight for layer in find_layers(model, wanted) if layer.x in means}
    )
    if form.transposes_gemm:
        transpose_gemm(model, wanted)
    model = ModelGraph.of(model.proto)
    view = find_weights(model)
    integers = Integers()
    if form.on_integers and calibration is not None:
        integers = watch_integers(model, view, config, calibration, excluded, progress)
    plan = plan_conversion(view, config, integers.plan.weights)
    return Prepared(source, model, config, opset, folded, integers, plan, refining, means)


@dataclass(frozen=True)
class Quantized:
    """results: of every planned weight, in order.  biases: those that change with them.

    belief: what the refinement knows of the outputs, where it saw every weight; else None.
    """

    results: list[Result]
    biases: Biases
    belief: Belief | None


def convert(prepared: Prepared, planned: Sequence[PlannedWeight], progress: Progress | None, threads: int | None) -> Built:
    """Quantize the planned weights and write them.  Changes `prepared.model`.

    Raises ModelError where the finished model does not give what the refinement believed.
    """
    quantized = quantize(prepared, planned, progress, threads)
    model, report = write(prepared, drain(quantized.results), quantized.biases)
    complete = not report.activations and len(report.converted) == len(planned) and not is_large(model)
    if quantized.belief is not None and complete:
        check_belief(model, quantized.belief)
    return model, report


def check_belief(model: onnx.ModelProto, belief: Belief) -> None:
    """Raise ModelError where the outputs of a finished model are further from the float ones than the refinement believed."""
    finished = run_session(load_session(model), "the converted model", None, belief.feed)
    exact = [numbers_in(belief.exact)]
    believed, actual = (relative_error(exact, [numbers_in(outputs)]) for outputs in (belief.refined, finished))
    if actual > believed * (1 + DOUBT) + ROUNDING:
        raise ModelError(
            f"the converted model has an output SQNR of {decibels(-10 * math.log10(actual))} where the refinement expected "
            f"{decibels(-10 * math.log10(max(believed, ROUNDING)))}; please report this, and convert with --refinement none"
        )


def quantize(prepared: Prepared, planned: Sequence[PlannedWeight], progress: Progress | None, threads: int | None) -> Quantized:
    """Quantize every planned weight, on calibration inputs where a layer can be."""
    belief = None
    refined: dict[str, Result] = {}
    biases: dict[str, GenericArray] = {}
    min_scales = prepared.integers.min_scales
    if prepared.refining is not None and planned:
        refinement = prepared.config.refinement
        layers, belief = quantize_layers(prepared.model, tuple(planned), prepared.refining, refinement, min_scales, progress)
        for done in layers:
            refined[done.layer.weight] = done.result
            if done.choice.bias is not None:
                biases[done.layer.bias] = done.layer.stored_bias(done.choice.bias)
    rest = tuple(item for item in planned if item.weight.name not in refined)
    nearest = {result.planned.weight.name: result for result in quantize_all(rest, min_scales, progress, threads)}
    if prepared.means:
        _correct(prepared, nearest, biases)
    results = [refined.get(item.weight.name) or nearest[item.weight.name] for item in planned]
    return Quantized(results, biases, None if rest else belief)


def _correct(prepared: Prepared, results: dict[str, Result], biases: dict[str, GenericArray]) -> None:
    """Take out of each bias what the error of the weight adds to the mean of the output, where the means of inputs are known.

    Nagel et al. 2019 (arXiv 1906.04721), equation 16.  Changes `results` and `biases`.
    """
    for layer in find_layers(prepared.graph, results.keys()):
        if layer.x in prepared.means and layer.can_correct:
            result = results[layer.weight]
            w = result.planned.weight.load()
            bias = layer.corrected_bias(result.quantized.dequantize() - w, prepared.means[layer.x])
            if bias is not None and result.finite:
                biases[layer.bias] = layer.stored_bias(bias)
                results[layer.weight] = replace(result, method="nearest, bias from BatchNormalization")


def write(prepared: Prepared, results: Iterable[Result], biases: Biases) -> tuple[onnx.ModelProto, QuantReport]:
    """The converted model and its report; the source where no weight is worth it.  Changes `prepared.model`, and returns it.

    Codes and the nodes that hold them are never all in memory at once where the results come from `drain`.
    """
    model, config, integers, target = prepared.model, prepared.config, prepared.integers, prepared.target
    finite, skipped = _finite(results)
    quantized = {name: result.quantized for name, result in finite.items() if result.is_integer}
    for name, values in biases.items():
        set_initializer(model.graph, values, name)
    decodes, converted = _decode(finite, target, Constants(FreshNames(model)), integers.plan.why_not, skipped)
    opsets = (prepared.opset, target.opset)
    everything = (*prepared.plan.skipped, *skipped)
    report = QuantReport(config.to_dict(), opsets, prepared.folded, converted, everything, integers.reports())
    if not decodes:
        return prepared.source, report
    decode_after_lookup(model, replace_weights(model, {weight.name for weight in converted}, drain(decodes)))
    if integers.plan.weighted:
        new_biases = [
            replace(bias, values=np.asarray(biases.get(bias.node.bias, bias.values), np.float32)) for bias in integers.biases
        ]
        quantize_activations(model, integers.plan, integers.grids, new_biases, quantized)
    set_metadata(model, METADATA_KEY, json.dumps({"version": version("requant_onnx"), **config.to_dict()}, sort_keys=True))
    return model, report


def drain(items: list[T]) -> Iterator[T]:
    """The items in order, each out of its list: what nobody else refers to is freed once the next is asked for."""
    items.reverse()
    while items:
        yield items.pop()


def copied(prepared: Prepared) -> Prepared:
    """One that may be written while the other stays."""
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    return replace(prepared, graph=replace(prepared.graph, proto=model))


def _is_narrow(config: QuantConfig) -> bool:
    return (config.min_ort.major, config.min_ort.minor) > NARROW_ORT


def _finite(results: Iterable[Result]) -> tuple[dict[str, Result], list[SkippedWeight]]:
    """The results by weight, and those that cannot be: a graph planned for integers has no way back."""
    finite: dict[str, Result] = {}
    skipped = []
    for result in results:
        name = result.planned.weight.name
        if result.finite:
            finite[name] = result
        elif result.is_integer:
            raise ModelError(f"the weight '{name}' has levels beyond the largest float; repair it, or choose --form folded")
        else:
            skipped.append(_skipped(result, "has levels beyond the largest float"))
    return finite, skipped


def _decode(
    results: dict[str, Result],
    target: Target,
    constants: Constants,
    why_not_int8: Mapping[str, str],
    skipped: list[SkippedWeight],
) -> tuple[list[Decode], tuple[WeightReport, ...]]:
    """The decodes of all weights that are worth it, and their reports.  Takes the results out of their dictionary one by one, and
    adds those whose weights stay to `skipped`."""
    order, decodes = list(results), []
    reports: dict[str, WeightReport] = {}
    for group in drain(group_weights([result.coded() for result in results.values()], target)):
        decode = decode_of(group, target, constants)
        members = [results.pop(weight.name) for weight in group]
        stored = sum(result.planned.weight.stored_bytes for result in members)
        if decode.bytes >= stored and not FORMS[group[0].form].on_integers:
            skipped += [_skipped(result, _not_smaller(group, decode, stored)) for result in members]
            continue
        decodes.append(decode)
        sizes = bytes_of_each(group, decode)
        for weight, result in zip(group, members, strict=True):
            reports[weight.name] = result.report(sizes[weight.name], why_not_int8.get(weight.name, ""))
    return decodes, tuple(reports[name] for name in order if name in reports)


def _not_smaller(group: tuple[Coded, ...], decode: Decode, stored: int) -> str:
    together = f", together with {len(group) - 1} others" if len(group) > 1 else ""
    return f"would not get smaller ({stored} bytes, {decode.bytes} with its decode{together})"


def _skipped(result: Result, reason: str) -> SkippedWeight:
    weight = result.planned.weight
    return SkippedWeight(weight.name, weight.op, weight.shape, reason, weight.stored_bytes)
