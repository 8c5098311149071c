"""The change of each weight is determined from the two files alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from requant_onnx import Calibration, Form, Granularity, ImageSet, Int8Speed, QuantConfig, Transform, html_report, quantize_model
from requant_onnx.evaluate.weight_comparison import dissect, output_sqnr
from requant_onnx.files.load import load_model
from requant_onnx.runtime.stream import Chunk

INPUTS = Calibration(ImageSet(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8)).astype(np.uint8), None))


@pytest.mark.slow
@pytest.mark.parametrize("form", list(Form))
def test_grids_errors_and_scales_are_those_of_the_report(form: Form) -> None:
    config = QuantConfig(bits=4, form=form, int8_speed=Int8Speed.ALL, transform=Transform(None if form is Form.INT8 else 0.5))
    made, report = quantize_model(small_cnn(), config, calibration=INPUTS if form is Form.INT8 else None)
    found = dissect(small_cnn(), made, INPUTS)
    assert [sorted(weight.shape) for weight in found] == [sorted(weight.shape) for weight in report.converted]  # Gemm is transposed
    for weight, told in zip(found, report.converted, strict=True):
        assert (weight.op, weight.outcome) == (told.op, "grid")
        assert weight.bits <= told.bits
        assert weight.grid is not None
        assert weight.grid.describe() == told.transform
        assert weight.sqnr_db == pytest.approx(told.sqnr_db, abs=0.01)
        assert weight.scales is not None
        np.testing.assert_allclose((weight.scales.min(), weight.scales.max()), told.scale, rtol=1e-4)
        if form is not Form.INT8:  # int8 scales have a lower bound
            assert weight.alpha is not None
            assert weight.alpha[0] == pytest.approx(told.alpha[0], rel=2e-3)
            assert weight.alpha[2] == pytest.approx(told.alpha[1], rel=2e-3)
        assert 0 < weight.output_sqnr_db < 70


def test_the_curve_has_its_optimum_at_the_alpha_that_the_search_found() -> None:
    config = QuantConfig(bits=4, granularity=Granularity.PER_TENSOR, form=Form.FOLDED)
    made, report = quantize_model(small_cnn(), config)
    for weight, told in zip(dissect(small_cnn(), made, None), report.converted, strict=True):
        assert weight.curve is not None
        assert weight.curve.best[0] == pytest.approx(told.alpha[0], abs=0.011)  # the curve has a point every 0.01
        assert weight.curve.best[1] == pytest.approx(told.sqnr_db, abs=0.2)
        assert weight.curve.per_channel == pytest.approx(told.sqnr_db, abs=0.01)
        assert weight.curve.full <= weight.curve.best[1]
        assert math.isnan(weight.output_sqnr_db)
        assert weight.densities is not None
        assert weight.densities[0].counts.sum() == math.prod(weight.shape)
        assert weight.densities[0].levels.size <= 2**told.bits


def test_the_same_model_is_the_same() -> None:
    found = dissect(small_cnn(), small_cnn(), INPUTS)
    assert {(weight.outcome, weight.sqnr_db, weight.output_sqnr_db) for weight in found} == {("same", math.inf, math.inf)}


def test_weights_behind_a_folded_batchnormalization_are_matched() -> None:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, 6, 6] y) {
        a = Conv(x, w)
        b = BatchNormalization(a, s, b0, m, v)
        c = Relu(b)
        d = Conv<pads = [1, 1, 1, 1]>(c, w2)
        y = BatchNormalization(d, s, b0, m, v)
    }"""
    vectors = {"s": np.abs(laplace(8)) + 1, "b0": laplace(8), "m": laplace(8, seed=3), "v": np.abs(laplace(8, seed=4)) + 1}
    model = parse(text, w=laplace(8, 3, 3, 3), w2=laplace(8, 8, 3, 3), **vectors)
    made, report = quantize_model(model, QuantConfig(bits=4))
    assert report.folded_batchnorms == 2
    found = dissect(model, made, INPUTS)
    assert [weight.sqnr_db for weight in found] == pytest.approx([told.sqnr_db for told in report.converted], abs=0.01)
    assert all(weight.output_sqnr_db > 5 for weight in found)


