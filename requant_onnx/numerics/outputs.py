"""The similarity of the outputs of two models: the errors of every output, and the agreement of answers, by kind (answers.py).

scores        the same largest score; among the five largest
mask          the same class at a pixel; mean intersection over union
detections    see heads.py: detections of the reference that the candidate also has, and the number of additional ones
others        the same answer; values have only errors
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from requant_onnx.numerics.answers import (
    NO_CLASS,
    WHOLE,
    channels_first,
    class_axis,
    edge_of,
    kind_of,
    pixel_classes,
    strings_of,
    top_classes,
)
from requant_onnx.numerics.arrays import AnyArray, Float64Array
from requant_onnx.numerics.detections import ALIKE, OVERLAPS, Candidates, matched
from requant_onnx.numerics.heads import PairReader, Task

CHANNELS = (1, 3, 4)  # possible numbers of channels of an image


SAME = {
    "top-1": "of the top-1 answers agree with the float model",
    "pixels": "of the pixels have the same class as in the float model",
    "strings": "of the strings agree with the float model",
    "texts": "of the texts agree with the float model",
    "detections": "of the detections of the float model are found again",
}
"""The end of a sentence about an agreement, after its percentage, by `OutputReport.what`."""


@dataclass(frozen=True)
class OutputReport:
    """The similarity of one output of two models.

    kind: see answers.py, or "detections" or "other".  sqnr_db (in dB), cosine: None if it is not a tensor of numbers, or one of
    classes, or the shapes differ.
    largest: largest difference.  agreement: share of identical answers, 0..1; None if there are no answers.
    what: kind of the answers, for example "top-1" or "pixels".  count: number of compared answers.  extra: other figures, by name.
    same_shape: False if the candidate gave another shape for an input, so that nothing could be compared.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    sqnr_db: float | None
    cosine: float | None
    largest: float | None
    agreement: float | None = None
    what: str = ""
    count: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    same_shape: bool = True

    @property
    def standard_error(self) -> float:
        """The standard error of the agreement, as a binomial share."""
        if self.agreement is None or not self.count:
            return 0.0
        return math.sqrt(self.agreement * (1 - self.agreement) / self.count)


