"""A verdict on whether a converted model can be shipped, as far as the data shows, with its reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from requant_onnx.convert.report import GOOD_AGREEMENT, GOOD_DB, LEAST_DB, Compared, FileSizes, ValidationReport
from requant_onnx.numerics.outputs import SAME
from requant_onnx.text import decibels

SMALL_DROP, LARGE_DROP = 0.5, 2.0  # drops in top-1, in points: good up to the first, bad beyond the second
LEAST_AGREEMENT = 0.9
SLOWER = 1.1  # relative latency


class Level(Enum):
    """The rating of a figure."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"


@dataclass(frozen=True)
class Reason:
    """A finding, as a sentence."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """A verdict, decided by the worst of its reasons."""

    reasons: tuple[Reason, ...]

    @property
    def level(self) -> Level:
        """The worst level of all reasons."""
        levels = {reason.level for reason in self.reasons}
        return next(level for level in (Level.BAD, Level.DOUBTFUL, Level.GOOD) if level in levels)

    @property
    def sentence(self) -> str:
        """The answer to whether the model can be shipped."""
        return {
            Level.GOOD: "Yes, as far as this data shows.",
            Level.DOUBTFUL: "Not before you have checked the doubtful points below.",
            Level.BAD: "No.",
        }[self.level]


def judge(validation: ValidationReport | None, sizes: FileSizes, doubts: tuple[str, ...] = ()) -> Verdict:
    """The verdict.  validation: None if nothing could be compared.  doubts: weaknesses of the data, as sentences."""
    ratio = sizes.reference / max(1, sizes.candidate)
    if ratio > 1:
        reasons = [Reason(Level.GOOD, f"The file is {ratio:.2f} times smaller.")]
    else:
        reasons = [Reason(Level.BAD, f"The file is not smaller: {sizes.candidate:,} bytes, compared to {sizes.reference:,}.")]
    reasons += [Reason(Level.DOUBTFUL, text) for text in doubts]
    if validation is None:
        return Verdict((*reasons, Reason(Level.DOUBTFUL, "The answers were not compared.")))
    found = (_accuracy(validation), _precision(validation), _agreement(validation))
    reasons += [reason for reason in found if reason is not None]
    for name in validation.reshaped:
        reasons.append(Reason(Level.DOUBTFUL, f"The output {name} changes its shape for some inputs, so it was not compared."))
    reasons += [*_outputs(validation), *_latency(validation)]
    return Verdict(tuple(reasons))


def _accuracy(report: ValidationReport) -> Reason | None:
    return None if report.top1 is None else _of_change("Top-1 accuracy", report.top1, report.top1_error)


def _precision(report: ValidationReport) -> Reason | None:
    return None if report.mean_ap is None else _of_change("The mAP", report.mean_ap, report.mean_ap_error)


def _of_change(title: str, both: Compared, standard_error: float | None) -> Reason:
    change, error = 100 * (both[1] - both[0]), 100 * (standard_error or 0.0)
    text = f"{title} changes by {change:+.2f} points (standard error {error:.2f}), from {both[0]:.2%}."
    if change >= -SMALL_DROP:
        return Reason(Level.GOOD, text)
    return Reason(Level.DOUBTFUL if change >= -max(LARGE_DROP, 2 * error) else Level.BAD, text)


def _agreement(report: ValidationReport) -> Reason | None:
    if report.agreement is None:
        return None
    error = report.agreement_error or 0.0
    text = f"{report.agreement:.2%} {SAME[report.agreement_of]} (standard error {error:.2%})."
    if report.agreement + error >= GOOD_AGREEMENT:
        return Reason(Level.GOOD, text)
    labeled = report.top1 is not None or report.mean_ap is not None  # labels are more informative than agreement
    lost = report.agreement + error < LEAST_AGREEMENT and not labeled
    return Reason(Level.BAD if lost else Level.DOUBTFUL, text)


def _outputs(report: ValidationReport) -> list[Reason]:
    known = [(output.sqnr_db, output.name) for output in report.outputs if output.sqnr_db is not None]
    if not known:
        is_said = report.agreement is not None or report.reshaped
        return [] if is_said else [Reason(Level.DOUBTFUL, "No output is a tensor of numbers.")]
    least, name = min(known, key=lambda each: (not math.isnan(each[0]), each[0]))  # NaN is the worst
    text = f"The output SQNR is {decibels(least)}" + (f" for the worst of {len(known)} outputs, {name}." if len(known) > 1 else ".")
    if not least >= LEAST_DB:  # NaN too
        return [Reason(Level.BAD, text)]
    return [Reason(Level.GOOD if least >= GOOD_DB else Level.DOUBTFUL, text)]


def _latency(report: ValidationReport) -> list[Reason]:
    if report.latency_ratio is None:
        return []
    ratio = report.latency_ratio
    if ratio <= SLOWER:
        return [Reason(Level.GOOD, f"A run takes {ratio:.2f} times as long as before, on this machine.")]
    advice = "weights that are decoded in every run are listed below; --form folded decodes them once, at load"
    return [Reason(Level.DOUBTFUL, f"A run takes {ratio:.2f} times as long as before, on this machine: {advice}.")]
