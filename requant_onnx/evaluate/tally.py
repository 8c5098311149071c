"""Running sums over the outputs of two models, and the figures computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from requant_onnx.convert.report import Compared, FileSizes, ValidationReport
from requant_onnx.errors import DataError
from requant_onnx.evaluate.latency import Latency
from requant_onnx.evaluate.mean_ap import Precision, PrecisionTally
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.numerics.answers import top_classes
from requant_onnx.numerics.arrays import AnyArray, Int64Array
from requant_onnx.numerics.heads import HEADS, Task
from requant_onnx.numerics.outputs import DetectionTally, OutputReport, OutputTally, images_in, without_padding

CHANCE = 3.0  # standard errors above chance; an accuracy below suggests a mistake in the inputs
POOR = 0.05  # AP50 of the reference; a value below suggests wrong labels or a wrong head


@dataclass(frozen=True)
class Timed:
    """The measured times, of batches of `batch` images; none by default."""

    latency: Latency | None = None
    batch: int = 0


class Tally:
    """The running sums over the batches."""

    def __init__(
        self,
        names: tuple[list[str], list[str]],
        images: ImageSet | FeedSet,
        size: tuple[int, int] | None,
        task: Task | None = None,
    ) -> None:
        """names: names of the outputs of the two models.  size: height and width of the images, if there are any.

        task: None to recognize it.
        """
        self._task = task = task or Task()
        self._images, self._size = images, size
        if set(names[0]) != set(names[1]) and len(names[0]) != len(names[1]):
            text = f"the reference has the outputs {names[0]}, but the candidate has {names[1]}"
            raise DataError(f"{text}; compare models with the same outputs")
        others = iter([k for k, name in enumerate(names[1]) if name not in names[0]])
        self._order = [names[1].index(name) if name in names[1] else next(others) for name in names[0]]
        self._outputs = [OutputTally(name) for name in names[0]]
        self._detections = DetectionTally(task)
        self._precision: PrecisionTally | None = None
        if isinstance(images, ImageSet) and images.objects is not None and size is not None:
            self._precision = PrecisionTally(images.objects, size, ids=task.head is not None and HEADS[task.head].ids)
        self._broken = [0, 0]
        self._right: list[list[bool]] = [[], []]
        self._classes = 0

    def add(self, batch: Any, first: list[Any], second: list[Any], start: int, count: int) -> tuple[list[Any], list[Any]]:
        """Compare the outputs of both models for a batch.  count: number of its images that are not padding.

        Returns the outputs of these images, those of the second model in the order of the first.
        """
        second = [second[k] for k in self._order]
        size = len(batch) if isinstance(batch, np.ndarray) else None
        if size is not None:
            first, second = ([without_padding(y, size, count) for y in outputs] for outputs in (first, second))
        images = count if size is not None else images_in(batch.values())[0]
        for tally, one, other in zip(self._outputs, first, second, strict=True):
            tally.add(one, other, images, self._size)
        found = self._detections.add(first, second, images, self._size)
        if self._precision is not None:
            if found is None:
                shapes = ", ".join("x".join(map(str, np.shape(y))) for y in first)
                text = f"the labels are boxes, but the outputs, of shapes {shapes}, are not a recognized head"
                raise DataError(f"{text}; name it with --task detect:HEAD, or drop the labels")
            self._precision.add(found)
        self._broken = [n + _broken(outputs, images) for n, outputs in zip(self._broken, (first, second), strict=True)]
        if self._outputs[0].kind == "scores" and np.shape(first[0]) != np.shape(second[0]):
            raise DataError(
                f"the reference gives {np.shape(first[0])[1]} scores per image, but the candidate {np.shape(second[0])[1]}; "
                "compare models with the same classes"
            )
        if self._images.y is not None and self._task.has_answers:
            self._label(np.asarray(first[0]), np.asarray(second[0]), self._images.y[start : start + count])
        return first, second

    def _label(self, first: AnyArray, second: AnyArray, labels: Int64Array) -> None:
        if self._outputs[0].kind == "classes":
            self._classes = max(self._classes, int(labels.max()) + 1)
            for right, y in zip(self._right, (first, second), strict=True):
                right.extend((y.reshape(-1) == labels).tolist() if y.size == len(labels) else [False] * len(labels))
            return
        if self._outputs[0].kind != "scores":
            raise DataError(
                f"the images have labels, but the first output of the models, of shape {first.shape}, is not one row of scores or "
                "one class per image; give images without labels to compare only the outputs"
            )
        scores = [y.reshape(len(labels), -1) for y in (first, second)]
        self._classes = scores[0].shape[1]
        if labels.min() < 0 or labels.max() >= self._classes:
            text = f"the labels are {labels.min()} to {labels.max()}, but the models give {self._classes} scores"
            raise DataError(f"{text}; give labels of the same classes")
        for right, y in zip(self._right, scores, strict=True):
            right.extend((top_classes(y) == labels).tolist())

    def precision(self) -> Precision | None:
        """The mAP, None without labeled boxes; slow to compute."""
        return None if self._precision is None else self._precision.report()

    def notes(self, how: Normalization, precision: Precision | None) -> tuple[str, ...]:
        """Sentences about models that return NaN or infinity, and about a reference hardly better than chance."""
        named = zip(("reference", "candidate"), self._broken, strict=True)
        what = "inputs" if isinstance(self._images, FeedSet) else "images"
        notes = [f"the {name} gives NaN or infinity for {count} {what}" for name, count in named if count]
        listed = " and std ".join(", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
        if precision is not None and precision.ap50.reference < POOR:
            notes.append(
                f"the reference itself has an AP50 of {precision.ap50.reference:.2%}; check the labels, the head (--task), and the "
                f"normalization (mean {listed})"
            )
        directories = getattr(self._images.x, "classes", 0) if isinstance(self._images, ImageSet) else 0
        has_scores = self._outputs[0].kind == "scores"
        if self._right[0] and has_scores and directories and directories != self._classes:
            notes.append(
                f"the models give {self._classes:,} scores, but the images are in {directories:,} subdirectories, so the labels "
                "are probably wrong: the k-th subdirectory, by name, counts as class k"
            )
        if self._right[0]:
            share, chance = float(np.mean(self._right[0])), 1 / self._classes
            if share < chance + CHANCE * math.sqrt(chance * (1 - chance) / len(self._right[0])):
                notes.append(
                    f"the reference itself is right on {share:.2%} of the images, hardly more than chance; check the labels, and "
                    f"the normalization (mean {listed})"
                )
        return tuple(notes)

    def report(self, sizes: FileSizes, timed: Timed, notes: tuple[str, ...], precision: Precision | None) -> ValidationReport:
        """The figures computed from the sums."""
        detections = self._detections.report()
        answers = detections is None and self._task.has_answers
        outputs = [tally.report(answers=answers) for tally in self._outputs]
        answered = [output for output in ([detections] if detections else outputs) if output.agreement is not None]
        numbers = [output for output in outputs if output.sqnr_db is not None]
        first: OutputReport | None = answered[0] if answered else None
        right = [np.array(each, bool) for each in self._right]
        latency = timed.latency
        report = ValidationReport(
            images=len(self._images),
            top1=Compared(*(float(each.mean()) for each in right)) if len(right[0]) else None,
            top1_error=_paired_error(*right) if len(right[0]) else None,
            agreement=None if first is None else first.agreement,
            agreement_error=None if first is None else first.standard_error,
            agreement_of="" if first is None else first.what,
            sqnr_db=numbers[0].sqnr_db if numbers else None,
            bytes=sizes,
            latency_ms=None if latency is None else Compared(*latency.milliseconds),
            latency_spread=None if latency is None else Compared(*latency.spread),
            latency_ratio=None if latency is None else latency.ratio,
            latency_ratio_error=None if latency is None else latency.ratio_error,
            latency_batch=timed.batch,
            notes=notes,
            kind="inputs" if isinstance(self._images, FeedSet) else "images",
            outputs=(*outputs, *([detections] if detections else [])),
            mean_ap=None if precision is None else precision.mean_ap,
            mean_ap_error=None if precision is None else precision.error,
            ap50=None if precision is None else precision.ap50,
        )
        reshaped = [f"output '{name}' changes its shape for some inputs, so it was not compared" for name in report.reshaped]
        return replace(report, notes=(*notes, *reshaped))


def _paired_error(reference: AnyArray, candidate: AnyArray) -> float:
    """The standard error of a change of accuracy, which comes from images that only one of the two models gets right."""
    difference = candidate.astype(np.float64) - reference
    return float(difference.std() / math.sqrt(len(difference)))


def _broken(outputs: list[Any], images: int) -> int:
    """The number of images, out of `images`, for which an output contains NaN or infinity; at least one for a whole batch."""
    broken = np.zeros(images, bool)
    for y in outputs:
        if isinstance(y, np.ndarray) and y.dtype.kind == "f" and not np.isfinite(y).all():
            has_rows = y.ndim > 0 and len(y) == images
            broken |= ~np.isfinite(y.reshape(images, -1)).all(1) if has_rows else np.arange(images) == 0
    return int(broken.sum())
