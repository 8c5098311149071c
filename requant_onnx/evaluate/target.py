"""The smallest file that meets a target for its answers, measured on data that rounding has not used.

Widths are tried by bisection, then files with separate bits for each weight, between the largest file that failed and the smallest
that passed.  A target is met if the figure reaches it.  Because test sets are finite, the result also states whether it is met
with 95 % confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx

from requant_onnx.config import Budget, QuantConfig
from requant_onnx.convert.pipeline import quantize_model
from requant_onnx.convert.report import QuantReport
from requant_onnx.convert.selfcheck import self_check
from requant_onnx.errors import ConfigError, RequantError
from requant_onnx.evaluate.gate import SLACK
from requant_onnx.evaluate.validate import validate
from requant_onnx.files.load import ModelLike, load_model
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.progress import Progress
from requant_onnx.runtimes import RUNTIMES

CONFIDENT = 1.645  # standard errors: 95 % on one side
MIXED_TRIES = 3
Evaluate = Callable[[onnx.ModelProto], float]


@dataclass(frozen=True)
class Target:
    """The target that a file must meet.  Exactly one of max_drop and min_agreement is given.

    max_drop: largest drop in top-1 accuracy on labeled images, in points, or in the score of a function to evaluate.
    min_agreement: smallest share of answers that agree with the float model, in percent.
    size: largest size of the file, in bytes; None for no limit.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.max_drop is None) == (self.min_agreement is None):
            raise ConfigError("a target needs either a largest drop or a smallest agreement; give exactly one of the two")
        if self.max_drop is not None and not (math.isfinite(self.max_drop) and self.max_drop >= 0.0):
            raise ConfigError(f"the largest drop must be 0 or more, not {self.max_drop}")
        if self.min_agreement is not None and not 0.0 < self.min_agreement <= 100.0:
            raise ConfigError(f"the smallest agreement must be above 0 % and at most 100 %, not {self.min_agreement} %")


@dataclass(frozen=True)
class Trial:
    """A file that was tried.  value: value of the figure.  error: its standard error, NaN if unknown.

    reaches: whether the value meets the target.  holds: whether it also has at most the size that was given.
    is_sure: whether it does so with 95 % confidence.
    """

    bytes: int
    bits: str
    value: float
    error: float
    reaches: bool
    holds: bool
    is_sure: bool


@dataclass(frozen=True)
class Found:
    """The best file, and all trials.  holds: whether it meets the target and the size.  sentence: result for users."""

    model: onnx.ModelProto
    report: QuantReport
    trials: tuple[Trial, ...]
    holds: bool
    sentence: str


