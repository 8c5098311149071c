"""Run a float model on calibration images and watch its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from requant_onnx.data import MAX_VALUES, ImageSet, Normalisation, batches
from requant_onnx.errors import ConfigError, DataError, ModelError
from requant_onnx.noise import noise_images
from requant_onnx.numerics.activation import Histogram
from requant_onnx.runtime import Classifier, open_classifier, require_image

BATCH_BYTES = 1 << 27  # of all watched activations of a batch
MAX_BATCH = 100
CHUNK = 32  # images
DEFAULT_COUNT = 256
NATURAL = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, near those of any natural images
NOISE_HEADROOM = 1.5  # by which ranges seen on noise are widened, for images reach further (measured: README, "int8")
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What the activations are watched on: `count` images drawn at random, or as many images of noise where there are none.

    normalisation: for uint8 images (default: pixel / 255) and for noise (default: ImageNet's, for 3 channels).
    seed: of the drawing, and of the noise.  size: of the noise; it (height, width) is needed where the model leaves it free.
    """

    images: ImageSet | None = None
    normalisation: Normalisation | None = None
    count: int = DEFAULT_COUNT
    seed: int = 0
    size: tuple[int, int] | None = None

    @property
    def headroom(self) -> float:
        """Factor on the ranges seen."""
        return NOISE_HEADROOM if self.images is None else 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.images, ImageSet | None):
            raise ConfigError(f"calibration images must be an ImageSet (load_images makes one), not {type(self.images).__name__}")
        if not _is_whole(self.count) or self.count < 1:
            raise ConfigError(f"calibration needs 1 image or more, not {self.count!r}")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"the seed must be a whole number from 0 on, not {self.seed!r}")
        if self.size is not None and (len(self.size) != 2 or not all(_is_whole(n) and n > 0 for n in self.size)):
            raise ConfigError(f"the size of noise must be (height, width), both 1 or more, not {self.size!r}")
        if self.images is not None and len(self.images) == 0:
            raise DataError("there are no calibration images; give at least one")
        if self.images is not None and self.images.x.dtype != "uint8" and self.normalisation is not None:
            raise DataError(
                "the calibration images are float32, taken as normalised already; drop mean and std, or give uint8 pixels"
            )


def watch_activations(
    model: onnx.ModelProto, tensors: Collection[str], calibration: Calibration, progress: Watch | None = None
) -> dict[str, Histogram]:
    """The histogram of each named tensor over all calibration images.  Memory: BATCH_BYTES of activations at a time.

    progress: called with the images done and their number.  Raises ModelError when the model has another number of inputs than
    one image input or gives NaN or infinity, DataError when the images do not fit it.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inputs = {item.name for item in model.graph.input}
    computed = [name for name in tensors if name not in inputs]
    if computed:
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    classifier = open_classifier(watched, "the model")
    images = _images_for(classifier, calibration)
    normalisation = _normalisation(calibration, images)
    histograms = {name: Histogram() for name in tensors}
    size = classifier.batch or _batch_size(classifier, images, normalisation)
    for start, x in batches(images, normalisation, size, fixed=classifier.batch is not None):
        for name, values in zip(computed, classifier.tensors(x) if computed else (), strict=True):
            _add(histograms[name], name, values)
        for name in inputs.intersection(tensors):
            _add(histograms[name], name, x)
        if progress is not None:
            progress(min(start + size, len(images)), len(images))
    return histograms


def calibration_chunks(model: onnx.ModelProto, calibration: Calibration) -> list[dict[str, npt.NDArray[np.generic]]]:
    """The calibration images as inputs of the model, CHUNK at a time.  Raises as `watch_activations`."""
    classifier = open_classifier(model, "the model")
    images = _images_for(classifier, calibration)
    normalisation = _normalisation(calibration, images)
    size = classifier.batch or min(CHUNK, max(1, len(images) // 4))
    parts = batches(images, normalisation, size, fixed=classifier.batch is not None)
    return [{classifier.input: classifier.fit(x)} for _, x in parts]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _normalisation(calibration: Calibration, images: ImageSet) -> Normalisation:
    natural = calibration.images is None and images.x.shape[1] == 3
    return calibration.normalisation or (NATURAL if natural else Normalisation())


def _images_for(classifier: Classifier, calibration: Calibration) -> ImageSet:
    """The images given, if they fit, or noise of the size that the model takes."""
    if calibration.images is not None:
        require_image(classifier, calibration.images.x.shape[1:])
        return calibration.images.drawn(calibration.count, calibration.seed)
    image = classifier.image_shape(calibration.size)
    if image is not None and calibration.size not in (None, image[1:]):
        raise DataError(f"the model takes images of {image[1]}x{image[2]}, not noise of another size; drop the size")
    if image is None:
        raise DataError(
            "the model leaves the size of its images free; give noise of a size, for instance --calibrate noise:224x224, or images"
        )
    if calibration.count * math.prod(image) > MAX_VALUES:
        raise DataError(
            f"{calibration.count} images of {image[1]}x{image[2]} are too much noise to hold; make fewer with --calibrate-limit"
        )
    return ImageSet(noise_images(calibration.count, *image, seed=calibration.seed), None)


def _batch_size(classifier: Classifier, images: ImageSet, normalisation: Normalisation) -> int:
    _, x = next(batches(images.first(1), normalisation, 1, fixed=False))
    bytes_each = sum(values.nbytes for values in classifier.tensors(x))
    return max(1, min(len(images), MAX_BATCH, BATCH_BYTES // max(1, bytes_each)))


def _add(histogram: Histogram, name: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"'{name}' is NaN or infinite on the calibration images; check the images and their normalisation")
    histogram.add(values.astype(np.float32, copy=False))
