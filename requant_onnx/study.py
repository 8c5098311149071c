"""All that a report shows of two models, put together: dissected, explained, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from requant_onnx.anatomy import Anatomy, dissect
from requant_onnx.calibrate import Calibration, calibration_images
from requant_onnx.data import ImageSet, Normalisation
from requant_onnx.errors import DataError, LoadError, ModelError
from requant_onnx.execute import Progress
from requant_onnx.explain import Explanation, explain
from requant_onnx.graph.load import Source, file_bytes
from requant_onnx.report import QuantReport, ValidationReport
from requant_onnx.validate import validate

COMPARED = 64  # images on which the outputs of layers are compared


@dataclass(frozen=True)
class Study:
    """Two models.  names, bytes: of the reference and the candidate.  inputs: what outputs of layers were compared on.

    explanation, validation, conversion: None where there is none.  settings: titles and texts of how the file was made.
    """

    names: tuple[str, str]
    bytes: tuple[int, int]
    weights: Sequence[Anatomy]
    explanation: Explanation | None = None
    validation: ValidationReport | None = None
    conversion: QuantReport | None = None
    inputs: str = ""
    notes: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = ()


def study(
    reference: Source,
    candidate: Source,
    images: ImageSet | None,
    normalisation: Normalisation | None,
    progress: Progress | None = None,
) -> Study:
    """Everything but the conversion.  images: None for noise, where the model takes images of a known size.

    Raises ModelError, DataError as `validate`.
    """
    notes: list[str] = []
    chosen = _noise(reference, notes) if images is None else (images, normalisation)
    validation, calibration, inputs = None, None, ""
    if chosen is not None:
        validation = validate(reference, candidate, *chosen, progress=progress)
        some = chosen[0].first(COMPARED)
        calibration = Calibration(some, chosen[1], COMPARED)
        inputs = f"{len(some)} images" + (" of noise" if images is None else "")
    weights = dissect(reference, candidate, calibration, progress)
    explanation = _explanation(candidate, notes)
    sizes = (_bytes(reference), _bytes(candidate))
    return Study((_name(reference), _name(candidate)), sizes, weights, explanation, validation, None, inputs, notes)


def _noise(model: Source, notes: list[str]) -> tuple[ImageSet, Normalisation | None] | None:
    """Noise that the model takes; None, and a note, where it takes none."""
    try:
        images, normalisation = calibration_images(model, Calibration())
    except (ModelError, DataError) as error:
        notes.append(f"outputs were not compared: {error}")
        return None
    return images, normalisation


def _explanation(model: Source, notes: list[str]) -> Explanation | None:
    try:
        return explain(model)
    except LoadError as error:
        notes.append(f"what ONNX Runtime does with the weights is not known: {error}")
        return None


def _name(model: Source) -> str:
    return "the model" if isinstance(model, onnx.ModelProto) else str(model)


def _bytes(model: Source) -> int:
    return model.ByteSize() if isinstance(model, onnx.ModelProto) else file_bytes(Path(model))
