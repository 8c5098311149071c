"""Comparison of two models' outputs: errors, answers of every kind, detections; gates; latency."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse
from onnxruntime import InferenceSession

from requant_onnx import ImageSet, QuantConfig, ValidationReport, quantize_model, save_model, validate
from requant_onnx.cli.main import main
from requant_onnx.convert.report import Compared, FileSizes, SelfCheck
from requant_onnx.errors import QualityError
from requant_onnx.evaluate.gate import FIGURES, check_gate
from requant_onnx.evaluate.latency import compare_latency
from requant_onnx.evaluate.verdict import Level, judge
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.numerics.answers import NO_CLASS, kind_of, top_classes
from requant_onnx.numerics.boxes import anchors_of
from requant_onnx.numerics.detections import ALIKE, Detections, matched, overlaps
from requant_onnx.numerics.heads import PairReader, find_candidates
from requant_onnx.numerics.outputs import OutputReport, OutputTally

REPORT = ValidationReport(
    images=1000, top1=Compared(0.92, 0.918), top1_error=0.003, agreement=0.985, agreement_error=0.004, agreement_of="top-1",
    sqnr_db=25.0, bytes=FileSizes(1000, 200), latency_ms=None, latency_spread=None, latency_ratio=None, latency_batch=1, notes=(),
    outputs=(OutputReport("y", (1, 10), "scores", 25.0, 1.0, 0.1, 0.985),),
)  # fmt: skip


def tallied(reference: np.ndarray, candidate: np.ndarray, images: int, size: tuple[int, int] | None = None) -> OutputTally:
    tally = OutputTally("y")
    tally.add(reference, candidate, images, size)
    return tally


@pytest.mark.parametrize(
    ("shape", "images", "size", "kind"),
    [
        ((4, 10), 4, None, "scores"),
        ((4, 10, 1, 1), 4, (32, 32), "scores"),
        ((4, 1), 4, None, "values"),
        ((10,), 1, None, "values"),
        ((2, 21, 32, 32), 2, (32, 32), "mask"),
        ((2, 1, 16, 16), 2, (64, 64), "mask"),
        ((2, 32, 32, 21), 2, (32, 32), "mask"),
        ((2, 16, 16, 1), 2, (64, 64), "mask"),
        ((2, 32, 32), 2, (32, 32), "mask"),
        ((2, 64, 8, 8), 2, (64, 64), "values"),
        ((2, 21, 32, 32), 2, None, "values"),
        ((1, 84, 8400), 1, (640, 640), "values"),
        ((0, 10), 0, None, "scores"),
    ],
)
def test_kinds_of_outputs(shape: tuple[int, ...], images: int, size: tuple[int, int] | None, kind: str) -> None:
    assert kind_of(np.full(shape, -1.0, np.float32), images, size) == kind


@pytest.mark.parametrize(
    ("low", "high", "channels", "kind"),
    [
        (0, 1, 3, "values"),  # an autoencoder
        (-1, 1, 3, "values"),  # a generator with tanh
        (0, 255, 3, "values"),
        (-0.02, 1.03, 3, "values"),  # super-resolution, which overshoots at edges
        (-5, 5, 3, "mask"),  # logits of three classes
        (0.1, 80, 1, "values"),  # depths
        (0, 80, 1, "values"),  # depths behind a Relu
        (0, 1, 1, "mask"),
        (-9, -1, 1, "mask"),  # logits of an image without an object
        (-9, 9, 1, "mask"),
    ],
)
def test_pictures_and_depths_are_no_masks(low: float, high: float, channels: int, kind: str) -> None:
    output = np.random.default_rng(0).uniform(low, high, (2, channels, 8, 8)).astype(np.float32)
    assert kind_of(output, 2, (8, 8)) == kind
    shares = np.exp(output / abs(output).max())
    assert kind_of(shares / shares.sum(1, keepdims=True), 2, (8, 8)) == "mask"


@pytest.mark.parametrize(
    ("shape", "most", "kind"),
    [
        ((4,), 1000, "classes"),
        ((4, 1), 1000, "classes"),
        ((4, 5), 1000, "values"),  # of the five best, perhaps
        ((4, 32, 32), 20, "mask"),
        ((4, 1, 16, 16), 20, "mask"),
        ((4, 1, 32, 32), 256, "values"),  # a gray picture
        ((), 5, "values"),
    ],
)
def test_integers_are_classes(shape: tuple[int, ...], most: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, most, shape) for _ in range(2))
    assert kind_of(first, 4, (32, 32)) == kind
    report = tallied(first, np.where(rng.random(shape) < 0.25, second, first), 4, (32, 32)).report()
    assert (report.sqnr_db is None) == (report.agreement is not None) == (kind != "values")
    if report.agreement is not None:
        assert report.agreement >= 0.5


def test_quantized_scores_are_scores() -> None:
    """Those of models whose outputs are uint8."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (4, 10)).astype(np.uint8)
    assert tallied(rows, rows, 4).report().extra == {"top5": 1.0}
    mask = rng.integers(0, 256, (2, 5, 8, 8)).astype(np.uint8)
    report = tallied(mask, mask, 2, (8, 8)).report()
    assert (report.kind, report.agreement, report.sqnr_db) == ("mask", 1.0, math.inf)
    assert tallied(rows.astype(np.int64), rows.astype(np.int64), 4).report().kind == "values"


