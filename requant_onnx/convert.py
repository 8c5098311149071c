"""The conversion: load -> normalise -> view -> watch -> plan -> quantize -> rewrite."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import version

import onnx

from requant_onnx.calibrate import Calibration
from requant_onnx.config import METADATA_KEY, NARROW_ORT, Form, QuantConfig, Refinement
from requant_onnx.errors import ConfigError, LoadError, ModelError
from requant_onnx.execute import Progress, Result, quantize_all
from requant_onnx.explain import WeightFate, broken_promises
from requant_onnx.graph.activations import biases_of, quantize_activations
from requant_onnx.graph.decode import Constants, Decode
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.forms import Coded, Target, bytes_of_each, decode_of, group_weights
from requant_onnx.graph.full_pads import write_full_pads
from requant_onnx.graph.layers import give_biases
from requant_onnx.graph.load import ModelLike, is_large, load_model, opset_of
from requant_onnx.graph.names import FreshNames, all_graphs
from requant_onnx.graph.normalise import normalise
from requant_onnx.graph.rewrite import replace_weights, set_metadata
from requant_onnx.graph.transpose_gemm import transpose_gemm
from requant_onnx.graph.weights import LeftAlone, find_weights
from requant_onnx.integers import Integers, watch_integers
from requant_onnx.layerwise import quantize_layers
from requant_onnx.plan import PlannedWeight, kept_in_float, opset_for, plan_conversion
from requant_onnx.report import InspectedWeight, InspectReport, QuantReport, WeightReport
from requant_onnx.runtime import loads


def quantize_model(
    model: ModelLike,
    config: QuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> tuple[onnx.ModelProto, QuantReport]:
    """Quantize the weights of a model.  The model given never changes; the same input gives the same output, whatever `threads` is.

    calibration: for the int8 form, which needs it.  Where nothing can be converted, the model comes back as it was and
    `report.converted` is empty.
    Raises ModelError when the model cannot be loaded, holds NaN or infinite weights, or ONNX Runtime does not do with a weight what
    the form promises; ConfigError when threads is below 1 or the int8 form has no calibration; DataError when the calibration
    images do not fit the model.
    """
    config = config or QuantConfig()
    _check(config, calibration, threads)
    excluded: dict[str, str] = {}
    while True:  # at most once for each weight that a kernel is planned for and not found
        made, report = _convert(load_model(model), config, calibration, excluded, progress, threads)
        notes, broken = _broken_promises(model, made, report.converted)
        if not broken:
            return made, replace(report, notes=(*_notes(calibration), *notes, *excluded.values()))
        for name, fate in broken.items():
            if config.form is not Form.INT8 or name in excluded:
                raise ModelError(
                    f"ONNX Runtime does not do with '{name}' what the {config.form.value} form promises "
                    f"({fate.fate.value}: {fate.why}); take another --form"
                )
            excluded[name] = f"ONNX Runtime finds no integer kernel for '{name}' ({fate.why}), so it is float (folded)"


def _convert(
    loaded: onnx.ModelProto,
    config: QuantConfig,
    calibration: Calibration | None,
    excluded: Collection[str],
    progress: Progress | None,
    threads: int | None,
) -> tuple[onnx.ModelProto, QuantReport]:
    """One conversion, unchecked.  excluded: weights that integer kernels are not planned for."""
    view, before = find_weights(loaded), opset_of(loaded)
    if not view.weights:
        return loaded, QuantReport(config.to_dict(), (before, before), 0, (), view.left_alone, ())
    source = onnx.ModelProto()
    source.CopyFrom(loaded)
    narrow = (config.min_ort.major, config.min_ort.minor) > NARROW_ORT
    raised, folded = normalise(loaded, opset_for(config, narrow))
    refining = calibration if config.refinement is not Refinement.NONE else None
    wanted = {w.name for w in find_weights(raised).weights if not kept_in_float(w, config)}
    if config.form is Form.QDQ:
        transpose_gemm(raised, wanted)
    if config.form is Form.INT8:
        write_full_pads(raised)
    if refining is not None:
        give_biases(raised, wanted)
    view = find_weights(raised)
    integers = Integers()
    if config.form is Form.INT8 and calibration is not None:
        integers = watch_integers(raised, view, config, calibration, excluded, progress)
    plan = plan_conversion(view, config, integers.plan.weights)
    results = _quantize(raised, plan.planned, config, refining, integers, progress, threads)
    _require_finite(results)
    target = Target(opset_of(raised), narrow)
    decodes, converted, left = _decode(results, target, Constants(FreshNames(raised)))
    everything = (*plan.left_alone, *left)
    report = QuantReport(config.to_dict(), (before, target.opset), folded, converted, everything, integers.reports())
    if not decodes:
        return source, report
    replace_weights(raised, {weight.name for weight in converted}, decodes)
    quantized = {result.planned.weight.name: result.quantized for result in results}
    quantize_activations(raised, integers.plan, integers.grids, biases_of(raised, integers.plan), quantized)
    set_metadata(raised, METADATA_KEY, _provenance(config))
    return raised, report


def inspect_model(model: ModelLike) -> InspectReport:
    """What a model holds and what `quantize_model` would do with it.  Raises ModelError when it cannot be loaded."""
    loaded = load_model(model)
    view = find_weights(loaded)
    ops = Counter(node.op_type for graph in all_graphs(loaded.graph) for node in graph.node)
    return InspectReport(
        opset=opset_of(loaded),
        ir_version=loaded.ir_version,
        producer=f"{loaded.producer_name} {loaded.producer_version}".strip(),
        ops=dict(ops.most_common()),
        weights=tuple(InspectedWeight(w.name, w.op, w.shape, w.is_edge, w.stored_bytes) for w in view.weights),
        left_alone=view.left_alone,
    )


def _check(config: QuantConfig, calibration: Calibration | None, threads: int | None) -> None:
    if not isinstance(calibration, Calibration | None):
        raise ConfigError(f"calibration must be a Calibration, not {type(calibration).__name__}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be 1 or more, not {threads}")
    if config.form is Form.INT8 and calibration is None:
        raise ConfigError("the int8 form needs the ranges of activations; give --calibrate with images, or --calibrate noise")
    if config.form is not Form.INT8 and calibration is not None and config.refinement is Refinement.NONE:
        raise ConfigError("calibration without refinement is for --form int8 only; drop --calibrate, or choose a refinement")


def _notes(calibration: Calibration | None) -> tuple[str, ...]:
    if calibration is None or calibration.images is not None or calibration.normalisation is not None:
        return ()
    return (
        "the noise was normalised as ImageNet's images are; a model that takes other values, say 0..255, needs --mean and --std",
    )


def _broken_promises(
    source: ModelLike, model: onnx.ModelProto, converted: tuple[WeightReport, ...]
) -> tuple[tuple[str, ...], dict[str, WeightFate]]:
    """(notes, weights that ONNX Runtime does not treat as their form promises); a note where it loads not even the input."""
    promised = {weight.name: Form(weight.form) for weight in converted if weight.form != Form.QDQ.value}
    if not promised:  # DequantizeLinear is decoded at every run, or fused, as ONNX Runtime likes
        return (), {}
    if is_large(model):
        return ("the model is larger than 2 GB, so what ONNX Runtime does with it was not checked; see requant explain",), {}
    try:
        return (), broken_promises(model, promised)
    except LoadError as error:
        if loads(load_model(source)):
            raise
        return (f"what ONNX Runtime does with the weights was not checked: {error}, and neither does the input",), {}


def _quantize(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    config: QuantConfig,
    calibration: Calibration | None,
    integers: Integers,
    progress: Progress | None,
    threads: int | None,
) -> list[Result]:
    """Every planned weight, in order: on calibration inputs where a layer can be, with its bias changed in `model`."""
    refined: dict[str, Result] = {}
    if calibration is not None:
        for done in quantize_layers(model, planned, calibration, config.refinement, integers.floors, progress):
            refined[done.layer.weight] = done.result
            if done.choice.bias is not None:
                set_initializer(model.graph, done.choice.bias, done.layer.bias)
    rest = tuple(item for item in planned if item.weight.name not in refined)
    nearest = {result.planned.weight.name: result for result in quantize_all(rest, integers.floors, progress, threads)}
    return [refined.get(item.weight.name) or nearest[item.weight.name] for item in planned]


def _require_finite(results: list[Result]) -> None:
    """A graph planned for integers has no way back."""
    for result in results:
        if not result.finite and result.planned.form is Form.INT8:
            name = result.planned.weight.name
            raise ModelError(f"the weight '{name}' has levels beyond the largest float; repair it, or take --form folded")


def _decode(
    results: list[Result], target: Target, constants: Constants
) -> tuple[list[Decode], tuple[WeightReport, ...], list[LeftAlone]]:
    """The decodes of all weights that are worth it, and for each weight its report or the reason why it stays."""
    finite = [result for result in results if result.finite]
    left = [_left(result, "has levels beyond the largest float") for result in results if not result.finite]
    by_name = {result.planned.weight.name: result for result in finite}
    decodes, sizes = [], {}
    for group in group_weights([result.coded() for result in finite], target):
        decode = decode_of(group, target, constants)
        stored = sum(by_name[weight.name].planned.weight.stored_bytes for weight in group)
        if decode.bytes < stored or group[0].form is Form.INT8:
            decodes.append(decode)
            sizes.update(bytes_of_each(group, decode))
        else:
            left += [_left(by_name[w.name], _not_smaller(group, decode, stored)) for w in group]
    return decodes, tuple(r.report(sizes[r.planned.weight.name]) for r in finite if r.planned.weight.name in sizes), left


def _not_smaller(group: tuple[Coded, ...], decode: Decode, stored: int) -> str:
    together = f", together with {len(group) - 1} others" if len(group) > 1 else ""
    return f"would not get smaller ({stored} bytes, {decode.bytes} with its decode{together})"


def _left(result: Result, reason: str) -> LeftAlone:
    weight = result.planned.weight
    return LeftAlone(weight.name, weight.op, weight.shape, reason)


def _provenance(config: QuantConfig) -> str:
    return json.dumps({"version": version("requant_onnx"), **config.to_dict()}, sort_keys=True)
