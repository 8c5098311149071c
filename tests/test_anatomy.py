"""What became of each weight is found out from the two files alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn
from onnxruntime.quantization import QuantType, quantize_dynamic

from requant_onnx import Calibration, Form, Granularity, ImageSet, QuantConfig, Transform, quantize_model
from requant_onnx.anatomy import dissect, output_sqnr
from requant_onnx.graph.load import load_model
from requant_onnx.lockstep import Chunk

INPUTS = Calibration(ImageSet(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8)).astype(np.uint8), None))


@pytest.mark.parametrize("form", list(Form))
def test_grids_errors_and_scales_are_those_of_the_report(form: Form) -> None:
    config = QuantConfig(bits=4, form=form, transform=Transform(None if form is Form.INT8 else 0.5))
    made, report = quantize_model(small_cnn(), config, calibration=INPUTS if form is Form.INT8 else None)
    found = dissect(small_cnn(), made, INPUTS)
    assert [sorted(weight.shape) for weight in found] == [sorted(weight.shape) for weight in report.converted]  # Gemm is turned
    for weight, told in zip(found, report.converted, strict=True):
        assert (weight.op, weight.kind) == (told.op, "grid")
        assert weight.bits <= told.bits
        assert weight.exponent == pytest.approx(told.exponent)
        assert weight.sqnr_db == pytest.approx(told.sqnr_db, abs=0.01)
        assert weight.scales is not None
        np.testing.assert_allclose((weight.scales.min(), weight.scales.max()), told.scale, rtol=1e-4)
        if form is not Form.INT8:  # whose scales have a floor
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
        assert weight.curve.own == pytest.approx(told.sqnr_db, abs=0.01)
        assert weight.curve.full <= weight.curve.best[1]
        assert math.isnan(weight.output_sqnr_db)
        assert weight.densities is not None
        assert weight.densities[0].counts.sum() == math.prod(weight.shape)
        assert weight.densities[0].levels.size <= 2**told.bits


def test_the_same_model_is_the_same() -> None:
    found = dissect(small_cnn(), small_cnn(), INPUTS)
    assert {(weight.kind, weight.sqnr_db, weight.output_sqnr_db) for weight in found} == {("same", math.inf, math.inf)}


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
    kinds = {weight.name: weight.kind for weight in dissect(small_cnn(), changed, INPUTS)}
    assert kinds == {"w1": "same", "w2": "changed", "w3": "same", "w4": "same"}


def test_outputs_are_compared_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = quantize_model(OWN_MODEL, QuantConfig(bits=3))
    model = load_model(OWN_MODEL)
    names = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    chunks: list[Chunk] = [{"input": np.random.default_rng(k).normal(size=(4, 3, 32, 32)).astype(np.float32)} for k in range(2)]
    whole = output_sqnr(model, made, names, chunks)
    monkeypatch.setattr("requant_onnx.anatomy.TENSOR_BYTES", 1 << 18)
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
