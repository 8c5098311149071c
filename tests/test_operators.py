"""Every row of the operator table describes what ONNX Runtime computes.  A new row fails here until it has its own cases."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse
from onnxruntime import InferenceSession

import requant_onnx
from requant_onnx import Calibration, Form, Int8Speed, QuantConfig, quantize_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.layers import Layer, find_layers
from requant_onnx.graph.operators import KERNELS, OPERATORS
from requant_onnx.runtime.explain import explain

PRODUCT_TOLERANCE = 1e-4  # relative to the largest result: float32 sums of up to 100 products in another order
IMAGE, ROW = (3, 4, 7, 8), (3, 5)
CASES = [
    ("Conv", "Conv<pads = [1, 1, 1, 1]>", IMAGE, (6, 4, 3, 3)),
    ("Conv", "Conv<strides = [2, 1], dilations = [1, 2], pads = [0, 1, 2, 1]>", IMAGE, (6, 4, 3, 2)),
    ("Conv", 'Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>', IMAGE, (6, 4, 2, 3)),
    ("Conv", 'Conv<auto_pad = "SAME_LOWER">', IMAGE, (6, 4, 2, 2)),
    ("Conv", 'Conv<auto_pad = "VALID">', IMAGE, (6, 4, 2, 2)),
    ("Conv", "Conv<group = 2>", IMAGE, (6, 2, 3, 3)),
    ("Conv", "Conv<group = 4>", IMAGE, (4, 1, 3, 3)),
    ("ConvTranspose", "ConvTranspose", IMAGE, (4, 6, 3, 3)),
    (
        "ConvTranspose",
        "ConvTranspose<strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 0]>",
        IMAGE,
        (4, 6, 3, 3),
    ),
    ("ConvTranspose", "ConvTranspose<group = 2, dilations = [2, 1], pads = [1, 1, 1, 1]>", IMAGE, (4, 3, 3, 2)),
    ("Gemm", "Gemm<transB = 1>", ROW, (6, 5)),
    ("Gemm", "Gemm", ROW, (5, 6)),
    ("MatMul", "MatMul", ROW, (5, 6)),
    ("MatMul", "MatMul", (2, 3, 5), (5, 6)),
    ("MatMul", "MatMul", (2, 3, 5), (1, 5, 6)),
]
EVERY_CASE = pytest.mark.parametrize(("name", "op", "x_shape", "shape"), CASES)
EVERY_ROW = pytest.mark.parametrize("name", OPERATORS)


def model_of(op: str, x_shape: tuple[int, ...], w: np.ndarray, bias: np.ndarray | None = None) -> onnx.ModelProto:
    sizes, free = ", ".join(["n", *map(str, x_shape[1:])]), ", ".join(f"m{k}" for k in range(len(x_shape)))
    weights = {"w": w} if bias is None else {"w": w, "b": bias}
    inputs = "x, w" if bias is None else "x, w, b"
    return parse(f"net (float[{sizes}] x) => (float[{free}] y) {{ y = {op}({inputs}) }}", **weights)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])


def layer_of(model: onnx.ModelProto) -> Layer:
    (layer,) = find_layers(ModelGraph.of(model), {"w"})
    return layer


def inputs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def channel_of_output(y: np.ndarray, name: str) -> np.ndarray:
    """The output as (channels, rest)."""
    axis = 1 if OPERATORS[name].channels_second else -1
    return np.moveaxis(y, axis, 0).reshape(y.shape[axis], -1)


@EVERY_ROW
def test_every_row_has_cases(name: str) -> None:
    assert any(case[0] == name for case in CASES)


@EVERY_CASE
def test_tensor_is_the_inverse_of_matrices(name: str, op: str, x_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert OPERATORS[name].fits(layer_of(model_of(op, x_shape, laplace(*shape))).product.attributes, shape)
    w = laplace(*shape)
    product = layer_of(model_of(op, x_shape, w)).product
    matrices = product.matrices(w)
    assert len(matrices) == product.group
    assert {len(matrix) for matrix in matrices} == {product.rows}
    np.testing.assert_array_equal(product.tensor(matrices), w)


@EVERY_CASE
def test_the_matrix_product_is_what_onnx_runtime_computes(
    name: str, op: str, x_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    assert OPERATORS[name].fits(layer_of(model_of(op, x_shape, laplace(*shape))).product.attributes, shape)
    w, x = laplace(*shape), inputs(x_shape)
    model = model_of(op, x_shape, w)
    product, y = layer_of(model).product, run(model, x)
    every = np.arange(product.count(y))
    for places in (every, every[::3]):
        made = product.inputs(x, places) @ product.matrices(w).swapaxes(1, 2)
        assert made.shape == (product.group, len(places), product.rows)
        assert abs(made - product.results(y, places)).max() <= PRODUCT_TOLERANCE * abs(y).max()


@EVERY_CASE
def test_the_channel_axis_is_that_of_the_output_channels(
    name: str, op: str, x_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Doubling the first channel of the weight doubles only the first channel of each group of the output."""
    w, x = laplace(*shape), inputs(x_shape)
    product = layer_of(model_of(op, x_shape, w)).product
    axis = OPERATORS[name].channel_axis(product.attributes, 1, len(shape))
    doubled = w.copy()
    doubled[(slice(None),) * axis + (0,)] *= 2
    before, after = (channel_of_output(run(model_of(op, x_shape, values), x), name) for values in (w, doubled))
    changed = {int(k) for k in np.flatnonzero(abs(after - before).max(1) > PRODUCT_TOLERANCE * abs(before).max())}
    assert changed == (set(range(0, product.channels, product.rows)) if product.scale_is_shared else {0})
    np.testing.assert_allclose(after[sorted(changed)], 2 * before[sorted(changed)], rtol=1e-4, atol=1e-4 * abs(before).max())


