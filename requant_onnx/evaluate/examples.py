"""The inputs on which the answers of two models differ most, and the answers that changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from requant_onnx.convert.report import sqnr_db
from requant_onnx.numerics.answers import NO_CLASS, kind_of, strings_of
from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array
from requant_onnx.numerics.detections import ALIKE, Candidates
from requant_onnx.numerics.heads import PairReader, Task

WORST = 8  # examples kept
CHANGES = 12  # pairs of answers listed


@dataclass(frozen=True)
class Example:
    """An input.  index: index in the data.  answers: answers of the reference and of the candidate as text, "" if there are none.

    label: the right answer as text, "" if unknown.  differs: whether the answers differ.
    sqnr_db: SQNR over all its outputs, in dB.
    """

    index: int
    answers: tuple[str, str]
    label: str
    differs: bool
    sqnr_db: float


@dataclass(frozen=True)
class Change:
    """A pair of answers, and the number of inputs whose answer changed this way.  label: right answer, "" if unknown."""

    label: str
    reference: str
    candidate: str
    count: int


class _Answers(NamedTuple):
    """The answers to the inputs of a batch.  texts: as text.  keys: values to compare.  are_classes: whether keys are classes."""

    texts: list[str]
    keys: list[Any]
    are_classes: bool = False


class Examples:
    """A collector of examples from the outputs of two models, batch by batch."""

    def __init__(self, labels: Int64Array | None, size: tuple[int, int] | None, task: Task | None = None) -> None:
        """labels: labels of all inputs, if known.  size: height and width of the images, if the models take images.

        task: None to recognize it.
        """
        self._task = task or Task()
        self._reader = PairReader(self._task.head)
        self._labels, self._size = labels if self._task.has_answers else None, size
        self._worst: list[Example] = []
        self._changes: Counter[tuple[str, str, str]] = Counter()

    def add(self, start: int, count: int, first: Sequence[Any], second: Sequence[Any]) -> None:
        """Add a batch.  start: index of its first input.  count: number of inputs.  first, second: outputs of the two models."""
        has_answers = self._task.has_answers
        found = self._reader.read(first, second, count, self._size) if has_answers else None
        if found is None:
            kind = _kind_of_first(first, count, self._size) if has_answers else ""
            one, other = (_answers(outputs[0], kind, count) for outputs in (first, second))
        else:
            one, other = (_detected(candidates) for candidates in found)
        for k, sqnr in enumerate(_sqnr(first, second, count)):
            label = "" if self._labels is None else f"class {self._labels[start + k]}"
            differs = one.keys[k] != other.keys[k]
            if differs and one.are_classes:
                self._changes[label, f"class {one.keys[k]}", f"class {other.keys[k]}"] += 1
            self._worst.append(Example(start + k, (one.texts[k], other.texts[k]), label, differs, sqnr))
        self._worst.sort(key=lambda example: (not example.differs, not math.isnan(example.sqnr_db), example.sqnr_db, example.index))
        del self._worst[WORST:]

    @property
    def worst(self) -> tuple[Example, ...]:
        """The worst examples: those with different answers first, then by SQNR; none if the outputs are the same."""
        return tuple(example for example in self._worst if example.differs or example.sqnr_db != math.inf)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The pairs of answers that changed most often."""
        return tuple(Change(*pair, count) for pair, count in self._changes.most_common(CHANGES))


def _sqnr(first: Sequence[Any], second: Sequence[Any], count: int) -> list[float]:
    """The SQNR of each input in dB, over all outputs with one row per input; for a single input, over all outputs."""
    power, error = np.zeros(count), np.zeros(count)
    for a, b in zip(first, second, strict=True):
        if _has_rows(a, count) and np.shape(a) == np.shape(b) and a.dtype.kind in "fiu":
            with np.errstate(invalid="ignore", over="ignore"):
                x, y = (np.asarray(values, np.float64).reshape(count, -1) for values in (a, b))
                power += np.square(x).sum(1)
                error += np.square(x - y).sum(1)
    return [sqnr_db(float(p), float(e)) for p, e in zip(power, error, strict=True)]


def _has_rows(values: Any, count: int) -> bool:
    return isinstance(values, np.ndarray) and (count == 1 or (values.ndim > 0 and len(values) == count))


def _detected(found: Sequence[Candidates]) -> _Answers:
    each = [tuple(sorted(part.above(ALIKE).classes.tolist())) for part in found]
    return _Answers([_listed(classes) for classes in each], list(each))


def _kind_of_first(outputs: Sequence[Any], count: int, size: tuple[int, int] | None) -> str:
    """The kind of the first output, "" if it is not an array of numbers."""
    output = outputs[0]
    return kind_of(output, count, size) if isinstance(output, np.ndarray) and output.dtype.kind in "fiub" else ""


def _answers(output: Any, kind: str, count: int) -> _Answers:
    """The answers in an output of this kind."""
    if kind == "scores":
        scores = np.asarray(output, np.float64).reshape(count, -1)
        tops, shares = scores.argmax(1).tolist(), _shares(scores).max(1).tolist()
        return _Answers([f"class {top} ({share:.0%})" for top, share in zip(tops, shares, strict=True)], tops, True)
    if kind == "classes":
        values = np.asarray(output)
        classes = (
            [int(each) if math.isfinite(each) else NO_CLASS for each in values.reshape(-1)]
            if values.size == count
            else [NO_CLASS] * count
        )
        return _Answers([f"class {each}" for each in classes], classes, True)
    if kind == "text":
        texts = strings_of(np.asarray(output, np.float64), count)
        return _Answers([" ".join(map(str, text)) or "(nothing)" for text in texts], list(texts))
    return _Answers([""] * count, [0] * count)


def _listed(classes: tuple[int, ...]) -> str:
    each = ", ".join(f"{n} of class {c}" for c, n in sorted(Counter(classes).items()))
    return f"{len(classes)} object{'' if len(classes) == 1 else 's'}" + (f": {each}" if each else "")


def _shares(scores: Float64Array) -> Float64Array:
    """Scores as probabilities: unchanged if they already are, else their softmax."""
    if scores.min() >= 0.0 and np.allclose(scores.sum(1), 1.0, atol=1e-2):
        return scores
    shifted: AnyArray = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))
