"""Heads of detectors, named or recognized: boxes by hand, and rejected outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import laplace, parse

from requant_onnx import ConfigError, DataError, ImageSet, html_report, validate
from requant_onnx.numerics.boxes import anchors_of
from requant_onnx.numerics.detections import ALIKE, JUDGED, MOST, Candidates, Detections
from requant_onnx.numerics.heads import HEADS, PairReader, find_candidates, task_of
from requant_onnx.numerics.outputs import DetectionTally

SIZE = (64, 32)  # 32 cells of stride 8, 8 of 16, 2 of 32
ANCHORS = 42


def found(head: str | None, *outputs: np.ndarray, size: tuple[int, int] | None = SIZE) -> Detections:
    each = find_candidates(list(outputs), 1, size, head)
    assert each is not None
    assert len(each) == 1
    return each[0].above(ALIKE)


def rows(*values: list[float], anchors: int = ANCHORS) -> np.ndarray:
    """The values padded with zeros, (1, anchors, len(values[0]))."""
    head = np.zeros((1, anchors, len(values[0])), np.float32)
    head[0, : len(values)] = values
    return head


CENTERED = [20.0, 30.0, 8.0, 12.0]
CORNERS = [16.0, 24.0, 24.0, 36.0]
V8, V5 = rows([*CENTERED, 0.1, 0.9, 0.2]), rows([*CENTERED, 0.9, 0.1, 1.0, 0.2])
LISTED = np.array([[*CORNERS, 0.9, 1], [0, 0, 5, 5, 0.1, 0]], np.float32)
SCORES, LABELS = LISTED[None, :, 4], LISTED[None, :, 5]
SWAPPED = LISTED[:, [0, 1, 2, 3, 5, 4]]
BY_CLASS = np.array([[[0.1, 0.9, 0.2], [0.0, 0.0, 0.1]]], np.float32)
BOXES = LISTED[None, :, :4]
IN_CENTER = np.array([[CENTERED, [2.5, 2.5, 5, 5]]], np.float32)
RELATIVE = IN_CENTER / np.array([32, 64, 32, 64], np.float32)
SIGMOID = np.log(BY_CLASS.clip(1e-9) / (1 - BY_CLASS.clip(1e-9)))
SOFTMAX = np.log(np.array([[[0.02, 0.9, 0.01, 0.07], [1e-9, 1e-9, 1e-9, 1.0]]], np.float32)) + 3.0


@pytest.mark.parametrize(
    ("head", "outputs"),
    [
        ("yolov8", [V8.swapaxes(1, 2)]),
        ("yolov8", [V8]),
        ("yolov8", [V8[:, :10].swapaxes(1, 2)]),  # another number of anchors
        ("yolov5", [V5]),
        ("yolov5", [V5.swapaxes(1, 2)]),
        ("nms", [LISTED]),
        ("nms", [np.zeros((1, 3), np.float32), LISTED[None]]),  # among other outputs
        ("nms", [np.insert(LISTED, 0, 0, 1)]),
        ("nms-class-first", [np.insert(SWAPPED, 0, 0, 1)]),
        ("nms-counts", [LISTED[:, [5, 4, 0, 1, 2, 3]], np.array([2], np.int32)]),
        ("dets", [LISTED[None, :, :5], LABELS.astype(np.int64)]),
        ("boxes", [BOXES, SCORES, LABELS]),
        ("boxes", [BY_CLASS, BOXES]),
        ("boxes-ids", [LABELS.astype(np.int64), SCORES, BOXES]),
        ("boxes-center", [BY_CLASS, IN_CENTER]),
        ("tf-boxes", [BOXES[..., [1, 0, 3, 2]], LABELS, SCORES, np.ones(1, np.float32)]),
        (None, [V8.swapaxes(1, 2)]),
        (None, [V5]),
        (None, [LISTED]),
        (None, [LISTED[:, [5, 4, 0, 1, 2, 3]], np.array([2], np.int32)]),
        (None, [LISTED[None, :, :5], LABELS.astype(np.int64)]),
        (None, [BOXES, LABELS, SCORES]),
    ],
)
def test_heads_by_hand(head: str | None, outputs: list[np.ndarray]) -> None:
    each = found(head, *outputs)
    np.testing.assert_allclose(each.boxes, [CORNERS])
    np.testing.assert_allclose(each.scores, [0.9], rtol=1e-6)
    assert each.classes.tolist() == [1]


@pytest.mark.parametrize(
    ("head", "logits"),
    [("rtdetr", SIGMOID), ("rtdetr-ids", SIGMOID), ("detr", SOFTMAX), ("detr-ids", SOFTMAX), (None, SIGMOID), (None, SOFTMAX)],
)
def test_queries_by_hand(head: str | None, logits: np.ndarray) -> None:
    each = found(head, logits, RELATIVE)
    np.testing.assert_allclose(each.boxes, [np.divide(CORNERS, [32, 64, 32, 64])], rtol=1e-6)
    np.testing.assert_allclose(each.scores, [0.9], rtol=1e-6)
    assert each.classes.tolist() == [1]
    assert HEADS[head or "detr"].ids == str(head).endswith("-ids")


@pytest.mark.parametrize(
    "outputs",
    [
        [V8.swapaxes(1, 2)],
        [V5],
        [LISTED],
        [LISTED[None, :, :5], LABELS.astype(int)],
        [BOXES, LABELS, SCORES],
        [SIGMOID, RELATIVE],
        [SOFTMAX, RELATIVE],
    ],
)
def test_an_unchanged_model_finds_all_its_detections_again(outputs: list[np.ndarray]) -> None:
    tally = DetectionTally()
    tally.add(outputs, outputs, 1, SIZE)
    report = tally.report()
    assert report is not None
    assert (report.agreement, report.count, report.extra["more"]) == (1.0, 1, 0.0)


@pytest.mark.parametrize("more", [[-0.3, 1.5], [14.0, 22.0, 0.9], [-0.7]], ids=["masks", "keypoints", "angles"])
@pytest.mark.parametrize(("rows", "axis"), [(V8, 2), (V5, 1)], ids=["yolov8", "yolov5"])
def test_other_values_after_the_scores_are_no_classes(rows: np.ndarray, axis: int, more: list[float]) -> None:
    head = np.concatenate([rows, np.broadcast_to(np.array(more, np.float32), (*rows.shape[:2], len(more)))], -1)
    each = found(None, head.swapaxes(1, 2) if axis == 2 else head)
    assert (each.boxes.tolist(), each.classes.tolist()) == ([CORNERS], [1])
    np.testing.assert_allclose(each.scores, [0.9], rtol=1e-6)


def test_the_reference_decides_which_columns_are_scores() -> None:
    """A candidate with rounded activations may have a score slightly above 1."""
    head = np.concatenate([V8, np.broadcast_to(np.array([-0.3], np.float32), (1, ANCHORS, 1))], -1)
    rounded = head.copy()
    rounded[0, 5, 4] = 1.01
    for name in (None, "yolov8"):
        pair = PairReader(name).read([head.swapaxes(1, 2)], [rounded.swapaxes(1, 2)], 1, SIZE)
        assert pair is not None
        assert [part[0].columns for part in pair] == [3, 3]


def test_the_first_batch_decides_on_the_head() -> None:
    """With more objects than queries without one, the logits of a DETR look like those of sigmoids."""
    rng = np.random.default_rng(0)
    tally = DetectionTally()
    for objects in (5, 60, 5):
        logits = rng.normal(-6, 1, (1, 100, 4))
        logits[0, :objects, 1], logits[0, objects:, 3] = 5, 5
        boxes = np.concatenate([rng.uniform(0.2, 0.8, (1, 100, 2)), rng.uniform(0.01, 0.1, (1, 100, 2))], -1)
        tally.add([logits, boxes], [logits, boxes], 1, SIZE)
    report = tally.report()
    assert report is not None
    assert (report.count, report.agreement) == (70, 1.0)


def test_boxes_of_padding_are_dropped() -> None:
    rows = LISTED[:, [5, 4, 0, 1, 2, 3]]
    each = find_candidates([np.concatenate([rows, rows]), np.array([2])], 1, SIZE)
    assert each is not None
    assert [len(part.scores) for part in each] == [2]


def test_queries_of_a_corrupt_model_are_read() -> None:
    for head, logits in (("rtdetr", SIGMOID), ("detr", SOFTMAX)):
        for value in (math.nan, math.inf, -math.inf, 1e30):
            odd = logits.copy()
            odd[0, 1] = value
            assert found(head, odd, RELATIVE).classes[:1].tolist() in ([1], [0])


def test_centers_and_logits_are_not_recognized_as_corners_and_scores() -> None:
    for outputs in ([BY_CLASS, IN_CENTER], [SIGMOID, BOXES], [SIGMOID, IN_CENTER]):
        assert find_candidates(outputs, 1, SIZE) is None


def test_cells_of_yolox_by_hand() -> None:
    """Anchor 5 is the cell (1, 1) of stride 8, four per row; anchor 33 the cell (1, 0) of stride 16, anchor 41 (0, 1) of 32."""
    head = np.full((1, ANCHORS, 6), -3.0, np.float32)
    head[..., 4:] = 0.0
    head[0, 5] = [0.5, 0.25, math.log(2), 0.0, 0.9, 1.0]
    head[0, 33] = [0.0, 0.0, math.log(0.5), math.log(0.25), 0.8, 1.0]
    head[0, 41] = [0.5, 0.5, 0.0, 0.0, 0.7, 1.0]
    each = found("yolox", head)
    np.testing.assert_allclose(each.boxes, [[4, 6, 20, 14], [12, -2, 20, 2], [0, 32, 32, 64]], rtol=1e-6)
    np.testing.assert_allclose(each.scores, [0.9, 0.8, 0.7], rtol=1e-6)
    head[0, 5, 2] = 1e4  # a broken model
    assert len(found("yolox", head).boxes) == 3


def test_what_a_told_head_cannot_be_is_refused() -> None:
    cases = [
        ("yolov8", [np.zeros((1, 10), np.float32)], r"1x10 on images of 64x32, which do not match the head 'yolov8': \(n, 4"),
        ("yolox", [V5[:, :40]], "1x40x8 on images of 64x32"),  # too few cells
        ("nms", [V5], "1x42x8"),
        ("nms", [LISTED + 0.5], "2x6"),  # classes that are not integers
        ("nms-class-first", [LISTED], "do not match the head 'nms-class-first'"),
        ("nms-counts", [LISTED, np.array([3])], "2x6, 1 on"),  # another number of boxes
        ("nms-counts", [LISTED + 0.5, np.array([2])], "2x6, 1 on"),
        ("dets", [LISTED[None, :, :5], LABELS], "1x2x5, 1x2 on"),
        ("boxes", [BOXES, BOXES], "1x2x4, 1x2x4"),
        ("tf-boxes", [BOXES], "1x2x4"),
        ("boxes", [BOXES, SCORES, SCORES * 0.5], "1x2x4, 1x2, 1x2"),
    ]
    for head, outputs, message in cases:
        with pytest.raises(DataError, match=message):
            find_candidates(outputs, 1, SIZE, head)
    with pytest.raises(DataError, match="shapes 1x42x8, which do not match"):
        find_candidates([V5], 1, None, "yolox")


def test_only_what_can_hardly_be_anything_else_is_recognized() -> None:
    for outputs in ([V8[:, :10]], [np.zeros((1, 10))], [LISTED, LISTED], [SWAPPED], [BOXES], [V8.swapaxes(1, 2), np.array(["a"])]):
        assert find_candidates(outputs, 1, SIZE) is None
    assert anchors_of(*SIZE) >= {ANCHORS, 3 * ANCHORS}
    assert {name for name, head in HEADS.items() if head.is_recognized} == {
        "yolov8",
        "yolox",
        "yolov5",
        "nms",
        "nms-counts",
        "dets",
        "boxes",
        "rtdetr",
        "detr",
    }


def test_sizes_that_are_logarithms_tell_that_a_head_is_not_decoded() -> None:
    rows = np.abs(np.random.default_rng(0).normal(size=(1, ANCHORS, 7)))
    decoded, logarithms = find_candidates([rows], 1, SIZE), find_candidates([rows - [0, 0, 2, 2, 0, 0, 0]], 1, SIZE)
    for found_so, head, given in ((decoded, "yolov5", rows), (logarithms, "yolox", rows - [0, 0, 2, 2, 0, 0, 0])):
        told = find_candidates([given], 1, SIZE, head)
        assert found_so is not None
        assert told is not None
        np.testing.assert_array_equal(found_so[0].boxes, told[0].boxes)


def test_an_image_without_objects_is_one() -> None:
    """TensorFlow detectors then return scores of 0, which are integers too, and labels of 1."""
    nothing, ones = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    for outputs in ([BOXES, ones, nothing], [BOXES, nothing, ones]):
        assert len(found("tf-boxes", *outputs).scores) == 0
    assert len(found("nms", np.zeros((0, 7), np.float32)).scores) == 0


def test_weak_doubled_and_broken_ones_are_dropped() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 6], [np.nan, 0, 1, 1], [50, 50, 60, 60]])
    scores, classes = np.array([0.5, 0.9, 0.8, 0.9, 0.1]), np.array([0, 0, 1, 0, 0])
    strong = Candidates(boxes, scores, classes, True).above(ALIKE)  # the first overlaps the second by 0.6
    assert (strong.scores.tolist(), strong.classes.tolist()) == ([0.9, 0.8], [0, 1])
    assert Candidates(boxes, scores, classes, True).above(JUDGED).scores.tolist() == [0.9, 0.8, 0.5, 0.1]
    assert Candidates(boxes, scores, classes, False).above(ALIKE).scores.tolist() == [0.9, 0.8, 0.5]
    many = np.arange(2 * MOST) / (2 * MOST)
    assert Candidates(np.zeros((2 * MOST, 4)), many, np.zeros(2 * MOST, int), False).above(ALIKE).scores.min() == 0.5


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("detect:yolovx", "did you mean 'detect:yolox'?"),
        ("detect:qqq", "give values, or detect:HEAD, with one of yolov8, yolox, yolov5, nms"),
        ("detect", "give values, or detect:HEAD"),
        ("value", "did you mean 'values'?"),
        ("yolov8", "did you mean 'detect:yolov8'?"),
        ("segment:yolov8", "the task 'segment:yolov8' is unknown"),
    ],
)
def test_unknown_tasks(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        task_of(task)


def test_outputs_without_answers_are_compared_by_their_values() -> None:
    """Scores, unless the task is `values`; rows of length 1 are embeddings in any case."""
    text = "net (float[n, 3, 4, 4] x) => (float[n, 16] y) { f = Flatten (x) s = MatMul (f, w) y = TAIL (s) }"
    images = ImageSet(np.random.default_rng(0).integers(0, 255, (6, 3, 4, 4)).astype(np.uint8), np.arange(6))
    for tail, task, is_answer in (("Identity", None, True), ("Identity", "values", False), ("LpNormalization", None, False)):
        model = parse(text.replace("TAIL", tail), w=laplace(48, 16))
        other = parse(text.replace("TAIL", tail), w=laplace(48, 16, seed=1))
        report = validate(model, other, replace(images, y=None if tail != "Identity" else images.y), latency_batch=None, task=task)
        assert (report.agreement is not None, report.outputs[0].kind == "scores", report.top1 is not None) == (is_answer,) * 3
        assert report.sqnr_db is not None
        page = html_report(model, other, replace(images, y=None), task=task)
        assert ("of the top-1 answers agree" in page) == is_answer


def test_a_told_head_is_compared() -> None:
    """No head has ten anchors for images of 64x64, so this one is not recognized by itself."""
    text = "net (float[1, 3, 64, 64] x) => (float[1, 10, 8] y) { m = ReduceMean<keepdims = 0>(x) s = Mul(m, e) y = Add(h, s) }"
    model = parse(text, h=V5[:, :10], e=np.zeros(1, np.float32))
    images = ImageSet(np.zeros((2, 3, 64, 64), np.uint8), None)
    assert validate(model, model, images, latency_batch=None).agreement_of == ""
    report = validate(model, model, images, latency_batch=None, task="detect:yolov5")
    assert (report.agreement, report.agreement_of, report.outputs[-1].count) == (1.0, "detections", 2)
    with pytest.raises(DataError, match="do not match the head 'boxes'"):
        validate(model, model, images, task="detect:boxes")
