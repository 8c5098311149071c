"""The similarity of the outputs of two models: the errors of every output, and the answers of outputs of a known kind.

scores        (n, classes), also (n, classes, 1, 1), unless all rows have length 1: the same largest score; among the five largest
classes       (n,) or (n, 1), integers: the same class
mask          (n, classes, h, w) with at least a quarter of the image's h and w: the same class at a pixel, mean IoU;
              (n, 1, h, w): the same side of 1/2 if all values of the reference are in 0..1, else of 0;
              (n, h, w) or (n, 1, h, w), integers: the same class;
              not pictures (n, 3, h, w) in -1..1 or above 0, nor depths (n, 1, h, w) above 0
text          (n, steps, classes) that sum to 1, or (steps, 1, classes) for an image: the same string after CTC decoding, with class
              0 as blank
detections    see heads.py: detections of the reference that the candidate also has, and the number of additional ones
texts         arrays of strings: equal strings
values        all others: errors only
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array
from requant_onnx.numerics.detections import ALIKE, OVERLAPS, Candidates, matched
from requant_onnx.numerics.heads import Task, find_in_both

SCALES = 4  # a mask is at most this many times smaller than the image along each axis
CHANNELS = (1, 3, 4)  # possible numbers of channels of an image
MOST_CLASSES, MOST_PRESENT = 1 << 12, 64  # largest numbers of classes of a mask, and of those that are present in its pixels
WHOLE = "iub"  # kinds of types of classes
UNIT = 1e-2  # difference of the length of an embedding from 1, with the rounding of float16
HIGHEST, SHARES = 1.001, 1e-2  # highest share of a class; largest difference of the sum of all from 1
FEWEST_STEPS, ALPHABET = 4, 10  # least numbers of steps and of classes of a text
NO_CLASS = -1  # the answer of a row of scores with NaN, which equals no label


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

    kind: see above.  sqnr_db (in dB), cosine: None if it is not a tensor of numbers, or of classes, or the shapes differ.
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
        self._edge: float | None = None  # of masks with one channel: probabilities or logits, as in the first batch
        self._union = self._common = np.zeros(0)  # pixels of each class in either model, and in both

    def add(self, reference: Any, candidate: Any, images: int, size: tuple[int, int] | None) -> None:
        """Compare a batch.  images: number of images in it.  size: their height and width."""
        if not isinstance(reference, np.ndarray) or not isinstance(candidate, np.ndarray):
            self._kind, self._odd = "other", True
            return
        if not self._kind:
            self._kind, self._shape = kind_of(reference, images, size), reference.shape
            self._discrete = self._kind in ("texts", "classes") or (self._kind == "mask" and reference.dtype.kind in WHOLE)
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
            self._add_mask(*((reference, candidate) if self._discrete else (a, b)))
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
        if self._edge is None:
            self._edge = 0.5 if a.min(initial=0.0) >= 0.0 and a.max(initial=0.0) <= 1.0 else 0.0
        first, second = _classes(a, self._edge), _classes(b, self._edge)
        self._count += first.size
        self._same += int((first == second).sum())
        count = max(2, int(first.max(initial=0)) + 1, int(second.max(initial=0)) + 1, len(self._union))
        both = np.bincount(first[first == second], minlength=count)
        each = [np.bincount(x.ravel(), minlength=count) for x in (first, second)]
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
        self._head = task.head
        self._reference = self._candidate = 0
        self._found = dict.fromkeys(OVERLAPS, 0)

    def add(
        self, reference: Sequence[Any], candidate: Sequence[Any], images: int, size: tuple[int, int] | None
    ) -> tuple[list[Candidates], list[Candidates]] | None:
        """Compare a batch.  reference, candidate: all outputs.  Returns the candidates in each image, None without known head."""
        pair = find_in_both(reference, candidate, images, size, self._head) if self.recognized else None
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


def top_classes(scores: AnyArray) -> Int64Array:
    """The class of the largest score of each row, (n, classes) -> (n,); NO_CLASS for a row with NaN."""
    return np.where(np.isnan(scores).any(1), NO_CLASS, scores.argmax(1))


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


def kind_of(output: AnyArray, images: int, size: tuple[int, int] | None) -> str:
    """The kind of an output.  images: number in the batch.  size: height and width of the images, if the model takes images."""
    if output.dtype.kind in "OSU":
        return "texts"
    if output.dtype.kind in WHOLE:
        return _kind_of_integers(output, images, size)
    shape = output.shape
    while (len(shape) > 2 and shape[-1] == 1 and len(shape) != 4) or (len(shape) == 4 and shape[2:] == (1, 1)):
        shape = shape[:-1]
    if len(shape) == 2 and shape[0] == images and shape[1] > 1:
        return "values" if _is_embedding(output.reshape(shape)) else "scores"
    if len(shape) == 4 and shape[0] == images and shape[1] <= MOST_CLASSES:
        return "mask" if _covers(shape[2:], size) and not _is_picture(output) else "values"
    if len(shape) == 3 and shape[2] >= ALPHABET and output.dtype.kind == "f" and output.size:
        steps = shape[1] if shape[0] == images else shape[0]
        sums_to_one = abs(output.sum(-1) - 1.0).max() < SHARES and output.min() >= 0.0
        is_column = shape[1] == 1 and size is not None  # logits of a text in an image
        if steps >= FEWEST_STEPS and images in shape[:2] and (sums_to_one or is_column):
            return "text"
    return "values"


def _kind_of_integers(output: AnyArray, images: int, size: tuple[int, int] | None) -> str:
    """The kind of an output of integers or truth values: the results of ArgMax, or others."""
    shape = output.shape
    if not shape or shape[0] != images:
        return "values"
    if output.size == images:
        return "classes"
    places = shape[2:] if len(shape) == 4 and shape[1] == 1 else shape[1:]
    few = output.min(initial=0) >= 0 and len(np.unique(output)) <= MOST_PRESENT
    return "mask" if len(places) == 2 and _covers(places, size) and few else "values"


def _covers(places: tuple[int, ...], size: tuple[int, int] | None) -> bool:
    """Whether an output has at least a value for SCALES x SCALES pixels of an image.  places: its height and width."""
    if size is None or 0 in places:
        return False
    return all(want <= SCALES * have and want % have == 0 for have, want in zip(places, size, strict=True))


def _is_embedding(rows: AnyArray) -> bool:
    """Whether rows are vectors of length 1, (n, size), as of faces or sentences, and not scores."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    return bool((abs(lengths - 1.0) < UNIT).all() and rows.min(initial=0.0) < 0.0)


