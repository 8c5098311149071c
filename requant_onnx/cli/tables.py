"""Reports as tables for the terminal (rich), or as plain text if the output is not a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from requant_onnx.choices import Form
from requant_onnx.cli.grid import Grid
from requant_onnx.cli.record import Line
from requant_onnx.convert.report import (
    GOOD_AGREEMENT,
    GOOD_DB,
    Compared,
    FrontPoint,
    InspectReport,
    QuantReport,
    SelfCheck,
    ValidationReport,
    WeightReport,
)
from requant_onnx.convert.restore import RestoreReport
from requant_onnx.evaluate.recipes import Comparison
from requant_onnx.evaluate.sensitivity import WeightCost
from requant_onnx.files.compressed import PACKERS
from requant_onnx.files.planes import SavedStage
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.weights import SkippedWeight
from requant_onnx.numerics.outputs import OutputReport
from requant_onnx.runtime.explain import Explanation
from requant_onnx.text import decibels, shape_text

ROWS = 12  # largest number of weights that are listed without -v
NOISY = 0.5  # interquartile range of latencies, relative to the lower quartile
ALIKE = 3  # largest number of skipped weights with the same reason that get a line each


def print_conversion(
    console: Console, report: QuantReport, sizes: tuple[int, int], downloads: Mapping[str, int], *, whole: bool = True
) -> None:
    """Print the weights, the skipped weights with their reasons, and totals.

    sizes: bytes of the two files.  downloads: bytes of the second, by compressor.  whole: whether each of many weights gets a row.
    """
    if report.converted and len(report.converted) > ROWS and not whole:
        console.print(escape(_weights_in_short(report.converted)))
    elif report.converted:
        table = Grid("weight", "op", "shape", "bits", "transform", "alpha", "scale", "MSE", "SQNR dB", "bytes before", "after")
        for weight in report.converted:
            table.add_row(*_weight_row(weight))
        table.show(console)
    print_skipped(console, report.skipped)
    hint = FORMS[Form(report.config["form"])].hint
    if report.converted and hint:
        console.print(hint)
    if report.activations:
        console.print(f"activation tensors on 8-bit integers: {len(report.activations)}")
        integers = [weight for weight in report.converted if FORMS[Form(weight.form)].on_integers]
        share = sum(weight.bytes_before for weight in integers) / max(1, report.bytes_before)
        rest = "; the others are decoded at load time and run at float speed" if len(integers) < len(report.converted) else ""
        console.print(f"weights on integers: {len(integers)} of {len(report.converted)}, {share:.0%} of their bytes{rest}")
    for line in _remarks(report):
        console.print(escape(line))
    if report.folded_batchnorms:
        console.print(f"BatchNormalization folded into the layer before it: {report.folded_batchnorms}")
    if report.opset[0] != report.opset[1]:
        console.print(f"opset raised from {report.opset[0]} to {report.opset[1]}, which decoding the weights requires")
    _print_front(console, report.front)
    before, after = report.bytes_before, report.bytes_after
    folded = " after BatchNormalization was folded" if report.folded_batchnorms else ""
    covered = f", {report.coverage:.1%} of the bytes of all float constants{folded}" if report.converted else ""
    vectors = report.vectors
    if vectors.count:
        console.print(f"vectors as float16: {vectors.count}, {vectors.bytes_before:,} -> {vectors.bytes_after:,} bytes")
    console.print(f"weights: {len(report.converted)} converted{covered}, {before:,} -> {after:,} bytes{_ratio(before, after)}")
    console.print(f"file: {sizes[0]:,} -> {sizes[1]:,} bytes{_ratio(*sizes)}")
    _print_end(console, report, downloads)


def _weights_in_short(weights: Sequence[WeightReport]) -> str:
    """One line for many weights: how many have how many bits, and the one with the largest error."""
    counts = Counter(weight.bits for weight in weights)
    widths = ", ".join(f"{count} of {bits:g} bits" for bits, count in sorted(counts.items(), reverse=True))
    worst = min(weights, key=lambda weight: weight.sqnr_db)
    return f"weights: {widths}; the largest relative error is that of {worst.name} ({decibels(worst.sqnr_db)}); -v lists all"


def _print_end(console: Console, report: QuantReport, downloads: Mapping[str, int]) -> None:
    if downloads:
        console.print(f"download: {', '.join(f'{size:,} bytes as {PACKERS[name]}' for name, size in downloads.items())}")
    if report.download_bytes is not None and report.converted:
        weights = sum(math.prod(weight.shape) for weight in report.converted)
        console.print(f"in the download, a weight takes {8 * report.download_bytes / weights:.2f} bits")
    if report.converted:
        console.print(escape(_check(report)))


def _check(report: QuantReport) -> str:
    if report.check is None:
        return f"not checked: {report.why_unchecked}"
    if report.check.is_good:
        return f"check: {report.check.sentence()}"
    limits = f"{GOOD_DB:g} dB and {GOOD_AGREEMENT:.0%}"
    return f"warning: {report.check.sentence()}; below {limits}, answers may change, so compare the models with `requant validate`"


def _print_front(console: Console, front: tuple[FrontPoint, ...]) -> None:
    if not front:
        return
    table = Grid("approx. bytes", "SQNR dB")
    for point in front:
        table.add_row(f"{point.bytes:,}", f"{point.sqnr_db:.1f}")
    table.show(console)


def _remarks(report: QuantReport) -> list[str]:
    """One line for each weight that is folded instead of int8, and for each note."""
    folded: dict[str, list[WeightReport]] = {}
    for weight in report.converted:
        if weight.why_not_int8:
            folded.setdefault(weight.why_not_int8, []).append(weight)
    lines = [f"folded instead of int8: {_names(weights)} {why}" for why, weights in folded.items()]
    return lines + [f"note: {note}" for note in report.notes]


def _names(weights: Sequence[WeightReport]) -> str:
    """The weights that share a reason: each by name if there are few."""
    if len(weights) > ALIKE:
        return f"{len(weights)} weights; each"
    return ", ".join(f"{weight.name} ({weight.op})" for weight in weights)


def print_skipped(console: Console, items: tuple[SkippedWeight, ...]) -> None:
    """Print one line per skipped weight, and one line for all that share a reason if there are many of them."""
    counts = Counter(item.reason for item in items)
    many = {reason: count for reason, count in counts.items() if count > ALIKE}
    for item in items:
        if item.reason not in many:
            console.print(escape(f"skipped: {item.name} ({item.op}, {shape_text(item.shape)}) {item.reason}"))
    for reason, count in many.items():
        alike = [item for item in items if item.reason == reason]
        ops = ", ".join(f"{op} {number}" for op, number in Counter(item.op for item in alike).most_common())
        size = sum(item.bytes for item in alike)
        amount = f" of {size:,} bytes" if size else ""
        console.print(escape(f"skipped: {count} constants{amount} ({ops}); each {reason}"))


def print_validation(console: Console, report: ValidationReport, downloads: Mapping[str, tuple[int | None, int]]) -> None:
    """Print the reference next to the candidate, and the similarity of every output.

    downloads: bytes of both, by compressor; None where compressing would take too long.
    """
    table = Grid(f"{report.images:,} {report.kind}", "reference", "candidate", "")
    if report.top1 is not None and report.top1_error is not None:
        table.add_row("top-1", *(f"{value:.2%}" for value in report.top1), _change(report.top1, report.top1_error))
    if report.mean_ap is not None and report.ap50 is not None:
        table.add_row("mAP", *(f"{value:.2%}" for value in report.mean_ap), _change(report.mean_ap, report.mean_ap_error or 0.0))
        table.add_row("AP50", *(f"{value:.2%}" for value in report.ap50), f"{100 * (report.ap50[1] - report.ap50[0]):+.2f} points")
    table.add_row("file size", *(f"{size:,}" for size in report.bytes), _times(*report.bytes))
    for name, (before, after) in downloads.items():
        cells = (
            ("too large to measure", f"{after:,}", "") if before is None else (f"{before:,}", f"{after:,}", _times(before, after))
        )
        table.add_row(f"as {PACKERS[name]}", *cells)
    if report.latency_ms is not None and report.latency_ratio is not None:
        latency = f"latency, batch {report.latency_batch}"
        noise = "; noisy: other work runs on this machine" if max(report.latency_spread or (0.0,)) > NOISY else ""
        change = f"{report.latency_ratio:.2f} x the time (standard error {report.latency_ratio_error or 0.0:.2f}{noise})"
        table.add_row(latency, *(f"{value:.2f} ms" for value in report.latency_ms), change)
    table.show(console)
    answers = []
    if report.agreement is not None:
        answers.append(f"{report.agreement_of} agreement {report.agreement:.2%}, standard error {report.agreement_error:.2%}")
    if report.sqnr_db is not None:
        answers.append(f"output SQNR {decibels(report.sqnr_db)}")
    console.print("; ".join(answers) or "no output could be compared as numbers")
    if len(report.outputs) > 1:
        _print_outputs(console, report.outputs)
    for note in report.notes:
        console.print(escape(f"note: {note}"))
    if report.top1 is None and report.mean_ap is None:
        console.print(f"the {report.kind} have no labels: this shows how similar the models' answers are, not how good")


def _change(shares: Compared, error: float) -> str:
    """A change in accuracy with its standard error, and whether it is within the error."""
    change = 100 * (shares[1] - shares[0])
    within = ", not significant" if abs(change) <= 100 * error else ""
    return f"{change:+.2f} points (standard error {100 * error:.2f}{within})"


def _print_outputs(console: Console, outputs: Sequence[OutputReport]) -> None:
    table = Grid("output", "kind", "SQNR dB", "cosine", "largest difference", "agreement")
    for output in outputs:
        figures = (("{:.1f}", output.sqnr_db), ("{:.5f}", output.cosine), ("{:.3g}", output.largest))
        cells = ["" if value is None else text.format(value) for text, value in figures]
        agreement = "" if output.agreement is None else f"{output.agreement:.2%} of {output.count:,} {output.what}"
        table.add_row(escape(output.name), output.kind, *cells, agreement)
    table.show(console)
    for output in outputs:
        if output.kind == "detections":
            found = f"{output.extra['found_0.75']:.2%} with an overlap of 0.75 or more"
            console.print(f"detections: {output.agreement:.2%} found again, {found}; {output.extra['more']:.0f} additional")
        elif "mean_iou" in output.extra:
            console.print(escape(f"{output.name}: mean IoU {output.extra['mean_iou']:.2%}"))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print one row per trial, the float model first."""
    labeled = comparison.top1 is not None
    packers = list(dict.fromkeys(name for trial in comparison.trials for name in trial.downloads))
    sizes, answers = [f"{PACKERS[name]} bytes" for name in packers], ["top-1", "change"] if labeled else []
    table = Grid("recipe", "bits", "bytes", "x smaller", *sizes, *answers, "agreement", "SQNR dB")
    accuracy = [] if comparison.top1 is None else [f"{comparison.top1:.2%}", ""]
    table.add_row("float", "32", f"{comparison.bytes:,}", "", *("" for _ in packers), *accuracy, "", "")
    for trial in comparison.trials:
        accuracy = [] if trial.top1 is None or trial.change is None else [f"{trial.top1:.2%}", f"{trial.change * 100:+.2f} points"]
        packed = [f"{trial.downloads[name]:,}" if name in trial.downloads else "" for name in packers]
        cells = [trial.recipe, str(trial.bits), f"{trial.bytes:,}", f"{trial.ratio:.2f}", *packed, *accuracy]
        agreement = "" if trial.agreement is None else f"{trial.agreement:.2%}"
        table.add_row(*cells, agreement, "" if trial.sqnr_db is None else decibels(trial.sqnr_db, ""))
    table.show(console)
    console.print(f"{comparison.images:,} images" + ("" if labeled else " without labels: the table shows agreement, not accuracy"))