class OutputTally:
    """Running sums for one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kind = ""
        self._shape: tuple[int, ...] = ()
        self._power = self._error = self._dot = self._other = self._largest = 0.0
        self._odd = self._reshaped = self._discrete = False
        self._same = self._count = self._five = 0
        self._axis = 0  # of the classes of a mask
        self._edge: float | None = None  # of masks with one channel: probabilities or logits, as in the first batch
        self._union = self._common = np.zeros(0)  # pixels of each class in either model, and in both

    def add(self, reference: Any, candidate: Any, images: int, size: tuple[int, int] | None) -> None:
        """Compare a batch.  images: number of images in it.  size: their height and width."""
        if not isinstance(reference, np.ndarray) or not isinstance(candidate, np.ndarray):
            self._kind, self._odd = "other", True
            return
        if not self._kind:
            self._kind, self._shape = kind_of(reference, images, size), reference.shape
            self._axis = class_axis(reference, size) or 0
            is_index = (
                self._kind == "mask" and reference.dtype.kind in WHOLE and channels_first(reference, self._axis).shape[1] == 1
            )
            self._discrete = is_index or self._kind in ("texts", "classes")
        if reference.shape != candidate.shape:
            self._odd = self._reshaped = True
            return
        if self._kind in ("texts", "classes"):
            self._count += reference.size
            self._same += int((reference == candidate).sum())
            return
        a, b = reference.astype(np.float64), candidate.astype(np.float64)
        same = np.isinf(a) & (a == b)  # equal infinities, such as log 0, have no error, and do not count as power
        x, y = (np.where(same, 0.0, a), np.where(same, 0.0, b)) if same.any() else (a, b)
        with np.errstate(invalid="ignore", over="ignore"):
            self._power += float((x * x).sum())
            self._other += float((y * y).sum())
            self._dot += float((x * y).sum())
            self._error += float(((x - y) ** 2).sum())
            self._largest = float(np.maximum(self._largest, np.abs(x - y).max(initial=0.0)))  # NaN stays NaN
        if self._kind == "scores":
            self._add_scores(a.reshape(images, -1), b.reshape(images, -1))
        elif self._kind == "mask":
            self._add_mask(*((np.nan_to_num(y, nan=-1.0).astype(np.int64) for y in (a, b)) if self._discrete else (a, b)))
        elif self._kind == "text":
            self._count += images
            self._same += sum(x == y for x, y in zip(strings_of(a, images), strings_of(b, images), strict=True))

    def _add_scores(self, a: Float64Array, b: Float64Array) -> None:
        tops = top_classes(a)
        answered = tops != NO_CLASS
        self._count += len(a)
        self._same += int(((tops == top_classes(b)) & answered).sum())
        five = np.argsort(-b, 1, kind="stable")[:, :5]
        self._five += int(((five == tops[:, None]).any(1) & answered & ~np.isnan(b).any(1)).sum())

    def _add_mask(self, a: AnyArray, b: AnyArray) -> None:
        a, b = (channels_first(each, self._axis) for each in (a, b))
        if self._edge is None:
            self._edge = edge_of(a)
        first, second = pixel_classes(a, self._edge), pixel_classes(b, self._edge)
        is_class = b[:, 0] >= 0 if self._discrete else ~np.isnan(b).any(1)
        same = (first == second) & is_class
        self._count += first.size
        self._same += int(same.sum())
        count = max(2, int(first.max(initial=0)) + 1, int(second.max(initial=0)) + 1, len(self._union))
        both = np.bincount(first[same], minlength=count)
        each = [np.bincount(x.ravel(), minlength=count) for x in (first, second[is_class])]
        longer = (0, count - len(self._union))
        self._union = np.pad(self._union, longer) + (each[0] + each[1] - both)
        self._common = np.pad(self._common, longer) + both

    @property
    def kind(self) -> str:
        """The kind of the output, decided by the first batch."""
        return self._kind

    def report(self, *, answers: bool = True) -> OutputReport:
        """The figures computed from the sums.  answers: whether its values are answers, not part of detections."""
        numbers = not self._odd and not self._discrete
        sqnr = math.inf if self._error == 0.0 else 10 * math.log10(self._power / self._error) if self._power > 0.0 else -math.inf
        sqnr = sqnr if math.isfinite(self._power + self._error) else math.nan
        norm = math.sqrt(self._power * self._other)
        what = {"scores": "top-1", "mask": "pixels", "text": "strings", "texts": "texts", "classes": "top-1"}.get(self._kind, "")
        extra = {}
        if self._kind == "scores" and self._count:
            extra["top5"] = self._five / self._count
        if self._union.any():
            present = self._union > 0
            extra["mean_iou"] = float((self._common[present] / self._union[present]).mean())
        return OutputReport(
            name=self.name,
            shape=self._shape,
            kind=self._kind if self._kind in ("texts", "other", "classes") or (answers and not self._odd) else "values",
            sqnr_db=sqnr if numbers else None,
            cosine=(self._dot / norm if norm != 0.0 else float(self._power == self._other)) if numbers else None,
            largest=self._largest if numbers else None,
            agreement=self._same / self._count if answers and self._count and not self._odd else None,
            what=what if answers else "",
            count=self._count if answers else 0,
            extra=extra if answers else {},
            same_shape=not self._reshaped,
        )


class DetectionTally:
    """Running sums over the detections of all images."""

    def __init__(self, task: Task | None = None) -> None:
        """task: None to recognize the head."""
        task = task or Task()
        self.recognized = task.has_answers
        self._reader = PairReader(task.head)
        self._reference = self._candidate = 0
        self._found = dict.fromkeys(OVERLAPS, 0)

    def add(
        self, reference: Sequence[Any], candidate: Sequence[Any], images: int, size: tuple[int, int] | None
    ) -> tuple[list[Candidates], list[Candidates]] | None:
        """Compare a batch.  reference, candidate: all outputs.  Returns the candidates in each image, None without known head."""
        pair = self._reader.read(reference, candidate, images, size) if self.recognized else None
        if pair is None:
            self.recognized = False
            return None
        for one, other in zip(*([each.above(ALIKE) for each in found] for found in pair), strict=True):
            self._reference += len(one.scores)
            self._candidate += len(other.scores)
            for overlap in OVERLAPS:
                self._found[overlap] += matched(one, other, overlap)
        return pair

    def report(self) -> OutputReport | None:
        """The share of detections found again with overlap 0.5; None without a known head, or if the reference detected nothing."""
        if not self.recognized or not self._reference:
            return None
        shares = {f"found_{overlap:g}": found / self._reference for overlap, found in self._found.items()}
        extra = {**shares, "detections": float(self._reference), "more": float(self._candidate - self._found[OVERLAPS[0]])}
        share = self._found[OVERLAPS[0]] / self._reference
        return OutputReport("detections", (), "detections", None, None, None, share, "detections", self._reference, extra)


def worst(values: Iterable[float | None]) -> float | None:
    """The smallest of some SQNRs, NaN if one is NaN; None if none is known."""
    known = [value for value in values if value is not None]
    return float(np.min(known)) if known else None


def without_padding(output: Any, padded: int, images: int) -> Any:
    """The rows of an output that belong to images.  padded: size of the batch.  images: how many of them are not padding."""
    is_padded = isinstance(output, np.ndarray) and output.ndim > 0 and len(output) == padded
    return output[:images] if is_padded else output


def images_in(inputs: Collection[AnyArray]) -> tuple[int, tuple[int, int] | None]:
    """The number of inputs in a batch, and the height and width of its images, if there are any.

    Arrays whose first dimensions differ form a single input together.

    >>> images_in([np.zeros((4, 3, 32, 48)), np.zeros(())]), images_in([np.zeros((2, 32, 48, 3))]), images_in([np.zeros((5, 7))])
    ((1, (32, 48)), (2, (32, 48)), (5, None))
    """
    lengths = {len(values) if values.ndim > 1 else 1 for values in inputs}
    count = lengths.pop() if len(lengths) == 1 else 1
    shape = next((values.shape for values in inputs if values.ndim == 4), None)
    if shape is None:
        return count, None
    last = shape[3] in CHANNELS and shape[1] not in CHANNELS
    return count, (shape[1], shape[2]) if last else (shape[2], shape[3])
