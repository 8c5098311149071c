"""Objects in the outputs of detectors: recognized heads, decoded, and matched between two models.

Recognized, for an image of h x w pixels with N anchors (the cells of strides 8, 16 and 32, once or three times; P6 nets add 64):

    (n, 4 + classes, N)         YOLOv8, v9, v11: center, size, scores
    (n, N, 5 + classes)         YOLOv5, v7: center, size, objectness, scores
    (n, k, 6), (k, 6), (k, 7)   after suppression: corners, score, class, with the image first where there are 7
    boxes (n, k, 4) beside scores (n, k) or (n, k, classes), and labels (n, k)    SSD, Faster R-CNN, RT-DETR

Boxes are corners x1, y1, x2, y2 in whatever unit the model gives; a match needs the same class and an overlap, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array

SCORE = 0.25  # below it a detection counts for nothing
SUPPRESSION = 0.45  # overlap from which on the weaker of two detections of a class is dropped, where the model does not do so
MOST = 300  # detections of an image
OVERLAPS = (0.5, 0.75)


@dataclass(frozen=True)
class Detections:
    """The objects of one image.  boxes: corners, (k, 4).  scores, classes: (k,)."""

    boxes: Float64Array
    scores: Float64Array
    classes: Int64Array


def anchors_of(height: int, width: int) -> set[int]:
    """How many anchors heads of the YOLO family have on such images."""
    cells = [-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64)]
    return {times * sum(cells[:levels]) for times in (1, 3) for levels in (3, 4)}


def find_detections(outputs: Sequence[AnyArray], images: int, size: tuple[int, int] | None) -> list[Detections] | None:
    """The objects of each image; None where the outputs are no recognized head.

    outputs: of the model, in order.  images: in the batch.  size: height and width of the images, where the model takes any.
    """
    for output in outputs:
        if output.ndim == 3 and output.shape[0] == images and size is not None:
            anchors = anchors_of(*size)
            if output.shape[2] in anchors and output.shape[1] > 4:
                return [_suppressed(*_centered(rows.T, False)) for rows in output.astype(np.float64)]
            if output.shape[1] in anchors and output.shape[2] > 5:
                return [_suppressed(*_centered(rows, True)) for rows in output.astype(np.float64)]
    return _listed(outputs, images) or _boxes_and_scores(outputs, images)


def _centered(rows: Float64Array, objectness: bool) -> tuple[Float64Array, Float64Array]:
    """Corners and scores by class of rows of center, size, scores."""
    center, half = rows[:, :2], rows[:, 2:4] / 2
    scores = rows[:, 5:] * rows[:, 4:5] if objectness else rows[:, 4:]
    return np.concatenate([center - half, center + half], 1), scores


def _suppressed(boxes: Float64Array, scores: Float64Array) -> Detections:
    """The detections of each anchor's best class, without those that a stronger one of the same class overlaps."""
    classes, best = scores.argmax(1), scores.max(1)
    order = np.flatnonzero(best >= SCORE)
    order = order[np.argsort(-best[order], kind="stable")][: 10 * MOST]
    kept: list[int] = []
    while order.size and len(kept) < MOST:
        first, order = int(order[0]), order[1:]
        kept.append(first)
        rivals = (classes[order] == classes[first]) & (overlaps(boxes[first : first + 1], boxes[order])[0] > SUPPRESSION)
        order = order[~rivals]
    return Detections(boxes[kept], best[kept], classes[kept].astype(np.int64))


def _listed(outputs: Sequence[AnyArray], images: int) -> list[Detections] | None:
    """One output that lists corners, score and class."""
    if len(outputs) != 1 or outputs[0].ndim not in (2, 3) or outputs[0].shape[-1] not in (6, 7):
        return None
    rows = outputs[0].astype(np.float64)
    if rows.ndim == 3 and rows.shape[-1] == 6 and len(rows) == images:
        each = list(rows)
    elif rows.ndim == 2 and rows.shape[-1] == 7:
        each = [rows[rows[:, 0] == k, 1:] for k in range(images)]
    elif rows.ndim == 2 and images == 1:
        each = [rows[:, -6:]]
    else:
        return None
    whole = all((part[:, 5] == np.rint(part[:, 5])).all() and (part[:, 4] <= 1.0).all() for part in each)
    return [_taken(part[:, :4], part[:, 4], part[:, 5]) for part in each] if whole else None


def _boxes_and_scores(outputs: Sequence[AnyArray], images: int) -> list[Detections] | None:
    """An output of boxes beside one of scores, with or without one of labels."""
    boxes = [output for output in outputs if output.ndim in (2, 3) and output.shape[-1] == 4]
    if len(boxes) != 1:
        return None
    places = boxes[0].shape[:-1]
    if (boxes[0].ndim == 2 and images != 1) or (boxes[0].ndim == 3 and places[0] != images):
        return None
    flat = [output for output in outputs if output.shape == places]
    labels = [output for output in flat if output.dtype.kind in "iu" or (output.size and (output == np.rint(output)).all())]
    scores = [output for output in flat if not any(output is label for label in labels)]
    by_class = [output for output in outputs if output.shape[:-1] == places and output.shape[-1] > 1 and output is not boxes[0]]
    shape = (images, -1, 4)
    if len(scores) == 1 and len(labels) == 1:
        parts = zip(boxes[0].reshape(shape), scores[0].reshape(images, -1), labels[0].reshape(images, -1), strict=True)
        return [_taken(*(np.asarray(part, np.float64) for part in each)) for each in parts]
    if len(by_class) == 1:
        pairs = zip(boxes[0].reshape(shape), by_class[0].reshape(images, -1, by_class[0].shape[-1]), strict=True)
        return [_suppressed(*(np.asarray(part, np.float64) for part in each)) for each in pairs]
    return None


def _taken(boxes: Float64Array, scores: Float64Array, classes: Float64Array) -> Detections:
    strong = np.flatnonzero(scores >= SCORE)[:MOST]
    return Detections(boxes[strong], scores[strong], np.rint(classes[strong]).astype(np.int64))


def overlaps(a: Float64Array, b: Float64Array) -> Float64Array:
    """Intersection over union of each pair of boxes, (len(a), len(b)).  a, b: corners, (k, 4)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.prod(np.clip(high - low, 0.0, None), 2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None), 1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0.0))


def matched(reference: Detections, candidate: Detections, overlap: float) -> int:
    """How many detections of the reference the candidate has too: same class, such an overlap, each counted once."""
    pairs = overlaps(reference.boxes, candidate.boxes)
    pairs[reference.classes[:, None] != candidate.classes[None]] = 0.0
    found = 0
    for row in np.argsort(-reference.scores, kind="stable"):
        if pairs.shape[1] and pairs[row].max() >= overlap:
            pairs[:, pairs[row].argmax()] = 0.0
            found += 1
    return found
