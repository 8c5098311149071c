"""The results of a conversion, a validation and an inspection, as values that can be written as JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from requant_onnx.graph.weights import SkippedWeight
from requant_onnx.numerics.outputs import SAME, OutputReport, worst
from requant_onnx.text import decibels


class Bounds(NamedTuple):
    """The smallest and the largest of several values.  low, high: these two values."""

    low: float
    high: float


class Compared(NamedTuple):
    """The same figure of two models: the reference and the candidate."""

    reference: float
    candidate: float


class FileSizes(NamedTuple):
    """The sizes of two files, in bytes."""

    reference: int
    candidate: int


@dataclass(frozen=True)
class WeightReport:
    """One converted weight.

    name: name of its tensor.  op: type of the node that reads it.  shape: its shape.
    form: form in which it is stored (in the int8 form, some weights are folded).  bits: bits per weight.
    transform: transform of its grid, as in --transform.  axis: axis of its scales, None for one scale.
    alpha, scale: smallest and largest value over the channels.
    mse: mean squared error of the decoded weights.
    sqnr_db: 10 * log10(sum w**2 / sum (w_hat - w)**2), in dB; infinite if exact.
    bytes_before: bytes of the stored values.  bytes_after: bytes of codes, scales, zero points and decode nodes in the file; for
    weights that are decoded together, the share of each.
    method: method that chose its codes.  output_errors: by method tried, the squared error of the layer's output on held-out
    calibration inputs, relative to the power of the output.
    why_not_int8: in the int8 form, why no integer kernel reads it (a sentence without its subject), else "".
    why_nearest: with calibration inputs, why they are not used for it (a sentence without its subject), else "".
    """

    name: str
    op: str
    shape: tuple[int, ...]
    form: str
    bits: float
    transform: str
    axis: int | None
    alpha: Bounds
    scale: Bounds
    mse: float
    sqnr_db: float
    bytes_before: int
    bytes_after: int
    method: str = "nearest"
    output_errors: dict[str, float] = field(default_factory=dict)
    why_not_int8: str = ""
    why_nearest: str = ""


@dataclass(frozen=True)
class ActivationReport:
    """One quantized activation.  range: smallest and largest value that its 8-bit codes can hold."""

    name: str
    range: Bounds
    scale: float
    zero_point: int


@dataclass(frozen=True)
class FrontPoint:
    """One compromise between the size of the file and its error, both estimated.

    bytes: size of the file.  sqnr_db: output SQNR in dB with nearest levels, by the additive model; without calibration, that of a
    power mean of the relative errors of the weights.
    """

    bytes: int
    sqnr_db: float


@dataclass(frozen=True)
class VectorReport:
    """Biases and other vectors that were stored as float16: their number, and their bytes before and after."""

    count: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


SCHEMA_VERSION = 1  # of the JSON reports; it increases when a key is removed or changes its meaning
FEW_ANSWERS = 100
GOOD_DB, GOOD_AGREEMENT = 20.0, 0.97  # limits of a self-check, below which it warns
LEAST_DB = 5.0  # below this limit, the command line writes a file only with --force-quality


@dataclass(frozen=True)
class SelfCheck:
    """The difference between the outputs of both models, if possible on inputs that the conversion did not use.

    inputs: description of these inputs.  outputs: comparison of each output; instead of outputs that are selected, such as lists of
    boxes, of the tensors from which they are selected."""

    inputs: str
    outputs: tuple[OutputReport, ...]

    @property
    def sqnr_db(self) -> float | None:
        """The lowest SQNR of all outputs, in dB, NaN if one is NaN; None if no output has one."""
        return worst(each.sqnr_db for each in self.outputs)

    @property
    def answers(self) -> OutputReport | None:
        """The first output that has answers; None if there is none."""
        return next((each for each in self.outputs if each.agreement is not None), None)

    @property
    def is_good(self) -> bool:
        """Whether there is no reason to warn.  As inputs are few, the agreement may be a standard error below GOOD_AGREEMENT."""
        answers = self.answers
        agrees = answers is None or (answers.agreement or 0.0) + answers.standard_error >= GOOD_AGREEMENT
        return (self.sqnr_db is None or self.sqnr_db >= GOOD_DB) and agrees

    @property
    def is_broken(self) -> bool:
        """Whether the outputs have little to do with those of the float model."""
        return self.sqnr_db is not None and not self.sqnr_db >= LEAST_DB  # NaN is broken

    def sentence(self) -> str:
        """The result as one sentence for users."""
        parts = []
        if self.sqnr_db is not None:
            many = "the worst of its outputs has" if len(self.outputs) > 1 else "its output has"
            parts.append(f"{many} an SQNR of {decibels(self.sqnr_db)}")
        if self.answers is not None and self.answers.agreement is not None:
            parts.append(_share(self.answers))
        return f"on {self.inputs}, {' and '.join(parts) or 'no output could be compared'}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**_fields(self), "sqnr_db": as_json(self.sqnr_db), "is_good": self.is_good}


def _share(answers: OutputReport) -> str:
    """The share of equal answers as text: a count if answers are few, because a percentage would look more precise than it is."""
    agreement, text = answers.agreement or 0.0, SAME[answers.what]
    if answers.count < FEW_ANSWERS and text.startswith("of the "):
        return f"{round(agreement * answers.count)} of {answers.count} {text.removeprefix('of the ')}"
    return f"{agreement:.1%} {text}"


@dataclass(frozen=True, repr=False)
class QuantReport:
    """The report of one conversion.

    config: settings, as QuantConfig.to_dict writes them.  opset: opset before and after.
    folded_batchnorms: number of BatchNormalization nodes that were folded into weights.
    converted: every converted weight.  skipped: every float constant that was not converted, and why.
    activations: quantized activations of the int8 form.  notes: sentences for users.
    front: with a budget, the best compromises between size and error, the smallest file first.
    vectors: biases and other vectors stored as float16.  floats: bytes of all float constants in the input.
    complaint: objection of the onnx checker to the input, if ONNX Runtime runs it anyway; "" for none.
    check: the self-check; None if there was none.  why_unchecked: the reason for that, as a sentence.
    download_bytes: compressed size of the file, as save_model writes it, in bytes; None unless it was optimized for downloads.
    """

    config: dict[str, Any]
    opset: tuple[int, int]
    folded_batchnorms: int
    converted: tuple[WeightReport, ...]
    skipped: tuple[SkippedWeight, ...]
    activations: tuple[ActivationReport, ...]
    notes: tuple[str, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    vectors: VectorReport = field(default_factory=VectorReport)
    floats: int = 0
    complaint: str = ""
    check: SelfCheck | None = None
    why_unchecked: str = "it was not requested"
    download_bytes: int | None = None

    def __repr__(self) -> str:
        """Short: all fields are in to_dict()."""
        check = "" if self.check is None else f", {self.check.sentence()}"
        return f"<QuantReport: {len(self.converted)} weights, {self.bytes_before:,} -> {self.bytes_after:,} bytes{check}>"

    def _repr_html_(self) -> str:
        rows = [("weights", f"{len(self.converted)} converted, {len(self.skipped)} skipped")]
        rows += [("bytes", f"{self.bytes_before:,} to {self.bytes_after:,}"), ("coverage", f"{self.coverage:.1%}")]
        rows += [] if self.check is None else [("check", self.check.sentence())]
        return _html(rows + [("note", note) for note in self.notes])

    @property
    def bytes_before(self) -> int:
        """Bytes of the converted weights in the input."""
        return sum(weight.bytes_before for weight in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of the converted weights in the output."""
        return sum(weight.bytes_after for weight in self.converted)

    @property
    def coverage(self) -> float:
        """Share of the bytes of all float constants that was converted, or folded into a converted weight, 0 .. 1."""
        left = sum(item.bytes for item in self.skipped)
        return max(0.0, 1 - left / self.floats) if self.floats else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and the totals, for JSON."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "coverage": self.coverage}
        check = {} if self.check is None else {"check": self.check.to_dict()}
        return {"schema_version": SCHEMA_VERSION, **_fields(self), **totals, **check}


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """The comparison of two models on the same images, or other inputs (kind).

    images: number of inputs.  kind: what they are, for example "images".
    top1: top-1 accuracy, 0..1, None without labels.  top1_error: standard error of the change in accuracy (paired).
    agreement: share of identical answers in the first output that has answers, or of detections, 0..1; None without answers.
    agreement_of: kind of the answers, for example "top-1".  agreement_error: standard error of the agreement.
    sqnr_db: SQNR in dB of the first output that is a tensor of numbers.  bytes: file sizes.
    latency_ms: time of one run of `latency_batch` images, lower quartile, in ms.  latency_spread: interquartile range, relative
    to it.  latency_ratio: candidate / reference.  latency_ratio_error: its standard error.  All four are None without timing.
    notes: sentences that qualify the figures.  outputs: comparison of every output, and of detections.
    mean_ap, ap50: for detectors, COCO AP@[.5:.95] and AP at an overlap of 0.5, 0..1; None without labeled boxes.
    mean_ap_error: standard error of the change in mean_ap, by resampling the images.
    """

    images: int
    top1: Compared | None
    top1_error: float | None
    agreement: float | None
    agreement_error: float | None
    agreement_of: str
    sqnr_db: float | None
    bytes: FileSizes
    latency_ms: Compared | None
    latency_spread: Compared | None
    latency_ratio: float | None
    latency_batch: int
    notes: tuple[str, ...]
    kind: str = "images"
    outputs: tuple[OutputReport, ...] = ()
    mean_ap: Compared | None = None
    mean_ap_error: float | None = None
    ap50: Compared | None = None
    latency_ratio_error: float | None = None

    @property
    def reshaped(self) -> tuple[str, ...]:
        """Names of the outputs that have no figures because their shape changed; none if they were compared as detections."""
        if any(output.kind == "detections" for output in self.outputs):
            return ()
        return tuple(output.name for output in self.outputs if not output.same_shape)

    def __repr__(self) -> str:
        """Short: all fields are in to_dict()."""
        return f"<ValidationReport: {', '.join(f'{name} {value}' for name, value in self._rows())}>"

    def _repr_html_(self) -> str:
        return _html([*self._rows(), *(("note", note) for note in self.notes)])

    def _rows(self) -> list[tuple[str, str]]:
        rows = [(self.kind, f"{self.images:,}")]
        for name, pair in (("top-1", self.top1), ("mAP", self.mean_ap), ("AP50", self.ap50)):
            rows += [] if pair is None else [(name, f"{pair[0]:.2%} to {pair[1]:.2%}")]
        if self.agreement is not None:
            rows.append((f"{self.agreement_of} agreement", f"{self.agreement:.2%}"))
        if self.sqnr_db is not None:
            rows.append(("output SQNR", decibels(self.sqnr_db)))
        rows.append(("bytes", f"{self.bytes[0]:,} to {self.bytes[1]:,}"))
        return [*rows, *([] if self.latency_ratio is None else [("latency", f"{self.latency_ratio:.2f} x")])]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {"schema_version": SCHEMA_VERSION, **_fields(self)}


