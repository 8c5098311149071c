"""Models of every kind through every command: convert, validate, report, compare, restore, and a gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, trained_model

from requant_onnx.cli.main import main

Data = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def yolo() -> tuple[onnx.ModelProto, Data]:
    """A YOLOv8 head for images of 64x64: strides 8, 16 and 32, 84 anchors, each with center, size and 3 classes."""
    text = """net (float[1, 3, 64, 64] x) => (float[1, 7, 84] y) {
        a = Conv<kernel_shape = [8, 8], strides = [8, 8]>(x, w1)
        b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, w2)
        d = Relu(c)
        e = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(d, w3)
        f = Relu(e)
        h1 = Conv(b, v1)
        h2 = Conv(d, v2)
        h3 = Conv(f, v3)
        r1 = Reshape(h1, s)
        r2 = Reshape(h2, s)
        r3 = Reshape(h3, s)
        all = Concat<axis = 2>(r1, r2, r3)
        boxes, scores = Split<axis = 1>(all, parts)
        near = Sigmoid(boxes)
        large = Mul(near, k)
        likely = Sigmoid(scores)
        y = Concat<axis = 1>(large, likely)
    }"""
    weights = {
        "w1": laplace(16, 3, 8, 8), "w2": laplace(16, 16, 3, 3, seed=1), "w3": laplace(16, 16, 3, 3, seed=2),
        "v1": laplace(7, 16, 1, 1, seed=3), "v2": laplace(7, 16, 1, 1, seed=4), "v3": laplace(7, 16, 1, 1, seed=5),
        "s": np.array([1, 7, -1], np.int64), "parts": np.array([4, 3], np.int64), "k": np.float32(64),
    }  # fmt: skip
    return parse(text, **weights), {"x": RNG.integers(0, 256, (24, 64, 64, 3), np.uint8)}


def two_inputs() -> tuple[onnx.ModelProto, Data]:
    text = """net (float[n, 3, 16, 16] image, float[n, 8] facts) => (float[n, 5] y, float[n, 16] features) {
        a = Conv<pads = [1, 1, 1, 1]>(image, w1)
        b = Relu(a)
        c = GlobalAveragePool(b)
        features = Flatten(c)
        d = Concat<axis = 1>(features, facts)
        y = Gemm<transB = 1>(d, w2)
    }"""
    data = {"image": RNG.normal(size=(24, 3, 16, 16)).astype(np.float32), "facts": RNG.normal(size=(24, 8)).astype(np.float32)}
    return parse(text, w1=laplace(16, 3, 3, 3), w2=laplace(5, 24, seed=1)), data


def uint8_nhwc() -> tuple[onnx.ModelProto, Data]:
    text = """net (uint8[n, 16, 16, 3] pixels) => (float[n, 6] y) {
        a = Cast<to = 1>(pixels)
        b = Mul(a, k)
        c = Transpose<perm = [0, 3, 1, 2]>(b)
        d = Conv<pads = [1, 1, 1, 1]>(c, w1)
        e = Relu(d)
        f = GlobalAveragePool(e)
        g = Flatten(f)
        y = Gemm<transB = 1>(g, w2)
    }"""
    model = parse(text, k=np.float32(1 / 255), w1=laplace(16, 3, 3, 3), w2=laplace(6, 16, seed=1))
    return model, {"x": RNG.integers(0, 256, (24, 16, 16, 3), np.uint8)}


def segmentation() -> tuple[onnx.ModelProto, Data]:
    text = """net (float[n, 3, 32, 32] x) => (float[n, 4, 32, 32] masks) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, w2)
        d = Relu(c)
        masks = ConvTranspose<strides = [2, 2]>(d, w3)
    }"""
    weights = {"w1": laplace(16, 3, 3, 3), "w2": laplace(16, 16, 3, 3, seed=1), "w3": laplace(16, 4, 2, 2, seed=2)}
    return parse(text, **weights), {"x": RNG.integers(0, 256, (24, 32, 32, 3), np.uint8)}


def audio() -> tuple[onnx.ModelProto, Data]:
    """The voice detector of silero, with samples, a state and a sample rate."""
    model = onnx.load(trained_model("silero_vad"))
    shapes = {item.name: [d.dim_value or 1 for d in item.type.tensor_type.shape.dim] for item in model.graph.input}
    data = {"input": RNG.normal(size=(24, 1, 512)).astype(np.float32) / 10, "sr": np.full(24, 16000, np.int64)}
    state = np.zeros((24, *[2 if n == 0 else n for n in shapes["state"]]), np.float32)
    return model, {**data, "state": state}


KINDS: dict[str, tuple[Callable[[], tuple[onnx.ModelProto, Data]], str, str]] = {
    "yolo": (yolo, "detections", "found=80"),
    "two inputs": (two_inputs, "scores", "agreement=80"),
    "uint8 NHWC": (uint8_nhwc, "scores", "agreement=80"),
    "segmentation": (segmentation, "mask", "agreement=80"),
    "audio": (audio, "values", "worst-sqnr=10"),
}
"""Kind -> the model and its data, the recognized kind of an output, and a gate."""


@pytest.mark.parametrize("kind", [pytest.param(name, marks=pytest.mark.slow if name == "audio" else ()) for name in KINDS])
def test_every_command_takes_every_kind_of_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    build, output, gate = KINDS[kind]
    model, data = build()
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **data)  # type: ignore[arg-type]
    source, made, inputs = (str(tmp_path / name) for name in ("in.onnx", "out.onnx", "data.npz"))
    assert main(["convert", source, made, "--bits", "8", "--form", "folded", "--calibrate", inputs, "--calibrate-limit", "16"]) == 0
    assert "not used in the conversion" in capsys.readouterr().out
    validated = ["validate", source, made, "--data", inputs, "--no-latency"]
    assert main([*validated, "--fail-below", gate, "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert output in [each["kind"] for each in report["outputs"]]
    assert main([*validated, "--fail-below", "worst-sqnr=300"]) == 4
    assert main(["report", source, made, str(tmp_path / "a.html"), "--data", inputs]) == 0
    page = (tmp_path / "a.html").read_text()
    assert "Can I ship this?" in page
    assert ("data:image/" in page) == ("x" in data)
    options = ["--bits", "4", "--recipes", "max,best", "--calibrate", inputs, "--no-cache", "--jobs", "1"]
    assert main(["compare", source, "--data", inputs, *options, "--json", str(tmp_path / "b.json")]) == 0
    assert {trial["recipe"] for trial in json.loads((tmp_path / "b.json").read_text())["trials"]} == {"max", "best"}
    assert main(["restore", made, str(tmp_path / "back.onnx")]) == 0
    same = ["validate", made, str(tmp_path / "back.onnx"), "--data", inputs, "--no-latency", "--fail-below", "worst-sqnr=90"]
    assert main(same) == 0


def test_a_page_on_detectors_is_told_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    model, data = yolo()
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **{name: values[:4] for name, values in data.items()})  # type: ignore[arg-type]
    command = ["report", str(tmp_path / "in.onnx"), str(tmp_path / "in.onnx"), str(tmp_path / "a.html")]
    inputs = ["--data", str(tmp_path / "data.npz")]
    assert main([*command, *inputs, "--task", "detect:yolov8"]) == 0
    page = (tmp_path / "a.html").read_text()
    assert "of the detections of the float model are found again" in page
    assert "The file is not smaller" in page
    for more, said in (
        ([*inputs, "--task", "detect:tf-boxes"], "do not match the head 'tf-boxes'"),
        ([*inputs, "--labels", "a.json"], "--labels applies to images:DIR"),
        (["--labels", "a.json"], "--labels applies to images:DIR, not to 'noise'"),
    ):
        assert main([*command, "--force", *more]) == 2
        assert said in capsys.readouterr().err
