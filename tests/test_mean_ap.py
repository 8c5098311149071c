"""The mAP of detectors: by hand, on the command line, and of a trained model."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import missing, parse, wheel_of
from test_annotations import coco, objects
from test_image_folder import write

from requant_onnx import ConfigError, DataError, Form, Normalization, QuantConfig, load_images, quantize_model, validate
from requant_onnx.cli.main import main
from requant_onnx.convert.schema import report_schema
from requant_onnx.evaluate.mean_ap import PrecisionTally, _ranked
from requant_onnx.inputs.annotations import ObjectLabels, Objects
from requant_onnx.numerics.average_precision import mean_average_precision
from requant_onnx.numerics.detections import ALIKE, Candidates
from requant_onnx.numerics.heads import find_candidates

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("pycocotools")

SIZE = (100, 200)  # height, width
A, B, C = [0, 0, 10, 10], [50, 50, 70, 90], [20, 0, 30, 10]
PIXELS = Normalization((0.0,), (1 / 255,))


def candidates(boxes: Any, scores: Any, classes: Any) -> Candidates:
    return Candidates(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(classes, np.int64), False)


def precision(
    truths: Sequence[Objects], found: Sequence[Candidates], *, ids: bool = False, known: Any = (3, 8)
) -> tuple[float, float]:
    """The AP and AP50 if both models have these detections."""
    tally = PrecisionTally(ObjectLabels(known, tuple(truths)), SIZE, ids=ids)
    tally.add((found, found))
    report = tally.report()
    assert report.mean_ap[0] == report.mean_ap[1]
    assert report.error == 0.0
    return report.mean_ap[0], report.ap50[0]


def test_perfect_detections() -> None:
    truths = [objects([A, B], [3, 8]), objects([], []), objects([C], [8])]
    found = [candidates([A, B], [0.9, 0.01], [0, 1]), candidates([], [], []), candidates([C], [0.5], [1])]
    assert precision(truths, found) == pytest.approx((1.0, 1.0))
    by_id = [candidates(each.boxes, each.scores, np.array([3, 8])[each.classes].tolist()) for each in found]
    assert precision(truths, by_id, ids=True) == pytest.approx((1.0, 1.0))
    relative = [candidates(each.boxes / [200, 100, 200, 100], each.scores, each.classes.tolist()) for each in found]
    assert precision(truths, relative) == pytest.approx((1.0, 1.0))
    swapped = [candidates(each.boxes, each.scores, (1 - each.classes).tolist()) for each in found]
    assert precision(truths, swapped) == pytest.approx((0.0, 0.0))


def test_figures_by_hand() -> None:
    """With right, wrong, right, precision is 1 up to a recall of 1/2, 51 of 101 points, and then 2/3."""
    truths = [objects([A, B], [3, 3])]
    found = [candidates([A, C, B], [0.9, 0.8, 0.7], [0, 0, 0])]
    expected = (51 + 50 * 2 / 3) / 101
    assert precision(truths, found) == pytest.approx((expected, expected))
    less = [candidates([[0, 0, 10, 7.2]], [0.9], [0])]  # an overlap of 0.72: enough for 5 of 10
    assert precision([objects([A], [3])], less) == pytest.approx((0.5, 1.0))


def test_a_crowd_is_no_object_and_no_mistake() -> None:
    truths = [objects([A, [40, 40, 100, 100]], [3, 3], [False, True])]
    found = [candidates([[50, 50, 90, 90], A], [0.9, 0.8], [0, 0])]
    assert precision(truths, found) == pytest.approx((1.0, 1.0))


def test_models_differ_and_the_error_is_that_of_the_change() -> None:
    """The candidate misses the object in every second of 8 images."""
    truths = [objects([A], [3])] * 8
    both = ([candidates([A], [0.9], [0])] * 8, [candidates([A], [0.9 - 0.8 * (k % 2)], [k % 2]) for k in range(8)])
    tally = PrecisionTally(ObjectLabels((3, 8), tuple(truths)), SIZE, ids=False)
    for start in (0, 4):
        tally.add((both[0][start : start + 4], both[1][start : start + 4]))
    report = tally.report()
    assert report.mean_ap == pytest.approx((1.0, 51 / 101))
    assert report.error == pytest.approx((0.25 / 8) ** 0.5, rel=0.25)  # a binomial share; 100 resamples estimate it to within 7 %


def test_resampling_has_the_figures_of_pycocotools() -> None:
    """The weighted mAP of random detections equals pycocotools' mAP on images repeated as often as their weights."""
    rng = np.random.default_rng(0)
    truths, found = [], []
    for _ in range(12):
        corners = rng.uniform(0, 60, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (6, 2))], 1)
        classes = rng.integers(0, 3, 6)
        truths.append(objects(boxes[:4], classes[:4], rng.random(4) < 0.1))
        found.append(candidates(boxes + rng.normal(0, 2, boxes.shape), rng.random(6), classes))
    times = np.array([0, 1, 2, 3] * 3)
    for weights, chosen in ((np.ones(12, np.int64), range(12)), (times, np.repeat(np.arange(12), times))):
        tally = PrecisionTally(ObjectLabels((0, 1, 2), tuple(truths)), SIZE, ids=False)
        tally.add((found, found))
        made = mean_average_precision(_ranked(tally._evaluated(tally._found[0], tally._unit()).evalImgs, 12), weights)
        again = PrecisionTally(ObjectLabels((0, 1, 2), tuple(truths[k] for k in chosen)), SIZE, ids=False)
        again.add(([found[k] for k in chosen],) * 2)
        assert 0.05 < made < 0.95
        assert made == pytest.approx(again.report().mean_ap[0], rel=1e-9)


