"""A self-contained page about a conversion, which needs no network, has a light and a dark theme, and fits every screen width."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from requant_onnx.convert.report import ValidationReport, WeightReport
from requant_onnx.evaluate.page_data import Shown, Study
from requant_onnx.evaluate.weight_comparison import ComparedWeight
from requant_onnx.files.compressed import PACKERS
from requant_onnx.numerics.arrays import UInt8Array
from requant_onnx.numerics.kinds import GridKind
from requant_onnx.progress import Progress
from requant_onnx.runtime.explain import WeightFate
from requant_onnx.runtime.version import runtime_version
from requant_onnx.text import shape_text
from requant_onnx.webpage.figures import charts_of, growth_chart
from requant_onnx.webpage.network import draw
from requant_onnx.webpage.terms import TERMS

THUMBNAIL = 160  # longer side of an example's image, in pixels


@dataclass(frozen=True)
class Column:
    """A column of a table.  title: heading.  text: whether it contains text.  term: term of the glossary that explains it."""

    title: str
    text: bool = False
    term: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.  shown: text.  value: sort key.  text: whether it is text."""

    shown: str
    value: float | str = ""
    text: bool = False


def render(study: Study, progress: Progress | None = None) -> str:
    """The page as HTML."""
    fates = {weight.name: weight for weight in study.explanation.weights} if study.explanation else {}
    details, rows = [], []
    for number, weight in enumerate(study.weights):
        fate = fates.get(weight.name)
        report = None if study.conversion is None else _report_of(weight, fate, study.conversion.converted)
        details.append(_detail(number, weight, fate, report))
        rows.append(_row(number, weight, fate, report, study.conversion is not None))
        if progress is not None:
            progress("drawing", number + 1, len(study.weights))
    answers = study.answers
    return fill(
        "page.html",
        title=Path(study.names[1]).name,
        subtitle=f"Quantized weights compared to {study.names[0]}: how each was converted, and what it costs.",
        data="" if answers is None else answers.data,
        verdict=study.verdict,
        cards=_cards(study),
        notes=_notes(study),
        network=draw(study.flow, study.weights),
        examples=[] if answers is None else [_example(shown) for shown in answers.examples],
        changes=[] if answers is None else answers.changes,
        outputs=[] if answers is None or len(answers.validation.outputs) < 2 else _outputs(answers.validation),
        growth=growth_chart(study.weights),
        columns=_columns(study.conversion is not None),
        rows=rows,
        left=[f"{item.name} ({item.op}) {item.reason}" for item in study.conversion.skipped] if study.conversion else [],
        ranges=study.ranges,
        weights=details,
        settings=[{"title": title, "text": text} for title, text in study.settings],
    )


def _example(shown: Shown) -> dict[str, Any]:
    """An example for the page, with its image as a data URI, "" if there is none."""
    example = shown.example
    same = f"both {example.answers[0]}" if example.answers[0] else "only values"
    answers = f"float {example.answers[0]}, converted {example.answers[1]}" if example.differs else same
    sqnr = "no SQNR" if math.isnan(example.sqnr_db) else f"{_decibels(example.sqnr_db)} SQNR"
    text = f"input {example.index}: {answers}, {f'right answer {example.label}, ' if example.label else ''}{sqnr}"
    return {"text": text, "image": "" if shown.pixels is None else _data_uri(shown.pixels), "differs": example.differs}


def _data_uri(pixels: UInt8Array) -> str:
    """The data URI of a thumbnail.  pixels: (h, w, 1 or 3)."""
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(pixels.shape[:2]) <= THUMBNAIL // 2 else "JPEG")
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _outputs(report: ValidationReport) -> list[tuple[str, ...]]:
    """The table rows, one per output."""
    rows: list[tuple[str, ...]] = []
    for output in report.outputs:
        agreement = "" if output.agreement is None else f"{output.agreement:.2%} of {output.count:,} {output.what}"
        sqnr = "" if output.sqnr_db is None else _decibels(output.sqnr_db)
        more = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in output.extra.items())
        rows.append((output.name, output.kind, sqnr, agreement, more))
    return rows


