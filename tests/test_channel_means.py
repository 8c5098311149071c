"""Means of activations from BatchNormalization, and biases corrected by them, without any data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, parse
from onnxruntime import InferenceSession

from requant_onnx import Form, QuantConfig, Refinement, quantize_model
from requant_onnx.graph.channel_means import channel_means
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.layers import find_layers

NORMALIZED = {"gamma": np.array([1.0, 0.5, 2.0], np.float32), "beta": np.array([0.5, -1.0, 0.0], np.float32)}
STATISTICS = {"m": np.zeros(3, np.float32), "v": np.ones(3, np.float32)}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(InferenceSession(model.SerializeToString()).run(None, {"x": x})[0], np.float64)


@pytest.mark.parametrize(
    "text",
    [
        "y = Relu(b)",
        "y = LeakyRelu<alpha = 0.2>(b)",
        "y = Sigmoid(b)",
        "y = HardSwish(b)",
        "y = Clip(b, low, high)",
        "r = Relu(b) y = Identity(r)",
        "r = Relu(b) y = GlobalAveragePool(r)",
        "c = BatchNormalization(z, gamma, beta, m, v) y = Add(b, c)",
        "c = BatchNormalization(z, gamma, beta, m, v) s = Add(b, c) y = Relu(s)",
        "r = Relu(b) y = Concat<axis = 1>(b, r)",
    ],
)
def test_the_means_are_those_of_normal_inputs(text: str) -> None:
    head = "b = BatchNormalization<epsilon = 0.0>(x, gamma, beta, m, v)"
    two = "float[n, 3, 16, 16] x, float[n, 3, 16, 16] z" if "z" in text else "float[n, 3, 16, 16] x"
    bounds = {"low": np.float32(-0.5), "high": np.float32(1.0)}
    model = parse(f"net ({two}) => (float[n, c, h, w] y) {{ {head} {text} }}", **NORMALIZED, **STATISTICS, **bounds)
    generator = np.random.default_rng(0)
    feeds = {item.name: generator.normal(size=(400, 3, 16, 16)).astype(np.float32) for item in model.graph.input}
    y = np.asarray(InferenceSession(model.SerializeToString()).run(None, feeds)[0], np.float64)
    np.testing.assert_allclose(channel_means(ModelGraph.of(model))["y"], y.mean((0, 2, 3)), atol=0.03)


@pytest.mark.parametrize("text", ["y = MaxPool<kernel_shape = [2, 2]>(b)", "y = Clip(b, x)", "y = Mul(b, b)", "y = Add(b, x)"])
def test_what_is_not_known_is_left_out(text: str) -> None:
    model = parse(
        f"net (float[n, 3, 8, 8] x) => (float[n, c, h, w] y) {{ b = BatchNormalization(x, gamma, beta, m, v) {text} }}",
        **NORMALIZED,
        **STATISTICS,
    )
    assert channel_means(ModelGraph.of(model)).keys() == {"b"}


def test_parameters_that_a_caller_may_replace_are_not_known() -> None:
    text = "{ b = BatchNormalization(x, gamma, beta, m, v) c = Clip(b, low) y = BatchNormalization(c, scale, beta, m, v) }"
    inputs = "float[n, 3, 8, 8] x, float[3] scale, float low"
    defaults = {"scale": np.ones(3, np.float32), "low": np.array(0, np.float32)}
    model = parse(f"net ({inputs}) => (float[n, c, h, w] y) {text}", **NORMALIZED, **STATISTICS, **defaults)
    assert channel_means(ModelGraph.of(model)).keys() == {"b"}


def net() -> onnx.ModelProto:
    """A model of Conv, BatchNormalization with its input's statistics, Relu, grouped Conv with weights that round to one side."""
    text = """net (float[n, 4, 12, 12] x) => (float[n, 8, h, w] y) {
        a = Conv(x, w) b = BatchNormalization(a, gamma, beta, m, v) c = Relu(b) y = Conv<group = 2>(c, u) }"""
    generator = np.random.default_rng(0)
    w, u = laplace(8, 4, 3, 3), np.abs(laplace(8, 4, 3, 3, seed=1)) ** 2
    statistics = {"m": np.zeros(8, np.float32), "v": (w**2).sum((1, 2, 3))}  # for independent inputs
    gamma, beta = (generator.normal(1.0, 0.3, 8).astype(np.float32) for _ in range(2))
    return parse(text, w=w, u=u, gamma=gamma, beta=beta, **statistics)


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
def test_the_correction_restores_the_means_of_channels(form: Form) -> None:
    x = np.random.default_rng(1).normal(size=(200, 4, 12, 12)).astype(np.float32)
    exact = run(net(), x)
    shifts = []
    for refinement in (Refinement.NONE, Refinement.DESCENT):
        made, report = quantize_model(net(), QuantConfig(3, form=form, refinement=refinement))
        shifts.append(abs((run(made, x) - exact).mean((0, 2, 3))).mean())
    assert shifts[1] < 0.4 * shifts[0]
    assert [weight.method for weight in report.converted] == ["nearest", "nearest, bias from BatchNormalization"]


def test_a_bias_is_corrected_only_where_means_fit() -> None:
    model = parse("net (float[n, 4, 7, 8] x) => (float[n, a, b, c] y) { y = ConvTranspose(x, w) }", w=laplace(4, 6, 3, 3))
    (layer,) = find_layers(ModelGraph.of(model), {"w"})
    assert layer.corrected_bias(laplace(4, 6, 3, 3), np.ones(4)) is None
    model = parse("net (float[n, 4, 7, 8] x) => (float[n, a, b, c] y) { y = Conv(x, w) }", w=laplace(6, 4, 3, 3))
    (layer,) = find_layers(ModelGraph.of(model), {"w"})
    assert layer.corrected_bias(laplace(6, 4, 3, 3), np.ones(5)) is None
    found = layer.corrected_bias(laplace(6, 4, 3, 3), np.arange(4.0))
    assert found is not None
    np.testing.assert_allclose(found, -(laplace(6, 4, 3, 3).sum((2, 3)) @ np.arange(4.0)), rtol=1e-5)