def print_inspection(console: Console, report: InspectReport) -> None:
    """Print opset, operators and weights."""
    console.print(escape(f"opset {report.opset}, IR version {report.ir_version}, made by {report.producer or 'unknown'}"))
    for title, tensors in (("inputs", report.inputs), ("outputs", report.outputs)):
        console.print(escape(f"{title}: {', '.join(tensors)}"))
    console.print("operators: " + escape(", ".join(f"{op} {count}" for op, count in report.ops.items())))
    if report.weights:
        table = Grid("can be converted", "op", "shape", "layer", "bytes")
        for weight in report.weights:
            edge = "first or last" if weight.edge else ""
            table.add_row(escape(weight.name), weight.op, shape_text(weight.shape), edge, f"{weight.bytes:,}")
        table.show(console)
    print_skipped(console, report.skipped)
    size = sum(weight.bytes for weight in report.weights)
    console.print(f"weights: {len(report.weights)} can be converted, {size:,} bytes, {report.coverage:.1%} of all float constants")


def print_sensitivity(console: Console, costs: Sequence[WeightCost], inputs: str) -> None:
    """Print what each weight costs at each width, the most sensitive first."""
    widths = sorted(costs[0].sqnr_db, reverse=True) if costs else []
    table = Grid("weight alone at", "op", *(f"{bits} bits" for bits in widths), "bytes before", "at 8", "at 4")
    for cost in costs:
        cells = [decibels(cost.sqnr_db[bits], "") for bits in widths]
        sizes = [f"{cost.bytes[bits]:,}" if bits in cost.bytes else "" for bits in (8, 4)]
        table.add_row(escape(cost.name), cost.op, *cells, f"{cost.bytes_before:,}", *sizes)
    table.show(console)
    console.print(f"output SQNR in dB on {inputs}, with one weight at its nearest levels and all others in float")


