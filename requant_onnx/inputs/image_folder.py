"""Images in a directory, decoded on demand, with the usual steps of classifiers (resize and center crop) or of detectors.

https://docs.pytorch.org/vision/stable/transforms.html: Resize(n) (bilinear, antialiased, on the shorter side), CenterCrop(n).
https://docs.ultralytics.com/reference/data/augment/: LetterBox, whose border is gray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from requant_onnx.errors import ConfigError, DataError
from requant_onnx.numerics.arrays import Int64Array, UInt8Array
from requant_onnx.text import first_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

LARGEST = 1 << 14  # size of images, in pixels
UNREADABLE = 0.01  # largest share of damaged images, which are skipped
END_OF_JPEG, TAIL = b"\xff\xd9", 1 << 12
DEEP = 1 << 8  # 16-bit levels per 8-bit level
BORDER = 114  # gray of the border around a letterboxed image, as in YOLO
BRIGHTEST, BRIGHTEST_DEEP = 255, (1 << 16) - 1  # largest values of pixels with 8 and 16 bits


@dataclass(frozen=True)
class Pipeline:
    """Steps applied to an image.

    resize: length of the shorter side, in pixels, or None.  crop: (height, width) of the center, in pixels, or None.
    only_others: whether images that have the size of the crop already stay unchanged.
    letterbox: (height, width) into which the whole image is resized with its proportions; the rest is gray.
    stretch: (height, width) to which the whole image is resized, whatever its proportions.
    Raises ConfigError if a size is out of range, or there is more than one of crop (or resize), letterbox and stretch.
    """

    resize: int | None = None
    crop: tuple[int, int] | None = None
    only_others: bool = False
    letterbox: tuple[int, int] | None = None
    stretch: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("resize", "crop", "letterbox", "stretch") if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            sizes = (value,) if name == "resize" else value
            if name != "resize":
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise ConfigError(f"the size {value} of --{name} must be a pair of a height and a width, in pixels")
                object.__setattr__(self, name, tuple(value))
            if not all(isinstance(size, int) and 0 < size <= LARGEST for size in sizes):
                raise ConfigError(f"the size {value} of --{name} must be 1 to {LARGEST} pixels")
        if len(given) > 1 and given.keys() != {"resize", "crop"}:
            together = " and ".join(f"--{name}" for name in given)
            raise ConfigError(f"{together} exclude each other; drop all but one, or all but --resize and --crop")

    def apply(self, image: Any) -> Any:
        """Resize a Pillow image (RGB or gray), and crop it or add a border."""
        size, left, top = self.places(image.size)
        if size != image.size:
            image = image.resize(size, _pillow().Image.Resampling.BILINEAR)
        frame = self.frame(size)
        if frame == size:
            return image
        border = BORDER if self.letterbox else 0
        framed = _pillow().Image.new(image.mode, frame, border if image.mode == "L" else (border,) * 3)
        framed.paste(image, (-left, -top))
        return framed

    def frame(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) of the result.  size: (width, height) after resizing."""
        height, width = self.crop or self.letterbox or size[::-1]
        return width, height

    def places(self, size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        """The geometry: (width, height) after resizing, and left and top of the result in it.  size: (width, height) before."""
        if self.stretch is not None:
            size = self.stretch[::-1]
        elif self.letterbox is not None:
            scale = min(self.letterbox[1] / size[0], self.letterbox[0] / size[1])
            size = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        elif self.resize is not None and not (self.only_others and size[::-1] == self.crop):
            other = int(self.resize * max(size) / min(size))
            size = (self.resize, other) if size[0] <= size[1] else (other, self.resize)
        width, height = self.frame(size)
        return size, round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)


@dataclass(frozen=True)
class FolderImages:
    """Images that behave like an array of uint8 pixels, (n, 3, h, w), or (n, 1, h, w) in gray.

    size: (h, w) of every image.  unreadable: files that were skipped.  classes: number of subdirectories that give the labels.
    """

    paths: tuple[Path, ...]
    pipeline: Pipeline
    size: tuple[int, int]
    unreadable: tuple[Path, ...] = ()
    classes: int = 0
    gray: bool = False
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (n, 3, h, w), or (n, 1, h, w)."""
        return (len(self.paths), 1 if self.gray else 3, *self.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: slice) -> UInt8Array:
        pixels: UInt8Array = np.stack([self._pixels(path) for path in self.paths[which]]).transpose(0, 3, 1, 2)
        return pixels

    def subset(self, which: slice | Sequence[int]) -> FolderImages:
        """Some of the images, not yet decoded."""
        chosen = self.paths[which] if isinstance(which, slice) else tuple(self.paths[k] for k in which)
        return replace(self, paths=chosen)

    def fingerprint(self) -> bytes:
        """Bytes that identify the images: the pipeline, and names, sizes and times of the files."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return repr((self.pipeline, self.size, self.gray, stats)).encode("utf-8", "surrogateescape")

    def _pixels(self, path: Path) -> UInt8Array:
        pixels = _decoded(path, self.pipeline, self.gray)
        if pixels.shape[:2] != self.size:
            raise DataError(
                f"the image '{path}' is {_listed(pixels.shape)}, but '{self.paths[0].name}' is {_listed(self.size)}; "
                "give --fit, --letterbox, --stretch, or --resize and --crop, to make all sizes equal"
            )
        return pixels


