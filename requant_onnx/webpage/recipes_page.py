"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from requant_onnx.evaluate.recipes import Comparison
from requant_onnx.text import decibels
from requant_onnx.webpage.figures import trials_chart
from requant_onnx.webpage.report_page import Cell, Column, fill


def render_comparison(comparison: Comparison, name: str, settings: Sequence[tuple[str, str]]) -> str:
    """The page as HTML.  name: name of the model."""
    labeled = comparison.top1 is not None
    cards = [("file size", f"{comparison.bytes:,} B", "")]
    cards.append(("images", f"{comparison.images:,}", "" if labeled else "without labels"))
    cards += [("top-1 accuracy", f"{comparison.top1:.2%}", "")] if comparison.top1 is not None else []
    answered = all(trial.agreement is not None for trial in comparison.trials)
    has_errors = all(trial.sqnr_db is not None for trial in comparison.trials)
    measures = [*(["sqnr_db"] if has_errors else []), *(["top1"] if labeled else ["agreement"] if answered else [])]
    titles = ["recipe", "bits", "bytes", "x smaller", *(["top-1", "change, points"] if labeled else []), "agreement", "SQNR, dB"]
    return fill(
        "comparison.html",
        title=f"Recipes for {name}",
        subtitle="Every recipe at every width, compared to the float model.",
        cards=[{"label": label, "value": value, "note": note} for label, value, note in cards],
        notes=[] if labeled else ["The images have no labels: this shows how similar the models' answers are, not how good."],
        charts=[trials_chart(comparison.trials, measure) for measure in measures],
        columns=[Column(title, title == "recipe") for title in titles],
        rows=[_row(k, trial, labeled) for k, trial in enumerate(comparison.trials)],
        settings=[{"title": title, "text": text} for title, text in settings],
    )


def _row(number: int, trial: Any, labeled: bool) -> dict[str, Any]:
    cells = [Cell(trial.recipe), Cell(str(trial.bits), trial.bits), Cell(f"{trial.bytes:,}", trial.bytes)]
    cells.append(Cell(f"{trial.ratio:.2f}", trial.ratio))
    if labeled:
        cells += [Cell(f"{trial.top1:.2%}", trial.top1), Cell(f"{trial.change * 100:+.2f}", trial.change)]
    agreement = Cell("", -1.0) if trial.agreement is None else Cell(f"{trial.agreement:.2%}", trial.agreement)
    sqnr = Cell("", -1e9) if trial.sqnr_db is None else Cell(decibels(trial.sqnr_db, ""), min(trial.sqnr_db, 1e9))
    cells += [agreement, sqnr]
    return {"order": number, "cells": cells}
