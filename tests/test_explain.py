"""The treatment of weights by ONNX Runtime, for each form: these tests fail when it stops folding or fusing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import laplace, parse, small_cnn

from requant_onnx import (
    Calibration,
    EdgeLayers,
    Form,
    Granularity,
    Int8Speed,
    ModelError,
    QuantConfig,
    Transform,
    explain,
    load_session,
    quantize_model,
    save_model,
)
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import Fate
from requant_onnx.runtime.explain import _why_decoded, broken_promises

NOISE = Calibration(count=4)
FUSES_GEMM = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 26)


def fates(model: onnx.ModelProto) -> list[tuple[Fate, str]]:
    return [(weight.fate, weight.kernel) for weight in explain(model).weights]


def test_a_float_model_is_float() -> None:
    assert fates(small_cnn()) == [(Fate.FLOAT, "Conv")] * 3 + [(Fate.FLOAT, "Gemm")]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("transform", ["none", "sqrt", "power:0.7"])
def test_qdq_is_decoded_at_every_run_and_gemm_is_fused(bits: int, transform: str) -> None:
    model, _ = quantize_model(small_cnn(), QuantConfig(bits, transform=Transform.parse(transform)))
    found = explain(model).weights
    assert [weight.fate for weight in found[:3]] == [Fate.EVERY_RUN] * 3
    assert "use --form folded" in found[0].why
    assert (found[3].fate, found[3].kernel) == ((Fate.FUSED, "MatMulNBits") if FUSES_GEMM else (Fate.EVERY_RUN, "Gemm"))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("transform", ["none", "sqrt", "power:0.7"])
def test_folded_is_folded(bits: int, transform: str) -> None:
    model, _ = quantize_model(small_cnn(), QuantConfig(bits, transform=Transform.parse(transform), form=Form.FOLDED))
    assert fates(model) == [(Fate.FOLDED, "Conv")] * 3 + [(Fate.FOLDED, "Gemm")]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("transform", ["none", "sqrt", "power:0.7"])
def test_int8_is_fused(bits: int, transform: str) -> None:
    config = QuantConfig(bits, transform=Transform.parse(transform), form=Form.INT8, int8_speed=Int8Speed.ALL)
    model, _ = quantize_model(small_cnn(), config, calibration=NOISE)
    assert fates(model) == [(Fate.FUSED, "QLinearConv")] * 3 + [(Fate.FUSED, "QGemm")]


def test_a_broken_promise_is_found() -> None:
    model, report = quantize_model(small_cnn(), QuantConfig())
    broken = broken_promises(model, {weight.name: Form.FOLDED for weight in report.converted})
    assert broken["w1"].fate is Fate.EVERY_RUN
    assert set(broken) == {"w1", "w2", "w3", "w4"}


def test_a_weight_without_integer_kernel_becomes_float_and_the_others_not() -> None:
    """ONNX Runtime fuses MatMul and Add into a float Gemm before it looks for integer kernels."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 10] y) {
        a = Conv(x, v)  r = Relu(a)  p = GlobalAveragePool(r)  f = Flatten(p)  m = MatMul(f, w)  y = Add(m, b) }"""
    model = parse(text, v=laplace(40, 3, 3, 3), w=laplace(40, 10), b=laplace(10))
    _, report = quantize_model(model, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
    assert {weight.name: weight.form for weight in report.converted} == {"v": "int8", "w": "folded"}
    assert any("no integer kernel for 'w'" in note for note in report.notes)


def test_foreign_models_get_a_reason() -> None:
    """An int4 weight with quantized activations, and an int8 weight whose output is not quantized."""
    text = """net (float[n, 4, 6, 6] x) => (float[n, 8, 4, 4] y) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, s)  c = Conv(d, v)
        p = QuantizeLinear(c, s, z)  y = DequantizeLinear(p, s, z) }"""
    scalars = {"s": np.float32(0.1), "z": np.uint8(0)}
    w = np.rint(laplace(8, 4, 3, 3) * 60).astype(np.int8)
    assert fates(parse(text, opset=21, ir=10, w=w, **scalars)) == [(Fate.FUSED, "QLinearConv")]
    unquantized = text.replace("p = QuantizeLinear(c, s, z)  y = DequantizeLinear(p, s, z)", "y = Relu(c)")
    (weight,) = explain(parse(unquantized, opset=21, ir=10, w=w, **scalars)).weights
    assert weight.fate is Fate.EVERY_RUN
    assert "its output is not quantized" in weight.why
    model = parse(text, opset=21, ir=10, **scalars)
    model.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, w.shape, np.clip(w, -8, 7).ravel()))
    (weight,) = explain(model).weights
    assert weight.fate is Fate.EVERY_RUN
    assert "no integer kernel" in weight.why


def test_a_table_added_to_quantized_activations_gets_a_reason() -> None:
    text = """net (float[1, 8, 128] x) => (float[1, 8, 128] y) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  t = DequantizeLinear(codes, s, z)  y = Add(d, t) }"""
    codes = np.rint(laplace(8, 128) * 60).astype(np.int8)
    (weight,) = explain(parse(text, opset=19, ir=9, codes=codes, s=np.float32(0.1), z=np.int8(0))).weights
    assert weight.fate is Fate.EVERY_RUN
    assert "its output is not quantized" in weight.why


def test_operators_of_integers_are_listed_and_shapes_are_known() -> None:
    text = "net (uint8[n, 6] x) => (int32[n, 5] y) { y = MatMulInteger(x, w) }"
    (weight,) = explain(parse(text, w=np.ones((6, 5), np.int8))).weights
    assert (weight.fate, weight.kernel, weight.shape) == (Fate.FUSED, "MatMulInteger", (6, 5))
    converted, _ = quantize_model(small_cnn(), QuantConfig(3, form=Form.FOLDED))
    assert [weight.shape for weight in explain(converted).weights] == [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (10, 32)]


def test_load_session_decodes_qdq_at_load(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    results = []
    for form in (Form.QDQ, Form.FOLDED):
        path = tmp_path / f"{form.value}.onnx"
        save_model(quantize_model(small_cnn(), QuantConfig(form=form))[0], path)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        results.append(load_session(path, options).run(None, {"x": x})[0])
        assert "DequantizeLinear" not in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert abs(results[0] - results[1]).max() <= 0.01 * abs(results[0]).max()  # folded rounds its scales to float16
    with pytest.raises(ModelError, match="does not exist"):
        load_session(tmp_path / "nothing.onnx")


def test_declared_shapes_that_contradict_each_other_do_no_harm() -> None:
    """ONNX Runtime loads such a model, but shape inference rejects it (found by tools/fuzz.py)."""
    model = small_cnn()
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("b2", onnx.TensorProto.FLOAT, [4, 4]))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(model)
    made, report = quantize_model(model, QuantConfig(bits=4, form=Form.FOLDED))
    assert len(report.converted) == 4
    assert {weight.fate for weight in explain(made).weights} == {Fate.FOLDED}


def test_codes_that_numpy_lacks_are_named() -> None:
    """float8 read by DequantizeLinear: graphsurgeon returns its type as a number.  ONNX Runtime 1.20 cannot load such a model."""
    weight = onnx.helper.make_tensor("q", onnx.TensorProto.FLOAT8E4M3FN, [4, 3, 3, 3], laplace(108).tolist())
    text = """net (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) w = DequantizeLinear(q, s)
        c = Conv(xd, w) yq = QuantizeLinear(c, s, z) y = DequantizeLinear(yq, s, z) }"""
    model = parse(text, opset=19, ir=9, s=np.float32(0.05), z=np.uint8(128))
    model.graph.initializer.append(weight)
    conv = next(node for node in ModelGraph.of(model).nodes if node.op == "Conv")
    why = _why_decoded(conv, conv.inputs[1], "DequantizeLinear")
    assert why == "no integer kernel reads codes of type float8e4m3fn; int8 is supported"


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
def test_a_weight_with_a_live_reader_is_folded_all_the_same(form: Form) -> None:
    """An embedding table, gathered from in every run, whose transpose is the weight of the last layer."""
    text = """net (float[n, 16] x, int64[k] i) => (float[n, 40] y, float[k, 16] e) {
        t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) e = Gather(w, i) }"""
    model, report = quantize_model(parse(text, w=laplace(40, 16)), QuantConfig(4, form=form))
    assert [weight.name for weight in report.converted] == ["w"]
    (fate,) = explain(model).weights
    assert fate.fate is (Fate.EVERY_RUN if form is Form.QDQ else Fate.FOLDED)


def test_a_scalar_of_the_model_that_equals_one_of_the_decode_is_not_decoding() -> None:
    """ONNX Runtime merges equal scalars, so that a node of the model may read a scalar with the decode's name."""
    w = np.linspace(-7.5, 7.5, 400).reshape(16, 25).astype(np.float32)
    plain = parse("net (float[n, 16] x) => (float[n, 25] y) { y = MatMul(x, w) }", w=w)
    config = QuantConfig(4, granularity=Granularity.PER_TENSOR, form=Form.FOLDED, edge_layers=EdgeLayers.PLAIN)
    scale = quantize_model(plain, config)[1].converted[0].scale.low
    text = "net (float[n, 16] x) => (float[n, 25] y) { a = Mul(x, c) b = MatMul(a, w) y = Mul(b, c) }"
    model, report = quantize_model(parse(text, w=w, c=np.float32(scale)), config)
    assert len(report.converted) == 1
    assert [weight.fate for weight in explain(model).weights] == [Fate.FOLDED]