def fill(name: str, **values: Any) -> str:
    """Fill a template."""
    templates = Environment(loader=PackageLoader("requant_onnx", "webpage"), autoescape=True, trim_blocks=True)
    templates.globals["terms"] = TERMS
    page: str = templates.get_template(name).render(
        version=version("requant_onnx"),
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        footer=f"Made by requant_onnx {version('requant_onnx')} with ONNX Runtime {runtime_version()}.",
        **values,
    )
    return page


def _text(name: str) -> str:
    return files("requant_onnx.webpage").joinpath(name).read_text("utf-8")


def _cards(study: Study) -> list[dict[str, str]]:
    before, after = study.bytes
    cards = [("file size", f"{after:,} B", f"of {before:,} B, {before / max(1, after):.2f} x smaller")]
    if study.downloads:
        name, size = min(study.downloads.items(), key=lambda item: item[1])
        others = [f"{bytes_:,} B as {PACKERS[other]}" for other, bytes_ in study.downloads.items() if other != name]
        cards.append((f"download, {PACKERS[name]}", f"{size:,} B", ", ".join(others)))
    result = None if study.answers is None else study.answers.validation
    if result is not None and result.top1 is not None:
        change, error = (result.top1[1] - result.top1[0]) * 100, 100 * (result.top1_error or 0.0)
        note = f"of {result.top1[0]:.2%}, {change:+.2f} points, standard error {error:.2f}"
        cards.append(("top-1 accuracy", f"{result.top1[1]:.2%}", note))
    if result is not None and result.mean_ap is not None:
        change, error = (result.mean_ap[1] - result.mean_ap[0]) * 100, 100 * (result.mean_ap_error or 0.0)
        note = f"of {result.mean_ap[0]:.2%}, {change:+.2f} points, standard error {error:.2f}"
        cards.append(("mAP", f"{result.mean_ap[1]:.2%}", note))
    if result is not None:
        if result.agreement is not None:
            note = f"of {result.images:,} {result.kind}, standard error {result.agreement_error:.2%}"
            cards.append((f"{result.agreement_of} agreement", f"{result.agreement:.2%}", note))
        if result.sqnr_db is not None:
            cards.append(("output SQNR", _decibels(result.sqnr_db), "of the first output"))
        if result.latency_ms is not None and result.latency_ratio is not None:
            times = f"{result.latency_ms[1]:.2f} ms of {result.latency_ms[0]:.2f} ms, batch {result.latency_batch}"
            note = f"{times}, standard error {result.latency_ratio_error or 0.0:.2f}"
            cards.append(("latency", f"{result.latency_ratio:.2f} x", note))
    if study.conversion is not None:
        made = study.conversion
        note = f"{len(made.converted)} weights, {made.bytes_before:,} to {made.bytes_after:,} B"
        cards.append(("coverage", f"{made.coverage:.1%}", f"of the bytes of all float constants; {note}"))
    else:
        quantized = sum(weight.outcome == "grid" for weight in study.weights)
        cards.append(("weights", f"{quantized}", f"of {len(study.weights)} are quantized"))
    return [{"label": label, "value": value, "note": note, "term": _term(label)} for label, value, note in cards]


def _term(label: str) -> str:
    """The glossary term that a label ends with."""
    return next((term for term in TERMS if label.endswith(term)), "")


def _notes(study: Study) -> list[str]:
    result = None if study.answers is None else study.answers.validation
    notes = [*study.notes, *(result.notes if result else ())]
    notes += study.conversion.notes if study.conversion else ()
    if result is not None and result.top1 is None and result.mean_ap is None:
        notes.append("the inputs have no labels: this shows how similar the models' answers are, not how good")
    notes = [f"the outputs of layers were compared on {study.inputs}", *notes] if study.inputs else notes
    return [note[:1].upper() + note[1:].rstrip(".") + "." for note in notes]


def _columns(converted: bool) -> list[Column]:
    titles = [Column("weight", True), Column("op", True), Column("shape"), Column("bits"), Column("transform", True, "transform")]
    titles += [Column("mean alpha", term="alpha"), Column("weight SQNR, dB", term="SQNR")]
    titles += [Column("output SQNR, dB", term="output SQNR"), Column("alone, dB", term="alone")]
    titles += [Column("bytes before"), Column("after")] if converted else []
    return [*titles, Column("in ONNX Runtime", True, "folded at load")]


