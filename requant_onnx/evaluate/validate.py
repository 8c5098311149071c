"""Compare a candidate model with its reference on images: accuracy, agreement, output SQNR, size, latency."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from requant_onnx.convert.report import Compared, FileSizes, ValidationReport, sqnr_db
from requant_onnx.errors import DataError
from requant_onnx.files.load import LoadedModel, ModelLike, Source
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.operands import matmuls_with_int8_activations
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization, batches
from requant_onnx.numerics.arrays import Float32Array, Int64Array
from requant_onnx.progress import Progress
from requant_onnx.runtime.classifier import Classifier, open_classifier, require_image
from requant_onnx.runtime.feeds import open_fed
from requant_onnx.runtime.sessions import load_runnable

BATCH = 100
LATENCY_RUNS = 30


def validate(
    reference: ModelLike | LoadedModel,
    candidate: ModelLike | LoadedModel,
    images: ImageSet | FeedSet,
    normalization: Normalization | None = None,
    *,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run both models on all images in ONNX Runtime's CPU provider with default options.

    images: or inputs by name; then agreement counts the runs whose largest value of the first output has the same place.
    normalization: for uint8 images (default: pixel / 255); float images are taken as they are.
    Raises ModelError when a model is refused, DataError when the images or labels do not fit.
    """
    reference, candidate = load_runnable(reference), load_runnable(candidate)  # whose errors say more than ONNX Runtime's
    notes = _notes(candidate.proto)
    sources = (reference.source, candidate.source)
    if isinstance(images, FeedSet):
        return _validate_feeds(sources, images, notes, progress)
    models = (_open(sources[0], "the reference"), _open(sources[1], "the candidate"))
    if len(images) == 0:
        raise DataError("there are no images; give at least one")
    for model in models:
        require_image(model, images.x.shape[1:])
    if images.x.dtype != np.uint8 and normalization is not None:
        raise DataError("the images are float32, taken as normalized already; drop mean and std, or give uint8 pixels")
    normalization = models[0].normalization(normalization or Normalization())
    tally = _Tally()
    for start, x in _batches(images, normalization, models):
        count = min(len(x), len(images) - start)
        labels = None if images.y is None else images.y[start : start + count]
        tally.add(models[0].scores(x)[:count], models[1].scores(x)[:count], labels)
        if progress is not None:
            progress("validating", start + count, len(images))
    latency, batch = _latencies(models, images, normalization), _common_batch(models, free=1)
    sizes = FileSizes(models[0].bytes, models[1].bytes)
    return tally.report(sizes, images, latency, batch, (*notes, *tally.notes()))


def _validate_feeds(
    sources: tuple[Source, Source], feeds: FeedSet, notes: tuple[str, ...], progress: Progress | None
) -> ValidationReport:
    models = (open_fed(sources[0], _named(sources[0], "the reference")), open_fed(sources[1], _named(sources[1], "the candidate")))
    if len(feeds) == 0:
        raise DataError("there are no inputs; give at least one")
    tally = _Tally()
    for done, feed in enumerate(feeds.rows, 1):
        tally.add(models[0].scores(feed), models[1].scores(feed), None)
        if progress is not None:
            progress("validating", done, len(feeds))
    times = np.array([[model.latency(feeds.rows[0]) for model in models] for _ in range(LATENCY_RUNS + 2)])[2:]
    notes = (*notes, *tally.notes(), "the figures are those of the first output; its largest value counts as the answer")
    sizes = FileSizes(models[0].bytes, models[1].bytes)
    return tally.report(sizes, feeds, Compared(*map(float, np.median(times, axis=0))), 1, notes)


def _named(model: Source, role: str) -> str:
    return role if isinstance(model, onnx.ModelProto) else f"{role} '{model}'"


class _Tally:
    """Running sums over the batches."""

    def __init__(self) -> None:
        self.hits = np.zeros(2, np.int64)
        self.broken = np.zeros(2, np.int64)
        self.agree, self.power, self.error = 0, 0.0, 0.0

    def add(self, reference: Float32Array, candidate: Float32Array, labels: Int64Array | None) -> None:
        if reference.shape != candidate.shape:
            raise DataError(
                f"the reference gives {reference.shape[1]} scores an image and the candidate {candidate.shape[1]}; "
                "compare models of the same classes"
            )
        self.broken += [len(scores) - int(np.isfinite(scores).all(axis=1).sum()) for scores in (reference, candidate)]
        tops = [scores.argmax(1) for scores in (reference, candidate)]
        if labels is not None:
            if labels.min() < 0 or labels.max() >= reference.shape[1]:
                raise DataError(
                    f"the labels run from {labels.min()} to {labels.max()} and the models give {reference.shape[1]} scores; "
                    "give matching data"
                )
            self.hits += [int((top == labels).sum()) for top in tops]
        self.agree += int((tops[0] == tops[1]).sum())
        self.power += float(np.square(reference, dtype=np.float64).sum())
        self.error += float(np.square(reference.astype(np.float64) - candidate).sum())

    def notes(self) -> tuple[str, ...]:
        """A sentence for each model that gives NaN or infinity."""
        named = zip(("reference", "candidate"), self.broken, strict=True)
        return tuple(f"the {name} gives NaN or infinite scores for {count} images" for name, count in named if count)

    def report(
        self, sizes: FileSizes, images: ImageSet | FeedSet, latency: Compared, batch: int, notes: tuple[str, ...]
    ) -> ValidationReport:
        count = len(images)
        return ValidationReport(
            images=count,
            top1=None if images.y is None else Compared(*(float(hits) / count for hits in self.hits)),
            agreement=self.agree / count,
            sqnr_db=sqnr_db(self.power, self.error),
            bytes=sizes,
            latency_ms=latency,
            latency_batch=batch,
            notes=notes,
            kind="inputs" if isinstance(images, FeedSet) else "images",
        )


def _open(model: Source, role: str) -> Classifier:
    return open_classifier(model, _named(model, role))


def _notes(candidate: onnx.ModelProto) -> tuple[str, ...]:
    rounded = matmuls_with_int8_activations(ModelGraph.of(candidate))
    sentence = (
        f"ONNX Runtime rounds the activations of {', '.join(rounded)} to int8 by default, and the figures include that; "
        "the session option session.qdq_matmulnbits_accuracy_level=1 turns it off"
    )
    return (sentence,) if rounded else ()


def _common_batch(models: tuple[Classifier, Classifier], free: int = BATCH) -> int:
    fixed = {model.batch for model in models if model.batch is not None}
    if len(fixed) > 1:
        raise DataError(
            f"the models have fixed batch sizes {models[0].batch} and {models[1].batch}; compare models of one batch size"
        )
    return fixed.pop() if fixed else free


def _batches(
    images: ImageSet, normalization: Normalization, models: tuple[Classifier, Classifier]
) -> Iterator[tuple[int, Float32Array]]:
    """(start, x): x of the models' fixed batch size, if there is one, else of BATCH or fewer."""
    size = _common_batch(models, free=min(BATCH, len(images)))
    return batches(images, normalization, size, fixed=any(model.batch is not None for model in models))


def _latencies(models: tuple[Classifier, Classifier], images: ImageSet, normalization: Normalization) -> Compared:
    """Median milliseconds of each model, the runs interleaved so that other load hits both alike."""
    _, x = next(_batches(images.first(1), normalization, models))
    times = np.array([[model.latency(x) for model in models] for _ in range(LATENCY_RUNS + 2)])[2:]  # two to warm up
    return Compared(*map(float, np.median(times, axis=0)))
