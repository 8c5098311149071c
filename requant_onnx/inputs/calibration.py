"""Calibration inputs: images chosen at random, inputs by name, or synthetic images (noise)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from requant_onnx.errors import ConfigError, DataError
from requant_onnx.inputs.feeds import Feed
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.numerics.arrays import AnyArray

DEFAULT_COUNT = 256
DEFAULT_MEMORY = 1 << 28
SPARE = 32  # feeds kept beyond `count`, for the self-check
OTHER_SEED = 104729  # added to the seed for noise that a calibration has not used
NATURAL = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet, close to those of natural images in general
GRAY = Normalization((0.449,), (0.226,))  # the averages of these, for images with another number of channels
NOISE_HEADROOM = 1.5  # factor on ranges measured on noise, because images have wider ranges (measured: tools/results.md)


@runtime_checkable
class CalibrationDataReader(Protocol):
    """The part of onnxruntime.quantization.CalibrationDataReader that is used here."""

    def get_next(self) -> Feed | None:
        """The next inputs by name; None after the last ones."""


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs: `count` images chosen at random, the first `count` feeds, or, with neither, `count` images of noise.

    images: images to choose from.  feeds: inputs by name, for a model with any inputs (see `from_feeds`).
    normalization: normalization of uint8 images (default: pixel / 255) and of noise (default: the one of ImageNet).
    count: number of inputs.  seed: seed of the random choice and of the noise.
    size: (height, width) of the noise in pixels, needed if the model leaves its size free.
    memory: memory for activations during refinement, in bytes; with too little, layers with large activations see fewer inputs
    (at least four batches).
    Raises ConfigError if a value is out of range; DataError if there is no image.
    """

    images: ImageSet | None = None
    normalization: Normalization | None = None
    count: int = DEFAULT_COUNT
    seed: int = 0
    size: tuple[int, int] | None = None
    feeds: tuple[Feed, ...] = ()
    memory: int = DEFAULT_MEMORY

    @classmethod
    def from_feeds(cls, source: Iterable[Feed] | CalibrationDataReader, count: int = DEFAULT_COUNT) -> Calibration:
        """Make a Calibration from inputs by name.

        source: any iterable of dictionaries from input names to arrays, or a CalibrationDataReader of ONNX Runtime.
        count: number of feeds to use; some more are read for the self-check.
        Raises DataError if there is none, or one is not a dictionary of arrays.
        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
        """
        if isinstance(source, CalibrationDataReader):
            source = iter(source.get_next, None)
        feeds = tuple(_checked(feed) for feed in itertools.islice(source, count + SPARE))
        if not feeds:
            raise DataError("there are no calibration inputs; give at least one")
        return cls(feeds=feeds, count=count)

    @property
    def is_noise(self) -> bool:
        """Whether the inputs are noise."""
        return self.images is None and not self.feeds

    @property
    def headroom(self) -> float:
        """The factor by which measured ranges are extended."""
        return NOISE_HEADROOM if self.is_noise else 1.0

    def unseen(self, count: int) -> tuple[Calibration, bool]:
        """At most `count` inputs that this calibration does not use, and True; if there are none, its own inputs, and False."""
        if self.is_noise:
            return replace(self, count=count, seed=self.seed + OTHER_SEED), True
        if self.feeds:
            rest = self.feeds[self.count :][:count]
            feeds = rest or self.feeds[-count:]
            return replace(self, feeds=feeds, count=len(feeds)), bool(rest)
        assert self.images is not None
        others = self.images.not_drawn(self.count, self.seed)
        images = others if len(others) else self.images.drawn(self.count, self.seed)
        return replace(self, images=images, count=min(count, len(images)), seed=self.seed + OTHER_SEED), bool(len(others))

    def __post_init__(self) -> None:
        if not isinstance(self.images, ImageSet | None):
            raise ConfigError(f"calibration images must be an ImageSet (load_images makes one), not {type(self.images).__name__}")
        if not _is_whole(self.count) or self.count < 1:
            raise ConfigError(f"the number of calibration inputs must be 1 or more, not {self.count!r}")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"the seed must be a whole number of 0 or more, not {self.seed!r}")
        if not _is_whole(self.memory) or self.memory < 1:
            raise ConfigError(f"the memory for activations must be a number of bytes, not {self.memory!r}")
        if self.size is not None and (len(self.size) != 2 or not all(_is_whole(n) and n > 0 for n in self.size)):
            raise ConfigError(f"the size of noise must be (height, width), both 1 or more, not {self.size!r}")
        if self.feeds and (self.images is not None or self.normalization is not None or self.size is not None):
            raise ConfigError("give either images or feeds, and no normalization for feeds")
        if self.images is not None and len(self.images) == 0:
            raise DataError("there are no calibration images; give at least one")
        if self.images is not None and self.images.x.dtype != "uint8" and self.normalization is not None:
            raise DataError(
                "the calibration images are float32, so they count as normalized; drop mean and std, or give uint8 pixels"
            )


def _checked(feed: object) -> Feed:
    if not isinstance(feed, Mapping) or not feed:
        raise DataError(f"calibration inputs must be dictionaries from the names of inputs to arrays, not {type(feed).__name__}")
    arrays = {str(name): _of_strings(np.asarray(values)) for name, values in feed.items()}
    for name, values in arrays.items():
        if values.dtype.kind not in "biufU":
            raise DataError(f"the calibration input '{name}' must be an array of numbers or strings, not of {values.dtype}")
        if values.dtype.kind != "U" and not np.isfinite(values).all():
            raise DataError(f"the calibration input '{name}' contains NaN or infinity; remove these values")
    return arrays


def _of_strings(values: AnyArray) -> AnyArray:
    """An array of objects that are all strings, as pandas and ONNX Runtime make them, as an array of strings; others unchanged."""
    return values.astype(str) if values.dtype == object and all(isinstance(text, str) for text in values.ravel()) else values


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