def print_explanation(console: Console, explanation: Explanation) -> None:
    """Print what ONNX Runtime does with each weight."""
    table = Grid("weight", "op", "shape", "fate", "kernel", "reason", left=("fate", "kernel", "reason"))
    for weight in explanation.weights:
        table.add_row(escape(weight.name), weight.op, shape_text(weight.shape), weight.fate.value, weight.kernel, weight.why)
    if explanation.weights:
        table.show(console)
    operators = ", ".join(f"{op} {count}" for op, count in explanation.operators.items())
    console.print(escape(f"ONNX Runtime {explanation.runtime} runs: {operators}"))
    fates = Counter(weight.fate.value for weight in explanation.weights)
    console.print("weights: " + (", ".join(f"{count} {fate}" for fate, count in fates.items()) or "none"))
    for note in explanation.notes:
        console.print(escape(f"note: {note}"))


def print_stages(console: Console, saved: Sequence[SavedStage], checks: Sequence[SelfCheck | None]) -> None:
    """Print one row per stage of a progressive conversion."""
    table = Grid("bits", "graph", "graph bytes", "data bytes", "total so far", "SQNR dB", "agreement")
    total = 0
    for stage, check in zip(saved, checks, strict=True):
        total += stage.graph_bytes
        answers = None if check is None else check.answers
        quality = "" if check is None or check.sqnr_db is None else f"{check.sqnr_db:.1f}"
        agreement = "" if answers is None or answers.agreement is None else f"{answers.agreement:.1%}"
        sizes = (f"{stage.graph_bytes:,}", f"{stage.data_bytes:,}", f"{total + stage.data_bytes:,}")
        table.add_row(str(stage.bits), escape(stage.graph.name), *sizes, quality, agreement)
    table.show(console)
    data = saved[-1].data.name
    console.print(escape(f"each graph reads only the given number of data bytes, from the start of {data}"), soft_wrap=True)