def find_smallest(
    model: ModelLike,
    config: QuantConfig,
    target: Target,
    *,
    calibration: Calibration | None = None,
    data: ImageSet | FeedSet | None = None,
    normalization: Normalization | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Found:
    """Find the smallest file that meets a target, or the best one tried if none does.

    config: settings; its bits are not used.  data: inputs for the measurement, with labels for a drop; not needed with `evaluate`.
    evaluate: function that returns the score of a model, higher is better, for example a mAP.
    Raises ConfigError if the target and the data do not fit together, and as quantize_model and validate.
    """
    return _Search(load_model(model), config, target, calibration, data, normalization, evaluate, progress, threads).run()


class _Search:
    def __init__(
        self,
        model: onnx.ModelProto,
        config: QuantConfig,
        target: Target,
        calibration: Calibration | None,
        data: ImageSet | FeedSet | None,
        normalization: Normalization | None,
        evaluate: Evaluate | None,
        progress: Progress | None,
        threads: int | None,
    ) -> None:
        if evaluate is None and data is None:
            raise ConfigError("a target is measured on data; give --data, or a function to evaluate")
        if evaluate is None and target.max_drop is not None and (data is None or data.y is None):
            raise ConfigError("a drop in accuracy is measured on labels; give labeled --data, or --min-agreement")
        if evaluate is not None and target.max_drop is None:
            raise ConfigError("a function to evaluate needs a largest drop in its score; give --max-drop")
        self._model, self._config, self._target = model, config, target
        self._calibration, self._data, self._normalization = calibration, data, normalization
        self._evaluate, self._progress, self._threads = evaluate, progress, threads
        self._float = None if evaluate is None else float(evaluate(model))
        self._trials: list[tuple[Trial, onnx.ModelProto, QuantReport]] = []
        self._too_small = 0  # the largest size that no choice of bits reaches

    def run(self) -> Found:
        widths = RUNTIMES[self._config.runtime].bits
        low, high = 0, len(widths) - 1
        while low < high:  # find the fewest bits that meet the target, if any do
            middle = (low + high) // 2
            trial = self._try(replace(self._config, bits=widths[middle]), str(widths[middle]))
            if trial.reaches:  # if it does not fit, more bits would not help
                high = middle
            else:
                low = middle + 1
        if not any(trial.bits == str(widths[high]) for trial, *_ in self._trials):
            self._try(replace(self._config, bits=widths[high]), str(widths[high]))
        for _ in range(MIXED_TRIES if self._calibration is not None else 0):
            held = [trial.bytes for trial, *_ in self._trials if trial.reaches]
            failed = [trial.bytes for trial, *_ in self._trials if held and not trial.reaches and trial.bytes < min(held)]
            if not failed:
                break
            size = (min(held) + max(*failed, self._too_small)) // 2
            try:
                self._try(replace(self._config, bits=Budget(size=size)), "auto")
            except ConfigError:  # no choice of bits reaches this size
                self._too_small = size
        return self._found()

    def _try(self, config: QuantConfig, bits: str) -> Trial:
        if self._progress is not None:
            self._progress(f"trying {bits} bits", len(self._trials), 4 + MIXED_TRIES)
        made, report = quantize_model(self._model, config, calibration=self._calibration, threads=self._threads, check=False)
        value, error = self._measure(made)
        limit = -(self._target.max_drop or 0.0) if self._target.min_agreement is None else self._target.min_agreement
        size = made.ByteSize() if report.download_bytes is None else report.download_bytes
        fits = self._target.size is None or size <= self._target.size
        reaches = value >= limit - SLACK
        trial = Trial(size, bits, value, error, reaches, fits and reaches, fits and value - CONFIDENT * error >= limit)
        self._trials.append((trial, made, report))
        return trial

    def _measure(self, made: onnx.ModelProto) -> tuple[float, float]:
        """The figure, higher is better, and its standard error."""
        if self._evaluate is not None and self._float is not None:
            return float(self._evaluate(made)) - self._float, math.nan
        assert self._data is not None
        report = validate(self._model, made, self._data, self._normalization, latency_batch=None)
        least_error = 1 / (report.images + 1)  # that no image differs in a small sample does not show that none does
        if self._target.min_agreement is not None:
            if report.agreement is None or report.agreement_error is None:
                raise ConfigError("the model has no output with answers, such as rows of scores; give a function to evaluate")
            return 100 * report.agreement, 100 * max(report.agreement_error, least_error)
        assert report.top1 is not None
        return 100 * (report.top1[1] - report.top1[0]), 100 * max(report.top1_error or 0.0, least_error)

    def _found(self) -> Found:
        order = sorted((k for k in self._trials if math.isfinite(k[0].value)), key=lambda each: each[0].bytes)
        if not order:
            raise RequantError("no file that was tried could be measured; check the data and the model")
        holding = [each for each in order if each[0].holds]
        fitting = [each for each in order if self._target.size is None or each[0].bytes <= self._target.size]
        trial, model, report = holding[0] if holding else max(fitting or order, key=lambda each: each[0].value)
        what = "the agreement" if self._target.min_agreement is not None else "the change in the score"
        figure = f"{what} is {trial.value:.2f}" + (f" (standard error {trial.error:.2f})" if trial.error > 0.0 else "")
        wanted = f"{-(self._target.max_drop or 0.0):g}" if self._target.min_agreement is None else f"{self._target.min_agreement:g}"
        if not holding:
            limit = "" if self._target.size is None else f" in at most {self._target.size:,} bytes"
            sentence = (
                f"no file that was tried reaches the target of {wanted}{limit}; for the best, {figure}, in {trial.bytes:,} bytes"
            )
        elif trial.is_sure:
            sentence = f"{figure}, which reaches the target of {wanted} with 95 % confidence, in {trial.bytes:,} bytes"
        else:
            is_known = not math.isnan(trial.error)
            sure = "but not with 95 % confidence, which needs more data" if is_known else "with an unknown standard error"
            sentence = f"{figure}, which reaches the target of {wanted}, {sure}, in {trial.bytes:,} bytes"
        check = self_check(self._model, model, self._calibration)
        report = replace(report, why_unchecked=check) if isinstance(check, str) else replace(report, check=check, why_unchecked="")
        return Found(model, report, tuple(trial for trial, *_ in self._trials), bool(holding), sentence)
