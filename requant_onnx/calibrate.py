"""Run a float model on calibration inputs (images, noise, or any inputs by name) and watch its activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime import InferenceSession

from requant_onnx.data import MAX_VALUES, ImageSet, Normalization, batches
from requant_onnx.errors import ConfigError, DataError, ModelError
from requant_onnx.files.load import Source
from requant_onnx.noise import noise_images
from requant_onnx.numerics.activation import Histogram
from requant_onnx.runtime import Classifier, open_classifier, open_session, require_image, run_session

BATCH_BYTES = 1 << 27  # of all watched activations of a batch
MAX_BATCH = 100
CHUNK = 32  # images
DEFAULT_COUNT = 256
NATURAL = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, near those of any natural images
NOISE_HEADROOM = 1.5  # by which ranges seen on noise are widened, for images reach further (measured: README, "int8")
Watch = Callable[[int, int], None]
Feed: TypeAlias = "Mapping[str, npt.NDArray[Any]]"


@runtime_checkable
class Reader(Protocol):
    """What onnxruntime.quantization.CalibrationDataReader is used for here."""

    def get_next(self) -> Feed | None:
        """The next inputs by name, None after the last."""


@dataclass(frozen=True)
class Calibration:
    """What the activations are watched on: `count` images drawn at random; or the first `count` feeds, which are inputs by name
    for a model of any inputs (`from_feeds`); or, where there are neither, `count` images of noise.

    normalization: for uint8 images (default: pixel / 255) and for noise (default: ImageNet's, for 3 channels).
    seed: of the drawing, and of the noise.  size: of the noise; it (height, width) is needed where the model leaves it free.
    """

    images: ImageSet | None = None
    normalization: Normalization | None = None
    count: int = DEFAULT_COUNT
    seed: int = 0
    size: tuple[int, int] | None = None
    feeds: tuple[Feed, ...] = ()

    @classmethod
    def from_feeds(cls, source: Iterable[Feed] | Reader, count: int = DEFAULT_COUNT) -> Calibration:
        """Calibrate on inputs by name: dictionaries from any iterable, or from a CalibrationDataReader of ONNX Runtime.

        Reads until it has `count` feeds.  Raises DataError when there is none, or one is no dictionary of arrays.
        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
        """
        if isinstance(source, Reader):
            source = iter(source.get_next, None)
        feeds = tuple(_checked(feed) for feed in itertools.islice(source, count))
        if not feeds:
            raise DataError("there are no calibration inputs; give at least one")
        return cls(feeds=feeds, count=count)

    @property
    def is_noise(self) -> bool:
        """Whether the inputs are made up."""
        return self.images is None and not self.feeds

    @property
    def headroom(self) -> float:
        """Factor on the ranges seen."""
        return NOISE_HEADROOM if self.is_noise else 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.images, ImageSet | None):
            raise ConfigError(f"calibration images must be an ImageSet (load_images makes one), not {type(self.images).__name__}")
        if not _is_whole(self.count) or self.count < 1:
            raise ConfigError(f"calibration needs 1 image or more, not {self.count!r}")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"the seed must be a whole number from 0 on, not {self.seed!r}")
        if self.size is not None and (len(self.size) != 2 or not all(_is_whole(n) and n > 0 for n in self.size)):
            raise ConfigError(f"the size of noise must be (height, width), both 1 or more, not {self.size!r}")
        if self.feeds and (self.images is not None or self.normalization is not None or self.size is not None):
            raise ConfigError("calibration takes images or feeds, not both, and feeds are not normalized")
        if self.images is not None and len(self.images) == 0:
            raise DataError("there are no calibration images; give at least one")
        if self.images is not None and self.images.x.dtype != "uint8" and self.normalization is not None:
            raise DataError(
                "the calibration images are float32, taken as normalized already; drop mean and std, or give uint8 pixels"
            )


def watch_activations(
    model: onnx.ModelProto, tensors: Collection[str], calibration: Calibration, progress: Watch | None = None
) -> dict[str, Histogram]:
    """The histogram of each named tensor over all calibration inputs.  Memory: BATCH_BYTES of activations at a time.

    progress: called with the inputs done and their number.  Raises ModelError when the model does not take the inputs, or images
    where it has another number of inputs than one image input, or gives NaN or infinity; DataError when images do not fit it.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inputs = {item.name for item in model.graph.input}
    computed = [name for name in tensors if name not in inputs]
    if computed:
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    histograms = {name: Histogram() for name in tensors}
    source = _feeds_source(watched, calibration) if calibration.feeds else _image_source(watched, calibration)
    for done, feed in source.feeds(BATCH_BYTES):
        values = run_session(source.session, "the model", None, feed) if computed else ()
        for name, own in zip(computed, values, strict=True):
            _add(histograms[name], name, np.asarray(own))
        for name in inputs.intersection(tensors):
            _add(histograms[name], name, feed[name])
        if progress is not None:
            progress(done, source.total)
    return histograms


def calibration_chunks(model: onnx.ModelProto, calibration: Calibration) -> list[dict[str, npt.NDArray[Any]]]:
    """The calibration inputs, images CHUNK at a time.  Raises as `watch_activations`."""
    source = _feeds_source(model, calibration) if calibration.feeds else _image_source(model, calibration)
    return [dict(feed) for _, feed in source.feeds(None)]


@dataclass(frozen=True)
class _Source:
    """A model, open, and how to make its inputs.

    feeds: bytes of all outputs of one batch, or None for CHUNK images -> (inputs done, inputs by name).  total: how many there are.
    """

    session: InferenceSession
    feeds: Callable[[int | None], Iterator[tuple[int, Feed]]]
    total: int


def _feeds_source(model: onnx.ModelProto, calibration: Calibration) -> _Source:
    feeds, session = calibration.feeds[: calibration.count], open_session(model, "the model")
    wanted = sorted(item.name for item in session.get_inputs())
    for feed in feeds:
        if sorted(feed) != wanted:
            raise DataError(f"the calibration inputs hold {sorted(feed)} and the model takes {wanted}; give each by its name")
        for item in session.get_inputs():
            _require_input(item, feed[item.name])
    return _Source(session, lambda _: iter(enumerate(feeds, 1)), len(feeds))


def _require_input(item: Any, values: npt.NDArray[Any]) -> None:
    """Refuse what the model does not take.  item: an input of a session, with its name, type and shape."""
    name = item.type.removeprefix("tensor(").removesuffix(")")
    kind = {"float": "float32", "double": "float64"}.get(name, name)
    sizes = [size if isinstance(size, int) and size > 0 else None for size in item.shape]
    fits = len(sizes) == values.ndim and all(want in (None, have) for want, have in zip(sizes, values.shape, strict=True))
    if not fits or str(values.dtype) != kind:
        have, want = (_listed(shape) for shape in (values.shape, ["?" if size is None else size for size in sizes]))
        raise DataError(
            f"the calibration input '{item.name}' is {values.dtype} of shape {have} and the model takes {kind} of shape {want}; "
            "make it so"
        )


def _listed(shape: Iterable[object]) -> str:
    return "x".join(map(str, shape)) or "()"


def _image_source(model: onnx.ModelProto, calibration: Calibration) -> _Source:
    classifier = open_classifier(model, "the model")
    images = _images_for(classifier, calibration)
    normalization = _normalization(calibration, images)

    def feeds(limit: int | None) -> Iterator[tuple[int, Feed]]:
        chunk = min(CHUNK, max(1, len(images) // 4))
        size = classifier.batch or (chunk if limit is None else _batch_size(classifier, images, normalization, limit))
        for start, x in batches(images, normalization, size, fixed=classifier.batch is not None):
            yield min(start + size, len(images)), {classifier.input: classifier.fit(x)}

    return _Source(classifier.session, feeds, len(images))


def _checked(feed: object) -> Feed:
    if not isinstance(feed, Mapping) or not feed:
        raise DataError(f"calibration inputs must be dictionaries from the names of inputs to arrays, not {type(feed).__name__}")
    arrays = {str(name): np.asarray(values) for name, values in feed.items()}
    for name, values in arrays.items():
        if values.dtype.kind not in "biuf":
            raise DataError(f"the calibration input '{name}' must be an array of numbers, not of {values.dtype}")
        if not np.isfinite(values).all():
            raise DataError(f"the calibration input '{name}' holds NaN or infinity; take them out")
    return arrays


def calibration_images(model: Source, calibration: Calibration) -> tuple[ImageSet, Normalization | None]:
    """The images of a calibration, or its noise, and how they become inputs; for a calibration without feeds.

    Raises as `watch_activations`.
    """
    images = _images_for(open_classifier(model, "the model"), calibration)
    return images, calibration.normalization if images.x.dtype != "uint8" else _normalization(calibration, images)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _normalization(calibration: Calibration, images: ImageSet) -> Normalization:
    natural = calibration.images is None and images.x.shape[1] == 3
    return calibration.normalization or (NATURAL if natural else Normalization())


def _images_for(classifier: Classifier, calibration: Calibration) -> ImageSet:
    """The images given, if they fit, or noise of the size that the model takes."""
    if calibration.images is not None:
        require_image(classifier, calibration.images.x.shape[1:])
        return calibration.images.drawn(calibration.count, calibration.seed)
    image = classifier.image_shape(calibration.size)
    if image is not None and calibration.size not in (None, image[1:]):
        raise DataError(f"the model takes images of {image[1]}x{image[2]}, not noise of another size; drop the size")
    if image is None:
        raise DataError("the model leaves the size of its images free; give noise of a size, for instance noise:224x224, or images")
    if calibration.count * math.prod(image) > MAX_VALUES:
        raise DataError(f"{calibration.count} images of {image[1]}x{image[2]} are too much noise to hold; make fewer of it")
    return ImageSet(noise_images(calibration.count, *image, seed=calibration.seed), None)


def _batch_size(classifier: Classifier, images: ImageSet, normalization: Normalization, limit: int) -> int:
    _, x = next(batches(images.first(1), normalization, 1, fixed=False))
    bytes_each = sum(values.nbytes for values in classifier.tensors(x))
    return max(1, min(len(images), MAX_BATCH, limit // max(1, bytes_each)))


def _add(histogram: Histogram, name: str, values: npt.NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"'{name}' is NaN or infinite on the calibration inputs; check them and their normalization")
    histogram.add(values.astype(np.float32, copy=False))
