"""All data that a report shows about two models: comparison of weights, explanation and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from requant_onnx.convert.report import FileSizes, QuantReport, ValidationReport
from requant_onnx.errors import DataError, LoadError, ModelError
from requant_onnx.evaluate.examples import Change, Example, Examples
from requant_onnx.evaluate.validate import validate
from requant_onnx.evaluate.verdict import Verdict, judge
from requant_onnx.evaluate.weight_comparison import ComparedWeight, dissect
from requant_onnx.files.compressed import download_sizes
from requant_onnx.files.load import LoadedModel, ModelLike, Source, is_large
from requant_onnx.graph.activations import ActivationRange, activation_ranges
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.flow import Block, flow_of
from requant_onnx.graph.readers import find_readers
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.numerics.arrays import UInt8Array
from requant_onnx.numerics.heads import task_of
from requant_onnx.progress import Progress
from requant_onnx.runtime.explain import Explanation, explain
from requant_onnx.runtime.feeds import calibration_images
from requant_onnx.runtime.sessions import load_runnable

COMPARED, COMPARED_VALUES = 64, 1 << 22  # limits for comparing layer outputs: inputs, and values of images (27 of 224x224)
FEWEST = 8


class Names(NamedTuple):
    """The names of two models."""

    reference: str
    candidate: str


@dataclass(frozen=True)
class Shown:
    """An example and its image.  pixels: (h, w, c) with 1 or 3 channels, 0..255; None if the input is not an image."""

    example: Example
    pixels: UInt8Array | None


@dataclass(frozen=True)
class Answers:
    """The answers of the models.  data: description of the inputs.  examples: the worst ones.  changes: the most frequent ones."""

    data: str
    validation: ValidationReport
    examples: Sequence[Shown]
    changes: Sequence[Change]


@dataclass(frozen=True)
class Study:
    """The data on two models: their names, and their file sizes in bytes.  inputs: description of the inputs for layer outputs.

    flow: flow of the candidate.  explanation, answers, conversion: None if there is none.  settings: (title, text) pairs with the
    settings that made the file.  downloads: compressed sizes of the candidate in bytes, by compressor.
    """

    names: Names
    bytes: FileSizes
    weights: Sequence[ComparedWeight]
    verdict: Verdict
    flow: Sequence[Block] = ()
    ranges: Sequence[ActivationRange] = ()
    explanation: Explanation | None = None
    answers: Answers | None = None
    conversion: QuantReport | None = None
    inputs: str = ""
    notes: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = ()
    downloads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """The inputs for the comparison of models.  data: their name, as the user gave it.  used: whether the conversion used them.

    task: as in `validate`.
    """

    calibration: Calibration | None = None
    data: str = ""
    used: bool = False
    task: str | None = None


def study(reference: ModelLike, candidate: ModelLike, asked: Asked, progress: Progress | None = None) -> Study:
    """All data except the conversion.  asked: inputs for the comparison; if it has none, noise is used if the model takes it.

    Raises ModelError if a model does not load, DataError as `validate`.
    """
    models = (load_runnable(reference), load_runnable(candidate))
    notes: list[str] = []
    chosen = _inputs(models[0].source, asked.calibration, notes)
    answers, layers, inputs = None, None, ""
    if chosen is not None:
        data, normalization = chosen
        answers = _answers(models, data, normalization, asked, notes, progress)
        if isinstance(data, FeedSet):
            layers, inputs = Calibration(feeds=data.rows, count=min(COMPARED, len(data))), f"{min(COMPARED, len(data))} inputs"
        else:
            few = data.first(min(COMPARED, max(FEWEST, COMPARED_VALUES // math.prod(data.x.shape[1:]))))
            layers = Calibration(few, normalization, len(few))
            inputs = f"{len(few)} images" + (" of noise" if _is_noise(asked) else "")
    weights = dissect(*models, layers, progress)
    sizes = FileSizes(*(model.bytes for model in models))
    graph = ModelGraph.of(models[1].proto)
    explanation = _explanation(models[1], notes)
    notes += _doubts(weights, sizes)
    return Study(
        names=Names(*(model.label for model in models)),
        bytes=sizes,
        weights=weights,
        verdict=judge(None if answers is None else answers.validation, sizes, _weaknesses(asked, answers)),
        flow=flow_of(graph, find_readers(graph)),
        ranges=activation_ranges(graph),
        explanation=explanation,
        answers=answers,
        inputs=inputs,
        notes=notes,
        downloads={} if is_large(models[1].proto) else download_sizes(models[1].proto.SerializeToString()),
    )


def _is_noise(asked: Asked) -> bool:
    return asked.calibration is None or asked.calibration.is_noise


def _weaknesses(asked: Asked, answers: Answers | None) -> tuple[str, ...]:
    """Weaknesses of the data, as sentences."""
    if answers is None:
        return ()
    if asked.used:
        return ("The conversion also used these inputs, so the figures are optimistic; measure on other inputs, with --data.",)
    return ("The inputs are noise, not your data; measure on your own inputs, with --data.",) if _is_noise(asked) else ()


def _named(asked: Asked, data: ImageSet | FeedSet, normalization: Normalization | None) -> str:
    """A description of the inputs."""
    if isinstance(data, FeedSet):
        return f"{len(data):,} inputs" + (f" from {asked.data}" if asked.data else "")
    text = f"{len(data):,} images" + (" of noise" if _is_noise(asked) else f" from {asked.data}" if asked.data else "")
    if normalization is not None and not _is_noise(asked):
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (normalization.mean, normalization.std))
        text += f", normalized with mean {mean} and standard deviation {std}"
    return text + (", which the conversion also used" if asked.used else "")


def _answers(
    models: tuple[LoadedModel, LoadedModel],
    data: ImageSet | FeedSet,
    normalization: Normalization | None,
    asked: Asked,
    notes: list[str],
    progress: Progress | None,
) -> Answers | None:
    """The answers, or None and a note if the outputs cannot be compared; the weights still can."""
    examples = Examples(data.y, None if isinstance(data, FeedSet) else data.x.shape[2:], task_of(asked.task))
    try:
        report = validate(*models, data, normalization, task=asked.task, progress=progress, watch=examples.add)
    except ModelError as error:
        notes.append(f"answers were not compared: {error}")
        return None
    shown = [Shown(example, _pixels(data, example.index)) for example in examples.worst]
    return Answers(_named(asked, data, normalization), report, shown, examples.changes)


def _pixels(data: ImageSet | FeedSet, index: int) -> UInt8Array | None:
    """An image for display; normalized values are stretched to 0..255."""
    if isinstance(data, FeedSet):
        return None
    image = np.asarray(data.x[index : index + 1])[0].transpose(1, 2, 0)
    image = image if image.shape[2] == 3 else image[:, :, :1]
    if image.dtype == np.uint8:
        return np.asarray(image, np.uint8)
    low, high = float(image.min()), float(image.max())
    return np.asarray(np.rint((image - low) * (255 / max(high - low, 1e-12))), np.uint8)


def _doubts(weights: Sequence[ComparedWeight], sizes: FileSizes) -> list[str]:
    """Reasons to doubt the page, as sentences."""
    doubts = []
    unknown = sum(weight.outcome == "unknown" for weight in weights)
    if unknown:
        doubts.append(
            f"{unknown} of {len(weights)} weights could not be compared: they have no counterpart in the reference, or are in an "
            "integer kernel that does not state how they are decoded"
        )
    if any(weight.sqnr_db < 0 for weight in weights):
        doubts.append("some weights differ by more than their own size; is the candidate made from this reference?")
    if sizes.candidate > sizes.reference:
        doubts.append("the candidate is larger than the reference; are the two models in the right order?")
    return doubts


def _inputs(
    model: Source, calibration: Calibration | None, notes: list[str]
) -> tuple[ImageSet | FeedSet, Normalization | None] | None:
    """The given inputs, or noise that the model takes; None, and a note, if none were given and it takes no noise."""
    if calibration is not None and calibration.feeds:
        return FeedSet(calibration.feeds[: calibration.count]), None
    if calibration is not None:
        return calibration_images(model, calibration)
    try:
        return calibration_images(model, Calibration().unseen(COMPARED)[0])
    except (ModelError, DataError) as error:
        notes.append(f"outputs were not compared: {error}")
        return None


def _explanation(model: LoadedModel, notes: list[str]) -> Explanation | None:
    try:
        return explain(model)
    except LoadError as error:
        notes.append(f"the treatment of the weights by ONNX Runtime is unknown: {error}")
        return None
