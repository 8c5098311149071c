"""Objects that a detector finds in an image, without weak ones and duplicates, and their matches between two models.

Boxes are corners x1, y1, x2, y2 in the unit of the model; a match needs the same class and an overlap, which has no unit.
Duplicates are dropped greedily, class by class, in descending order of score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from requant_onnx.numerics.arrays import Float64Array, Int64Array

MOST = 300  # largest number of detections in an image
OVERLAPS = (0.5, 0.75)


class Limits(NamedTuple):
    """score: least score that counts.  suppression: overlap above which the weaker of two objects of a class is dropped."""

    score: float
    suppression: float


ALIKE = Limits(0.25, 0.45)  # for detections that are shown to users, and matched between models
JUDGED = Limits(0.001, 0.65)  # as usual in evaluations on COCO: weak detections never lower a mAP, and may raise it


@dataclass(frozen=True)
class Detections:
    """The objects of one image.  boxes: corners, (k, 4).  scores, classes: (k,)."""

    boxes: Float64Array
    scores: Float64Array
    classes: Int64Array


@dataclass(frozen=True)
class Candidates:
    """All detections of a head in one image, including weak ones.  doubled: whether the head outputs duplicates.

    columns: number of classes with a score for each box; 0 if each box has one class.
    """

    boxes: Float64Array
    scores: Float64Array
    classes: Int64Array
    doubled: bool
    columns: int = 0

    def above(self, limits: Limits) -> Detections:
        """The strongest candidates, at most MOST, in descending order of score; without duplicates if `doubled`."""
        usable = np.isfinite(self.boxes).all(1) & (self.scores >= limits.score)  # NaN is below every score
        order = np.flatnonzero(usable)
        order = order[np.argsort(-self.scores[order], kind="stable")]
        kept = self._distinct(order[: 10 * MOST], limits.suppression) if self.doubled else order[:MOST]
        return Detections(self.boxes[kept], self.scores[kept], self.classes[kept])

    def _distinct(self, order: Int64Array, suppression: float) -> Int64Array:
        kept: list[int] = []
        while order.size and len(kept) < MOST:
            first, order = int(order[0]), order[1:]
            kept.append(first)
            common = overlaps(self.boxes[first : first + 1], self.boxes[order])[0]
            order = order[(self.classes[order] != self.classes[first]) | (common <= suppression)]
        return np.array(kept, np.int64)


def overlaps(a: Float64Array, b: Float64Array) -> Float64Array:
    """The intersection over union of each pair of boxes, (len(a), len(b)).  a, b: corners, (k, 4)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.prod(np.clip(high - low, 0.0, None), 2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None), 1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0.0))


def matched(reference: Detections, candidate: Detections, overlap: float) -> int:
    """The number of the reference's detections that match a detection of the candidate, in class and overlap, one to one."""
    pairs = overlaps(reference.boxes, candidate.boxes)
    pairs[reference.classes[:, None] != candidate.classes[None]] = 0.0
    found = 0
    for row in np.argsort(-reference.scores, kind="stable"):
        if pairs.shape[1] and pairs[row].max() >= overlap:
            pairs[:, pairs[row].argmax()] = 0.0
            found += 1
    return found
