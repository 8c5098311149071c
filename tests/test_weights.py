"""Which weights are found, with which axis, and why others are skipped."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, skipped_weights, small_cnn
from onnx import helper, numpy_helper

from requant_onnx import Form, Granularity, QuantConfig, Transform
from requant_onnx.convert.pipeline import quantize_model
from requant_onnx.errors import ModelError
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.operands import is_fixed_kernel
from requant_onnx.graph.weights import find_weights

IO = "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y)"
MATRIX_IO = "net (float[n, 6] x) => (float[n, c] y)"
V_OUT = "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y, float[a, b, c, d] v)"
W_OUT = "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y, float[5, 4, 3, 3] w)"
W_IN = "net (float[n, 4, 6, 6] x, float[5, 4, 3, 3] w) => (float[n, c, h, w] y)"
W = laplace(5, 4, 3, 3)


def only(model: onnx.ModelProto) -> tuple[str, int | None]:
    view = find_weights(ModelGraph.of(model))
    assert not view.skipped
    (weight,) = view.weights
    return weight.name, weight.channel_axis


@pytest.mark.parametrize(
    ("text", "shape", "axis"),
    [
        (IO + "{ y = Conv(x, w) }", (5, 4, 3, 3), 0),
        (IO + "{ y = Conv<group = 4>(x, w) }", (4, 1, 3, 3), 0),
        (IO + "{ y = ConvTranspose(x, w) }", (4, 5, 3, 3), 1),
        (MATRIX_IO + "{ y = Gemm(x, w) }", (6, 5), 1),
        (MATRIX_IO + "{ y = Gemm<transB = 1>(x, w) }", (5, 6), 0),
        (MATRIX_IO + "{ y = MatMul(x, w) }", (6, 5), 1),
        ("net (float[n, 2, 6] x) => (float[n, 2, 5] y) { y = MatMul(x, w) }", (3, 6, 5), 2),
        ("net (float[6, n] x) => (float[c, n] y) { y = MatMul(w, x) }", (5, 6), 0),
        (IO + "{ i = Identity(w) y = Conv(x, i) }", (5, 4, 3, 3), 0),
    ],
)
def test_weight_and_axis_of_each_operator(text: str, shape: tuple[int, ...], axis: int) -> None:
    assert only(parse(text, w=laplace(*shape))) == ("w", axis)


def test_a_constant_node_is_a_weight() -> None:
    model = parse(IO + "{ y = Conv(x, w) }")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(laplace(5, 4, 3, 3))))
    assert only(model) == ("w", 0)
    converted, report = quantize_model(model)
    assert len(report.converted) == 1
    assert "Constant" not in [node.op_type for node in converted.graph.node]


def test_float16_behind_a_cast_is_emitted_as_float32() -> None:
    view = find_weights(
        ModelGraph.of(parse(IO + "{ f = Cast<to = 1>(w) y = Conv(x, f) }", w=laplace(5, 4, 3, 3).astype(np.float16)))
    )
    assert [weight.emit for weight in view.weights] == [onnx.TensorProto.FLOAT]


def test_first_and_last_layers() -> None:
    assert [(weight.name, weight.is_edge) for weight in find_weights(ModelGraph.of(small_cnn())).weights] == [
        ("w1", True),
        ("w2", False),
        ("w3", False),
        ("w4", True),
    ]


def test_a_product_of_two_activations_is_no_weight() -> None:
    view = find_weights(ModelGraph.of(parse("net (float[n, n] x) => (float[n, n] y) { y = MatMul(x, x) }")))
    assert not view.weights
    assert not view.skipped


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        (IO + "{ a = Mul(w, w) y = Conv(x, a) }", W, "is decoded from other constants (Mul)"),
        (IO + "{ m = ReduceMean(x) a = Mul(w, m) y = Conv(x, a) }", W, "is computed by Mul"),
        (W_OUT + "{ y = Conv(x, w) }", W, "is an output"),
        (V_OUT + "{ v = Identity(w) y = Conv(x, v) }", W, "is an output"),
        (V_OUT + "{ v = Transpose(w) y = Conv(x, w) }", W, "is an output"),
        (W_IN + "{ y = Conv(x, w) }", W, "a caller may replace"),
        (W_IN + "{ y = Conv(x, w) }", None, "is an input of the model"),
        ("net (float[n, 6] x) => (float[n] y) { y = MatMul(x, w) }", laplace(6), "has 1 dimensions"),
        (IO + "{ y = Conv(x, w) }", np.zeros((0, 4, 3, 3), np.float32), "has no elements"),
        (MATRIX_IO + "{ y = MatMulInteger(x, w) }", laplace(6, 5), "is already quantized (MatMulInteger)"),
    ],
)  # fmt: skip
def test_skipped_with_a_reason(text: str, weight: np.ndarray | None, reason: str) -> None:
    view = find_weights(ModelGraph.of(parse(text, **({} if weight is None else {"w": weight}))))
    assert not view.weights
    assert reason in view.skipped[0].reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QuantConfig(), "is already quantized (DequantizeLinear)"),
        (QuantConfig(4, transform=Transform(0.5)), "is already quantized (DequantizeLinear)"),
        (QuantConfig(3, form=Form.FOLDED, granularity=Granularity.PER_TENSOR), "is decoded from other constants (Mul)"),
    ],
)
def test_weights_of_a_converted_model_are_skipped(config: QuantConfig, reason: str) -> None:
    converted, _ = quantize_model(small_cnn(), config)
    del converted.metadata_props[:]  # with them it would be rejected
    again, report = quantize_model(converted)
    assert {item.reason.partition(",")[0] for item in skipped_weights(report)} == {reason}
    assert again.SerializeToString() == converted.SerializeToString()


def test_weights_listed_as_inputs_by_ir_3_are_converted_and_delisted() -> None:
    model = parse(
        "net (float[n, 4, 6, 6] x, float[50, 4, 3, 3] w) => (float[n, c, h, w] y) { y = Conv(x, w) }",
        ir=3,
        opset=8,
        w=laplace(50, 4, 3, 3),
    )
    converted, report = quantize_model(model)
    assert [weight.name for weight in report.converted] == ["w"]
    assert [item.name for item in converted.graph.input] == ["x"]


@pytest.mark.parametrize(
    ("listed", "nodes"),
    [("float[64, 1] g", "m = Mul(v, g) w = Transpose(m)"), ("int64[2] s", "w = Reshape(v, s)")],
)
def test_matrices_in_constants_do_not_hide_that_all_weights_are_listed(listed: str, nodes: str) -> None:
    """Old exporters list all initializers as inputs, but write a literal matrix, such as a mask, as a node."""
    inputs = f"float[n, 40] x, float[64, 40] v, {listed}"
    values = {"g": np.ones((64, 1), np.float32)} if listed.endswith("g") else {"s": np.array([40, 64])}
    model = parse(f"net ({inputs}) => (float[n, 64] y) {{ {nodes} r = MatMul(x, w) y = Add(r, k) }}", v=laplace(64, 40), **values)
    mask = numpy_helper.from_array(np.ones((1, 64), np.float32))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=mask))
    converted, report = quantize_model(model)
    assert len(report.converted) == 1
    assert [item.name for item in converted.graph.input] == ["x"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    w = laplace(50, 4, 3, 3)
    w[1, 2, 0, 0] = value
    with pytest.raises(ModelError, match="the weight 'w' contains 1 NaN or infinite"):
        quantize_model(parse(IO + "{ y = Conv(x, w) }", w=w))


@pytest.mark.parametrize(
    ("counts", "divisor"),
    [
        ([1, 4, 7, 4, 1, 4, 16, 26, 16, 4, 7, 26, 41, 26, 7], 273),  # a Gaussian of 5 x 5, in part
        ([1, 7, 30, 100], 255),
        ([3, 10, 47], 7),
    ],
)
def test_kernels_of_large_multiples_are_fixed_in_spite_of_float32(counts: list[int], divisor: int) -> None:
    kernel = np.array(counts, np.float32) / np.float32(divisor)
    assert is_fixed_kernel(kernel) is (counts[0] == 1)  # multiples of a number that is not among them are not recognized
    assert not is_fixed_kernel(kernel * np.linspace(1, 1.001, len(counts), dtype=np.float32))


def test_kernels_written_by_hand_stay_exact_and_are_no_last_layer() -> None:
    """In a YOLO head, distances are means of 0..15 over their probabilities, by an untrained Conv (DFL)."""
    model = parse(
        """net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] boxes, float[n, 5, 8, 8] scores) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w1)
            b = Conv(a, w2)
            c = Conv(b, w3)
            p = Softmax<axis = 1>(c)
            boxes = Conv(p, dfl)
            scores = Conv(b, w4)
        }""",
        w1=laplace(8, 3, 3, 3), w2=laplace(16, 8, 1, 1, seed=1), w3=laplace(16, 16, 1, 1, seed=2), w4=laplace(5, 16, 1, 1, seed=3),
        dfl=np.tile(np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1), (4, 1, 1, 1)),
    )  # fmt: skip
    view = find_weights(ModelGraph.of(model))
    assert [(weight.name, weight.is_edge) for weight in view.weights] == [("w1", True), ("w2", False), ("w3", True), ("w4", True)]
    assert [item.name for item in view.skipped] == ["dfl"]
    assert view.skipped[0].reason == "has whole multiples of one number, as fixed kernels do"
