"""ONNX Runtime sessions: of an image classifier, with clear refusals of anything else; of a converted file; optimized graphs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from requant_onnx.config import METADATA_KEY, Form, Int8Levels
from requant_onnx.errors import DataError, LoadError, ModelError
from requant_onnx.files.load import ModelLike, is_large, load_skeleton, source_of
from requant_onnx.text import first_line

FloatArray = npt.NDArray[np.float32]
INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Classifier:
    """A model with one image input, ready to run.  shape: of the input, None where it is free.  bytes: size of the file."""

    name: str
    session: onnxruntime.InferenceSession
    input: str
    dtype: type[np.floating]
    shape: Shape
    bytes: int

    @property
    def batch(self) -> int | None:
        """The fixed batch size, None when it is free."""
        return self.shape[0]

    def scores(self, x: FloatArray) -> FloatArray:
        """Run the first output.  x: (n, c, h, w), n the fixed batch size if there is one.  Returns (n, classes) float32.

        Raises ModelError when the model fails or its first output is not one row of scores an image.
        """
        first = self._run([self.session.get_outputs()[0].name], {self.input: self.fit(x)})[0]
        scores = np.asarray(first)
        classes = max(scores.shape[1:], default=0)
        if scores.shape[:1] != x.shape[:1] or scores.size != len(x) * classes or classes < 2:
            raise ModelError(
                f"the first output of {self.name} has shape {scores.shape}, not one row of scores for each of {len(x)} images"
            )
        return scores.reshape(len(x), -1).astype(np.float32)

    def tensors(self, x: FloatArray) -> list[FloatArray]:
        """Every output for x: (n, c, h, w).  Raises ModelError when the model fails."""
        return [np.asarray(values, np.float32) for values in self._run(None, {self.input: self.fit(x)})]

    def latency(self, x: FloatArray) -> float:
        """Milliseconds of one run."""
        feed = {self.input: self.fit(x)}
        started = time.perf_counter()
        self._run(None, feed)
        return (time.perf_counter() - started) * 1000

    def _run(self, outputs: list[str] | None, feed: dict[str, npt.NDArray[np.floating]]) -> list[object]:
        return run_session(self.session, self.name, outputs, feed)

    def image_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int] | None:
        """(c, h, w) of the images it takes, None where it leaves one free.  size: (h, w) to take where they are free."""
        last = self.shape[3] in (1, 3) and self.shape[1] not in (1, 3)
        channels, *sizes = (self.shape[3], *self.shape[1:3]) if last else self.shape[1:]
        height, width = (own or (size and size[k]) for k, own in enumerate(sizes))
        return (channels, height, width) if channels and height and width else None

    def accepts(self, image: tuple[int, ...]) -> bool:
        """Whether an image of shape (c, h, w) fits, as it is or as (h, w, c)."""
        return _fits(image, self.shape[1:]) or self._wants_channels_last(image)

    def _wants_channels_last(self, image: tuple[int, ...]) -> bool:
        return not _fits(image, self.shape[1:]) and _fits((*image[1:], image[0]), self.shape[1:])

    def fit(self, x: FloatArray) -> npt.NDArray[np.floating]:
        """(n, c, h, w) as the model takes it."""
        x = x.transpose(0, 2, 3, 1) if self._wants_channels_last(x.shape[1:]) else x
        return np.ascontiguousarray(x, self.dtype)


def open_classifier(
    model: onnx.ModelProto | str | os.PathLike[str], name: str, options: onnxruntime.SessionOptions | None = None
) -> Classifier:
    """Load a model in ONNX Runtime's CPU provider, with default options where none are given.

    Raises ModelError when it does not load, or has another number of inputs than one, or an input that is no image.
    """
    source = _serialized(model, name)
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    session = _open(source, name, options or quiet_options())
    inputs = session.get_inputs()
    if len(inputs) != 1:
        listed = ", ".join(f"'{item.name}'" for item in inputs)
        raise ModelError(f"{name} has {len(inputs)} inputs ({listed}), and images are run only through models with one image input")
    shape = tuple(n if isinstance(n, int) and n > 0 else None for n in inputs[0].shape)
    if len(shape) != 4 or inputs[0].type not in INPUT_TYPES:
        raise ModelError(
            f"the input '{inputs[0].name}' of {name} is a {inputs[0].type} of shape {inputs[0].shape}, "
            "and images are run only through models that take float images of 4 dimensions"
        )
    return Classifier(name, session, inputs[0].name, INPUT_TYPES[inputs[0].type], shape, size)


def quiet_options() -> onnxruntime.SessionOptions:
    """Default options, but without warnings: those of the optimizer are not for users."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def optimized_graph(model: onnx.ModelProto | str | os.PathLike[str], name: str, folder: Path) -> tuple[str, onnx.ModelProto]:
    """ONNX Runtime's version, and the model as it has optimized it with default options.  folder: for a temporary file.

    Raises ModelError when the model does not load.
    """
    options = quiet_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    _open(_serialized(model, name), name, options)
    return onnxruntime.__version__, onnx.load(folder / "optimized.onnx", load_external_data=False)


