"""All that a report shows of two models, put together: dissected, explained, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from requant_onnx.convert.report import FileSizes, QuantReport, ValidationReport
from requant_onnx.errors import DataError, LoadError, ModelError
from requant_onnx.evaluate.validate import validate
from requant_onnx.evaluate.weight_comparison import ComparedWeight, dissect
from requant_onnx.files.load import LoadedModel, ModelLike, Source
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.progress import Progress
from requant_onnx.runtime.explain import Explanation, explain
from requant_onnx.runtime.feeds import calibration_images
from requant_onnx.runtime.sessions import load_runnable

COMPARED = 64  # images on which the outputs of layers are compared


class Names(NamedTuple):
    """What two models are called."""

    reference: str
    candidate: str


@dataclass(frozen=True)
class Study:
    """Two models: what they are called, and the bytes of their files.  inputs: what outputs of layers were compared on.

    explanation, validation, conversion: None where there is none.  settings: titles and texts of how the file was made.
    """

    names: Names
    bytes: FileSizes
    weights: Sequence[ComparedWeight]
    explanation: Explanation | None = None
    validation: ValidationReport | None = None
    conversion: QuantReport | None = None
    inputs: str = ""
    notes: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = ()


def study(
    reference: ModelLike, candidate: ModelLike, calibration: Calibration | None = None, progress: Progress | None = None
) -> Study:
    """Everything but the conversion.  calibration: the inputs to compare on; None for noise, where the model takes it.

    Raises ModelError where a model does not load, DataError as `validate`.
    """
    models = (load_runnable(reference), load_runnable(candidate))
    notes: list[str] = []
    validation, layers, inputs = None, None, ""
    if calibration is not None and calibration.feeds:
        layers = replace(calibration, count=min(COMPARED, calibration.count))
        inputs = f"{len(layers.feeds[: layers.count])} inputs"
    else:
        chosen = _images(models[0].source, calibration, notes)
        if chosen is not None:
            validation = _validation(*models, *chosen, notes, progress)
            layers = Calibration(chosen[0].first(COMPARED), chosen[1], COMPARED)
            noise = calibration is None or calibration.is_noise
            inputs = f"{min(COMPARED, len(chosen[0]))} images" + (" of noise" if noise else "")
    weights = dissect(*models, layers, progress)
    sizes = FileSizes(*(model.bytes for model in models))
    notes += _doubts(weights, sizes)
    explanation = _explanation(models[1], notes)
    names = Names(*(model.label for model in models))
    return Study(names, sizes, weights, explanation, validation, None, inputs, notes)


def _validation(
    reference: LoadedModel,
    candidate: LoadedModel,
    images: ImageSet,
    normalization: Normalization | None,
    notes: list[str],
    progress: Progress | None,
) -> ValidationReport | None:
    """None, and a note, for models that give something else than scores: their layers can be compared all the same."""
    try:
        return validate(reference, candidate, images, normalization, progress=progress)
    except ModelError as error:
        notes.append(f"answers were not compared: {error}")
        return None


def _doubts(weights: Sequence[ComparedWeight], sizes: FileSizes) -> list[str]:
    """What the reader should know before believing the page."""
    doubts = []
    unknown = sum(weight.outcome == "unknown" for weight in weights)
    if unknown:
        doubts.append(
            f"{unknown} of {len(weights)} weights could not be compared: they have no counterpart in the reference, or lie in an "
            "integer kernel that does not say how they are decoded"
        )
    if any(weight.sqnr_db < 0 for weight in weights):
        doubts.append("some weights differ by more than they are large: is the candidate made from this reference?")
    if sizes.candidate > sizes.reference:
        doubts.append("the candidate is the larger file: is the reference given first?")
    return doubts


def _images(model: Source, calibration: Calibration | None, notes: list[str]) -> tuple[ImageSet, Normalization | None] | None:
    """The images asked for, or noise that the model takes; None, and a note, where nothing was asked for and it takes none."""
    if calibration is not None:
        return calibration_images(model, calibration)
    try:
        return calibration_images(model, Calibration())
    except (ModelError, DataError) as error:
        notes.append(f"outputs were not compared: {error}")
        return None


def _explanation(model: LoadedModel, notes: list[str]) -> Explanation | None:
    try:
        return explain(model)
    except LoadError as error:
        notes.append(f"what ONNX Runtime does with the weights is not known: {error}")
        return None
