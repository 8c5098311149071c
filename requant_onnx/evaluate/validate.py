"""Compare a candidate model with its reference: every output, accuracy, size and latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from requant_onnx.convert.report import FileSizes, ValidationReport
from requant_onnx.errors import DataError
from requant_onnx.evaluate.latency import compare_latency
from requant_onnx.evaluate.tally import Tally, Timed
from requant_onnx.files.load import LoadedModel, ModelLike, Source
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.graph.operands import matmuls_with_int8_activations
from requant_onnx.inputs.feeds import Feed, FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization, batches, for_channels
from requant_onnx.numerics.arrays import Float32Array
from requant_onnx.numerics.heads import task_of
from requant_onnx.numerics.outputs import images_in
from requant_onnx.progress import Progress
from requant_onnx.runtime.classifier import Classifier, open_classifier, require_image
from requant_onnx.runtime.feeds import fit_feed, open_fed
from requant_onnx.runtime.sessions import (
    Session,
    load_runnable,
    provider_in_use,
    quiet_options,
    run_session,
    serialized,
    start_session,
)

BATCH = 100
Watch = Callable[[int, int, list[Any], list[Any]], None]


@dataclass(frozen=True)
class _Opened:
    """An open model.  fit: images, (n, c, h, w), or inputs by name -> feed of the session."""

    name: str
    source: Source
    session: Session
    bytes: int
    fit: Callable[[Any], Feed]

    def run(self, batch: Any) -> list[Any]:
        return run_session(self.session, self.name, None, self.fit(batch))


def validate(
    reference: ModelLike | LoadedModel,
    candidate: ModelLike | LoadedModel,
    images: ImageSet | FeedSet,
    normalization: Normalization | None = None,
    *,
    latency_batch: int | None = 1,
    threads: int | None = None,
    task: str | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> ValidationReport:
    """Run both models on all images or other inputs in ONNX Runtime with default options, and compare every output.

    reference, candidate: path, ModelProto, bytes or binary file object.  images: images with or without labels, or inputs by name.
    normalization: normalization of uint8 images (default: pixel / 255); float images are used unchanged.
    latency_batch: number of images in a timed run (inputs by name are timed one by one); None for no timing.
    threads: number of threads of ONNX Runtime in timed runs (default: its own choice).
    task: detect:HEAD names the head of detectors if it is not recognized (numerics/heads.py lists the heads); values means that
    the outputs hold no answers, such as the embeddings of faces, so that only their values are compared.
    progress: callback for progress.  watch: callback after each batch, with the index of its first input, the number of its inputs,
    and the outputs of both models in the same order.
    Raises ModelError if a model cannot be loaded or run; DataError if images, labels or head do not fit; ConfigError for an unknown
    task.
    """
    asked = task_of(task)
    if latency_batch is not None and latency_batch < 1:
        raise DataError(f"latency_batch must be 1 or more, not {latency_batch}")
    reference, candidate = load_runnable(reference), load_runnable(candidate)  # its errors are clearer than ONNX Runtime's
    if len(images) == 0:
        raise DataError(f"there are no {'inputs' if isinstance(images, FeedSet) else 'images'}; give at least one")
    opened = _open((reference.source, candidate.source), images, normalization, latency_batch or 1)
    names = [[item.name for item in model.session.get_outputs()] for model in opened.models]
    tally = Tally((names[0], names[1]), images, opened.size, asked)
    for start, count, batch in opened.batches:
        outputs = tally.add(batch, opened.models[0].run(batch), opened.models[1].run(batch), start, count)
        if watch is not None:
            watch(start, count, *outputs)
        if progress is not None:
            progress("validating", start + count, len(images))
    timed = Timed() if latency_batch is None else _latency(opened.models, opened.timed, threads)
    precision = tally.precision()
    notes = (*_swapped(reference.proto, candidate.proto), *_notes(candidate.proto), *tally.notes(opened.normalization, precision))
    return tally.report(FileSizes(*(model.bytes for model in opened.models)), timed, notes, precision)


@dataclass(frozen=True)
class _Pair:
    """Two open models and their inputs.

    batches: (index of the first input, number of inputs, batch).  timed: batch for measuring the latency.
    size: height and width of the images, if there are any.  normalization: normalization of the images.
    """

    models: tuple[_Opened, _Opened]
    batches: Iterator[tuple[int, int, Any]]
    timed: Any
    size: tuple[int, int] | None
    normalization: Normalization


def _open(sources: tuple[Source, Source], images: ImageSet | FeedSet, normalization: Normalization | None, timed: int) -> _Pair:
    """Open both models.  timed: number of images in a timed run.  Raises as `validate`."""
    roles = ("the reference", "the candidate")
    if isinstance(images, FeedSet):
        fed = (_fed(sources[0], roles[0]), _fed(sources[1], roles[1]))
        feeds = ((k, 1, feed) for k, feed in enumerate(images.rows))
        return _Pair(fed, feeds, images.rows[0], images_in(images.rows[0].values())[1], normalization or Normalization())
    opened = (_classifier(sources[0], roles[0]), _classifier(sources[1], roles[1]))
    images, how = for_channels(images, normalization or Normalization(), opened[0].channels)
    how = _check_images(opened, images, None if normalization is None else how)
    models = (_of_images(opened[0], sources[0]), _of_images(opened[1], sources[1]))
    free = _common_batch(opened, free=timed)
    once = next(batches(images.first(free), how, free, fixed=True))[1]
    parts = ((start, min(len(x), len(images) - start), x) for start, x in _batches(images, how, opened))
    return _Pair(models, parts, once, images.x.shape[2:], how)


def _check_images(models: tuple[Classifier, Classifier], images: ImageSet, normalization: Normalization | None) -> Normalization:
    """The normalization of the images.  Raises DataError if they do not fit the models."""
    for model in models:
        require_image(model, images.x.shape[1:])
    if images.x.dtype != np.uint8 and normalization is not None:
        raise DataError("the images are float32, so they count as normalized; drop mean and std, or give uint8 pixels")
    return models[0].normalization(normalization or Normalization())


def _named(model: Source, role: str) -> str:
    return role if isinstance(model, onnx.ModelProto) else f"{role} '{model}'"


def _fed(source: Source, role: str) -> _Opened:
    fed = open_fed(source, _named(source, role))
    return _Opened(fed.name, source, fed.session, fed.bytes, lambda feed: fit_feed(fed.session, feed))


def _classifier(source: Source, role: str) -> Classifier:
    return open_classifier(source, _named(source, role))


def _of_images(model: Classifier, source: Source) -> _Opened:
    return _Opened(model.name, source, model.session, model.bytes, lambda x: {model.input: model.fit(x)})


def _notes(candidate: onnx.ModelProto) -> tuple[str, ...]:
    rounded = matmuls_with_int8_activations(ModelGraph.of(candidate))
    sentence = (
        f"ONNX Runtime rounds the activations of {', '.join(rounded)} to int8 by default, and the figures include this error; "
        "the session option session.qdq_matmulnbits_accuracy_level=1 turns it off"
    )
    return (sentence,) if rounded else ()


def _swapped(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> tuple[str, ...]:
    """A note if only the reference is a converted model."""
    converted = [settings_of(model) is not None for model in (reference, candidate)]
    return (
        ("the reference is a converted model, and the candidate is not; give the float model first",)
        if converted == [True, False]
        else ()
    )


def _common_batch(models: tuple[Classifier, Classifier], free: int = BATCH) -> int:
    fixed = {model.batch for model in models if model.batch is not None}
    if len(fixed) > 1:
        raise DataError(
            f"the models have fixed batch sizes {models[0].batch} and {models[1].batch}; compare models with one batch size"
        )
    return fixed.pop() if fixed else free


def _batches(
    images: ImageSet, normalization: Normalization, models: tuple[Classifier, Classifier]
) -> Iterator[tuple[int, Float32Array]]:
    """Batches (start, x), of the models' fixed batch size if there is one, else of at most BATCH images."""
    size = _common_batch(models, free=min(BATCH, len(images)))
    return batches(images, normalization, size, fixed=any(model.batch is not None for model in models))


def _latency(models: tuple[_Opened, _Opened], batch: Any, threads: int | None) -> Timed:
    """Time both models on one batch, in separate sessions whose threads do not spin."""
    options = quiet_options()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads or 0
    runs = []
    for model in models:
        session = start_session(serialized(model.source, model.name), model.name, options, provider_in_use())
        runs.append(_timed(session, model.name, model.fit(batch)))
    count = len(batch) if isinstance(batch, np.ndarray) else images_in(batch.values())[0]
    return Timed(compare_latency(runs[0], runs[1]), count)


def _timed(session: Session, name: str, feed: Feed) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        run_session(session, name, None, feed)
        return time.perf_counter() - started

    return run
