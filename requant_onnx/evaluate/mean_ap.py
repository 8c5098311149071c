"""The mean average precision of detectors, as COCO defines it, by pycocotools (https://github.com/ppwwyyxx/cocoapi).

AP@[.5:.95] is the mean over ten overlaps and all labeled classes, AP50 that for an overlap of 0.5; both use at most 100
detections per image.  Needs the extra: pip install 'requant_onnx[detection]'.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from requant_onnx.convert.report import Compared
from requant_onnx.errors import ConfigError, DataError
from requant_onnx.inputs.annotations import ObjectLabels
from requant_onnx.numerics.arrays import Float64Array, Int64Array
from requant_onnx.numerics.average_precision import Ranked, mean_average_precision
from requant_onnx.numerics.detections import JUDGED, Candidates, Detections

MOST_COUNTED = 100  # number of the strongest detections of an image that count
AREAS = [[0.0, 1e10]]  # ranges of areas in square pixels: all areas
RELATIVE = (-0.5, 1.5)  # range of all boxes of the reference if their unit is the image size
RESAMPLES = 100  # number of resamples of the images for the standard error


@dataclass(frozen=True)
class Precision:
    """The precision of both models, 0..1.  error: standard error of the change of mean_ap, by resampling the images."""

    mean_ap: Compared
    ap50: Compared
    error: float


class PrecisionTally:
    """The detections of two models on labeled images."""

    def __init__(self, labels: ObjectLabels, size: tuple[int, int], *, ids: bool) -> None:
        """size: height and width of the images.  ids: whether classes are category ids.  Raises ConfigError without the extra."""
        _library()
        self._labels, self._size, self._ids = labels, size, ids
        self._found: tuple[list[Detections], list[Detections]] = ([], [])

    def add(self, pair: tuple[Sequence[Candidates], Sequence[Candidates]]) -> None:
        """Add the detections of both models in the next images.  Raises DataError if they have classes that the labels lack."""
        count = len(self._labels.categories)
        for found, images in zip(self._found, pair, strict=True):
            added = [each.above(JUDGED) for each in images]
            highest = max((int(each.classes.max(initial=-1)) for each in added), default=-1)
            if not self._ids and highest >= count:
                raise DataError(
                    f"the models find objects of class {highest}, but the labels have {count} categories; give labels with all "
                    "categories of the model, or a head whose classes are category ids, such as --task detect:boxes-ids"
                )
            found.extend(added)

    def report(self) -> Precision:
        """The figures.  Raises DataError if no image has an object."""
        if not any(len(each.boxes) for each in self._labels.images):
            raise DataError("the labels have no boxes in these images; give images with objects")
        unit = self._unit()
        evaluated = [self._evaluated(found, unit) for found in self._found]
        values = [_figures(each) for each in evaluated]
        return Precision(
            Compared(*(value[0] for value in values)),
            Compared(*(value[1] for value in values)),
            _error(evaluated, len(self._found[0])),
        )

    def _unit(self) -> Float64Array:
        """The pixels per unit of x, y, x, y."""
        boxes = np.concatenate([each.boxes for each in self._found[0]])
        height, width = self._size
        relative = len(boxes) > 0 and boxes.min() >= RELATIVE[0] and boxes.max() <= RELATIVE[1]
        return np.array([width, height, width, height] if relative else [1, 1, 1, 1], np.float64)

    def _evaluated(self, found: Sequence[Detections], unit: Float64Array) -> Any:
        """The COCOeval of one model, evaluated for each image."""
        coco, evaluation = _library()
        ids = np.array(self._labels.categories, np.int64)
        truths = [(each.boxes, each.categories, {"iscrowd": each.crowds}) for each in self._labels.images]
        seen = []
        for each in found:
            known = np.isin(each.classes, ids if self._ids else np.arange(len(ids)))
            classes = each.classes[known] if self._ids else ids[each.classes[known]]
            seen.append((each.boxes[known] * unit, classes, {"score": each.scores[known]}))
        with contextlib.redirect_stdout(io.StringIO()):  # COCO prints
            evaluated = evaluation(*(_indexed(coco, ids, rows) for rows in (truths, seen)), "bbox")
            evaluated.params.maxDets, evaluated.params.areaRng, evaluated.params.areaRngLbl = [MOST_COUNTED], AREAS, ["all"]
            evaluated.evaluate()
        return evaluated


def _indexed(coco: Any, categories: Int64Array, images: Sequence[tuple[Float64Array, Int64Array, dict[str, Any]]]) -> Any:
    """A COCO object of the boxes of images, their categories and further columns."""
    data = coco()
    data.dataset = {"images": [{"id": k} for k in range(len(images))], "categories": [{"id": int(k)} for k in categories]}
    annotations: list[dict[str, Any]] = []
    for image, (boxes, classes, more) in enumerate(images):
        for k, (box, category) in enumerate(zip(boxes, classes, strict=True)):
            width, height = (float(length) for length in box[2:] - box[:2])
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": int(category), "iscrowd": 0}  # id 0 is no match
            annotations.append(
                {**row, "bbox": [float(box[0]), float(box[1]), width, height], "area": width * height}
                | {name: column[k].item() for name, column in more.items()}
            )
    data.dataset["annotations"] = annotations
    data.createIndex()
    return data


def _figures(evaluated: Any) -> tuple[float, float]:
    """The AP@[.5:.95] and the AP50."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluated.accumulate()
    precision = evaluated.eval["precision"]  # (overlaps, recalls, categories, 1, 1), -1 for categories without labels
    mean, first = (each[each > -1] for each in (precision, precision[0]))
    return (float(mean.mean()), float(first.mean())) if mean.size else (0.0, 0.0)


def _error(evaluated: Sequence[Any], images: int) -> float:
    """The standard error of the change of AP@[.5:.95], with both models on the same images, resampled with replacement."""
    rng = np.random.default_rng(0)
    ranked = [_ranked(each.evalImgs, images) for each in evaluated]
    changes = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, images, images), minlength=images)
        first, second = (mean_average_precision(each, times) for each in ranked)
        changes.append(second - first)
    return float(np.std(changes))


def _ranked(rows: Sequence[dict[str, Any] | None], images: int) -> list[Ranked]:
    """The results of COCOeval for each category, over images.  rows: by category, then image; None if an image has none."""
    ranked = []
    for start in range(0, len(rows), images):
        known = [(k, row) for k, row in enumerate(rows[start : start + images]) if row is not None]
        if not known:
            continue
        scores = np.concatenate([row["dtScores"] for _, row in known])
        order = np.argsort(-scores, kind="stable")
        image = np.repeat([k for k, _ in known], [len(row["dtScores"]) for _, row in known])
        hit, ignored = (np.concatenate([row[name] != 0 for _, row in known], 1)[:, order] for name in ("dtMatches", "dtIgnore"))
        objects = np.zeros(images, np.int64)
        objects[[k for k, _ in known]] = [int((np.asarray(row["gtIgnore"]) == 0).sum()) for _, row in known]
        ranked.append(Ranked(image[order], hit & ~ignored, ~hit & ~ignored, objects))
    return ranked


def _library() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO  # noqa: PLC0415
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415
    except ImportError:
        raise ConfigError("mAP needs pycocotools; install it with: pip install 'requant_onnx[detection]'") from None
    return COCO, COCOeval