def _report_of(weight: ComparedWeight, fate: WeightFate | None, reports: Sequence[WeightReport]) -> WeightReport | None:
    """The report on a weight, found by its name or by that of a tensor it is decoded from, because a Cast may be in between."""
    names = {weight.name} if fate is None else {weight.name, *fate.behind}
    return next((report for report in reports if report.name in names), None)


def _row(
    number: int, weight: ComparedWeight, fate: WeightFate | None, report: WeightReport | None, converted: bool
) -> dict[str, Any]:
    elements = math.prod(weight.shape)
    cells = [
        Cell(weight.name),
        Cell(weight.op, text=True),
        Cell(shape_text(weight.shape), elements),
        Cell(str(weight.bits) if weight.outcome == "grid" else "32" if weight.outcome == "same" else "", weight.bits),
        Cell("" if weight.grid is None else _transform(weight.grid), text=True),
        Cell("", "") if weight.alpha is None else Cell(f"{weight.alpha[1]:.3f}", weight.alpha[1]),
        _number(weight.sqnr_db),
        _number(weight.output_sqnr_db),
        _number(weight.alone_sqnr_db),
    ]
    if converted:
        cells += [Cell(f"{n:,}", n) for n in (report.bytes_before, report.bytes_after)] if report else [Cell(""), Cell("")]
    cells.append(Cell(fate.fate.value if fate else "", text=True))
    return {"id": f"weight-{number}", "order": number, "cells": cells}


def _number(decibels: float) -> Cell:
    if math.isnan(decibels):
        return Cell("")
    return Cell("exact" if decibels == math.inf else f"{decibels:.1f}", min(decibels, 1e9))


def _detail(number: int, weight: ComparedWeight, fate: WeightFate | None, report: WeightReport | None) -> dict[str, Any]:
    facts = [("operator", weight.op), ("shape", shape_text(weight.shape))]
    if weight.grid is not None and weight.alpha is not None and weight.scales is not None:
        transform = "no transform" if weight.grid.is_uniform else f"transform {_transform(weight.grid)}"
        scales = "one scale" if weight.scales.size == 1 else f"{weight.scales.size} scales"
        facts += [("grid", f"{weight.bits} bits, {transform}, {scales}")]
        facts += [("alpha", f"{weight.alpha[0]:.3f} to {weight.alpha[2]:.3f}, mean {weight.alpha[1]:.3f}")]
    kinds = {
        "same": "identical values",
        "changed": f"{_decibels(weight.sqnr_db)}, on an unknown grid",
        "grid": _decibels(weight.sqnr_db),
        "unknown": "not compared",
    }
    facts += [("weight SQNR", kinds[weight.outcome]), ("output SQNR", _decibels(weight.output_sqnr_db))]
    if not math.isnan(weight.alone_sqnr_db):
        facts += [("output SQNR of the model with only this weight quantized", _decibels(weight.alone_sqnr_db))]
    if report is not None:
        facts += [("form", report.form), ("method", report.method), ("bytes", f"{report.bytes_before:,} to {report.bytes_after:,}")]
        tried = ", ".join(f"{step} {error:.2e}" for step, error in report.output_errors.items())
        facts += [("relative output error by method tried", tried)] if tried else []
        facts += [("not int8, because it", report.why_not_int8)] if report.why_not_int8 else []
    if fate is not None:
        facts += [
            ("in ONNX Runtime", f"{fate.fate.value}, read by {fate.kernel or weight.op}{f': {fate.why}' if fate.why else ''}")
        ]
    line = f"{weight.bits} bits, {_decibels(weight.sqnr_db)}" if weight.outcome == "grid" else kinds[weight.outcome]
    return {"id": f"weight-{number}", "title": weight.name, "line": line, "facts": facts, "charts": charts_of(weight, number)}


def _transform(grid: GridKind) -> str:
    name, _, exponent = grid.describe().partition(":")
    return f"{name} {Fraction(exponent).limit_denominator(12)}" if exponent else name


def _decibels(value: float) -> str:
    return "not compared" if math.isnan(value) else "exact" if math.isinf(value) and value > 0 else f"{value:.1f} dB"