def _is_picture(output: AnyArray) -> bool:
    """Whether an output is a picture or a map of depths, (n, 3 or 1, h, w), not a mask, whose values are logits or shares."""
    if output.shape[1] not in (1, 3) or not output.size:
        return False
    low, high = output.min(), output.max()
    if output.shape[1] == 1:
        return bool(low > 0 and high > HIGHEST)
    is_bounded = low >= 0 or (low >= -HIGHEST and high <= HIGHEST)
    return bool(is_bounded and abs(output.sum(1, dtype=np.float64) - 1.0).max() > SHARES)


def _classes(mask: AnyArray, edge: float) -> Int64Array:
    """The class of each pixel.  edge: least value of the class 1, if there is one channel that is not of integers."""
    if mask.dtype.kind in WHOLE:
        return np.maximum(mask.astype(np.int64), 0)
    if mask.shape[1] > 1:
        return np.asarray(mask.argmax(1))
    return np.asarray(mask[:, 0] > edge, np.int64)


def strings_of(output: Float64Array, images: int) -> list[tuple[int, ...]]:
    """The best path of each image by CTC's rule: repeats joined, then blanks dropped (Graves et al. 2006)."""
    rows = output if output.shape[0] == images else output.swapaxes(0, 1)[:images]  # without the padding of a batch
    strings = []
    for path in rows.argmax(-1):
        joined = path[np.concatenate([[True], np.diff(path) != 0])]
        strings.append(tuple(joined[joined != 0].tolist()))
    return strings