def print_restored(console: Console, report: RestoreReport, sizes: tuple[int, int]) -> None:
    """Print what was restored."""
    before, after = sizes
    console.print(
        f"{report.constants} constants (weights, biases and other vectors) and {report.activations} activations are float again; "
        f"{before:,} -> {after:,} bytes"
    )
    if report.left:
        console.print(f"operators still on integers: {', '.join(report.left)}")


def _weight_row(weight: WeightReport) -> tuple[str, ...]:
    return (
        escape(weight.name),
        weight.op,
        shape_text(weight.shape),
        str(weight.bits),
        weight.transform,
        _span(weight.alpha, ".3f"),
        _span(weight.scale, ".3g"),
        f"{weight.mse:.2e}",
        decibels(weight.sqnr_db, ""),
        f"{weight.bytes_before:,}",
        f"{weight.bytes_after:,}",
    )


def print_tried(console: Console, report: QuantReport) -> None:
    """Print the method chosen for each weight, and the relative error of the layer's output with each method tried."""
    table = Grid("weight", "form", "chosen", "output error by method tried", left=("chosen", "output error by method tried"))
    for weight in report.converted:
        tried = ", ".join(f"{step} {error:.2e}" for step, error in weight.output_errors.items())
        table.add_row(escape(weight.name), weight.form, weight.method, tried or weight.why_nearest or "(no calibration inputs)")
    table.show(console)


def _span(bounds: tuple[float, float], form: str) -> str:
    low, high = (format(value, form) for value in bounds)
    return low if low == high else f"{low}..{high}"


def _ratio(before: int, after: int) -> str:
    return f" ({_times(before, after)})" if after else ""


def _times(before: int, after: int) -> str:
    """How much smaller a file is, or larger."""
    return f"{before / after:.2f} x smaller" if before >= after else f"{after / before:.2f} x larger"


def print_many(console: Console, lines: Sequence[Line], earlier: int) -> None:
    """Print one row per model, why models failed, and totals.  earlier: number of models that an earlier run converted."""
    table = Grid("model", "status", "bytes before", "after", "ratio", "weights", "skipped", "SQNR dB", "seconds")
    for line in lines:
        sizes = (f"{line.bytes_before:,}", f"{line.bytes_after:,}", f"{line.bytes_before / max(1, line.bytes_after):.2f}")
        quality = "" if line.sqnr_db is None else f"{line.sqnr_db:.1f}"
        cells = (*sizes, str(line.converted), str(line.skipped), quality, f"{line.seconds:.1f}") if line.is_done else [""] * 7
        table.add_row(escape(line.model), line.status, *cells)
    table.show(console)
    for line in lines:
        if not line.is_done:
            console.print(escape(f"failed: {line.model}: {line.error}"))
    done = [line for line in lines if line.is_done]
    before, after = sum(line.bytes_before for line in done), sum(line.bytes_after for line in done)
    known = f", {earlier} of them by an earlier run" if earlier else ""
    console.print(f"models: {len(done)} of {len(lines)} converted{known}, {before:,} -> {after:,} bytes{_ratio(before, after)}")