def load_session(model: ModelLike, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """An InferenceSession of ONNX Runtime's CPU provider with the options that suit the form of a converted model.

    qdq: decode at load (`session.disable_quant_qdq`), for float speed.  int8 with levels up to 127: sums that cannot saturate on
    CPUs without VNNI (`session.x64quantprecision`).  Any other file: default options.  options: to start from.
    Raises ModelError when it does not load.
    """
    options = options or quiet_options()
    source = source_of(model)
    settings = _settings(source if isinstance(source, onnx.ModelProto) else load_skeleton(source))
    if settings.get("form") == Form.QDQ.value:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if settings.get("form") == Form.INT8.value and settings.get("int8_levels") == Int8Levels.FULL.value:
        options.add_session_config_entry("session.x64quantprecision", "1")
    name = "the model" if isinstance(source, onnx.ModelProto) else f"'{source}'"
    return _open(_serialized(source, name), name, options)


def open_session(model: onnx.ModelProto, name: str) -> onnxruntime.InferenceSession:
    """A session with default options.  Raises ModelError when the model does not load."""
    return _open(_serialized(model, name), name, quiet_options())


def run_session(
    session: onnxruntime.InferenceSession, name: str, outputs: list[str] | None, feed: Mapping[str, npt.NDArray[np.generic]]
) -> list[Any]:
    """The outputs named (None: all).  Raises ModelError when the model does not take the feed."""
    try:
        return list(session.run(outputs, dict(feed)))
    except Exception as error:  # onnxruntime raises many types of its own
        sizes = ", ".join("x".join(map(str, values.shape)) for values in feed.values())
        raise ModelError(f"{name} fails in ONNX Runtime on inputs of {sizes} ({first_line(error)})") from None


def _settings(model: onnx.ModelProto) -> dict[str, object]:
    """The settings that a file was converted with, {} when it was not."""
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), "{}")
    try:
        settings = json.loads(text)
    except ValueError:  # somebody else's entry
        return {}
    return settings if isinstance(settings, dict) else {}


def _open(source: bytes | str, name: str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types of its own
        raise LoadError(f"{name} does not load in ONNX Runtime {onnxruntime.__version__} ({first_line(error)})") from None


def _serialized(model: onnx.ModelProto | str | os.PathLike[str], name: str) -> bytes | str:
    if not isinstance(model, onnx.ModelProto):
        return str(model)
    if is_large(model):
        raise ModelError(f"{name} is larger than 2 GB, more than ONNX Runtime takes from memory; save it and give its path")
    data: bytes = model.SerializeToString()
    return data


def loads(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime takes the model at all: it may lack operators of other domains."""
    try:
        _open(model.SerializeToString(), "the model", quiet_options())
    except LoadError:
        return False
    return True


def require_image(classifier: Classifier, image: tuple[int, ...]) -> None:
    """Raise DataError unless images of shape (c, h, w) fit the model."""
    if not classifier.accepts(image):
        wanted = "x".join("?" if n is None else str(n) for n in classifier.shape[1:])
        given = "x".join(map(str, image))
        raise DataError(f"the images are {given} and {classifier.name} takes {wanted}; give images of that size")


def _fits(image: tuple[int, ...], shape: Shape) -> bool:
    return len(image) == len(shape) and all(wanted in (None, n) for n, wanted in zip(image, shape, strict=True))
