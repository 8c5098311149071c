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
from requant_onnx.convert.selfcheck import check_without_inputs, self_check
from requant_onnx.convert.steps import Steps, convert
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

COARSE_BITS = 5  # up to this width, refinement gains more accuracy than the noise of a test set


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
    """Quantize the weights of a model.  Returns the new model, with all its values in memory, and a report.

    The given model never changes.  The same input gives the same output, with any number of threads.  If nothing can be
    converted, the model is returned unchanged and `report.converted` is empty.
    model: path, ModelProto, bytes or binary file object.  config: settings (default: QuantConfig()).
    calibration: inputs on which rounding is refined (`config.refinement`), bits are chosen within a budget, and activations are
    measured; the int8 form needs them.
    progress: callback for progress.  threads: number of threads (default: one per core).
    time_limit: approximate time limit, in seconds.  Layers whose refinement gains least for its time are not refined, and the
    report gives their number; the bytes of the file then depend on the speed of the machine.
    check: whether to compare the result with the model, if possible on inputs that the conversion did not use (`report.check`).
    Raises ModelError if the model cannot be loaded, has NaN or infinite weights, or ONNX Runtime does not treat a weight as the
    form promises; ConvertedError if it is already converted; ConfigError if settings or arguments do not fit together; DataError
    if the calibration inputs do not fit the model; QualityError if ONNX Runtime does not run the result.
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
    steps: Steps = convert,
) -> tuple[onnx.ModelProto, QuantReport]:
    """As quantize_model, but external data may still be in the files of the input, from which save_model reads them.

    steps: function that quantizes and writes a prepared model, for conversions with fixed bits."""
    clock = Clock(time_limit)
    _check(config, calibration, threads, time_limit)
    if config.int8_levels is Int8Levels.AUTO:
        config = replace(config, int8_levels=Int8Levels.FULL if adds_exactly() else Int8Levels.SAFE)
    loaded = load_runnable(model)
    _check_new(loaded.proto)
    excluded: dict[str, str] = {}
    while True:  # repeated at most once for each weight whose planned kernel is missing
        made, report = _convert(loaded.proto, config, calibration, excluded, clock, progress, threads, steps)
        checked = RUNTIMES[config.runtime].checked
        notes, broken = _broken_promises(loaded, made, report.converted) if checked else ((), {})
        if not broken:
            notes = (*_odd(loaded), *_notes(loaded.proto, config, calibration, report), *_levels_note(config), *notes)
            notes += tuple(excluded.values())
            if loaded.complaint and not is_large(made) and not runs(whole(made)):
                raise ModelError(
                    f"the model is not valid ONNX ({loaded.complaint}), and the converted model does not run; export it again"
                )
            report = replace(report, notes=(*report.notes, *notes), complaint=loaded.complaint)
            if progress is not None:
                progress("checking the result", 1, 1)
            return made, (_checked(loaded.proto, made, config, calibration, report) if check and report.converted else report)
        for name, fate in broken.items():
            if not FORMS[config.form].on_integers or name in excluded:
                raise ModelError(
                    f"ONNX Runtime does not treat '{name}' as the {config.form.value} form promises "
                    f"({fate.fate.value}: {fate.why}); choose another --form"
                )
            excluded[name] = f"ONNX Runtime has no integer kernel for '{name}' ({fate.why}), so it uses the folded form"


def _checked(
    source: onnx.ModelProto, made: onnx.ModelProto, config: QuantConfig, calibration: Calibration | None, report: QuantReport
) -> QuantReport:
    """The report with the self-check.  Raises QualityError if a result for a checked runtime does not run, or needs more inputs."""
    checked = RUNTIMES[config.runtime].checked
    try:
        found = self_check(source, made, calibration)
    except QualityError as error:
        if checked:
            raise
        found = str(error)
    if isinstance(found, str):
        loaded = any(FORMS[Form(weight.form)].promise is not None for weight in report.converted)  # to check the promise
        check_without_inputs(source, made, loads=checked and not loaded)
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
    steps: Steps,
) -> tuple[onnx.ModelProto, QuantReport]:
    """Run one conversion without checks.  source: model, which does not change.  excluded: weights without integer kernels.

    BLAS gets one thread, because the last bits of its sums, and therefore the codes, depend on the number of threads.
    """
    with threadpool_limits(limits=1, user_api="blas"), thread_limit(threads):
        prepared = prepare(source, config, calibration, excluded, clock, progress)
        if config.optimize_for.compresses:
            return write_for_download(prepared, calibration, progress, threads)
        if isinstance(config.bits, Budget):
            return write_within(prepared, config.bits, calibration, progress, threads)
        return steps(prepared, prepared.plan.planned, progress, threads)


def inspect_model(model: ModelLike) -> InspectReport:
    """List the contents of a model, and the weights that `quantize_model` would convert.

    model: path, ModelProto, bytes or binary file object.  Raises ModelError if it cannot be loaded."""
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
    """The name, type and shape of a tensor, as text."""
    tensor = item.type.tensor_type
    if not item.type.HasField("tensor_type"):
        return f"{item.name} ({item.type.WhichOneof('value') or 'no type'})"
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return f"{item.name} ({kind} {'x'.join(sizes) or 'scalar'})"


def _check(config: QuantConfig, calibration: Calibration | None, threads: int | None, time_limit: float | None) -> None:
    """Raise ConfigError if a setting or argument is invalid, or if they do not fit together."""
    if not isinstance(calibration, Calibration | None):
        raise ConfigError(f"calibration must be a Calibration, not {type(calibration).__name__}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be 1 or more, not {threads}")
    if time_limit is not None and not (isinstance(time_limit, int | float) and 0 < time_limit < math.inf):
        raise ConfigError(f"the time limit must be a number of seconds above 0, not {time_limit!r}")
    if time_limit is not None and isinstance(config.bits, Budget):
        raise ConfigError(
            "a time limit needs a fixed number of bits, but --bits auto tries many; give --bits N, or drop the time limit"
        )
    check_installed(config.optimize_for)
    if FORMS[config.form].on_integers and calibration is None:
        raise ConfigError("the int8 form measures the ranges of activations; give --calibrate with images, or --calibrate noise")
    if isinstance(config.bits, Budget) and config.bits.sqnr_db is not None and calibration is None:
        raise ConfigError("an output SQNR is measured on calibration inputs; give --calibrate with images, or --calibrate noise")
    if calibration is not None and config.refinement.sees_outputs and config.rounding is Space.TRANSFORMED:
        raise ConfigError(
            f"rounding in transformed space chooses nearest levels, and refinement '{config.refinement}' chooses levels by the "
            "output error; drop --rounding, or choose --refinement none or bias"
        )
    watched = FORMS[config.form].on_integers or isinstance(config.bits, Budget)
    if not watched and calibration is not None and config.refinement is Refinement.NONE:
        raise ConfigError("without refinement, only --form int8 uses calibration inputs; drop --calibrate, or choose a refinement")


def _odd(model: LoadedModel) -> tuple[str, ...]:
    """A note for a model that runs but is not valid."""
    if not model.complaint:
        return ()
    return (f"the onnx checker rejects the model ({model.complaint}), but ONNX Runtime runs it, so it was converted",)


def _notes(model: onnx.ModelProto, config: QuantConfig, calibration: Calibration | None, report: QuantReport) -> tuple[str, ...]:
    """Notes on what the user could improve: calibration inputs at few bits, and their normalization."""
    if calibration is None:
        blind = not isinstance(config.bits, Budget) and config.refinement is not Refinement.NONE
        coarse = blind and any(weight.bits <= COARSE_BITS for weight in report.converted)
        return ("at few bits, --calibrate improves the accuracy; it takes images, or noise, which needs no data",) if coarse else ()
    pixels = any(item.type.tensor_type.elem_type == onnx.TensorProto.UINT8 for item in model.graph.input)
    if not calibration.is_noise or calibration.normalization is not None or pixels:
        return ()
    return (
        "the noise was normalized like ImageNet images; a model that takes other values, such as 0..255, needs --mean and --std",
    )


def _check_new(model: onnx.ModelProto) -> None:
    """Raise ConvertedError for a model that requant_onnx has converted."""
    settings = settings_of(model)
    if settings and "version" in settings:  # otherwise, the entry is not ours
        made = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "version")
        raise ConvertedError(
            f"the model is already converted, by requant_onnx {settings.get('version', '?')} ({made or 'default settings'}); "
            "convert the original model, or turn this one into a float model with requant restore"
        )


def _levels_note(config: QuantConfig) -> tuple[str, ...]:
    """A note on whether int8 weights up to 127 are safe."""
    if not FORMS[config.form].on_integers or not RUNTIMES[config.runtime].checked:
        return ()
    if config.int8_levels is Int8Levels.SAFE and adds_exactly():
        return ("this CPU adds int8 products exactly, so the finer --int8-levels 127 (or auto) is safe on such CPUs",)
    if config.int8_levels is Int8Levels.FULL and not adds_exactly():
        return ("this CPU saturates sums of int8 products; open sessions with load_session, or choose --int8-levels 64",)
    return ()


def _broken_promises(
    source: LoadedModel, model: onnx.ModelProto, converted: tuple[WeightReport, ...]
) -> tuple[tuple[str, ...], dict[str, WeightFate]]:
    """Notes, and the weights that ONNX Runtime does not treat as promised, by name; only a note if it cannot load the input."""
    promised = {weight.name: Form(weight.form) for weight in converted if FORMS[Form(weight.form)].promise is not None}
    if not promised:  # ONNX Runtime is free to run a DequantizeLinear every time, or to fuse it
        return (), {}
    if is_large(model) or sum(weight.bytes_before for weight in converted) > LARGE_BYTES:
        return ("the model is larger than 2 GB, so its treatment by ONNX Runtime was not checked; see requant explain",), {}
    try:
        return (), broken_promises(whole(model), promised)
    except LoadError as error:
        if runs(source.source):
            raise
        return (
            f"how ONNX Runtime treats the weights was not checked, because it loads neither the input nor the result: {error}",
        ), {}
