"""The heads of detectors: one row of HEADS per kind.

Only heads with distinctive shapes are recognized; the others must be named.  A named head may have any number of anchors, and its
axes in either order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from requant_onnx.errors import ConfigError, DataError
from requant_onnx.numerics.arrays import AnyArray
from requant_onnx.numerics.boxes import Batch, boxes, detr, listed, numbered, scored, yolo, yolox
from requant_onnx.numerics.detections import Candidates

DETECT, VALUES = "detect:", "values"


@dataclass(frozen=True)
class Head:
    """A kind of head.  what: description of its outputs.  read: reads the outputs; returns None if they are not of this kind.

    ids: whether its classes are category ids of the annotations, not indices.  is_recognized: whether it need not be named.
    """

    what: str
    read: Callable[[Sequence[AnyArray], Batch], list[Candidates] | None]
    ids: bool = False
    is_recognized: bool = False


XYXY, YXYX = (0, 1, 2, 3), (1, 0, 3, 2)
HEADS = {
    "yolov8": Head(
        "(n, 4 + classes, N): center, size, scores; YOLOv8, v9, v11 (masks, keypoints or angles may follow)",
        partial(yolo, 2, False),
        is_recognized=True,
    ),
    "yolox": Head("like yolov5, but in grid cells (strides 8, 16, 32), with sizes as logarithms", yolox, is_recognized=True),
    "yolov5": Head("(n, N, 5 + classes): center, size, objectness, scores; YOLOv5, v7", partial(yolo, 1, True), is_recognized=True),
    "nms": Head(
        "(n, k, 6), (k, 6) or (k, 7): corners, score, class; with 7 values, the image comes first",
        partial(listed, 4),
        is_recognized=True,
    ),
    "nms-class-first": Head("like nms, with the class before the score; YOLOv7 with built-in NMS", partial(listed, 5)),
    "nms-counts": Head(
        "(all boxes, 6): class, score, corners; numbers of boxes (n), integers; PaddleDetection", numbered, is_recognized=True
    ),
    "dets": Head("(n, k, 5): corners, score; labels (n, k), integers; MMDetection", scored, is_recognized=True),
    "boxes": Head(
        "corners (n, k, 4), with scores and labels (n, k), or with scores (n, k, classes)",
        partial(boxes, XYXY, False),
        is_recognized=True,
    ),
    "boxes-ids": Head("like boxes, where the labels are category ids; torchvision", partial(boxes, XYXY, False), ids=True),
    "boxes-center": Head("like boxes, with center and size instead of corners", partial(boxes, XYXY, True)),
    "tf-boxes": Head("like boxes-ids, in the order y, x, y, x; TensorFlow", partial(boxes, YXYX, False), ids=True),
    "rtdetr": Head(
        "(n, k, 4): center, size, relative to the image; logits (n, k, classes) of a sigmoid; RT-DETR, D-FINE",
        partial(detr, False),
        is_recognized=True,
    ),
    "rtdetr-ids": Head("like rtdetr, where the classes are category ids; RF-DETR", partial(detr, False), ids=True),
    "detr": Head(
        "like rtdetr, of a softmax whose last class means no object; DETR, YOLOS", partial(detr, True), is_recognized=True
    ),
    "detr-ids": Head("like detr, where the classes are category ids; DETR on COCO", partial(detr, True), ids=True),
}
"""The heads by name, in the order in which they are tried."""


class Task(NamedTuple):
    """What the outputs are.  head: a key of HEADS, None to recognize it.  has_answers: False to compare only values."""

    head: str | None = None
    has_answers: bool = True


def task_of(text: str | None) -> Task:
    """Parse a task.  text: None for the default.  Raises ConfigError.

    >>> task_of("detect:yolox")
    Task(head='yolox', has_answers=True)
    """
    if text is None or text == VALUES:
        return Task(has_answers=text is None)
    name = text.removeprefix(DETECT)
    if name == text or name not in HEADS:
        near = [] if name in DETECT else difflib.get_close_matches(name, (*HEADS, VALUES), 1)
        kind = "" if VALUES in near else DETECT
        hint = f"did you mean '{kind}{near[0]}'?" if near else f"give {VALUES}, or {DETECT}HEAD, with one of {', '.join(HEADS)}"
        raise ConfigError(f"the task '{text}' is unknown; {hint}")
    return Task(name)


def find_candidates(
    outputs: Sequence[Any], images: int, size: tuple[int, int] | None, head: str | None = None, columns: int = 0
) -> list[Candidates] | None:
    """The detections in each image; None if the outputs are not those of a recognized head.

    outputs: outputs of the model, in order.  images: number of images in the batch.  size: (height, width) of the images, or None.
    head: a key of HEADS, None to recognize it.  columns: number of classes with a score for each box, 0 if it is not known.
    Raises DataError if the outputs cannot be those of that head.
    """
    if head is None:
        recognized = _recognized(outputs, images, size)
        return None if recognized is None else recognized[1]
    found = HEADS[head].read(_arrays(outputs), Batch(images, size, True, columns))
    if found is None:
        shapes = ", ".join("x".join(map(str, np.shape(y))) or "()" for y in outputs)
        of = "" if size is None else f" on images of {size[0]}x{size[1]}"
        raise DataError(f"the outputs have the shapes {shapes}{of}, which do not match the head '{head}': {HEADS[head].what}")
    return found


class PairReader:
    """A reader of the detections of two models, batch by batch.

    Recognition looks at values, so the first batch of the reference decides on the head and on the columns of scores.
    """

    def __init__(self, head: str | None = None) -> None:
        """head: a key of HEADS, None to recognize it."""
        self._is_named, self._head, self._columns = head is not None, head, 0

    def read(
        self, reference: Sequence[Any], candidate: Sequence[Any], images: int, size: tuple[int, int] | None
    ) -> tuple[list[Candidates], list[Candidates]] | None:
        """The detections of both models; None if the outputs of one of them are not those of a recognized head.

        Parameters and errors as of `find_candidates`.
        """
        if self._head is None:
            recognized = _recognized(reference, images, size)
            if recognized is None:
                return None
            self._head = recognized[0]
        found = []
        for outputs in (reference, candidate):
            if self._is_named:
                each = find_candidates(outputs, images, size, self._head, self._columns)
            else:
                each = HEADS[self._head].read(_arrays(outputs), Batch(images, size, True, self._columns))
            if each is None:
                return None
            self._columns = self._columns or _columns(each)
            found.append(each)
        return found[0], found[1]


def _columns(found: Sequence[Candidates]) -> int:
    return found[0].columns if found else 0


def _arrays(outputs: Sequence[Any]) -> list[AnyArray]:
    return [y for y in outputs if isinstance(y, np.ndarray) and y.dtype.kind in "fiu"]


def _recognized(outputs: Sequence[Any], images: int, size: tuple[int, int] | None) -> tuple[str, list[Candidates]] | None:
    """The name of the head of some outputs, and the detections in each image; None if no head is recognized."""
    arrays = _arrays(outputs)
    if len(arrays) < len(outputs):
        return None
    rows = ((name, row.read(arrays, Batch(images, size, False))) for name, row in HEADS.items() if row.is_recognized)
    return next(((name, found) for name, found in rows if found is not None), None)
