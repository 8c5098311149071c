"""Gates: bounds on the figures of a validation, for continuous integration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from requant_onnx.convert.report import ValidationReport
from requant_onnx.errors import ConfigError, QualityError
from requant_onnx.numerics.outputs import worst

EXIT_CODE = 4
SLACK = 1e-9  # for the rounding of 100 * share: 100 * 0.57 is below 57


class Figure(NamedTuple):
    """A figure that can have a bound.  read: its value, None if it was not measured.  is_most: whether it has an upper bound."""

    title: str
    read: Callable[[ValidationReport], float | None]
    is_most: bool


def _is_first_reshaped(report: ValidationReport) -> bool:
    """Whether the first output, on which most figures are, changed its shape."""
    return bool(report.outputs) and report.outputs[0].name in report.reshaped


def _agreement(report: ValidationReport) -> float | None:
    return None if report.agreement is None or _is_first_reshaped(report) else 100 * report.agreement


def _worst(report: ValidationReport) -> float | None:
    return None if report.reshaped else worst(output.sqnr_db for output in report.outputs)


def _found(report: ValidationReport) -> float | None:
    shares = [output.agreement for output in report.outputs if output.kind == "detections" and output.agreement is not None]
    return 100 * shares[0] if shares else None


def _map_drop(report: ValidationReport) -> float | None:
    return None if report.mean_ap is None else 100 * (report.mean_ap.reference - report.mean_ap.candidate)


FIGURES: dict[str, Figure] = {
    "agreement": Figure("the agreement in percent", _agreement, False),
    "top1": Figure("the top-1 accuracy in percent", lambda r: None if r.top1 is None else 100 * r.top1[1], False),
    "top1-drop": Figure("the top-1 drop in points", lambda r: None if r.top1 is None else 100 * (r.top1[0] - r.top1[1]), True),
    "sqnr": Figure("the output SQNR in dB", lambda r: None if _is_first_reshaped(r) else r.sqnr_db, False),
    "worst-sqnr": Figure("the lowest SQNR of all outputs in dB", _worst, False),
    "latency": Figure("the latency relative to the reference", lambda r: r.latency_ratio, True),
    "ratio": Figure("the size of the reference relative to the candidate", lambda r: r.bytes[0] / max(1, r.bytes[1]), False),
    "bytes": Figure("the size of the candidate in bytes", lambda r: float(r.bytes[1]), True),
    "map-drop": Figure("the mAP drop in points", _map_drop, True),
    "found": Figure("the share of detections found again in percent", _found, False),
}
"""The figures that --fail-below can bound, by name."""


def parse_gate(text: str) -> dict[str, float]:
    """Parse bounds.  Raises ConfigError.

    >>> parse_gate("agreement=99,latency=1.1")
    {'agreement': 99.0, 'latency': 1.1}
    """
    bounds = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in FIGURES or not equals:
            near = difflib.get_close_matches(name, FIGURES, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"the figures are {', '.join(FIGURES)}"
            raise ConfigError(f"--fail-below '{part.strip()}' is not of the form FIGURE=NUMBER with a known figure; {hint}")
        if name in bounds:
            raise ConfigError(f"--fail-below has two bounds for {name}; give one of them")
        try:
            bounds[name] = float(value)
        except ValueError:
            bounds[name] = math.nan
        if not math.isfinite(bounds[name]):
            raise ConfigError(f"--fail-below {name} '{value}' is not a number")
    return bounds


def check_gate(report: ValidationReport, bounds: Mapping[str, float]) -> None:
    """Raise QualityError, which lists all failures, unless the report meets the bounds; a figure that was not measured fails."""
    failures = []
    for name, bound in bounds.items():
        figure = FIGURES[name]
        value = figure.read(report)
        if value is None:
            failures.append(f"{figure.title} was not measured")
        elif not (value <= bound + SLACK if figure.is_most else value >= bound - SLACK):  # NaN fails
            failures.append(f"{figure.title} is {value:.6g}, {'above' if figure.is_most else 'below'} {bound:g}")
    if failures:
        raise QualityError(f"the candidate fails: {'; '.join(failures)}", EXIT_CODE)
