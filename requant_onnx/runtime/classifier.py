"""Image classifiers: models with one image input, which run on batches; other models are rejected with a clear message."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from requant_onnx.errors import DataError, ModelError
from requant_onnx.inputs.feeds import BY_NAME
from requant_onnx.inputs.images import Normalization
from requant_onnx.numerics.arrays import Float32Array
from requant_onnx.runtime.sessions import provider_in_use, quiet_options, run_session, serialized, start_session

INPUT_TYPES: dict[str, type[np.number]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
PIXELS = Normalization((0.0,), (1 / 255,))  # the identity
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ImageInput:
    """The image input of a model.  input: its name.  shape: its dimensions, None where free."""

    input: str
    dtype: type[np.number]
    shape: Shape

    @property
    def takes_pixels(self) -> bool:
        """Whether the model normalizes its input itself: it takes pixels 0..255."""
        return self.dtype is np.uint8

    def normalization(self, wanted: Normalization) -> Normalization:
        """The normalization of pixels: `wanted`, unless the model takes pixels."""
        return PIXELS if self.takes_pixels else wanted

    @property
    def batch(self) -> int | None:
        """The fixed batch size, None if it is free."""
        return self.shape[0]

    def image_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int] | None:
        """The shape of its images, (c, h, w), None if one is still free.  size: (h, w) to use where they are free."""
        last = self.shape[3] in (1, 3) and self.shape[1] not in (1, 3)
        channels, *sizes = (self.shape[3], *self.shape[1:3]) if last else self.shape[1:]
        height, width = (fixed or (size and size[k]) for k, fixed in enumerate(sizes))
        return (channels, height, width) if channels and height and width else None

    @property
    def channels(self) -> int | None:
        """The number of channels of its images, None if it is free."""
        image = self.image_shape((1, 1))
        return None if image is None else image[0]

    def accepts(self, image: tuple[int, ...]) -> bool:
        """Whether an image of shape (c, h, w) fits, unchanged or as (h, w, c)."""
        return _fits(image, self.shape[1:]) or self._wants_channels_last(image)

    def _wants_channels_last(self, image: tuple[int, ...]) -> bool:
        return not _fits(image, self.shape[1:]) and _fits((*image[1:], image[0]), self.shape[1:])

    def fit(self, x: Float32Array) -> npt.NDArray[np.number]:
        """Images, (n, c, h, w), in the type and layout of the model."""
        x = x.transpose(0, 2, 3, 1) if self._wants_channels_last(x.shape[1:]) else x
        return np.ascontiguousarray(np.rint(x) if self.takes_pixels else x, self.dtype)


@dataclass(frozen=True)
class Classifier(ImageInput):
    """A model with one image input, ready to run.  bytes: size of the file."""

    name: str
    session: onnxruntime.InferenceSession
    bytes: int

    @property
    def taken(self) -> ImageInput:
        """Its image input, without the model."""
        return ImageInput(self.input, self.dtype, self.shape)

    def scores(self, x: Float32Array) -> Float32Array:
        """Run the first output.  x: (n, c, h, w), n the fixed batch size if there is one.  Returns (n, classes) float32.

        Raises ModelError when the model fails or its first output is not one row of scores per image.
        """
        first = self._run([self.session.get_outputs()[0].name], {self.input: self.fit(x)})[0]
        scores = np.asarray(first)
        classes = max(scores.shape[1:], default=0)
        if scores.shape[:1] != x.shape[:1] or scores.size != len(x) * classes or classes < 2:
            raise ModelError(
                f"the first output of {self.name} has shape {scores.shape}, not one row of scores per image for {len(x)} images"
            )
        return scores.reshape(len(x), -1).astype(np.float32)

    def tensors(self, x: Float32Array) -> list[Float32Array]:
        """Every output for x: (n, c, h, w).  Raises ModelError when the model fails."""
        return [np.asarray(values, np.float32) for values in self._run(None, {self.input: self.fit(x)})]

    def latency(self, x: Float32Array) -> float:
        """The time of one run, in ms."""
        feed = {self.input: self.fit(x)}
        started = time.perf_counter()
        self._run(None, feed)
        return (time.perf_counter() - started) * 1000

    def _run(self, outputs: list[str] | None, feed: dict[str, npt.NDArray[np.number]]) -> list[object]:
        return run_session(self.session, self.name, outputs, feed)


def open_classifier(
    model: onnx.ModelProto | str | os.PathLike[str], name: str, options: onnxruntime.SessionOptions | None = None
) -> Classifier:
    """Load a model in ONNX Runtime on the current provider, with default options if none are given.

    Raises ModelError when it does not load, has a number of inputs other than one, or an input that is not an image.
    """
    source = serialized(model, name)
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    session = start_session(source, name, options or quiet_options(), provider_in_use())
    inputs = session.get_inputs()
    if len(inputs) != 1:
        listed = ", ".join(f"'{item.name}'" for item in inputs)
        raise ModelError(
            f"{name} has {len(inputs)} inputs ({listed}), but images need a model with a single image input; {BY_NAME}"
        )
    shape = tuple(n if isinstance(n, int) and n > 0 else None for n in inputs[0].shape)
    if len(shape) != 4 or inputs[0].type not in INPUT_TYPES:
        raise ModelError(
            f"the input '{inputs[0].name}' of {name} is a {inputs[0].type} of shape {inputs[0].shape}, "
            f"but images need a model whose input has 4 dimensions; {BY_NAME}"
        )
    return Classifier(inputs[0].name, INPUT_TYPES[inputs[0].type], shape, name, session, size)


def require_image(classifier: Classifier, image: tuple[int, ...]) -> None:
    """Raise DataError unless images of shape (c, h, w) fit the model."""
    if not classifier.accepts(image):
        wanted = "x".join("?" if n is None else str(n) for n in classifier.shape[1:])
        given = "x".join(map(str, image))
        other = classifier.channels not in (None, image[0])
        advice = (
            "give an .npz file with so many channels"
            if other
            else "give images of that size (for a directory, use --fit or --letterbox)"
        )
        raise DataError(f"the images are {given}, but {classifier.name} takes {wanted}; {advice}")


def _fits(image: tuple[int, ...], shape: Shape) -> bool:
    return len(image) == len(shape) and all(wanted in (None, n) for n, wanted in zip(image, shape, strict=True))
