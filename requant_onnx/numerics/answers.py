"""The kinds of outputs of models, and the answers in them.

scores        (n, classes), also (n, classes, 1, 1), unless all rows have length 1: the class with the largest score
classes       (n,) or (n, 1), integers: the class
mask          (n, classes, h, w), (n, h, w, classes) with at least a quarter of the image's h and w: the class of each pixel;
              one class, or (n, h, w): the same for the sides of 1/2 if all values are in 0..1, else of 0; integers are classes;
              not pictures of three channels in -1..1 or from 0, nor depths from 0
text          (n, steps, classes) that sum to 1, or (steps, 1, classes) for an image: the string after CTC decoding, with class 0 as
              blank
texts         arrays of strings
values        all others: no answers
"""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array

SCALES = 4  # a mask is at most this many times smaller than the image along each axis
MOST_CLASSES, MOST_PRESENT = 1 << 12, 64  # largest numbers of classes of a mask, and of those that are present in its pixels
WHOLE = "iub"  # kinds of types of classes
CODES = (np.uint8, np.int8)  # types of quantized scores, also of classes
FEWEST_PARTS = 16  # least size of an embedding
UNIT = 1e-2  # difference of the length of an embedding from 1, with the rounding of float16
BRIGHTEST = 1.25  # value of a picture in -1..1 or 0..1, with some overshoot at edges; logits of classes are larger
HIGHEST, SHARES = 1.001, 1e-2  # highest share of a class; largest difference of the sum of all from 1
FEWEST_STEPS, ALPHABET = 4, 10  # least numbers of steps and of classes of a text
NO_CLASS = -1  # the answer of a row of scores with NaN, which equals no label


def kind_of(output: AnyArray, images: int, size: tuple[int, int] | None) -> str:
    """The kind of an output.  images: number in the batch.  size: height and width of the images, if the model takes images."""
    if output.dtype.kind in "OSU":
        return "texts"
    shape = output.shape
    is_whole = output.dtype.kind in WHOLE
    has_scores = not is_whole or output.dtype in CODES
    if is_whole and shape and shape[0] == images == output.size:
        return "classes"
    while (len(shape) > 2 and shape[-1] == 1 and len(shape) != 4) or (len(shape) == 4 and shape[2:] == (1, 1)):
        shape = shape[:-1]
    if len(shape) == 2 and shape[0] == images and shape[1] > 1 and has_scores:
        return "values" if _is_embedding(output.reshape(shape)) else "scores"
    if _is_text(output, images, size):
        return "text"
    axis = class_axis(output, size) if shape and shape[0] == images else None
    return "values" if axis is None or not _has_classes(channels_first(output, axis)) else "mask"


def top_classes(scores: AnyArray) -> Int64Array:
    """The class of the largest score of each row, (n, classes) -> (n,); NO_CLASS for a row with NaN."""
    return np.where(np.isnan(scores).any(1), NO_CLASS, scores.argmax(1))


def class_axis(output: AnyArray, size: tuple[int, int] | None) -> int | None:
    """The axis of the classes of a mask, 0 if it has none; None if the output has fewer values than masks.  size: as of kind_of."""
    if output.ndim == 3 and _covers(output.shape[1:], size):
        return 0
    if output.ndim == 4 and _covers(output.shape[2:], size):
        return 1
    return 3 if output.ndim == 4 and _covers(output.shape[1:3], size) else None


def channels_first(mask: AnyArray, axis: int) -> AnyArray:
    """A mask as (n, classes, h, w).  axis: see class_axis."""
    return np.moveaxis(mask, axis, 1) if axis else mask[:, None]


def pixel_classes(mask: AnyArray, edge: float) -> Int64Array:
    """The class of each pixel, (n, classes, h, w) -> (n, h, w).  edge: least value of class 1 in a single channel of floats."""
    if mask.shape[1] > 1:
        return np.asarray(mask.argmax(1))
    if mask.dtype.kind in WHOLE:
        return np.maximum(mask[:, 0].astype(np.int64), 0)
    return np.asarray(mask[:, 0] > edge, np.int64)


def edge_of(mask: AnyArray) -> float:
    """The least value of class 1 in a mask of one channel: of probabilities or of logits."""
    return 0.5 if mask.min(initial=0.0) >= 0.0 and mask.max(initial=0.0) <= 1.0 else 0.0


def strings_of(output: Float64Array, images: int) -> list[tuple[int, ...]]:
    """The best path of each image by CTC's rule: repeats joined, then blanks dropped (Graves et al. 2006)."""
    rows = output if output.shape[0] == images else output.swapaxes(0, 1)[:images]  # without the padding of a batch
    strings = []
    for path in rows.argmax(-1):
        joined = path[np.concatenate([[True], np.diff(path) != 0])]
        strings.append(tuple(joined[joined != 0].tolist()))
    return strings


def _covers(places: tuple[int, ...], size: tuple[int, int] | None) -> bool:
    """Whether an output has at least a value for SCALES x SCALES pixels of an image.  places: its height and width."""
    if size is None or 0 in places:
        return False
    return all(want <= SCALES * have and want % have == 0 for have, want in zip(places, size, strict=True))


def _has_classes(mask: AnyArray) -> bool:
    """Whether a mask, (n, classes, h, w), has classes, and is neither a picture nor a map of depths."""
    channels = mask.shape[1]
    if mask.dtype.kind in WHOLE and (channels == 1 or mask.dtype not in CODES):
        return channels == 1 and bool(mask.min(initial=0) >= 0) and len(np.unique(mask)) <= MOST_PRESENT
    if channels not in (1, 3) or not mask.size:
        return bool(0 < channels <= MOST_CLASSES)
    low, high = mask.min(), mask.max()
    if channels == 1:
        return bool(low < 0 or high <= HIGHEST)
    is_bounded = bool(low >= 0) or (low >= -BRIGHTEST and high <= BRIGHTEST)
    return not is_bounded or bool(abs(mask.sum(1, dtype=np.float64) - 1.0).max() <= SHARES)


def _is_embedding(rows: AnyArray) -> bool:
    """Whether rows are vectors of length 1, (n, size), as of faces or sentences, and not scores."""
    if rows.shape[1] < FEWEST_PARTS or rows.dtype.kind != "f":
        return False
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    return bool((abs(lengths - 1.0) < UNIT).all() and rows.min(initial=0.0) < 0.0)


def _is_text(output: AnyArray, images: int, size: tuple[int, int] | None) -> bool:
    """Whether an output may be a text.  images, size: as of kind_of."""
    shape = output.shape
    if len(shape) != 3 or shape[2] < ALPHABET or output.dtype.kind != "f" or not output.size or images not in shape[:2]:
        return False
    steps = shape[1] if shape[0] == images else shape[0]
    sums_to_one = abs(output.sum(-1) - 1.0).max() < SHARES and output.min() >= 0.0
    is_column = shape[1] == 1 and size is not None  # logits of a text in an image
    return steps >= FEWEST_STEPS and bool(sums_to_one or is_column)
