"""Run a float model on calibration inputs (images, noise, or any inputs by name) and record its activations."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import onnx
from onnxruntime import InferenceSession, SessionOptions

from requant_onnx.errors import DataError, ModelError
from requant_onnx.files.load import Source
from requant_onnx.inputs.calibration import GRAY, NATURAL, Calibration
from requant_onnx.inputs.feeds import Feed
from requant_onnx.inputs.images import MAX_VALUES, ImageSet, Normalization, batches, for_channels, images_from
from requant_onnx.inputs.synthetic import noise_images
from requant_onnx.numerics.activation import Histogram
from requant_onnx.numerics.arrays import AnyArray, Float32Array
from requant_onnx.numerics.outputs import images_in
from requant_onnx.runtime.classifier import Classifier, ImageInput, open_classifier, require_image
from requant_onnx.runtime.sessions import open_session, provider_in_use, quiet_options, run_session, serialized, start_session

BATCH_BYTES = 1 << 27  # largest size of all watched activations of a batch
MAX_BATCH = 100
CHUNK, CHUNK_VALUES = 32, 1 << 20  # images per chunk, and values in all of them
Watch = Callable[[int, int], None]


def watch_activations(
    model: onnx.ModelProto, tensors: Collection[str], calibration: Calibration, progress: Watch | None = None
) -> dict[str, Histogram]:
    """The histogram of each named tensor over all calibration inputs.  Memory: BATCH_BYTES of activations at a time.

    progress: called with the numbers of finished and of all inputs.  Raises ModelError when the model does not accept the inputs,
    gets images but does not have exactly one image input, or returns NaN or infinity; DataError when images do not fit it.
    """
    histograms = {name: Histogram() for name in tensors}
    for done, total, values in _watch(model, tensors, calibration):
        for name, activation in values.items():
            _add(histograms[name], name, activation)
        if progress is not None:
            progress(done, total)
    return histograms


def activation_sizes(model: onnx.ModelProto, tensors: Collection[str], calibration: Calibration) -> dict[str, int]:
    """The number of elements of each named tensor for one input or one fixed batch.  Raises as `watch_activations`."""
    _, _, values = next(_watch(model, tensors, replace(calibration, count=1)))
    return {name: int(np.size(value)) for name, value in values.items()}


def _watch(
    model: onnx.ModelProto, tensors: Collection[str], calibration: Calibration
) -> Iterator[tuple[int, int, dict[str, AnyArray]]]:
    """Batches of calibration inputs: (number of finished inputs, number of all, the named tensors)."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inputs = {item.name for item in model.graph.input}
    computed = [name for name in tensors if name not in inputs]
    if computed:
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    source = _feeds_source(watched, calibration) if calibration.feeds else _image_source(watched, calibration)
    for done, feed in source.feeds(BATCH_BYTES):
        values = run_session(source.session, "the model", None, feed) if computed else ()
        given = {name: feed[name] for name in inputs.intersection(tensors)}
        yield done, source.total, {**given, **{name: np.asarray(each) for name, each in zip(computed, values, strict=True)}}


def calibration_chunks(model: onnx.ModelProto, calibration: Calibration) -> Sequence[dict[str, AnyArray]]:
    """The calibration inputs, images CHUNK at a time, normalized on access.  Raises as `watch_activations`."""
    if calibration.feeds:
        return [dict(feed) for _, feed in _feeds_source(model, calibration).feeds(BATCH_BYTES)]
    classifier = open_classifier(model, "the model")
    images = _images_for(classifier, calibration)
    size = classifier.batch or _chunk_size(images)
    normalization = classifier.normalization(_normalization(calibration, images))
    return _ImageChunks(images, normalization, classifier.taken, size, range(0, len(images), size))


def counts_in(chunks: Sequence[dict[str, AnyArray]]) -> list[int]:
    """The number of inputs in each chunk of `calibration_chunks`, without those that fill a fixed batch."""
    if isinstance(chunks, _ImageChunks):
        return [min(chunks.size, len(chunks.images) - start) for start in chunks.starts]
    return [images_in(chunk.values())[0] for chunk in chunks]