def test_files_of_other_tools(tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    quantize_dynamic(tmp_path / "in.onnx", tmp_path / "q.onnx", op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    assert len(dissect(tmp_path / "in.onnx", tmp_path / "q.onnx", INPUTS)) >= 3
    changed = load_model(small_cnn())
    for item in changed.graph.initializer:
        if item.name == "w2":
            item.CopyFrom(onnx.numpy_helper.from_array(laplace(16, 16, 3, 3, seed=9), "w2"))
    kinds = {weight.name: weight.outcome for weight in dissect(small_cnn(), changed, INPUTS)}
    assert kinds == {"w1": "same", "w2": "changed", "w3": "same", "w4": "same"}


class _Feeds(CalibrationDataReader):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        self.feeds = iter([{"x": np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


RESIDUAL = """net (float[n, 3, 8, 8] x) => (float[n, 10] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(b, w2)
    d = Relu(c)
    e = Conv<pads = [1, 1, 1, 1]>(d, w3)
    f = Add(b, e)
    g = Relu(f)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    y = Gemm<transB = 1>(i, w4, b4)
}"""


def residual() -> onnx.ModelProto:
    weights = {"w2": laplace(16, 16, 3, 3, seed=1), "w3": laplace(16, 16, 3, 3, seed=3), "w4": laplace(10, 16, seed=4)}
    return parse(RESIDUAL, w1=laplace(16, 3, 3, 3), b4=laplace(10, seed=5), **weights)


def test_no_weight_is_missed_in_the_int8_form() -> None:
    """In it, outputs of nodes have other names than in the reference."""
    made, report = quantize_model(residual(), QuantConfig(4, form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=INPUTS)
    found = dissect(residual(), made, INPUTS)
    assert [weight.name for weight in found] == [told.name for told in report.converted]
    assert all(weight.outcome == "grid" and 5 < weight.output_sqnr_db < 60 for weight in found)


def test_a_folded_weight_whose_output_has_another_name_is_compared_as_folded() -> None:
    """In the int8 form of a residual block, the output's name moves to after the rounding; the weight keeps its name."""
    text = RESIDUAL.replace(
        "e = Conv<pads = [1, 1, 1, 1]>(d, w3)", "p = Conv<pads = [1, 1, 1, 1]>(d, w3) e = BatchNormalization(p, s, z, z, v)"
    )
    vectors = {"s": np.linspace(2, 9, 16, dtype=np.float32), "z": np.zeros(16, np.float32), "v": np.ones(16, np.float32)}
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in residual().graph.initializer}
    model = parse(text, **weights, **vectors)
    made, report = quantize_model(model, QuantConfig(4, form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=INPUTS)
    assert report.folded_batchnorms == 1
    found = {weight.name: weight.sqnr_db for weight in dissect(model, made, INPUTS)}
    assert found == pytest.approx({told.name: told.sqnr_db for told in report.converted}, abs=0.01)


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_no_weight_is_missed_in_files_of_onnxruntime(tmp_path: Path, form: str) -> None:
    onnx.save(residual(), tmp_path / "in.onnx")
    quantize_static(
        tmp_path / "in.onnx",
        tmp_path / "q.onnx",
        _Feeds(),
        quant_format=QuantFormat[form],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    found = dissect(tmp_path / "in.onnx", tmp_path / "q.onnx", INPUTS)
    assert [(weight.op, weight.outcome) for weight in found] == [("Conv", "grid")] * 3 + [("Gemm", "grid")]
    assert all(weight.sqnr_db > 30 for weight in found)
    compared = [weight.output_sqnr_db for weight in found if not math.isnan(weight.output_sqnr_db)]
    assert compared
    assert min(compared) > 15  # Conv and Relu become one node, so the tensor after both is compared


def test_weights_that_cannot_be_told_are_shown_as_such(tmp_path: Path) -> None:
    onnx.save(residual(), tmp_path / "in.onnx")
    quantize_dynamic(tmp_path / "in.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    found = dissect(tmp_path / "in.onnx", tmp_path / "q.onnx", INPUTS)
    assert [(weight.op, weight.outcome) for weight in found] == [("ConvInteger", "unknown")] * 3 + [("MatMulInteger", "unknown")]
    assert [weight.shape for weight in found[:3]] == [(16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3)]
    assert "4 of 4 weights could not be compared" in html_report(tmp_path / "in.onnx", tmp_path / "q.onnx")


def test_weights_in_bodies_are_matched() -> None:
    text = """net (bool c, float[1, 3, 8, 8] x) => (float[1, 16, 8, 8] y) {
        y = If(c) <
            then_branch = t () => (float[1, 16, 8, 8] o) { o = Conv<pads = [1, 1, 1, 1]>(x, w1) },
            else_branch = e () => (float[1, 16, 8, 8] o) { o = Conv<pads = [1, 1, 1, 1]>(x, w2) }
        >
    }"""
    model = parse(text, w1=laplace(16, 3, 3, 3), w2=laplace(16, 3, 3, 3, seed=1))
    made, report = quantize_model(model, QuantConfig(4))
    found = dissect(model, made, None)
    assert sorted((weight.name, weight.outcome) for weight in found) == [("w1", "grid"), ("w2", "grid")]
    assert sorted(weight.sqnr_db for weight in found) == pytest.approx(sorted(told.sqnr_db for told in report.converted), abs=0.01)


@pytest.mark.slow
def test_pages_join_weights_behind_a_cast_and_say_what_is_odd() -> None:
    text = "net (float[n, 3, 8, 8] x) => (float[n, 16, 8, 8] y) { v = Cast<to = 1>(w) y = Conv<pads = [1, 1, 1, 1]>(x, v) }"
    model = parse(text, w=laplace(16, 3, 3, 3).astype(np.float16))
    made, report = quantize_model(model, QuantConfig(4))
    (told,) = report.converted
    assert f"{told.bytes_before:,} to {told.bytes_after:,}" in html_report(model, made, conversion=report)
    page = html_report(model, made)
    assert "is the candidate made from this reference" not in page
    assert "output SQNR" in page
    other = parse(text, w=np.float16(0.1) * laplace(16, 3, 3, 3, seed=1).astype(np.float16))
    assert "is the candidate made from this reference" in html_report(other, made)
    smaller, _ = quantize_model(small_cnn(), QuantConfig(4))
    assert "are the two models in the right order" in html_report(smaller, small_cnn())


def test_outputs_are_compared_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = quantize_model(OWN_MODEL, QuantConfig(bits=3))
    model = load_model(OWN_MODEL)
    names = {node.output[0]: node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    chunks: list[Chunk] = [{"input": np.random.default_rng(k).normal(size=(4, 3, 32, 32)).astype(np.float32)} for k in range(2)]
    whole = output_sqnr(model, made, names, chunks)
    monkeypatch.setattr("requant_onnx.evaluate.weight_comparison.TENSOR_BYTES", 1 << 18)
    assert output_sqnr(model, made, names, chunks) == pytest.approx(whole)
    assert len(whole) == len(names)


@pytest.mark.parametrize("exponent", [0.5, 2 / 3, 0.75])
def test_in_transformed_space_levels_are_one_apart(exponent: float) -> None:
    config = QuantConfig(bits=4, form=Form.FOLDED, transform=Transform(exponent))
    made, _ = quantize_model(small_cnn(), config)
    for weight in dissect(small_cnn(), made, None)[1:-1]:  # the first and last layer have no transform
        assert weight.densities is not None
        levels = weight.densities[1].levels
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
        assert 8 < levels.size == np.unique(np.rint(levels)).size
