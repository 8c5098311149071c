"""Convert outputs of detectors to boxes: one function per kind of head, which returns None if the outputs do not match.

N anchors: the cells of strides 8, 16 and 32, once or three times (P6 nets add 64).
Cells of YOLOX (Ge et al. 2021, arXiv 2107.08430): center (t + cell) * stride, size exp(t) * stride.
Queries of DETR: logits of a softmax whose last class means no object (Carion et al. 2020, arXiv 2005.12872), or of one sigmoid per
class (Zhu et al. 2020, arXiv 2010.04159).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from requant_onnx.numerics.answers import HIGHEST
from requant_onnx.numerics.arrays import AnyArray, Float64Array
from requant_onnx.numerics.detections import Candidates

STRIDES = (8, 16, 32, 64)
LONGEST = 30.0  # limit on the logarithms of sizes, so that exp of a corrupt one stays finite
ORDERED = 0.9  # least share of boxes whose second corner is not above or left of the first, if they are corners
NO_OBJECT = 3.0  # least excess of the mean logit of the class for no object, because most queries find none
POSITIVE = 0.1  # least share of queries with a positive logit of that class; a sigmoid has one only for an object


class Batch(NamedTuple):
    """A batch.  images: number of images.  size: their height and width, None without images.  told: whether the head is named.

    columns: number of classes with a score for each box, 0 if it is not known.
    """

    images: int
    size: tuple[int, int] | None
    told: bool
    columns: int = 0


def anchors_of(height: int, width: int) -> set[int]:
    """The numbers of anchors that heads of the YOLO family have for images of this size."""
    cells = [-(-height // stride) * -(-width // stride) for stride in STRIDES]
    return {times * sum(cells[:levels]) for times in (1, 3) for levels in (3, 4)}


def _anchor_rows(outputs: Sequence[AnyArray], batch: Batch, axis: int, fewest: int) -> Float64Array | None:
    """The first output with a row of at least `fewest` values per anchor, (n, N, values).  axis: usual axis of the anchors."""
    expected = set() if batch.size is None else anchors_of(*batch.size)
    for output in outputs:
        if output.ndim != 3 or output.shape[0] != batch.images:
            continue
        usual, other = (output.swapaxes(1, 2), output) if axis == 2 else (output, output.swapaxes(1, 2))
        if usual.shape[1] not in expected:
            if not batch.told:
                continue
            usual = max(usual, other, key=lambda rows: rows.shape[1])
        if usual.shape[2] >= fewest:
            return usual.astype(np.float64)
    return None


def yolo(axis: int, objectness: bool, outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read decoded centers, sizes and scores.  axis: axis of the anchors.  objectness: whether it precedes the scores."""
    rows = _anchor_rows(outputs, batch, axis, 6 if objectness else 5)
    return None if rows is None else _of_rows(rows, objectness, batch)