@dataclass(frozen=True)
class _ImageChunks(Sequence[dict[str, AnyArray]]):
    """Chunks of images.  starts: index of the first image of each."""

    images: ImageSet
    normalization: Normalization
    taken: ImageInput
    size: int
    starts: range

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, AnyArray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, AnyArray]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, AnyArray] | Sequence[dict[str, AnyArray]]:
        if isinstance(index, slice):
            return replace(self, starts=self.starts[index])
        start = self.starts[index]
        is_fixed = self.taken.batch is not None
        x = images_from(self.images, start, self.size) if is_fixed else self.images.x[start : start + self.size]
        return {self.taken.input: self.taken.fit(self.normalization.apply(x))}


def _chunk_size(images: ImageSet) -> int:
    return min(CHUNK, max(1, len(images) // 4), max(1, CHUNK_VALUES // math.prod(images.x.shape[1:])))


@dataclass(frozen=True)
class _Source:
    """An open model and the source of its inputs.

    feeds: bytes of all outputs of one batch -> (number of finished inputs, inputs by name).  total: number of inputs.
    """

    session: InferenceSession
    feeds: Callable[[int], Iterator[tuple[int, Feed]]]
    total: int


def _feeds_source(model: onnx.ModelProto, calibration: Calibration) -> _Source:
    session = open_session(model, "the model")
    fitted = [fit_feed(session, feed) for feed in calibration.feeds[: calibration.count]]
    return _Source(session, lambda _: iter(enumerate(fitted, 1)), len(fitted))


def fit_feed(session: InferenceSession, feed: Feed) -> Feed:
    """Inputs in the types that a model takes.  Raises DataError if their names are not the model's, or they do not fit."""
    taken = {item.name: item for item in session.get_inputs()}
    if feed.keys() != taken.keys():
        raise DataError(f"the given inputs are {sorted(feed)}, but the model takes {sorted(taken)}; give each by its name")
    return {name: _fitted(taken[name], values) for name, values in feed.items()}


@dataclass(frozen=True)
class FedModel:
    """A model with any inputs, ready to run on feeds, one run each.  bytes: size of the file."""

    name: str
    session: InferenceSession
    bytes: int
    batch = 1

    def scores(self, feed: Feed) -> Float32Array:
        """All numbers of the first output, (1, n).  Raises ModelError when the model fails, or the output is not numeric."""
        first = self.session.get_outputs()[0].name
        values = run_session(self.session, self.name, [first], fit_feed(self.session, feed))[0]
        if not isinstance(values, np.ndarray) or values.dtype.kind in "OSU" or values.size == 0:
            raise ModelError(f"the first output of {self.name} is not a tensor of numbers, so there is nothing to compare")
        return values.reshape(1, -1).astype(np.float32)

    def latency(self, feed: Feed) -> float:
        """Milliseconds of one run."""
        fitted = fit_feed(self.session, feed)
        started = time.perf_counter()
        run_session(self.session, self.name, None, fitted)
        return (time.perf_counter() - started) * 1000


def open_fed(model: Source, name: str, options: SessionOptions | None = None) -> FedModel:
    """Load a model in ONNX Runtime's CPU provider, with default options if none are given.  Raises ModelError."""
    source = serialized(model, name)
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    return FedModel(name, start_session(source, name, options or quiet_options(), provider_in_use()), size)


def _fitted(item: Any, values: AnyArray) -> AnyArray:
    """The values in the type that the model takes.  item: an input of a session, with its name, type and shape.

    Raises DataError if the shape does not fit, or if the type would change values by more than float rounding.
    """
    name = item.type.removeprefix("tensor(").removesuffix(")")
    kind = {"float": "float32", "double": "float64"}.get(name, name)
    sizes = [size if isinstance(size, int) and size > 0 else None for size in item.shape]
    fits = len(sizes) == values.ndim and all(want in (None, have) for want, have in zip(sizes, values.shape, strict=True))
    cast = _cast(values, kind)
    if not fits or cast is None:
        have, want = (_listed(shape) for shape in (values.shape, ["?" if size is None else size for size in sizes]))
        raise DataError(
            f"the input '{item.name}' has type {values.dtype} and shape {have}, but the model takes {kind} of shape {want}; "
            "convert it"
        )
    return cast


def _cast(values: AnyArray, kind: str) -> AnyArray | None:
    """The values in another type; None if values would change or NumPy lacks the type."""
    if str(values.dtype) == kind:
        return values
    if values.dtype.kind == "U" or kind == "string":
        return values.astype(object) if values.dtype.kind == "U" and kind == "string" else None
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(kind)
    except TypeError:
        return None
    rounds = values.dtype.kind == cast.dtype.kind == "f"
    same = np.isfinite(cast).all() if rounds else (cast.astype(values.dtype) == values).all()
    return cast if same else None


def _listed(shape: Iterable[object]) -> str:
    return "x".join(map(str, shape)) or "()"


def _image_source(model: onnx.ModelProto, calibration: Calibration) -> _Source:
    classifier = open_classifier(model, "the model")
    images = _images_for(classifier, calibration)
    normalization = classifier.normalization(_normalization(calibration, images))

    def feeds(limit: int) -> Iterator[tuple[int, Feed]]:
        size = classifier.batch or _batch_size(classifier, images, normalization, limit)
        for start, x in batches(images, normalization, size, fixed=classifier.batch is not None):
            yield min(start + size, len(images)), {classifier.input: classifier.fit(x)}

    return _Source(classifier.session, feeds, len(images))


def calibration_images(model: Source, calibration: Calibration) -> tuple[ImageSet, Normalization | None]:
    """The images or noise of a calibration without feeds, and their normalization.

    Raises as `watch_activations`.
    """
    images = _images_for(open_classifier(model, "the model"), calibration)
    return images, calibration.normalization if images.x.dtype != "uint8" else _normalization(calibration, images)


def _normalization(calibration: Calibration, images: ImageSet) -> Normalization:
    if calibration.normalization is not None or calibration.images is not None:
        return for_channels(images, calibration.normalization or Normalization(), images.x.shape[1])[1]
    return NATURAL if images.x.shape[1] == len(NATURAL.mean) else GRAY


def _images_for(classifier: Classifier, calibration: Calibration) -> ImageSet:
    """The given images, if they fit, or noise of the size that the model takes."""
    if calibration.images is not None:
        images, _ = for_channels(calibration.images, Normalization(), classifier.channels)
        require_image(classifier, images.x.shape[1:])
        return images.drawn(calibration.count, calibration.seed)
    image = classifier.image_shape(calibration.size)
    if image is not None and calibration.size not in (None, image[1:]):
        raise DataError(f"the model takes images of {image[1]}x{image[2]}, so noise cannot have another size; drop the size")
    if image is None:
        raise DataError("the model leaves the size of images free; give noise with a size, for example noise:224x224, or images")
    if calibration.count * math.prod(image) > MAX_VALUES:
        raise DataError(f"{calibration.count} noise images of {image[1]}x{image[2]} do not fit in memory; use fewer")
    return ImageSet(noise_images(calibration.count, *image, seed=calibration.seed), None)


def _batch_size(classifier: Classifier, images: ImageSet, normalization: Normalization, limit: int) -> int:
    _, x = next(batches(images.first(1), normalization, 1, fixed=False))
    bytes_each = sum(values.nbytes for values in classifier.tensors(x))
    return max(1, min(len(images), MAX_BATCH, limit // max(1, bytes_each)))


def _add(histogram: Histogram, name: str, values: AnyArray) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"'{name}' has NaN or infinite values on the calibration inputs; check the inputs and their normalization")
    histogram.add(values.astype(np.float32, copy=False))
