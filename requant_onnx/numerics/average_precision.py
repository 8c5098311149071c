"""Average precision of detections, with a weight for each image, so that images can be resampled.

With image weights n and detections in descending order of score, true and false positives up to a detection are
t = sum n * right and f = sum n * wrong; recall is t / sum n * objects, precision t / (t + f).  AP is the mean, over 101 recalls
0, 0.01, .. 1, of the highest precision at that recall or a higher one, as COCO defines it; with n = 1, it equals pycocotools' AP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Ranked:
    """The detections of a class in all images, in descending order of score.

    images: image of each detection, (d,).  right, wrong: true and false positives at each overlap, (overlaps, d); a detection that
    is neither does not count.  objects: number of objects in each image, (images,).
    """

    images: Int64Array
    right: AnyArray
    wrong: AnyArray
    objects: Int64Array


def mean_average_precision(classes: Sequence[Ranked], times: Int64Array) -> float:
    """The mean over overlaps and all classes that have objects; 0 if none has.  times: weight of each image, (images,)."""
    found = [_average_precision(each, times) for each in classes if (each.objects * times).any()]
    return float(np.mean(found)) if found else 0.0


def _average_precision(ranked: Ranked, times: Int64Array) -> Float64Array:
    """The average precision at each overlap, (overlaps,)."""
    weights = times[ranked.images]
    right, wrong = (np.cumsum(each * weights, 1, dtype=np.float64) for each in (ranked.right, ranked.wrong))
    recall = right / (ranked.objects * times).sum()
    precision = right / np.maximum(right + wrong, 1.0)  # 0 before the first detection that counts
    highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    beyond = np.concatenate([highest, np.zeros((len(highest), 1))], 1)  # the precision at a recall that is never reached is 0
    reached = [np.searchsorted(each, RECALLS) for each in recall]
    return np.array([each[at].mean() for each, at in zip(beyond, reached, strict=True)])
