"""The check at the end of a conversion: the error of the outputs, if possible on inputs that the conversion did not use.

Without inputs, the converted model is only loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from requant_onnx.convert.report import SelfCheck
from requant_onnx.errors import DataError, ModelError, QualityError
from requant_onnx.files.load import is_large, whole
from requant_onnx.graph.selections import has_tensors, with_outputs
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.outputs import OutputReport, OutputTally, images_in, without_padding
from requant_onnx.runtime.feeds import calibration_chunks, counts_in
from requant_onnx.runtime.sensitivity import names_to_compare
from requant_onnx.runtime.sessions import load_session, open_session, run_session, runs

COUNT = 32  # number of inputs


def self_check(source: onnx.ModelProto, made: onnx.ModelProto, calibration: Calibration | None) -> SelfCheck | str:
    """Compare a converted model with its source.  Returns the reason, as a sentence, if that is not possible.

    calibration: calibration of the conversion, whose unused inputs are used if there are any; None to try noise.
    Raises QualityError if the converted model does not run.
    """
    if is_large(source) or is_large(made):
        return "the model is larger than 2 GB"
    unseen, words = _unseen(calibration)
    reference, outputs = whole(source), [item.name for item in source.graph.output]
    try:
        chunks = calibration_chunks(reference, unseen)
        compared = names_to_compare(reference, chunks)
        compared = compared if has_tensors(made, compared) else outputs
        names = list(dict.fromkeys([*outputs, *compared]))
        session = open_session(with_outputs(reference, names), "the model")
        exact = [run_session(session, "the model", names, chunk) for chunk in chunks]
    except (DataError, ModelError) as error:
        return f"there are no inputs for the model ({error})"
    try:
        if {item.name for item in made.graph.output} != set(outputs):
            return "the outputs of the converted model have different names"
        candidate = load_session(with_outputs(whole(made), names))
        tallies = [OutputTally(name) for name in names]
        for chunk, images, expected in zip(chunks, counts_in(chunks), exact, strict=True):
            found = run_session(candidate, "the converted model", names, chunk)
            padded, size = images_in(chunk.values())
            for tally, *pair in zip(tallies, expected, found, strict=True):
                one, other = (without_padding(y, padded, images) for y in pair)
                tally.add(one, other, images, size)
    except ModelError as error:
        raise QualityError(
            f"ONNX Runtime runs the model, but not the converted model ({error}); please report this, and choose another --form"
        ) from None
    judged = [tally for k, tally in enumerate(tallies) if not any(_has_nan(values[k]) for values in exact)]
    reports = [tally.report(answers=tally.name in outputs) for tally in judged]
    return SelfCheck(words, tuple(each for each in reports if each.name in compared or _is_class(each)))


def _is_class(report: OutputReport) -> bool:
    """Whether an output holds answers without an error, as ArgMax selects them."""
    return report.agreement is not None and report.sqnr_db is None


def _has_nan(output: Any) -> bool:
    """Whether an output of the float model itself has NaN, so that it says nothing about a conversion."""
    return isinstance(output, np.ndarray) and output.dtype.kind == "f" and bool(np.isnan(output).any())


def check_without_inputs(source: onnx.ModelProto, made: onnx.ModelProto, *, loads: bool) -> None:
    """Check what needs no inputs: a converted model requires only inputs of its source, and loads.

    loads: whether to load it in ONNX Runtime.  Raises QualityError if it fails a check.  Models above 2 GB are not loaded.
    """
    added = sorted(_required(made) - _required(source))
    if added:
        raise QualityError(
            f"the converted model requires the input '{added[0]}', which the model does not; please report this, "
            "and choose another --form"
        )
    if not loads or is_large(source) or is_large(made):
        return
    try:
        load_session(whole(made))
    except ModelError as error:
        if runs(whole(source)):
            raise QualityError(
                f"ONNX Runtime loads the model, but not the converted model ({error}); please report this, "
                "and choose another --form"
            ) from None


def _required(model: onnx.ModelProto) -> set[str]:
    """The names of the inputs without a default value."""
    stored = {item.name for item in model.graph.initializer} | {item.values.name for item in model.graph.sparse_initializer}
    return {item.name for item in model.graph.input} - stored


def _unseen(calibration: Calibration | None) -> tuple[Calibration, str]:
    """The inputs that a calibration does not use, or its own if there are no others, and their description."""
    unseen, is_new = (calibration or Calibration()).unseen(COUNT)
    kind = "images of noise" if unseen.is_noise else "inputs" if unseen.feeds else "images"
    return unseen, f"{unseen.count} {kind} {'not used in the conversion' if is_new else 'used in the conversion too'}"