def open_folder(folder: Path, pipeline: Pipeline) -> tuple[FolderImages, Int64Array | None]:
    """Open the images of a directory: (images, labels).

    As in torchvision's ImageFolder, each subdirectory is a class, in the order of names; images in the directory itself have no
    labels.  Names that begin with a dot are hidden files and directories, which other programs make.
    Raises DataError when there is no image, a directory has both images and subdirectories of images, or more than a share
    UNREADABLE of the images is damaged; an image whose damage shows only in decoding raises it then.
    """
    try:
        seen = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
        unlabeled = [path for path in seen if path.is_file() and path.suffix.lower() in SUFFIXES]
        classes = [_images_below(each) for each in seen if each.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read the directory '{folder}' ({error.strerror or error}); give a directory of images") from None
    labeled = [(path, label) for label, paths in enumerate(classes) for path in paths]
    if unlabeled and labeled:
        raise DataError(f"'{folder}' contains both images and subdirectories of images; give a directory with only one of them")
    given = tuple(unlabeled or (path for path, _ in labeled))
    if not given:
        raise DataError(f"'{folder}' has no images ({', '.join(SUFFIXES)}); give a directory of images, or one per class")
    readable = [_is_whole(path) for path in given]
    unreadable = tuple(path for path, good in zip(given, readable, strict=True) if not good)
    if len(unreadable) > UNREADABLE * len(given):
        _decoded(unreadable[0], pipeline)  # raises a more specific error
        raise DataError(
            f"'{unreadable[0]}' and {len(unreadable) - 1} others of {len(given)} images are damaged; fix or remove them"
        )
    paths = tuple(path for path, good in zip(given, readable, strict=True) if good)
    height, width, _ = _decoded(paths[0], pipeline).shape
    known = np.array([label for (_, label), good in zip(labeled, readable, strict=True) if good], np.int64) if labeled else None
    return FolderImages(paths, pipeline, (height, width), unreadable, len(classes) if labeled else 0), known


def size_of(path: Path) -> tuple[int, int]:
    """The (width, height) of an image, read from the start of the file.  Raises DataError."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            return int(image.width), int(image.height)
    except (OSError, ValueError, SyntaxError, pillow.Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image '{path}' ({first_line(error)}); repair or remove it") from None


def _is_whole(path: Path) -> bool:
    """Whether a file seems undamaged; it is decoded only if its end or its checksums do not show that."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            is_jpeg = image.format == "JPEG"
            image.verify()
        if is_jpeg and END_OF_JPEG not in _tail(path):
            _decoded(path, Pipeline())
    except (OSError, ValueError, SyntaxError, MemoryError, DataError, pillow.Image.DecompressionBombError):
        return False
    return True


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read()


def _images_below(folder: Path) -> list[Path]:
    """The images in a directory and its subdirectories, without hidden ones, in the order of names (Windows would ignore case)."""
    found = {path.relative_to(folder).parts: path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    shown = sorted(parts for parts in found if not any(name.startswith(".") for name in parts))
    return [found[parts] for parts in shown if found[parts].is_file()]


def _decoded(path: Path, pipeline: Pipeline, gray: bool = False) -> UInt8Array:
    """The pixels of a file, (h, w, 3), or (h, w, 1) in gray."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            pixels = np.asarray(pipeline.apply(_of_8_bits(image).convert("L" if gray else "RGB")), np.uint8)
            return pixels[:, :, None] if gray else pixels
    except (OSError, ValueError, SyntaxError, MemoryError, pillow.Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image '{path}' ({first_line(error)}); repair or remove it") from None


def _of_8_bits(image: Any) -> Any:
    """An image with 8 bits; Pillow would clip deeper ones at 255.  Raises ValueError where the range of pixels is not known.

    Pixels of 16 bits are scaled.  Those of 32 bits are, unless 8 bits are enough for them.  Pixels of 12 bits that are stored in
    16 cannot be told from dark ones.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    brightest = float(pixels.max())
    if image.mode == "F" and not (brightest <= 0 or 1 < brightest <= BRIGHTEST):
        raise ValueError(f"its pixels are floats up to {brightest:.4g} instead of {BRIGHTEST}")
    if brightest > BRIGHTEST_DEEP:
        raise ValueError(f"its pixels are numbers up to {brightest:.0f} instead of {BRIGHTEST_DEEP}")
    if image.mode == "F" or (image.mode == "I" and brightest <= BRIGHTEST):
        return _pillow().Image.fromarray(pixels.clip(0, BRIGHTEST).astype(np.uint8))
    return _pillow().Image.fromarray((pixels.astype(np.int64) // DEEP).clip(0, BRIGHTEST).astype(np.uint8))


def _pillow() -> ModuleType:
    try:
        import PIL.Image  # noqa: PLC0415
    except ImportError:
        raise DataError("a directory of images needs Pillow; install it with: pip install 'requant_onnx[images]'") from None
    return PIL


def _listed(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
