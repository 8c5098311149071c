"""Conversions end with a check on unused inputs, and are calibrated if possible."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn

from requant_onnx import Calibration, EdgeLayers, Form, ImageSet, Int8Speed, QuantConfig, quantize_model, save_model
from requant_onnx.cli.main import main
from requant_onnx.convert.selfcheck import COUNT, check_without_inputs, self_check
from requant_onnx.errors import QualityError


def test_what_is_broken_is_not_written_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--bits", "2", "--calibrate", "none", "--form", "folded"]
    report = ["--json", str(tmp_path / "a.json")]
    assert main([*command, *report]) == 3
    error = capsys.readouterr().err
    assert "too low to be useful, so nothing was written" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert main([*command, *report, "--force-quality"]) == 0
    assert "warning: on 32 images of noise not used in the conversion, its output has an SQNR of -" in capsys.readouterr().out
    check = json.loads((tmp_path / "a.json").read_text())["check"]
    assert check["is_good"] is False
    assert check["sqnr_db"] < 5


def test_conversions_are_calibrated_where_they_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for bits, images in ((8, 16), (4, 64)):
        command = ["convert", str(OWN_MODEL), str(tmp_path / f"{bits}.onnx"), "--bits", str(bits), "--form", "folded"]
        assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
        assert f"note: calibrated on {images} images of noise (no --calibrate given)" in capsys.readouterr().out
        report = json.loads((tmp_path / "r.json").read_text())
        sizes[bits] = report["check"]["sqnr_db"]
    assert sizes[8] > 35
    assert sizes[4] > 18
    assert {weight["method"] for weight in report["converted"]} > {"feedback, descent"}


def test_models_that_take_no_images_are_not_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(parse("net (float[n, 64] x) => (float[n, 32] y) { y = MatMul(x, w) }", w=laplace(64, 32)), tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "calibrated on" not in printed
    assert "not checked: there are no inputs for the model" in printed


def test_a_model_that_fails_on_noise_is_converted_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model requires 7 images at a time, which its input type does not declare."""
    text = "net (float[n, 3, 4, 4] x) => (float[a, b] y) { r = Reshape(x, s) y = MatMul(r, w) }"
    model = parse(text, s=np.array([7, 48], np.int64), w=laplace(48, 8))
    save_model(model, tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert "note: not calibrated; calibration on noise was tried, but" in " ".join(capsys.readouterr().out.split())


def test_images_that_were_not_drawn_are_used() -> None:
    few = ImageSet(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8)).astype(np.uint8), None)
    config = QuantConfig(3, form=Form.FOLDED)
    _, report = quantize_model(small_cnn(), config, calibration=Calibration(few, count=24))
    assert report.check is not None
    assert report.check.inputs == "16 images not used in the conversion"
    _, report = quantize_model(small_cnn(), config, calibration=Calibration(few, count=40))
    assert report.check is not None
    assert report.check.inputs == f"{COUNT} images used in the conversion too"
    drawn, rest = few.drawn(24, 5), few.not_drawn(24, 5)
    both = np.concatenate([np.asarray(drawn.x[:]), np.asarray(rest.x[:])])
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in np.asarray(few.x[:]))


def test_feeds_beyond_those_used_are_for_the_check() -> None:
    text = "net (float[n, 64] x, float[n, 64] z) => (float[n, 32] y) { s = Add(x, z) y = MatMul(s, w) }"
    rng = np.random.default_rng(0)
    rows = [{name: rng.normal(size=(2, 64)).astype(np.float32) for name in "xz"} for _ in range(30)]
    _, report = quantize_model(parse(text, w=laplace(64, 32)), QuantConfig(4), calibration=Calibration.from_feeds(rows, 20))
    assert report.check is not None
    assert report.check.inputs == "10 inputs not used in the conversion"
    _, report = quantize_model(parse(text, w=laplace(64, 32)), QuantConfig(4), calibration=Calibration.from_feeds(rows, 30))
    assert report.check is not None
    assert report.check.inputs == "30 inputs used in the conversion too"


def test_it_can_be_left_out() -> None:
    _, report = quantize_model(OWN_MODEL, check=False)
    assert (report.check, report.why_unchecked) == (None, "it was not requested")


