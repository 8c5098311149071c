"""Every operator in the table of holders is converted, and computes with w_hat in place of w.  A new row needs a case here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, parse
from onnx import helper
from oracle import check, feeds_for, run

from requant_onnx import Form, Granularity, QuantConfig, quantize_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.decode.forms import Fate
from requant_onnx.graph.holders import HOLDERS, MICROSOFT
from requant_onnx.graph.weights import find_weights
from requant_onnx.runtime.explain import explain

Shapes = dict[str, tuple[int, ...]]
SEQUENCE = "net (float[5, 2, 16] x) => (float[s, d, n, h] y)"
ROW = "net (float[2, 32] x) => (float[a, b] y)"
IMAGE = "net (float[1, 8, 9, 9] x) => (float[n, c, h, w] y)"
CASES: list[tuple[str, str, Shapes, dict[str, int | None]]] = [  # operator, text, weights, channel axis per weight
    ("LSTM", SEQUENCE + "{ y = LSTM<hidden_size = 24>(x, w, r) }", {"w": (1, 96, 16), "r": (1, 96, 24)}, {"w": 1, "r": 1}),
    ("GRU", SEQUENCE + "{ y = GRU<hidden_size = 24>(x, w, r) }", {"w": (1, 72, 16), "r": (1, 72, 24)}, {"w": 1, "r": 1}),
    ("RNN", SEQUENCE + "{ y = RNN<hidden_size = 40>(x, w, r) }", {"w": (1, 40, 16), "r": (1, 40, 40)}, {"w": 1, "r": 1}),
    (
        "LSTM",
        SEQUENCE + '{ y = LSTM<hidden_size = 24, direction = "bidirectional">(x, w, r) }',
        {"w": (2, 96, 16), "r": (2, 96, 24)},
        {"w": 0, "r": 0},
    ),
    ("Gather", "net (int64[2, 3] x) => (float[a, b, c] y) { y = Gather(w, x) }", {"w": (60, 20)}, {"w": 0}),
    ("Gather", "net (int64[2] x) => (float[a, b] y) { y = Gather<axis = -1>(w, x) }", {"w": (20, 60)}, {"w": 1}),
    (
        "Einsum",
        ROW[:-1] + ', float[e, f, g] z) { y = Einsum<equation = "ab,bc->ac">(x, w) z = Einsum<equation = "ab,bcd->acd">(x, v) }',
        {"w": (32, 24), "v": (32, 4, 9)},
        {"w": 1, "v": 2},
    ),
    ("Einsum", ROW + '{ y = Einsum<equation = "cb,ab">(w, x) }', {"w": (24, 32)}, {"w": 0}),
    (
        "DeformConv",
        "net (float[1, 8, 9, 9] x, float[1, 18, 7, 7] o) => (float[n, c, h, w] y) { y = DeformConv(x, w, o) }",
        {"w": (12, 8, 3, 3)},
        {"w": 0},
    ),
    ("Add", "net (float[2, 30, 20] x) => (float[a, b, c] y) { y = Add(x, w) }", {"w": (1, 30, 20)}, {"w": 2}),
    ("Sub", "net (float[2, 30, 20] x) => (float[a, b, c] y) { y = Sub(w, x) }", {"w": (30, 20)}, {"w": 1}),
    ("Mul", "net (float[2, 30, 20] x) => (float[a, b, c] y) { y = Mul(x, w) }", {"w": (1, 30, 20)}, {"w": 2}),
    ("FusedConv", IMAGE + '{ y = com.microsoft.FusedConv<activation = "Relu">(x, w) }', {"w": (12, 8, 3, 3)}, {"w": 0}),
    ("FusedGemm", ROW + '{ y = com.microsoft.FusedGemm<transB = 1, activation = "Relu">(x, w) }', {"w": (24, 32)}, {"w": 0}),
    ("FusedGemm", ROW + '{ y = com.microsoft.FusedGemm<activation = "Relu">(x, w) }', {"w": (32, 24)}, {"w": 1}),
    ("FusedMatMul", ROW + "{ y = com.microsoft.FusedMatMul<alpha = 0.5>(x, w) }", {"w": (32, 24)}, {"w": 1}),
    ("FusedMatMul", ROW + "{ y = com.microsoft.FusedMatMul<transB = 1>(x, w) }", {"w": (24, 32)}, {"w": 0}),
    (
        "Attention",
        "net (float[1, 5, 32] x) => (float[a, b, c] y) { y = com.microsoft.Attention<num_heads = 2>(x, w, b) }",
        {"w": (32, 96), "b": (96,)},
        {"w": 1},
    ),
]
UNTRIED = {"NhwcFusedConv", "FusedMatMulActivation", "TransposeMatMul", "EmbedLayerNormalization"}
"""Rows whose operators only ONNX Runtime creates, and runs only on some processors, or whose layout is that of another row."""
EVERY_CASE = pytest.mark.parametrize(("name", "text", "shapes", "axes"), CASES)
CONFIGS = [
    QuantConfig(8),
    QuantConfig(4),
    QuantConfig(3, form=Form.FOLDED),
    QuantConfig(4, form=Form.FOLDED, granularity=Granularity.PER_TENSOR),
    QuantConfig(5, granularity=Granularity.PER_TENSOR),
]


def model_of(text: str, shapes: Shapes, dtype: type = np.float32) -> onnx.ModelProto:
    model = parse(text, opset=19, **{name: laplace(*shape, seed=k).astype(dtype) for k, (name, shape) in enumerate(shapes.items())})
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def test_every_row_has_a_case() -> None:
    assert {name for _, name in HOLDERS} == {case[0] for case in CASES} | UNTRIED


@EVERY_CASE
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_holder_answers_with_w_hat(
    name: str, text: str, shapes: Shapes, axes: dict[str, int | None], config: QuantConfig
) -> None:
    del name
    report = check(model_of(text, shapes), config)
    per_channel = config.granularity is Granularity.PER_CHANNEL
    assert {w.name: w.axis for w in report.converted} == {w: axis if per_channel else None for w, axis in axes.items()}


@EVERY_CASE
def test_folded_weights_of_holders_are_folded(name: str, text: str, shapes: Shapes, axes: dict[str, int | None]) -> None:
    made, report = quantize_model(model_of(text, shapes), QuantConfig(8, form=Form.FOLDED))
    assert len(report.converted) == len(axes)
    fates = [weight for weight in explain(made).weights if weight.op == name]
    assert len(fates) == len(axes)
    assert {weight.fate for weight in fates} == {Fate.FOLDED}


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_of_the_qdq_form_is_decoded_behind_the_lookup(bits: int) -> None:
    made, _ = quantize_model(model_of(CASES[4][1], CASES[4][2]), QuantConfig(bits))
    optimized = explain(made)
    assert "DequantizeLinear" not in optimized.operators
    (weight,) = optimized.weights
    assert (weight.fate, weight.why) == (Fate.EVERY_RUN, "only the entries that are looked up are decoded")


def test_an_embedding_that_is_also_a_weight_is_decoded_whole() -> None:
    text = "net (int64[3] x) => (float[a, b] y) { e = Gather(w, x) t = Transpose(w) y = MatMul(e, t) }"
    report = check(model_of(text, {"w": (60, 20)}), QuantConfig(4), feeds_for(parse(text)))
    assert [w.axis for w in report.converted] == [0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "net (int64[3] x) => (float[a, b] y) { t = Identity(w) y = Gather(t, x) }",
        "net (int64[3] x) => (float[a, b] y) { t = Cast<to = 1>(w) y = Gather(t, x) }",
        "net (int64[3] x) => (float[a, b] y, int64[2] s) { t = Transpose(w) y = Gather<axis = 1>(t, x) s = Shape(w) }",
    ],
    ids=["Identity", "Cast", "Transpose"],
)
def test_an_embedding_behind_another_node_is_decoded_whole(text: str, config: QuantConfig) -> None:
    report = check(model_of(text, {"w": (60, 20)}, np.float16 if "Cast" in text else np.float32), config, feeds_for(parse(text)))
    assert [w.axis for w in report.converted] == [0 if config.granularity is Granularity.PER_CHANNEL else None]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("turned", "shape", "axis"), [(0, (24, 32), 0), (1, (32, 24), 1)])
def test_gemm_with_its_weight_on_the_left(turned: int, shape: tuple[int, ...], axis: int, config: QuantConfig) -> None:
    text = f"net (float[32, 5] x) => (float[a, b] y) {{ y = Gemm<transA = {turned}>(w, x) }}"
    report = check(model_of(text, {"w": shape}), config)
    assert [w.axis for w in report.converted] == [axis if config.granularity is Granularity.PER_CHANNEL else None]


def test_a_folded_embedding_before_a_cast_is_folded_all_the_same() -> None:
    """Cast and Mul after a lookup are not a decode if the table is float."""
    text = "net (int64[3] x, float16[3, 20] g) => (float16[a, b] y) { e = Gather(w, x) h = Cast<to = 10>(e) y = Mul(h, g) }"
    made, report = quantize_model(model_of(text, {"w": (60, 20)}), QuantConfig(4, form=Form.FOLDED))
    assert len(report.converted) == 1
    assert [weight.fate for weight in explain(made).weights] == [Fate.FOLDED]


def test_a_weight_that_is_stored_flat_has_no_scale_for_each_element() -> None:
    text = "net (float[2, 32] x) => (float[a, b] y) { v = Reshape(w, s) p = MatMul(x, v) q = MatMul(x, v) y = Add(p, q) }"
    model = model_of(text, {"w": (32 * 24, 1)})
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([32, 24]), "s"))
    (weight,) = quantize_model(model, QuantConfig(8))[1].converted
    assert weight.axis is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
def test_other_float_types(dtype: type, form: Form) -> None:
    kind = "float16" if dtype is np.float16 else "double"
    text = f"net ({kind}[2, 32] x, int64[2] i) => ({kind}[a, b] y) {{ m = MatMul(x, w) e = Gather(v, i) y = Add(m, e) }}"
    source = model_of(text, {"w": (32, 24), "v": (50, 24)}, dtype)
    made, report = quantize_model(source, QuantConfig(8, form=form))
    assert report.coverage == 1.0
    feeds = feeds_for(source)
    (y,), (expected,) = run(made, feeds), run(source, feeds)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, atol=0.02 * abs(expected).max())


def test_coordinates_and_masks_stay_exact() -> None:
    text = "net (float[1, 2, 400] x) => (float[a, b, c] y) { a = Add(x, grid) b = Mul(a, mask) y = Add(b, bias) }"
    grid = np.asarray(np.mgrid[0:20, 0:20]).reshape(1, 2, 400).astype(np.float32) + 0.5
    mask = (laplace(1, 2, 400) > 0).astype(np.float32)
    cut = np.where(laplace(1, 2, 400) > 0, 0, -np.inf).astype(np.float32)
    view = find_weights(ModelGraph.of(parse(text, grid=grid, mask=mask, bias=cut)))
    assert not view.weights
    assert [item.reason for item in view.skipped] == [
        "has values in steps of 1, as coordinates and masks do, which must stay exact",
        "has values in steps of 1, as coordinates and masks do, which must stay exact",
        "contains infinite values or NaN, as masks do",
    ]


def test_tables_of_coordinates_and_masks_stay_exact() -> None:
    """Unlike words, also those that another tool has quantized, and values that every grid represents."""
    places = np.stack([*np.mgrid[0:32, 0:32]], -1).reshape(1024, 2)
    tables = {
        "anchors": np.concatenate([(places + 0.5) / 32, np.tile([[0.1, 0.7], [0.9, 0.3]], (512, 1))], 1).astype(np.float32),
        "causal": np.triu(np.full((64, 64), -np.inf, np.float32), 1),
        "onehot": np.eye(64, dtype=np.float32) / 3,
        "words": laplace(500, 64),
        "quantized": np.rint(laplace(500, 64) * 300) / np.float32(300),
        "zeros": np.zeros((64, 64), np.float32),
    }
    reads = " ".join(f"{name}_y = Gather({name}, i)" for name in tables)
    outputs = ", ".join(f"float[a, b] {name}_y" for name in tables)
    view = find_weights(ModelGraph.of(parse(f"net (int64[a] i) => ({outputs}) {{ {reads} }}", **tables)))
    assert {weight.name for weight in view.weights} == {"words", "quantized", "zeros"}


@pytest.mark.parametrize("count", [64, 512, 1000, 4096])
def test_the_step_of_coordinates_is_found_in_spite_of_float32(count: int) -> None:
    """The smallest difference alone has a relative error that hundreds of steps multiply."""
    grid = np.repeat(np.linspace(-1, 1, count, dtype=np.float32)[:, None], 8, 1)
    model = parse(f"net (float[1, {count}, 8] x) => (float[a, b, c] y) {{ y = Add(x, grid) }}", grid=grid)
    view = find_weights(ModelGraph.of(model))
    assert not view.weights
    assert f"in steps of {2 / (count - 1):.4g}"[:-1] in view.skipped[0].reason