def test_two_scores_are_no_embedding() -> None:
    assert kind_of(np.array([[0.8, -0.6]]), 1, None) == "scores"


def test_masks_of_other_types_and_of_nan() -> None:
    classes = np.arange(16).reshape(1, 4, 4) % 3
    assert tallied(classes, classes.astype(np.float32), 1, (4, 4)).report().agreement == 1.0
    odd = classes.astype(np.float32)
    odd[0, 0] = math.nan
    assert tallied(classes, odd, 1, (4, 4)).report().agreement == 0.75
    mask = -np.ones((1, 1, 4, 4))
    assert tallied(mask, mask * math.nan, 1, (4, 4)).report().agreement == 0.0
    assert kind_of(np.zeros((1, 0, 4, 4)), 1, (4, 4)) == "values"


def test_masks_of_integers_by_hand() -> None:
    """Classes that appear only in a later batch count too."""
    tally = OutputTally("y")
    tally.add(np.array([[[0, 1], [0, 1]]]), np.array([[[0, 1], [1, 1]]]), 1, (2, 2))
    tally.add(np.array([[[7, 7], [0, 0]]]), np.array([[[7, 7], [0, -1]]]), 1, (2, 2))
    report = tally.report()
    assert (report.kind, report.agreement, report.sqnr_db) == ("mask", 6 / 8, None)
    assert report.extra["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1) / 3)


def test_a_model_that_returns_classes_is_validated() -> None:
    text = "net (float[n, 3, 4, 4] x) => (int64[n] y) { f = Flatten (x) s = MatMul (f, w) y = ArgMax <axis = 1, keepdims = 0> (s) }"
    model, other = (parse(text, w=laplace(48, 9, seed=k)) for k in range(2))
    images = ImageSet(np.random.default_rng(0).integers(0, 255, (8, 3, 4, 4)).astype(np.uint8), None)
    session = InferenceSession(model.SerializeToString())
    labels = session.run(None, {"x": (images.x[:] / np.float32(255)).astype(np.float32)})[0]
    report = validate(model, other, replace(images, y=labels), latency_batch=None)
    assert report.top1 is not None
    assert (report.top1.reference, report.agreement_of, report.sqnr_db) == (1.0, "top-1", None)
    assert report.top1.candidate == report.agreement
    assert report.agreement != 1.0


def test_errors_by_hand() -> None:
    report = tallied(np.array([[3.0, 4.0]]), np.array([[3.0, 5.0]]), 1).report()
    assert report.sqnr_db == pytest.approx(10 * math.log10(25 / 1))
    assert report.cosine == pytest.approx((9 + 20) / (5 * math.sqrt(34)))
    assert (report.largest, report.agreement, report.what, report.extra) == (1.0, 1.0, "top-1", {"top5": 1.0})


def test_masks_agree_by_pixels_and_classes() -> None:
    reference = np.zeros((1, 2, 2, 2))
    reference[0, 1, 0] = 1.0  # class 1 in the upper row
    candidate = reference.copy()
    candidate[0, 1, 0, 0] = -1.0
    report = tallied(reference, candidate, 1, (2, 2)).report()
    assert (report.kind, report.agreement, report.count) == ("mask", 0.75, 4)
    assert report.extra["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    one = tallied(np.array([[[[0.9, 0.1]]]]), np.array([[[[0.4, 0.1]]]]), 1, (1, 2)).report()
    assert one.agreement == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_the_classes_of_a_mask_may_be_the_last_axis(dtype: type) -> None:
    rng = np.random.default_rng(0)
    pair = [rng.integers(-3, 4, (2, 5, 8, 8)).astype(np.float32) for _ in range(2)]
    pair = [each.argmax(1)[:, None] for each in pair] if dtype is np.int64 else pair
    first = tallied(pair[0], pair[1], 2, (8, 8)).report()
    last = tallied(np.moveaxis(pair[0], 1, 3), np.moveaxis(pair[1], 1, 3), 2, (8, 8)).report()
    assert (last.kind, last.agreement, last.extra) == (first.kind, first.agreement, first.extra)
    assert first.kind == "mask"


def test_texts_follow_the_rule_of_ctc() -> None:
    def path(*classes: int) -> np.ndarray:
        return np.eye(12)[list(classes)][None]

    same = tallied(path(0, 3, 3, 0, 3, 5), path(3, 3, 0, 0, 3, 5), 1).report()
    assert (same.kind, same.agreement) == ("text", 1.0)
    assert tallied(path(0, 3, 3, 0, 3, 5), path(3, 3, 3, 3, 3, 5), 1).report().agreement == 0.0
    logits = -np.ones((6, 1, 12))
    assert tallied(logits, logits, 1, (32, 100)).report().kind == "text"
    assert tallied(logits, logits, 1).report().kind == "values"  # states of an LSTM


def test_strings_and_shapes_that_differ() -> None:
    assert tallied(np.array(["a", "b"], object), np.array(["a", "c"], object), 1).report().agreement == 0.5
    odd = tallied(np.zeros((3, 5)), np.zeros((2, 5)), 1).report()
    assert (odd.kind, odd.sqnr_db, odd.agreement) == ("values", None, None)


def only(outputs: list[np.ndarray], images: int, size: tuple[int, int] | None) -> Detections:
    found = find_candidates(outputs, images, size)
    assert found is not None
    assert len(found) == 1
    return found[0].above(ALIKE)


def heads(rng: np.random.Generator, boxes: np.ndarray, classes: np.ndarray, anchors: int) -> np.ndarray:
    """The head of a YOLOv8 of three classes, (1, 4 + 3, anchors), with these boxes (center, size) at random anchors."""
    head = np.zeros((1, 7, anchors))
    head[0, :4] = rng.uniform(0, 640, (4, anchors))
    at = rng.choice(anchors, len(boxes), replace=False)
    head[0, :4, at] = boxes
    head[0, 4 + classes, at] = 0.9
    return head


def test_heads_of_the_yolo_family_are_recognized() -> None:
    rng = np.random.default_rng(0)
    boxes, classes = np.array([[100, 100, 50, 80], [300, 200, 40, 40], [304, 200, 40, 40]], float), np.array([0, 2, 2])
    (anchors,) = anchors_of(640, 640) & {8400}
    head = heads(rng, boxes, classes, anchors)
    found = only([head], 1, (640, 640))
    assert sorted(found.classes.tolist()) == [0, 2]  # the third overlaps the second
    five = np.concatenate([head[:, :4], np.ones((1, 1, anchors)), head[:, 4:]], 1).swapaxes(1, 2)
    again = only([five], 1, (640, 640))
    np.testing.assert_array_equal(again.boxes, found.boxes)
    assert find_candidates([head], 1, (320, 320)) is None
    assert 3 * 25200 // 3 in anchors_of(640, 640)


def test_lists_of_boxes_are_recognized() -> None:
    rows = np.array([[0, 0, 10, 10, 0.9, 1], [20, 20, 30, 30, 0.1, 0]], float)
    for outputs in ([rows[None]], [np.insert(rows, 0, 0, 1)], [rows]):
        found = only(outputs, 1, None)
        assert (found.boxes.tolist(), found.classes.tolist()) == ([[0, 0, 10, 10]], [1])
    boxes, scores, labels = rows[None, :, :4], rows[None, :, 4], rows[None, :, 5].astype(np.int64)
    found = only([boxes, labels, scores], 1, None)
    assert found.classes.tolist() == [1]
    by_class = np.array([[[0.0, 0.9], [0.1, 0.0]]])
    found = only([by_class, boxes], 1, None)
    assert found.classes.tolist() == [1]
    assert find_candidates([np.zeros((1, 10))], 1, None) is None


def test_overlaps_and_matches_by_hand() -> None:
    a = np.array([[0, 0, 10, 10], [0, 0, 10, 10]], float)
    np.testing.assert_allclose(overlaps(a[:1], np.array([[5, 0, 15, 10], [20, 20, 30, 30]], float)), [[1 / 3, 0.0]])
    reference = Detections(a, np.array([0.9, 0.8]), np.array([1, 1]))
    assert matched(reference, Detections(a[:1], np.array([0.9]), np.array([1])), 0.5) == 1  # each detection counts once
    assert matched(reference, Detections(a[:1], np.array([0.9]), np.array([0])), 0.5) == 0
    assert matched(reference, Detections(a[:0], np.zeros(0), np.zeros(0, int)), 0.5) == 0


def test_a_detector_is_judged_by_what_it_finds() -> None:
    """The head of the model is a constant that its input shifts slightly."""
    head = heads(np.random.default_rng(1), np.array([[100, 100, 50, 80], [300, 200, 40, 40]], float), np.array([0, 2]), 84)
    text = "net (float[1, 3, 64, 64] x) => (float[1, 7, 84] y) { m = ReduceMean<keepdims = 0>(x) s = Mul(m, e) y = Add(h, s) }"

    def model(boxes: float) -> onnx.ModelProto:
        moved = head.copy()
        moved[:, 0] += boxes
        return parse(text, h=moved.astype(np.float32), e=np.zeros(1, np.float32))

    images = ImageSet(np.zeros((2, 3, 64, 64), np.uint8), None)
    same = validate(model(0.0), model(1.0), images, latency_batch=None)
    assert (same.agreement, same.agreement_of, same.outputs[-1].extra["detections"]) == (1.0, "detections", 4.0)
    lost = validate(model(0.0), model(30.0), images, latency_batch=None)
    assert lost.agreement == 0.0
    assert lost.outputs[-1].extra["more"] == 4.0
    assert lost.outputs[0].agreement is None


def test_every_output_is_compared_by_its_name() -> None:
    text = "net (float[n, 8] x, float[n, 8] z) => (float[n, 4] a, float[n, 4] b) { a = MatMul(x, v) b = MatMul(z, w) }"
    reference = parse(text, v=laplace(8, 4), w=laplace(8, 4, seed=1))
    candidate = onnx.ModelProto()
    candidate.CopyFrom(reference)
    candidate.graph.output.reverse()
    rng = np.random.default_rng(0)
    rows = [{"x": rng.normal(size=(3, 8)).astype(np.float32), "z": rng.normal(size=(3, 8)).astype(np.float32)} for _ in range(4)]
    report = validate(reference, candidate, FeedSet(tuple(rows)), latency_batch=None)
    assert [(y.name, y.sqnr_db, y.agreement, y.count) for y in report.outputs] == [
        ("a", math.inf, 1.0, 12),
        ("b", math.inf, 1.0, 12),
    ]
    assert report.latency_ms is None


def test_a_change_within_its_error_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x, made = rng.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8), tmp_path / "made.onnx"
    save_model(quantize_model(OWN_MODEL, QuantConfig(8))[0], made)
    np.savez(tmp_path / "data.npz", x=x, y=rng.integers(0, 10, 100))
    arguments = ["validate", str(OWN_MODEL), str(made), "--data", str(tmp_path / "data.npz"), "--no-latency", "--json"]
    assert main([*arguments, str(tmp_path / "a.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "points (standard error" in printed
    assert "hardly more than chance; check the labels, and the normalization (mean" in printed
    assert "latency" not in printed
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["top1_error"] is not None
    assert report["outputs"][0]["kind"] == "scores"


@pytest.mark.parametrize(
    ("gate", "code", "sentence"),
    [
        ("agreement=50,sqnr=10,worst-sqnr=10,bytes=10000000,ratio=1", 0, ""),
        ("agreement=100.1", 4, "the agreement in percent is"),
        ("ratio=50,sqnr=99", 4, "relative to the candidate is 3.8"),
        ("latency=1", 4, "relative to the reference was not measured"),
        ("top1-drop=1", 4, "was not measured"),
        ("agreemnt=9", 2, "did you mean 'agreement'?"),
        ("sqnr", 2, "is not of the form FIGURE=NUMBER"),
        ("sqnr=much", 2, "is not a number"),
        ("sqnr=nan", 2, "is not a number"),
        ("sqnr=20,agreement=9,sqnr=10", 2, "has two bounds for sqnr; give one of them"),
    ],
)
def test_gates(gate: str, code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(quantize_model(OWN_MODEL, QuantConfig(8))[0], tmp_path / "made.onnx")
    arguments = ["validate", str(OWN_MODEL), str(tmp_path / "made.onnx"), "--data", "noise", "--limit", "20", "--no-latency"]
    assert main([*arguments, "--fail-below", gate]) == code
    assert sentence in capsys.readouterr().err


def test_every_figure_of_a_gate_can_be_read() -> None:
    images = ImageSet(np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64))
    report = validate(OWN_MODEL, OWN_MODEL, images)
    missing = [name for name, figure in FIGURES.items() if figure.read(report) is None]
    assert missing == ["map-drop", "found"]


def test_a_ratio_of_times_survives_other_work() -> None:
    """Two models, one twice as slow; every seventh run of both takes five times as long.  The times are simulated."""
    count = 0

    def model(seconds: float) -> float:
        nonlocal count
        count += 1
        return seconds * (5 if count % 7 == 0 else 1)

    found = compare_latency(lambda: model(0.002), lambda: model(0.004))
    assert found.ratio == pytest.approx(2.0)
    assert found.milliseconds == pytest.approx((2.0, 4.0))
    assert found.spread == pytest.approx((0.0, 0.0))
    assert found.ratio_error == pytest.approx(0.0)


def test_the_standard_error_of_a_ratio_of_times_is_the_spread_of_repeated_measurements() -> None:
    """Three runs at a time share a disturbance, as on a machine where other work comes and goes."""
    generator = np.random.default_rng(0)

    def times() -> Iterator[float]:
        while True:
            yield from np.full(3, generator.uniform(0.01, 0.02)) + generator.uniform(0, 0.001, 3)

    found = []
    for _ in range(80):
        first, second = times(), times()
        found.append(compare_latency(partial(next, first), partial(next, second)))
    assert np.mean([each.ratio_error for each in found]) == pytest.approx(np.std([each.ratio for each in found]), rel=0.3)


@pytest.mark.parametrize("broken", [(), (0,), (1,), (0, 1)])
def test_rows_with_nan_have_no_answer(broken: tuple[int, ...]) -> None:
    """Whichever model gives NaN, and even if both do."""
    pair = [np.eye(4, 10), np.eye(4, 10)]
    for k in broken:
        pair[k][1, 3] = math.nan
    report = tallied(pair[0], pair[1], 4).report()
    right = 4 - bool(broken)
    assert (report.agreement, report.extra["top5"]) == (right / 4, right / 4)
    assert not broken or all(math.isnan(value) for value in (report.sqnr_db, report.cosine, report.largest) if value is not None)
    assert top_classes(pair[0]).tolist() == [0, NO_CLASS if 0 in broken else 1, 2, 3]


def test_equal_infinities_are_no_error() -> None:
    reference = np.array([[3.0, 4.0, -math.inf, math.inf]])
    report = tallied(reference, np.array([[3.0, 5.0, -math.inf, math.inf]]), 1).report()
    assert report.sqnr_db == pytest.approx(10 * math.log10(25 / 1))
    other = tallied(reference, np.array([[3.0, 4.0, 0.0, math.inf]]), 1).report()
    assert other.sqnr_db is not None
    assert math.isnan(other.sqnr_db)


def test_an_output_whose_shape_changes_is_not_skipped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
        g (float[1, 4] t) => (float[1, 4] y, int64[2, n] where)
        { y = Relu (t)  large = Greater (t, edge)  where = NonZero (large) }
    """
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, edge in zip(paths, (0.5, 0.9), strict=True):
        onnx.save(parse(text, edge=np.array([edge], np.float32)), path)
    rows = np.linspace(0, 1, 40, dtype=np.float32).reshape(10, 1, 4)
    np.savez(tmp_path / "rows.npz", t=rows[:, 0])
    arguments = ["validate", *map(str, paths), "--data", str(tmp_path / "rows.npz"), "--no-latency"]
    assert main([*arguments, "--fail-below", "worst-sqnr=20", "--json", str(tmp_path / "r.json")]) == 4
    printed = capsys.readouterr()
    assert "the lowest SQNR of all outputs in dB was not measured" in printed.err
    assert "note: output 'where' changes its shape for some inputs, so it was not compared" in " ".join(printed.out.split())
    assert [output["same_shape"] for output in json.loads((tmp_path / "r.json").read_text())["outputs"]] == [True, False]
    report = validate(paths[0], paths[1], FeedSet(tuple({"t": row} for row in rows)), latency_batch=None)
    assert any("The output where changes its shape" in reason.text for reason in judge(report, FileSizes(1000, 200)).reasons)


def test_no_other_output_stands_in_for_a_first_one_whose_shape_changes() -> None:
    first = replace(REPORT.outputs[0], same_shape=False, sqnr_db=None, agreement=None)
    report = replace(REPORT, outputs=(first, replace(REPORT.outputs[0], name="z")))
    for bound in ({"agreement": 50.0}, {"sqnr": 5.0}, {"worst-sqnr": 5.0}):
        with pytest.raises(QualityError, match="was not measured"):
            check_gate(report, bound)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_output_of_nan_is_the_worst_in_any_order(order: tuple[int, int]) -> None:
    outputs = [replace(REPORT.outputs[0], sqnr_db=40.0), replace(REPORT.outputs[0], sqnr_db=math.nan)]
    report = replace(REPORT, outputs=tuple(outputs[k] for k in order))
    with pytest.raises(QualityError, match="lowest SQNR of all outputs in dB is nan"):
        check_gate(report, {"worst-sqnr": 20.0})
    assert judge(report, report.bytes).level is Level.BAD
    assert SelfCheck("inputs", report.outputs).is_broken


def test_the_side_of_a_mask_is_decided_by_the_reference() -> None:
    reference = np.full((1, 1, 8, 8), 0.3)
    reference[..., :4] = 0.9
    candidate = reference.copy()
    candidate[0, 0, 0, 7] = -0.001  # no probability, but the others still are
    assert tallied(reference, candidate, 1, (8, 8)).report().agreement == 1.0


def test_texts_without_the_padding_of_a_batch() -> None:
    steps = np.zeros((6, 4, 12))
    steps[..., 3] = 1.0
    tally = tallied(steps, steps, 4)
    tally.add(steps, steps, 1, None)  # one image, and three copies of it
    assert (tally.report().agreement, tally.report().count) == (1.0, 5)


def test_the_reference_decides_on_the_head() -> None:
    """A width slightly below zero would make the candidate another head, of which nothing matches."""
    yolo = np.random.default_rng(0).uniform(0.1, 0.4, (1, 84, 8400)) * np.array([640] * 4 + [1] * 80)[None, :, None]
    yolo[0, 4, :9] = 0.9
    worse = yolo.copy()
    worse[0, 2, 100] = -1e-4
    pair = PairReader().read([yolo], [worse], 1, (640, 640))
    assert pair is not None
    assert len(pair[0][0].above(ALIKE).scores) == len(pair[1][0].above(ALIKE).scores) > 0


def test_a_gate_holds_at_exactly_its_bound() -> None:
    for right in range(101):
        check_gate(replace(REPORT, agreement=right / 100), {"agreement": float(right)})
        check_gate(replace(REPORT, top1=Compared(0.92, 0.92 - right / 1000)), {"top1-drop": right / 10})
        with pytest.raises(QualityError):
            check_gate(replace(REPORT, agreement=right / 100), {"agreement": right + 0.001})
