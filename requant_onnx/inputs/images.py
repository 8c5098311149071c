"""Images, with labels for validation: CIFAR in its official binary format, an .npz file, or a directory of images.

CIFAR layout: https://www.cs.toronto.edu/~kriz/cifar.html ("Binary version"); a record is the label bytes
(CIFAR-10: 1; CIFAR-100: coarse, fine), then 3072 bytes, channel by channel, row by row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np

from requant_onnx.errors import ConfigError, DataError
from requant_onnx.inputs.annotations import ObjectLabels, load_objects
from requant_onnx.inputs.feeds import BY_NAME, opened_npz
from requant_onnx.inputs.image_folder import FolderImages, Pipeline, open_folder
from requant_onnx.numerics.arrays import Float32Array, GenericArray, Int64Array, UInt8Array

Pixels: TypeAlias = "UInt8Array | Float32Array"
Images: TypeAlias = "Pixels | FolderImages"
PIXELS = 3 * 32 * 32
CHANNELS = (1, 3, 4)  # sizes that identify the channel axis
MAX_VALUES = 1 << 29  # largest number of values in generated or padded images; 2 GB
CIFAR_MEAN_STD = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}
"""The channel means and standard deviations of each train split, for pixels in 0..1."""

_FILES = {
    ("cifar10", "train"): ("cifar-10-batches-bin", [f"data_batch_{k}.bin" for k in range(1, 6)]),
    ("cifar10", "test"): ("cifar-10-batches-bin", ["test_batch.bin"]),
    ("cifar100", "train"): ("cifar-100-binary", ["train.bin"]),
    ("cifar100", "test"): ("cifar-100-binary", ["test.bin"]),
}
_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}


@dataclass(frozen=True)
class ImageSet:
    """Images and, if known, their labels.

    x: uint8 pixels 0..255 or normalized float32 values, (n, c, h, w), n >= 1.
    FolderImages behave like such an array.
    y: class indices, (n,) int64, or None.
    objects: labeled objects in each image, for detectors, or None.
    """

    x: Images
    y: Int64Array | None
    objects: ObjectLabels | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        """The shape and the type of the images, without their values.

        >>> ImageSet(np.zeros((2, 3, 4, 4), np.uint8), np.array([0, 1]))
        ImageSet(2 images of 3x4x4, uint8, labeled)
        """
        shape, labels = "x".join(map(str, self.x.shape[1:])), ", labeled" if self.y is not None else ""
        return f"ImageSet({len(self):,} images of {shape}, {self.x.dtype}{labels})"

    @property
    def pixels(self) -> Pixels:
        """The images as an array in memory."""
        return self.x[:]

    def first(self, count: int | None) -> ImageSet:
        """The first `count` images (all of them when None)."""
        return self if count is None else self._subset(slice(count))

    def part(self, start: int, end: int) -> ImageSet:
        """The images from `start` up to, not including, `end`."""
        return self._subset(slice(start, end))

    def fingerprint(self) -> bytes:
        """Bytes that identify the images, without labels: pixels, or names, sizes and times of the files in a directory."""
        if isinstance(self.x, FolderImages):
            return self.x.fingerprint()
        return repr((self.x.shape, self.x.dtype.str)).encode() + hashlib.sha256(np.ascontiguousarray(self.x).data).digest()

    def drawn(self, count: int, seed: int) -> ImageSet:
        """Choose `count` images at random (all if there are no more), in order.  The same seed chooses the same images."""
        if count >= len(self.x):
            return self
        return self._subset(np.sort(np.random.default_rng(seed).choice(len(self.x), count, replace=False)))

    def not_drawn(self, count: int, seed: int) -> ImageSet:
        """The images that `drawn` does not choose, in order."""
        if count >= len(self.x):
            return self._subset(slice(0, 0))
        chosen = np.random.default_rng(seed).choice(len(self.x), count, replace=False)
        return self._subset(np.setdiff1d(np.arange(len(self.x)), chosen))

    def _subset(self, which: slice | Int64Array) -> ImageSet:
        if isinstance(self.x, FolderImages):
            x: Images = self.x.subset(which if isinstance(which, slice) else which.tolist())
        else:
            x = self.x[which]
        objects = None if self.objects is None else self.objects.subset(which)
        return ImageSet(x, None if self.y is None else self.y[which], objects)


@dataclass(frozen=True)
class Normalization:
    """The normalization x = (pixel / 255 - mean) / std, channel by channel.

    mean, std: one value per channel, or one for all, in units of pixel / 255.
    Raises ConfigError if a value is not finite, or std is not above 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.mean or not self.std or not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0.0:
            raise ConfigError(f"mean {self.mean} and std {self.std} must be finite numbers, with std above 0")

    def apply(self, x: Pixels) -> Float32Array:
        """Normalize uint8 pixels, (n, c, h, w), to float32; float32 images do not change.  Raises DataError if c does not fit."""
        if x.dtype != np.uint8:
            return x.astype(np.float32, copy=False)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise DataError(
                    f"{name} has {len(values)} values, but the images have {x.shape[1]} channels; give one value per channel"
                )
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return np.asarray((x.astype(np.float32) / np.float32(255) - mean) / std, np.float32)


def for_channels(images: ImageSet, normalization: Normalization, channels: int | None) -> tuple[ImageSet, Normalization]:
    """Images and normalization for a model with so many channels; None if their number is free.

    Images of a directory become gray for a model with one channel, which then gets the averages of mean and std.
    """
    if channels != 1 or not isinstance(images.x, FolderImages):
        return images, normalization
    mean, std = (float(np.mean(values)) for values in (normalization.mean, normalization.std))
    return replace(images, x=replace(images.x, gray=True)), Normalization((mean,), (std,))