@EVERY_CASE
def test_the_bias_is_added_to_the_rows_in_their_order(name: str, op: str, x_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if OPERATORS[name].bias is None:
        assert len(onnx.defs.get_schema(name).inputs) == 2
        return
    w, x = laplace(*shape), inputs(x_shape)
    channels = layer_of(model_of(op, x_shape, w)).product.channels
    bias = np.arange(1.0, channels + 1).astype(np.float32)
    layer = layer_of(model_of(op, x_shape, w, bias))
    assert layer.bias == "b"
    without, with_bias = (channel_of_output(run(model_of(op, x_shape, w, b), x), name) for b in (None, bias))
    added = layer.biases.ravel()
    np.testing.assert_allclose(with_bias - without, np.repeat(added[:, None], without.shape[1], 1), atol=1e-4)


@EVERY_CASE
def test_means_of_inputs_give_the_mean_of_the_output(name: str, op: str, x_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """On an image with constant channels, away from its borders."""
    w = laplace(*shape)
    channels_second = OPERATORS[name].channels_second
    means = np.arange(1.0, x_shape[1 if channels_second else -1] + 1)
    model = model_of(op, x_shape, w)
    found = layer_of(model).product.mean_inputs(means)
    if found is None:
        assert name == "ConvTranspose"
        return
    x = np.ones(x_shape, np.float32) * (means.reshape(1, -1, 1, 1) if channels_second else means).astype(np.float32)
    y = run(model, x)
    center = (0, slice(None), *(n // 2 for n in y.shape[2:]))
    middle = y[center] if channels_second else y.reshape(-1, y.shape[-1])[0]
    rows = [part @ own for part, own in zip(layer_of(model).product.matrices(w), found, strict=True)]
    np.testing.assert_allclose(np.concatenate(rows), middle, atol=1e-4 * abs(middle).max())


PAIRS = {
    "Conv": "h = Conv(x, w) y = Conv(h, v)",
    "Gemm": "h = Gemm(x, w) y = Gemm(h, v)",
    "MatMul": "h = MatMul(x, w) y = MatMul(h, v)",
}


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if row.kernel is not None])
def test_the_integer_kernel_is_the_one_that_onnx_runtime_runs(name: str) -> None:
    """The first of two layers outputs integers to the second, which outputs floats if its kernel can."""
    image = OPERATORS[name].channels_second
    shape, tail = ((3, 4, 7, 8), "4, 7, 8] x) => (float[n, a, b, c]") if image else ((3, 5), "5] x) => (float[n, a]")
    weights = (laplace(6, 4, 3, 3), laplace(6, 6, 1, 1)) if image else (laplace(5, 6), laplace(6, 6))
    model = parse(f"net (float[n, {tail} y) {{ {PAIRS[name]} }}", w=weights[0], v=weights[1])
    feeds = [{"x": inputs(shape)} for _ in range(4)]
    made, _ = quantize_model(
        model, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=Calibration.from_feeds(feeds)
    )
    operators, kernel = explain(made).operators, OPERATORS[name].kernel
    assert kernel is not None
    assert KERNELS[kernel].operator == name
    assert kernel in operators
    assert {KERNELS[op].operator for op in operators if op in KERNELS} == {name}
    assert ("DequantizeLinear" in operators) is not OPERATORS[name].float_results


def test_kernels_stand_for_operators_that_have_a_row() -> None:
    assert {kernel.operator for kernel in KERNELS.values()} <= OPERATORS.keys()


def test_an_absorbed_activation_gives_the_name_in_the_table() -> None:
    model = model_of("Gemm<transB = 1>", ROW, laplace(6, 5))
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(onnx.helper.make_node("Relu", ["h"], ["y"]))
    assert set(explain(model).operators) & set(OPERATORS["Gemm"].fused)


COMPARISON = re.compile(r"\bop(?:_type)?\s*(?:==|!=|in|not in)\s*[(\[]?\s*\"[A-Z]")
ABOUT_ONE_OPERATOR = {
    "graph/activations.py": {"QuantizeLinear"},
    "graph/constants.py": {"Cast", "Constant"},
    "graph/edit.py": {"Constant"},
    "graph/integer/nodes.py": {"DequantizeLinear", "Pad"},
    "graph/integer/plan.py": {"Cast", "Identity", "Clip", "Relu", "Pad"},
    "graph/integer/worth.py": {"AveragePool", "Clip", "Relu"},
    "graph/layers.py": {"Add"},
    "graph/restore.py": {"Cast", "Clip", "Pad", "Relu"},
    "graph/operands.py": {"DequantizeLinear"},
    "graph/channel_means.py": {"BatchNormalization"},
    "graph/decode/lookup.py": {"Cast", "Mul"},
    "graph/decode/replace.py": {"Constant"},
    "graph/prepare/expose.py": {"Constant"},
    "graph/prepare/fold_batchnorm.py": {"BatchNormalization"},
    "graph/prepare/full_pads.py": {"Pad"},
    "graph/prepare/opset.py": {"Resize"},
    "graph/prepare/transpose_gemm.py": {"Gemm"},
    "graph/readers.py": {"QuantizeLinear", "DequantizeLinear"},
    "graph/reshapes.py": {"Transpose", "Flatten", "Reshape", "Unsqueeze", "Squeeze"},
    "graph/weights.py": {"Cast", "Constant", "DequantizeLinear"},
    "runtime/explain.py": {"Relu", "Clip", "QuantizeLinear"},
}
"""Modules that compare operator names -> those names: rewrites of one operator, and nodes without weights."""


def test_operators_with_weights_are_compared_only_in_the_table() -> None:
    package = Path(requant_onnx.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for line in path.read_text("utf-8").splitlines():
            if COMPARISON.search(line) and name != "graph/operators.py":
                compared = set(re.findall(r"\"([A-Z]\w+)\"", line))
                allowed = ABOUT_ONE_OPERATOR.get(name, set())
                assert compared <= allowed, f"{name} compares {', '.join(sorted(compared - allowed))}: {line.strip()}"