@dataclass(frozen=True)
class InspectedWeight:
    """A weight that `convert` would convert.  edge: whether it is in a first or last layer.  bytes: its size in the file."""

    name: str
    op: str
    shape: tuple[int, ...]
    edge: bool
    bytes: int


@dataclass(frozen=True, repr=False)
class InspectReport:
    """The contents of one model.

    producer: tool that wrote it.  ops: number of nodes by operator, including bodies of If, Loop and Scan.
    weights: weights that can be converted.  skipped: other float constants, and why they cannot.
    inputs, outputs: names, types and shapes, as text.  floats: bytes of all float constants.
    """

    opset: int
    ir_version: int
    producer: str
    ops: dict[str, int]
    weights: tuple[InspectedWeight, ...]
    skipped: tuple[SkippedWeight, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    floats: int = 0

    @property
    def coverage(self) -> float:
        """Share of the bytes of all float constants that can be converted, 0 .. 1."""
        return min(1.0, sum(weight.bytes for weight in self.weights) / self.floats) if self.floats else 0.0

    def __repr__(self) -> str:
        """Short: all fields are in to_dict()."""
        return f"<InspectReport: opset {self.opset}, {len(self.weights)} weights, {len(self.skipped)} skipped>"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the coverage, for JSON."""
        return {"schema_version": SCHEMA_VERSION, **_fields(self), "coverage": self.coverage}


def _html(rows: Sequence[tuple[str, str]]) -> str:
    """An HTML table for notebooks."""
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows]
    return f"<table>{''.join(lines)}</table>"


def _fields(report: Any) -> dict[str, Any]:
    return {key: as_json(value) for key, value in asdict(report).items()}


def as_json(value: Any) -> Any:
    """A value for JSON: tuples as lists; infinity and NaN, which JSON lacks, as the strings inf, -inf and nan."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sqnr_db(signal: float, error: float) -> float:
    """The signal-to-quantization-noise ratio in dB.  signal, error: energies of the values and of their errors.

    Infinite without error, minus infinity for an error without a signal, and NaN if an energy is not finite.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if error == 0.0:
        return math.inf
    if not math.isfinite(signal + error):
        return math.nan
    return 10 * math.log10(signal / error) if signal > 0.0 else -math.inf