def test_the_worst_output_counts() -> None:
    text = "net (float[n, 3, 4, 4] x) => (float[n, 48] a, float[n, 48] b) { f = Flatten(x) a = Mul(f, v) b = Mul(f, w) }"
    good = parse(text, v=np.ones(48, np.float32), w=np.ones(48, np.float32))
    bad = parse(text, v=np.ones(48, np.float32), w=1 + laplace(48))
    found = self_check(good, bad, None)
    assert not isinstance(found, str)
    assert found.is_broken or not found.is_good
    assert "the worst of its outputs has an SQNR of" in found.sentence()


def test_a_result_that_does_not_run_is_an_error() -> None:
    text = "net (float[n, 3, 4, 4] x) => (float[a, b] y) { r = Reshape(x, s) y = MatMul(r, w) }"
    good = parse(text, s=np.array([-1, 48], np.int64), w=laplace(48, 8))
    bad = parse(text, s=np.array([7, 48], np.int64), w=laplace(48, 8))
    with pytest.raises(QualityError, match=r"ONNX Runtime runs the model, but not the converted model .*; please report this"):
        self_check(good, bad, None)


@pytest.mark.parametrize("batch", [1, 3, COUNT, 100])
def test_the_copies_that_fill_a_fixed_batch_do_not_count(batch: int) -> None:
    """On the same images, a batch of any size gives the same agreement."""
    text = "net (float[{}, 3, 4, 4] x) => (float[{}, b] y) {{ f = Flatten(x) y = MatMul(f, w) }}"
    models = [parse(text.format(n, n), w=laplace(48, 20)) for n in (batch, "n")]
    checks = [quantize_model(model, QuantConfig(2, form=Form.FOLDED, edge_layers=EdgeLayers.PLAIN))[1].check for model in models]
    first, second = (check.answers for check in checks if check is not None)
    assert first is not None
    assert second is not None
    assert (first.count, first.agreement) == (second.count, second.agreement)
    assert first.sqnr_db == pytest.approx(second.sqnr_db)


TEXTS = "net (float[n, 48] x) => (float[a, b] y) { r = Reshape(x, s) y = MatMul(r, w) }"


def test_without_inputs_a_result_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is known about its inputs, except for a runtime that cannot be tried, and for broken models."""
    good = parse(TEXTS, s=np.array([-1, 48], np.int64), w=laplace(48, 8))
    bad = parse(TEXTS, s=np.array([-1, 48], np.int32), w=laplace(48, 8))
    check_without_inputs(good, good, loads=True)
    check_without_inputs(bad, bad, loads=True)
    check_without_inputs(good, bad, loads=False)
    with pytest.raises(QualityError, match=r"ONNX Runtime loads the model, but not the converted model .*; please report this"):
        check_without_inputs(good, bad, loads=True)
    asked = []
    monkeypatch.setattr("requant_onnx.convert.pipeline.check_without_inputs", lambda *_, loads: asked.append(loads))
    for config in (QuantConfig(), QuantConfig(form=Form.FOLDED), QuantConfig(runtime="tensorrt")):
        assert quantize_model(good, config)[1].why_unchecked.startswith("there are no inputs")
    assert asked == [True, False, False]  # the folded form has been loaded already


def test_without_inputs_a_result_may_not_require_more_of_them() -> None:
    values = np.array([-1, 48], np.int64)
    source = parse(TEXTS.replace("x)", "x, int64[2] s)"), s=values, w=laplace(48, 8))
    made = parse(TEXTS.replace("x)", "x, int64[2] s)"), w=laplace(48, 8))
    check_without_inputs(made, source, loads=False)
    with pytest.raises(QualityError, match="the converted model requires the input 's', which the model does not"):
        check_without_inputs(source, made, loads=False)


@pytest.mark.parametrize("form", list(Form))
def test_nan_of_the_float_model_is_no_fault_of_a_conversion(form: Form) -> None:
    """An output with a logarithm of negative numbers says nothing about the weights, and infinities in both models are equal."""
    text = """net (float[n, 3, 4, 4] x) => (float[n, b] y, float[n, b] l, float[n, b] m) {
        f = Flatten(x) y = MatMul(f, w) l = Log(y) m = Where(mask, y, low) }"""
    constants = {"w": laplace(48, 20), "mask": np.arange(20) > 2, "low": np.float32(-np.inf)}
    model = parse(text, **constants)
    config = QuantConfig(form=form, int8_speed=Int8Speed.ALL)
    report = quantize_model(model, config, calibration=Calibration(count=8))[1]
    assert report.check is not None
    assert [each.name for each in report.check.outputs] == ["y", "m"]
    assert report.check.is_good
    assert {weight.form for weight in report.converted} == {form.value}