def batches(images: ImageSet, normalization: Normalization, size: int, *, fixed: bool) -> Iterator[tuple[int, Float32Array]]:
    """Batches (start, x) of `size` images; the last is smaller, or, if the size is fixed, filled with the first images again.

    Raises DataError if a fixed size does not fit in memory.
    """
    for start in range(0, len(images), size):
        yield start, normalization.apply(images_from(images, start, size) if fixed else images.x[start : start + size])


def images_from(images: ImageSet, start: int, size: int) -> UInt8Array | Float32Array:
    """The images of a batch of fixed size, from `start` on; after the last image, the first ones follow again.

    Raises DataError if the batch does not fit in memory.
    """
    if size * math.prod(images.x.shape[1:]) > MAX_VALUES:
        raise DataError(f"the model takes batches of {size} images, too many for the memory; export it with a smaller batch")
    x = images.x[start : start + size]
    missing = size - len(x)
    if not missing:
        return x
    first = x if start == 0 else images.x[:missing]  # images of a directory are decoded at each access
    return np.concatenate([x, np.resize(first, (missing, *x.shape[1:]))])  # repeats them


def load_images(
    spec: str | PathLike[str],
    split: str = "test",
    pipeline: Pipeline | None = None,
    labels: str | PathLike[str] | None = None,
) -> ImageSet:
    """Load images from a data set, an array file or a directory.

    spec: `cifar10:DIR`, `cifar100:DIR`, `FILE.npz` (`x`, optionally `y`), `images:DIR` or just `DIR`; in a directory, images have
    labels if each class has a subdirectory.
    split: "train" or "test", for CIFAR.  pipeline: steps that give all images one size, for a directory.
    labels: path of a file of boxes in COCO format, for a directory.
    Raises DataError if the files are missing, damaged, empty or of the wrong shape.
    """
    spec = str(spec)
    dataset, colon, folder = spec.partition(":")
    photos = folder if dataset == "images" and folder else spec if Path(spec).is_dir() else None
    if photos is None and labels is not None:
        raise DataError(f"labeled boxes need images:DIR, not '{spec}'; give a directory of images")
    if colon and dataset in _LABEL_BYTES:
        return load_cifar(dataset, Path(folder), split)
    if spec.endswith(".npz"):
        return _load_npz(Path(spec))
    if photos is not None:
        x, y = open_folder(Path(photos), pipeline or Pipeline())
        return ImageSet(x, y) if labels is None else ImageSet(x, None, load_objects(Path(labels), x))
    raise DataError(unknown_data(spec, "cifar10:DIR, cifar100:DIR, images:DIR or FILE.npz"))


def unknown_data(spec: str, kinds: str) -> str:
    """The error about data of no known kind, which is often a wrong path.  kinds: in words."""
    missing = ":" not in spec and not Path(spec).exists()
    return f"'{spec}' {'does not exist' if missing else 'is not a known kind of data'}; give {kinds}"


def load_cifar(dataset: str, folder: Path, split: str) -> ImageSet:
    """Load one split of CIFAR.  folder: directory of the .bin files, or its parent.  x: (n, 3, 32, 32) uint8.

    Raises DataError when a file is missing or its size is not a whole number of records.
    """
    subfolder, names = _FILES[dataset, split]
    base = folder / subfolder if (folder / subfolder).is_dir() else folder
    records = np.concatenate([_read_records(base / name, dataset) for name in names])
    labels = records[:, _LABEL_BYTES[dataset] - 1].astype(np.int64)
    return ImageSet(records[:, _LABEL_BYTES[dataset] :].reshape(-1, 3, 32, 32), labels)


def _read_records(path: Path, dataset: str) -> UInt8Array:
    record = _LABEL_BYTES[dataset] + PIXELS
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(
            f"cannot read '{path}' ({error.strerror or error}); the {dataset} directory must contain the official binary files"
        ) from None
    if raw.size == 0 or raw.size % record:
        raise DataError(f"'{path}' has {raw.size} bytes, not a multiple of {record}; it is not a {dataset} binary file")
    return raw.reshape(-1, record)


def _load_npz(path: Path) -> ImageSet:
    with opened_npz(path) as arrays:
        if "x" not in arrays:
            raise DataError(f"'{path}' has no array named 'x'; it contains {sorted(arrays)}")
        x, y = arrays["x"], arrays.get("y")
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray | None):
        raise DataError(f"'{path}' contains something other than arrays; write it with numpy.savez(x=..., y=...)")
    return ImageSet(_nchw(x, path), _labels(y, len(x) if x.ndim else 0, path))


def _nchw(x: GenericArray, path: Path) -> Pixels:
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"'{path}' has x of shape {x.shape} and type {x.dtype}; images are (n, h, w, c) uint8 or (n, c, h, w) float32; for a "
            f"model with other inputs, {BY_NAME}"
        )
    if x.size == 0:
        raise DataError(f"'{path}' contains no images (x has shape {x.shape}); give at least one")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.uint8, copy=False)
    if not np.isfinite(x).all():
        raise DataError(f"'{path}' has NaN or infinite pixels in x; fix or remove these images")
    last = x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if last else x).astype(np.float32, copy=False)


def _labels(y: GenericArray | None, count: int, path: Path) -> Int64Array | None:
    if y is None:
        return None
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise DataError(f"'{path}' has y of shape {y.shape} and type {y.dtype}, but y must be {count} integer class indices")
    return y.astype(np.int64)