def yolox(outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read undecoded centers, sizes, objectness and scores of cells; some undecoded sizes are negative, decoded ones never are."""
    rows = _anchor_rows(outputs, batch, 1, 6)
    if rows is None or batch.size is None or not (batch.told or (rows[..., 2:4] < 0.0).any()):
        return None
    for strides in (STRIDES[:3], STRIDES):
        cells = np.concatenate([_cells(*batch.size, stride) for stride in strides])
        if len(cells) == rows.shape[1]:
            stride = cells[:, 2:]
            center, size = (rows[..., :2] + cells[:, :2]) * stride, np.exp(np.minimum(rows[..., 2:4], LONGEST)) * stride
            return _of_rows(np.concatenate([center, size, rows[..., 4:]], -1), True, batch)
    return None


def _cells(height: int, width: int, stride: int) -> Float64Array:
    """The (x, y, stride) of each cell, row by row."""
    y, x = np.mgrid[: -(-height // stride), : -(-width // stride)]
    return np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)], 1).astype(np.float64)


def _of_rows(rows: Float64Array, objectness: bool, batch: Batch) -> list[Candidates]:
    """The candidates of each image in rows of center, size and scores, (n, N, values), each with its best class."""
    first = 5 if objectness else 4
    scores = rows[..., first : first + (batch.columns or _count_scores(rows[..., first:]))]
    scores = scores * rows[..., 4:5] if objectness else scores
    return [_best(_corners(each[:, :4]), scores[k]) for k, each in enumerate(rows)]


def _count_scores(values: Float64Array) -> int:
    """The number of columns before the first that is not within 0..1, such as coefficients of masks, keypoints and angles.

    If the first is not, all columns are scores.
    """
    inside = ((values >= 0.0) & (values <= HIGHEST)).all((0, 1))
    return int(np.logical_and.accumulate(inside).sum()) or values.shape[-1]


def _corners(boxes: Float64Array) -> Float64Array:
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], 1)


def _best(boxes: Float64Array, scores: Float64Array, doubled: bool = True) -> Candidates:
    return Candidates(boxes, scores.max(1), scores.argmax(1).astype(np.int64), doubled, scores.shape[1])


def listed(score: int, outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read an output that lists corners, score and class.  score: column of the score, 4 or 5; the class is in the other."""
    if len(outputs) != 1 and not batch.told:
        return None
    for output in outputs:
        parts = _parts(output.astype(np.float64), batch.images)
        if parts is None:
            continue
        pairs = [(part[:, score], part[:, 9 - score]) for part in parts]
        if all((classes == np.rint(classes)).all() and (scores <= 1.0).all() for scores, classes in pairs):
            found = zip(parts, pairs, strict=True)
            return [Candidates(part[:, :4], scores, classes.astype(np.int64), False) for part, (scores, classes) in found]
    return None


def scored(outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read an output of corners and score, (n, k, 5), and one of integer labels, (n, k)."""
    rows = [output for output in outputs if output.ndim == 3 and output.shape[-1] == 5 and len(output) == batch.images]
    labels = [output for output in outputs if output.dtype.kind in "iu" and output.shape in {row.shape[:-1] for row in rows}]
    if len(rows) != 1 or len(labels) != 1:
        return None
    pairs = zip(rows[0].astype(np.float64), labels[0].astype(np.int64), strict=True)
    return [Candidates(part[:, :4], part[:, 4], classes, False) for part, classes in pairs]


def numbered(outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read an output of class, score and corners, (all boxes, 6), and the number of boxes in each image, (n,)."""
    rows = next((output for output in outputs if output.ndim == 2 and output.shape[-1] == 6), None)
    counts = next((output for output in outputs if output.dtype.kind in "iu" and output.shape == (batch.images,)), None)
    if rows is None or counts is None or counts.sum() > len(rows) or not (rows[:, 0] == np.rint(rows[:, 0])).all():
        return None
    parts = np.split(rows.astype(np.float64), np.cumsum(counts))[:-1]  # without those of the padding of a batch
    return [Candidates(part[:, 2:], part[:, 1], part[:, 0].astype(np.int64), False) for part in parts]


def _parts(rows: Float64Array, images: int) -> list[Float64Array] | None:
    """The six columns of a list, for each image."""
    if rows.ndim == 3 and rows.shape[-1] == 6 and len(rows) == images:
        return list(rows)
    if rows.ndim == 2 and rows.shape[-1] == 7:
        return [rows[rows[:, 0] == k, 1:] for k in range(images)]
    return [rows] if rows.ndim == 2 and rows.shape[-1] == 6 and images == 1 else None


def boxes(order: Sequence[int], centered: bool, outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read an output of boxes and one of scores, with or without one of labels.  order: columns of x, y, x, y."""
    found = _four_columns(outputs, batch)
    if len(found) != 1:
        return None
    output = found[0]
    rows = output.reshape(batch.images, -1, 4).astype(np.float64)[..., list(order)]
    corners = [_corners(each) if centered else each for each in rows]
    named = _scores_and_labels([each for each in outputs if each.shape == output.shape[:-1]])
    if named is not None:
        scores, labels = (each.reshape(batch.images, -1).astype(np.float64) for each in named)
        return [Candidates(*each, False) for each in zip(corners, scores, np.rint(labels).astype(np.int64), strict=True)]
    by_class = _by_class(outputs, output, batch)
    if by_class is None or not (batch.told or _are_corners(rows, by_class)):
        return None
    return [_best(*each) for each in zip(corners, by_class, strict=True)]


def _four_columns(outputs: Sequence[AnyArray], batch: Batch) -> list[AnyArray]:
    """The outputs that may have a box in each row, (n, k, 4), or (k, 4) for one image."""
    found = [output for output in outputs if output.ndim in (2, 3) and output.shape[-1] == 4]
    return [output for output in found if batch.images == (1 if output.ndim == 2 else len(output))]


def _by_class(outputs: Sequence[AnyArray], boxes: AnyArray, batch: Batch) -> Float64Array | None:
    """The only output with a value for each box and class, (n, k, classes)."""
    found = [each for each in outputs if each.shape[:-1] == boxes.shape[:-1] and each.shape[-1] > 1 and each is not boxes]
    return found[0].astype(np.float64).reshape(batch.images, -1, found[0].shape[-1]) if len(found) == 1 else None


def _are_corners(boxes: Float64Array, scores: Float64Array) -> bool:
    """Whether boxes may be corners, (n, k, 4), and values their scores, 0..1, not logits."""
    ordered = (boxes[..., 2:] >= boxes[..., :2]).all(-1)
    return not scores.size or bool(ordered.mean() >= ORDERED and scores.min() >= 0.0 and scores.max() <= HIGHEST)


def detr(softmax: bool, outputs: Sequence[AnyArray], batch: Batch) -> list[Candidates] | None:
    """Read centers and sizes relative to the image, and logits of classes.  softmax: whether the last class means no object."""
    found = _four_columns(outputs, batch)
    output = max(found, key=lambda y: float(y.min(initial=0.0)), default=None)  # logits of three classes have four columns too
    logits = None if output is None else _by_class(outputs, output, batch)
    if output is None or logits is None or not logits.size:
        return None
    rows = output.reshape(batch.images, -1, 4).astype(np.float64)
    if not batch.told:
        last = logits[..., -1]
        has_none = last.mean() - logits[..., :-1].mean() > NO_OBJECT and (last > 0.0).mean() >= POSITIVE
        if not (rows.min() >= 0.0 and rows.max() <= 1.0 and logits.min() < 0.0 and has_none == softmax):
            return None
    with np.errstate(invalid="ignore"):  # a corrupt model may give infinity
        relative = logits - logits.max(-1, keepdims=True) if softmax else np.clip(logits, -LONGEST, LONGEST)
        odds = np.exp(relative)
    scores = (odds / odds.sum(-1, keepdims=True))[..., :-1] if softmax else odds / (1.0 + odds)
    return [_best(_corners(each), scores[k], doubled=False) for k, each in enumerate(rows)]


def _scores_and_labels(pair: Sequence[AnyArray]) -> tuple[AnyArray, AnyArray] | None:
    """Tell two outputs apart, (scores, labels): labels are integers, and if both are, the ones with the larger maximum."""
    if len(pair) != 2:
        return None
    scores, labels = sorted(pair, key=lambda y: (y.dtype.kind in "iu", bool((y == np.rint(y)).all()), y.max(initial=0)))
    return (scores, labels) if scores.dtype.kind == "f" and (labels == np.rint(labels)).all() else None
