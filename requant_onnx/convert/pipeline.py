"""The conversion: load -> prepare -> quantize -> write (steps.py), within a budget (budget.py), checked in ONNX Runtime."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import onnx
from threadpoolctl import threadpool_limits

from requant_onnx.choices import Form, Int8Levels, Refinement, Space
from requant_onnx.config import Budget, QuantConfig
from requant_onnx.convert.budget import write_within
from requant_onnx.convert.download import write_for_download
from requant_onnx.convert.prepare import prepare
from requant_onnx.convert.report import InspectedWeight, InspectReport, QuantReport, WeightReport
from requant_onnx.convert.schedule import Clock
from requant_onnx.convert.selfcheck import self_check
from requant_onnx.convert.steps import convert
from requant_onnx.errors import ConfigError, ConvertedError, LoadError, ModelError, QualityError
from requant_onnx.files.compressed import check_installed
from requant_onnx.files.load import LARGE_BYTES, LoadedModel, ModelLike, is_large, materialize, opset_of, whole
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.graph.float_constants import float_constants, unconverted
from requant_onnx.graph.weights import find_weights
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.parallel import thread_limit
from requant_onnx.progress import Progress
from requant_onnx.runtime.cpu import adds_exactly
from requant_onnx.runtime.explain import WeightFate, broken_promises
from requant_onnx.runtime.fold_constants import exposed
from requant_onnx.runtime.sessions import load_runnable, runs
from requant_onnx.runtimes import RUNTIMES

COARSE_BITS = 5  # up to here, refinement is worth more than the noise of a test set


def quantize_model(
    model: ModelLike,
    config: QuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    time_limit: float | None = None,
    check: bool = True,
) -> tuple[onnx.ModelProto, QuantReport]:
    """Quantize the weights of a model.  The model given never changes; the same input gives the same output, whatever `threads` is.

    The result holds all its values, those that were external data too.

    calibration: the inputs on which rounding is refined, in every form (`config.refinement`), bits are chosen within a budget, and
    activations are watched for the int8 form, which needs it.  Where nothing can be converted, the model comes back as it was and
    `report.converted` is empty.
    time_limit: about how many seconds it may take; layers whose refinement gains least for its time go without it, and the report
    says how many.  The bytes of the file then depend on the speed of the machine.
    check: whether to compare the result with the model on inputs that were not used for it (`report.check`).
    Raises ModelError when the model cannot be loaded, holds NaN or infinite weights, or ONNX Runtime does not do with a weight what
    the form promises; ConfigError when threads is below 1 or the int8 form has no calibration; DataError when the calibration
    images do not fit the model.
    """
    made, report = convert_model(model, config or QuantConfig(), calibration, progress, threads, time_limit, check)
    return materialize(made), report


def convert_model(
    model: ModelLike,
    config: QuantConfig,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    time_limit: float | None = None,
    check: bool = True,
) -> tuple[onnx.ModelProto, QuantReport]:
    """As quantize_model, but external data may still lie in the files of the input, where save_model finds them."""
    clock = Clock(time_limit)
    _check(config, calibration, threads, time_limit)
    if config.int8_levels is Int8Levels.AUTO:
        config = replace(config, int8_levels=Int8Levels.FULL if adds_exactly() else Int8Levels.SAFE)
    loaded = load_runnable(model)
    _check_new(loaded.proto)
    excluded: dict[str, str] = {}
    while True:  # at most once for each weight that a kernel is planned for and not found
        made, report = _convert(loaded.proto, config, calibration, excluded, clock, progress, threads)
        checked = RUNTIMES[config.runtime].checked
        notes, broken = _broken_promises(loaded, made, report.converted) if checked else ((), {})
        if not broken:
            notes = (*_odd(loaded), *_notes(loaded.proto, config, calibration, report), *_levels_note(config), *notes)
            notes += tuple(excluded.values())
            if loaded.complaint and not is_large(made) and not runs(whole(made)):
                raise ModelError(
                    f"the model is not valid ONNX ({loaded.complaint}), and what is made of it does not run; export it again"
                )
            report = replace(report, notes=(*report.notes, *notes), complaint=loaded.complaint)
            return made, (_checked(loaded.proto, made, config, calibration, report) if check and report.converted else report)
        for name, fate in broken.items():
            if not FORMS[config.form].on_integers or name in excluded:
                raise ModelError(
                    f"ONNX Runtime does not do with '{name}' what the {config.form.value} form promises "
                    f"({fate.fate.value}: {fate.why}); choose another --form"
                )
            excluded[name] = f"ONNX Runtime finds no integer kernel for '{name}' ({fate.why}), so it is float (folded)"


def _checked(
    source: onnx.ModelProto, made: onnx.ModelProto, config: QuantConfig, calibration: Calibration | None, report: QuantReport
) -> QuantReport:
    """The report with the self-check.  Raises QualityError where the result does not run, and is meant to in ONNX Runtime."""
    try:
        found = self_check(source, made, calibration)
    except QualityError as error:
        if RUNTIMES[config.runtime].checked:
            raise
        found = str(error)
    if isinstance(found, str):
        return replace(report, why_unchecked=found)
    return replace(report, check=found, why_unchecked="")


def _convert(
    source: onnx.ModelProto,
    config: QuantConfig,
    calibration: Calibration | None,
    excluded: Collection[str],
    clock: Clock,
    progress: Progress | None,
    threads: int | None,
) -> tuple[onnx.ModelProto, QuantReport]:
    """One conversion, unchecked.  source: does not change.  excluded: weights that integer kernels are not planned for.

    BLAS gets one thread: the last bits of its sums, and by them the codes, depend on how many there are.
    """
    with threadpool_limits(limits=1, user_api="blas"), thread_limit(threads):
        prepared = prepare(source, config, calibration, excluded, clock, progress)
        if config.optimize_for.compresses:
            return write_for_download(prepared, calibration, progress, threads)
        if isinstance(config.bits, Budget):
            return write_within(prepared, config.bits, calibration, progress, threads)
        return convert(prepared, prepared.plan.planned, progress, threads)


def inspect_model(model: ModelLike) -> InspectReport:
    """What a model holds and what `quantize_model` would do with it.  Raises ModelError when it cannot be loaded."""
    loaded = load_runnable(model).copy()
    opset, ir_version = opset_of(loaded), loaded.ir_version
    ops = Counter(node.op_type for graph in all_graphs(loaded.graph) for node in graph.node)
    stored = {item.name for item in loaded.graph.initializer}
    inputs = tuple(_typed(item) for item in loaded.graph.input if item.name not in stored)
    outputs = tuple(_typed(item) for item in loaded.graph.output)
    graph = exposed(loaded).graph
    view, floats = find_weights(graph), float_constants(graph.proto)
    return InspectReport(
        opset=opset,
        ir_version=ir_version,
        producer=f"{loaded.producer_name} {loaded.producer_version}".strip(),
        ops=dict(ops.most_common()),
        weights=tuple(InspectedWeight(w.name, w.op, w.shape, w.is_edge, w.stored_bytes) for w in view.weights),
        skipped=(*view.skipped, *unconverted(floats, {w.name for w in view.weights}, view.skipped)),
        inputs=inputs,
        outputs=outputs,
        floats=sum(each.bytes for each in floats),
    )


def _typed(item: onnx.ValueInfoProto) -> str:
    """A tensor with its type and shape, as text."""
    tensor = item.type.tensor_type
    if not item.type.HasField("tensor_type"):
        return f"{item.name} ({item.type.WhichOneof('value') or 'no type'})"
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return f"{item.name} ({kind} {'x'.join(sizes) or 'scalar'})"


def _check(config: QuantConfig, calibration: Calibration | None, threads: int | None, time_limit: float | None) -> None:
    if not isinstance(calibration, Calibration | None):
        raise ConfigError(f"calibration must be a Calibration, not {type(calibration).__name__}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be 1 or more, not {threads}")
    if time_limit is not None and not (isinstance(time_limit, int | float) and 0 < time_limit < math.inf):
        raise ConfigError(f"the time limit must be a number of seconds above 0, not {time_limit!r}")
    if time_limit is not None and isinstance(config.bits, Budget):
        raise ConfigError(
            "a time limit is for one number of bits, and --bits auto tries many; give --bits N, or drop the time limit"
        )
    check_installed(config.optimize_for)
    if FORMS[config.form].on_integers and calibration is None:
        raise ConfigError("the int8 form needs the ranges of activations; give --calibrate with images, or --calibrate noise")
    if isinstance(config.bits, Budget) and config.bits.sqnr_db is not None and calibration is None:
        raise ConfigError("an output SQNR is measured on calibration inputs; give --calibrate with images, or --calibrate noise")
    if calibration is not None and config.refinement.sees_outputs and config.rounding is Space.TRANSFORMED:
        raise ConfigError(
            f"rounding in transformed space chooses nearest levels, and refinement '{config.refinement}' chooses levels by the "
            "output error; drop --rounding, or choose --refinement none or bias"
        )
    watched = FORMS[config.form].on_integers or isinstance(config.bits, Budget)
    if not watched and calibration is not None and config.refinement is Refinement.NONE:
        raise ConfigError("calibration without refinement is for --form int8 only; drop --calibrate, or choose a refinement")


def _odd(model: LoadedModel) -> tuple[str, ...]:
    """A note on a model that runs and is not valid."""
    if not model.complaint:
        return ()
    return (f"the checker of onnx does not take the model ({model.complaint}), and ONNX Runtime does, so it was converted",)


def _notes(model: onnx.ModelProto, config: QuantConfig, calibration: Calibration | None, report: QuantReport) -> tuple[str, ...]:
    """What could be better: calibration inputs at few bits, and the right ones."""
    if calibration is None:
        blind = not isinstance(config.bits, Budget) and config.refinement is not Refinement.NONE
        coarse = blind and any(weight.bits <= COARSE_BITS for weight in report.converted)
        return ("few bits cost less accuracy with --calibrate: images, or noise, which needs no data",) if coarse else ()
    pixels = any(item.type.tensor_type.elem_type == onnx.TensorProto.UINT8 for item in model.graph.input)
    if not calibration.is_noise or calibration.normalization is not None or pixels:
        return ()
    return (
        "the noise was normalized as ImageNet's images are; a model that takes other values, say 0..255, needs --mean and --std",
    )


def _check_new(model: onnx.ModelProto) -> None:
    """Raises ConvertedError for a model that is a result of ours."""
    settings = settings_of(model)
    if settings and "version" in settings:  # else somebody else's entry
        made = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "version")
        raise ConvertedError(
            f"the model was converted already, by requant_onnx {settings.get('version', '?')} ({made or 'default settings'}); "
            "convert the model that it was made from, or make a float model of it with requant restore"
        )


def _levels_note(config: QuantConfig) -> tuple[str, ...]:
    """Whether finer int8 weights would do."""
    if not FORMS[config.form].on_integers or not RUNTIMES[config.runtime].checked:
        return ()
    if config.int8_levels is Int8Levels.SAFE and adds_exactly():
        return ("this CPU adds int8 products exactly, so --int8-levels 127 (or auto), which is finer, is safe on CPUs like it",)
    if config.int8_levels is Int8Levels.FULL and not adds_exactly():
        return ("this CPU saturates sums of int8 products: open sessions with load_session, or choose --int8-levels 64",)
    return ()


def _broken_promises(
    source: LoadedModel, model: onnx.ModelProto, converted: tuple[WeightReport, ...]
) -> tuple[tuple[str, ...], dict[str, WeightFate]]:
    """(notes, weights that ONNX Runtime does not treat as their form promises); a note where it loads not even the input."""
    promised = {weight.name: Form(weight.form) for weight in converted if FORMS[Form(weight.form)].promise is not None}
    if not promised:  # DequantizeLinear is decoded at every run, or fused, as ONNX Runtime likes
        return (), {}
    if is_large(model) or sum(weight.bytes_before for weight in converted) > LARGE_BYTES:
        return ("the model is larger than 2 GB, so what ONNX Runtime does with it was not checked; see requant explain",), {}
    try:
        return (), broken_promises(whole(model), promised)
    except LoadError as error:
        if runs(source.source):
            raise
        return (f"what ONNX Runtime does with the weights was not checked: {error}, and neither does the input",), {}