def test_classes_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="find objects of class 2, but the labels have 2 categories"):
        precision([objects([A], [3])], [candidates([A], [0.9], [2])])
    assert precision([objects([A], [3])], [candidates([B, A], [0.9, 0.8], [90, 3])], ids=True) == pytest.approx((1.0, 1.0))
    with pytest.raises(DataError, match="no boxes in these images"):
        precision([objects([], [])], [candidates([A], [0.9], [0])])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 64x64, labels, and two detectors: the second one misplaces one object of two."""
    for name in "ab":
        write(tmp_path / f"photos/{name}.png", 64, 64)
    coco(tmp_path / "labels.json", {"a.png": [[8, 8, 16, 16]], "b.png": [[8, 8, 16, 16], [40, 40, 10, 10]]})
    for name, second in (("ref", 45.0), ("worse", 15.0)):
        head = np.zeros((1, 5, 84), np.float32)
        head[0, :, 3], head[0, :, 50] = [16, 16, 16, 16, 0.9], [second, 45, 10, 10, 0.8]
        text = "net (float[1, 3, 64, 64] x) => (float[1, 5, 84] y) { m = ReduceMean<keepdims = 0>(x) s = Mul(m, e) y = Add(h, s) }"
        onnx.save(parse(text, h=head, e=np.zeros(1, np.float32)), tmp_path / f"{name}.onnx")
    return tmp_path


def command(folder: Path, *more: str, candidate: str = "worse") -> list[str]:
    models = [str(folder / f"{name}.onnx") for name in ("ref", candidate)]
    return ["validate", *models, "--data", f"images:{folder / 'photos'}", "--no-latency", *more]


def test_the_command_prints_and_writes_the_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--labels", str(folder / "labels.json")]
    assert main(command(folder, *labels, "--json", str(folder / "r.json"))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    reference = (67 + 34 * 3 / 4) / 101  # right in both images; then right in one of them, at a recall of 1
    assert f"mAP {reference:.2%} {67 / 101:.2%} {100 * (67 / 101 - reference):+.2f} points (standard error" in printed
    assert f"AP50 {reference:.2%} {67 / 101:.2%}" in printed
    assert "no labels" not in printed
    report = json.loads((folder / "r.json").read_text())
    assert report["mean_ap"] == pytest.approx([reference, 67 / 101])
    jsonschema.validate(report, report_schema())
    assert main(command(folder, *labels, "--fail-below", "map-drop=0.1")) == 4
    assert "the mAP drop in points is" in capsys.readouterr().err
    assert main(command(folder, *labels, "--fail-below", "map-drop=0.1", candidate="ref")) == 0
    assert main(command(folder, "--fail-below", "map-drop=0.1")) == 4
    assert "the mAP drop in points was not measured" in capsys.readouterr().err


def test_a_reference_that_finds_nothing_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(folder / "labels.json", {"a.png": [[50, 0, 10, 10]], "b.png": []})
    assert main(command(folder, "--labels", str(folder / "labels.json"))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the reference itself has an AP50 of 0.00%; check the labels, the head (--task), and the normalization (mean" in printed


BOX: dict[str, list[list[float]]] = {"a.png": [[0, 0, 4, 4]], "b.png": []}


@pytest.mark.parametrize(
    ("boxes", "changes", "message"),
    [
        (BOX, {"images": None}, "is not in COCO format; give a file with 'images'"),
        (BOX, {"annotations": [{"image_id": 0}]}, "is not in COCO format (KeyError: 'bbox')"),
        (BOX, {"annotations": [3]}, "is not in COCO format (TypeError"),
        (BOX, {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "(KeyError: 5)"),
        (BOX, {"categories": [{"id": 1}]}, "a category_id is not one of the categories"),
        ({"a.png": [[0, 0, 4]], "b.png": []}, {}, "is not in COCO format (ValueError"),
        ({"a.png": [[0, 0, -4, 4]], "b.png": []}, {}, "a bbox is not a list of x, y, width and height"),
        ({"a.png": [[0, 0, float("nan"), 4]], "b.png": []}, {}, "a bbox is not a list of x, y, width and height"),
        ({"a.png": [], "c.png": []}, {}, "b.png' is not listed in"),
        ({"a.png": [], "b.png": []}, {}, "no boxes in these images"),
    ],
)
def test_labels_that_make_no_sense(
    folder: Path, boxes: dict[str, list[list[float]]], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = coco(folder / "labels.json", boxes, **changes)
    assert main(command(folder, "--labels", str(labels))) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_mistakes_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "no.json").write_text("{")
    (folder / "latin.json").write_bytes(b"\xff\xfe")
    (folder / "list.json").write_text("[1]")
    labels = str(folder / "labels.json")
    cases = [
        (["--labels", str(folder / "no.json")], "is not JSON"),
        (["--labels", str(folder / "latin.json")], "is not JSON"),
        (["--labels", str(folder / "list.json")], "is not in COCO format; give a file"),
        (["--labels", str(folder / "none.json")], "check the path of the labels"),
        (["--labels", labels, "--data", "noise"], "--labels applies to images:DIR, not to 'noise'; drop --labels"),
        (["--task", "detect:yolo5"], "did you mean 'detect:yolov5'?"),
        (["--task", "detect:boxes"], "the outputs have the shapes 1x5x84 on images of 64x64, which do not match the head 'boxes'"),
    ]
    for options, message in cases:
        assert main(command(folder, *options)) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    plain = parse("net (float[1, 3, 64, 64] x) => (float[1, 3] y) { y = ReduceMean<axes = [2, 3], keepdims = 0>(x) }", opset=13)
    onnx.save(plain, folder / "ref.onnx")
    assert main(command(folder, "--labels", labels, candidate="ref")) == 2
    assert "the labels are boxes, but the outputs, of shapes 1x3, are not a recognized head" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"labeled boxes need images:DIR, not 'x\.npz'"):
        load_images("x.npz", labels=labels)


def test_classes_of_a_told_head_may_be_category_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """net (float[1, 3, 64, 64] x) => (float[1, 2, 4] boxes, float[1, 2] scores, float[1, 2] labels) {
        m = ReduceMean<keepdims = 0>(x) s = Mul(m, e) boxes = Add(b, s) scores = Add(c, s) labels = Add(l, s) }"""
    values = {"b": [[[8, 8, 24, 24], [40, 40, 50, 50]]], "c": [[0.9, 0.8]], "l": [[7, 7]], "e": 0}
    onnx.save(parse(text, **{name: np.array(each, np.float32) for name, each in values.items()}), folder / "ref.onnx")
    labels = ["--labels", str(folder / "labels.json")]
    assert main(command(folder, *labels, candidate="ref")) == 2
    assert "objects of class 7, but the labels have 1 categories; give labels with all categories" in capsys.readouterr().err
    assert main(command(folder, *labels, "--task", "detect:boxes-ids", candidate="ref")) == 0
    assert "mAP 91" in " ".join(capsys.readouterr().out.split())  # (67 + 34 * 3 / 4) / 101


def test_labels_in_a_file_of_options_are_for_folders_only(folder: Path) -> None:
    (folder / "o.toml").write_text(f"labels = {json.dumps(str(folder / 'none.json'))}\n")
    assert main(command(folder, "--config", str(folder / "o.toml"), "--data", "noise", "--limit", "1")) == 0


def test_without_the_extra_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"pip install 'requant_onnx\[detection\]'"):
        PrecisionTally(ObjectLabels((1,), ()), SIZE, ids=False)
    assert main(command(folder)) == 0  # without labels it is not needed


LETTERS: tuple[list[list[tuple[float, float]]], ...] = (
    [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.9, 0.5)]],
    [[(0, 0), (1, 0), (0, 1), (1, 1)]],
    [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.6), (0.8, 0.6)]],
    [[(0, 0), (0, 1)], [(1, 0), (0, 0.5), (1, 1)]],
    [[(0, 1), (0, 0), (1, 1), (1, 0)]],
)
"""E, Z, H, A, K and N as lines in the unit square."""


def drawn(path: Path, seed: int) -> list[list[float]]:
    """Draw an image of four letters on a smooth background; return their boxes, [x, y, width, height]."""
    draw_module = pytest.importorskip("PIL.ImageDraw")
    rng = np.random.default_rng(seed)
    image = image_module.fromarray(rng.integers(60, 200, (8, 8, 3)).astype(np.uint8)).resize(
        (416, 416), image_module.Resampling.BICUBIC
    )
    boxes = []
    for k in range(4):
        letter = image_module.new("L", (64, 64))
        drawing = draw_module.Draw(letter)
        for line in LETTERS[int(rng.integers(len(LETTERS)))]:
            drawing.line([(12 + 40 * x, 7 + 50 * y) for x, y in line], fill=255, width=7, joint="curve")
        letter = letter.rotate(float(rng.uniform(-30, 30)))
        left, top = ((80, 250)[place] + int(rng.integers(60)) for place in (k % 2, k // 2))
        color = tuple(rng.integers(200, 255, 3).tolist())
        image.paste(image_module.new("RGB", (64, 64), color), (left, top), letter)
        low_x, low_y, high_x, high_y = letter.getbbox()
        boxes.append([left + low_x, top + low_y, high_x - low_x, high_y - low_y])
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return boxes


@pytest.mark.slow
def test_a_trained_detector_keeps_its_map_at_8_bits(tmp_path: Path) -> None:
    """ddddocr finds letters, as in captchas.  Labels: their true places, and the detections of the float model."""
    wheel = wheel_of("ddddocr")
    if wheel is None:
        missing("the wheel of ddddocr is not in $REQUANT_PACKAGES")
    with zipfile.ZipFile(wheel) as archive:
        model = onnx.load_from_string(archive.read("ddddocr/common_det.onnx"))
    photos = {f"{k}.png": drawn(tmp_path / "photos" / f"{k}.png", k) for k in range(6)}
    small = quantize_model(model, QuantConfig(8, form=Form.FOLDED))[0]

    def judged(boxes: dict[str, list[list[float]]]) -> Any:
        images = load_images(f"images:{tmp_path / 'photos'}", labels=coco(tmp_path / "labels.json", boxes))
        return validate(model, small, images, PIXELS, latency_batch=None, task="detect:yolox")

    truly = judged(photos)
    assert truly.ap50[0] > 0.85
    assert abs(truly.ap50[1] - truly.ap50[0]) < 0.1  # 24 letters
    own = judged({name: strong(model, tmp_path / "photos" / name) for name in photos})
    assert own.mean_ap[0] > 0.98
    assert own.mean_ap[1] > 0.9
    assert own.agreement > 0.95


def strong(model: onnx.ModelProto, path: Path) -> list[list[float]]:
    """The detections of the float model, [x, y, width, height]."""
    from onnxruntime import InferenceSession  # noqa: PLC0415

    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.asarray(image_module.open(path), np.float32).transpose(2, 0, 1)[None]
    found = find_candidates(session.run(None, {"images": x}), 1, (416, 416), "yolox")
    assert found is not None
    boxes = found[0].above(ALIKE).boxes
    listed: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    return listed
