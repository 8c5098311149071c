"""Folding keeps the function and changes only what it must."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, parse
from onnxruntime import InferenceSession

from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm

FLOAT32_SUMS = 1e-5  # relative: a dot product of 27 to 144 float32 terms, 6e-8 each


def norm_parameters(channels: int, *names: str) -> dict[str, np.ndarray]:
    values = {name: laplace(channels, seed=k) for k, name in enumerate(names)}
    values[names[-1]] = np.abs(values[names[-1]]) + np.float32(0.1)  # the variance
    return values


def run(model: onnx.ModelProto, shape: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


CONV = "net (float[n, 4, 6, 6] x) => (float[n, oc, h, w] y) { a = Conv(x, w1) y = BatchNormalization(a, g, b, m, v) }"
WITH_BIAS = "net (float[n, 4, 6, 6] x) => (float[n, oc, h, w] y) { a = Conv(x, w1, c) y = BatchNormalization(a, g, b, m, v) }"
TRANSPOSED = """net (float[n, 4, 6, 6] x) => (float[n, oc, h, w] y) {
    a = ConvTranspose<group = 2>(x, w1) y = BatchNormalization<epsilon = 0.01>(a, g, b, m, v) }"""
BEHIND_IDENTITY = """net (float[n, 4, 6, 6] x) => (float[n, oc, h, w] y) {
    i = Identity(w1) a = Conv(x, i) y = BatchNormalization(a, g, b, m, v) }"""


@pytest.mark.parametrize(
    ("text", "shape", "channels"),
    [(CONV, (5, 4, 3, 3), 5), (WITH_BIAS, (5, 4, 3, 3), 5), (TRANSPOSED, (4, 3, 2, 2), 6), (BEHIND_IDENTITY, (5, 4, 3, 3), 5)],
)
def test_folding_keeps_the_output(text: str, shape: tuple[int, ...], channels: int) -> None:
    weights = {"w1": laplace(*shape), **norm_parameters(channels, "g", "b", "m", "v")}
    if "w1, c" in text:
        weights["c"] = laplace(channels, seed=9)
    model = parse(text, **weights)
    before = run(model, (2, 4, 6, 6))
    assert fold_batchnorm(ModelGraph.of(model)) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] in (["Conv"], ["ConvTranspose"])
    assert len(model.graph.initializer) == 2  # the parameters of the BatchNormalization are removed
    np.testing.assert_allclose(run(model, (2, 4, 6, 6)), before, rtol=FLOAT32_SUMS, atol=FLOAT32_SUMS * np.abs(before).max())


def test_two_convs_with_one_weight_get_a_weight_each() -> None:
    text = """net (float[n, 4, 6, 6] x) => (float[n, 4, h, w] y) {
        a = Conv(x, w1) c = BatchNormalization(a, g, b, m, v)
        d = Conv(c, w1) y = BatchNormalization(d, g2, b2, m2, v2) }"""
    parameters = {**norm_parameters(4, "g", "b", "m", "v"), **norm_parameters(4, "g2", "b2", "m2", "v2")}
    model = parse(text, w1=laplace(4, 4, 1, 1), **parameters)
    before = run(model, (2, 4, 6, 6))
    assert fold_batchnorm(ModelGraph.of(model)) == 2
    np.testing.assert_allclose(run(model, (2, 4, 6, 6)), before, rtol=FLOAT32_SUMS, atol=FLOAT32_SUMS * np.abs(before).max())


IN = "net (float[n, 4, 6, 6] x)"
NORM = "BatchNormalization(a, g, b, m, v)"


@pytest.mark.parametrize(
    "text",
    [
        IN + "=> (float[n, 4, h, w] y, float[n, 4, h, w] a) { a = Conv(x, w1) y = " + NORM + "}",
        IN + "=> (float[n, 4, h, w] y) { a = Conv(x, w1) c = " + NORM + " y = Add(a, c) }",
        IN + "=> (float[n, 4, h, w] y) { c = Conv(x, w1) a = Relu(c) y = " + NORM + "}",
        IN[:-1] + ", float[4] g) => (float[n, 4, h, w] y) { a = Conv(x, w1) y = " + NORM + "}",
        IN + "=> (float[n, 4, h, w] y) { a = my.Conv(x, w1) y = " + NORM + "}",
        IN + "=> (float[n, 4, h, w] y) { a = Conv(x, w1) y = my." + NORM + "}",
        IN + "=> (float[n, 4, h, w] y) { a = Conv(x, w1) y = BatchNormalization(a, g, b, m, w1) }",
        IN + "=> (float[n, 4, h, w] y) { c = Mul(w1, w1) a = Conv(x, c) y = " + NORM + "}",
    ],
)
def test_what_cannot_be_folded_stays_byte_for_byte(text: str) -> None:
    model = parse(text, w1=laplace(4, 4, 1, 1), **norm_parameters(4, "g", "b", "m", "v"))
    before = model.SerializeToString()
    assert fold_batchnorm(ModelGraph.of(model)) == 0
    assert model.SerializeToString() == before


PLAIN = IN + "=> (float[n, 4, h, w] y) { a = Conv(x, w1) y = " + NORM + "}"


def test_an_absent_bias_is_no_obstacle() -> None:
    model = parse(PLAIN, w1=laplace(4, 4, 1, 1), **norm_parameters(4, "g", "b", "m", "v"))
    model.graph.node[0].input.append("")
    assert fold_batchnorm(ModelGraph.of(model)) == 1


def test_a_negative_variance_is_not_folded() -> None:
    parameters = norm_parameters(4, "g", "b", "m", "v")
    parameters["v"] *= -1
    assert fold_batchnorm(ModelGraph.of(parse(PLAIN, w1=laplace(4, 4, 1, 1), **parameters))) == 0
