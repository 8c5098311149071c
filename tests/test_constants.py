"""Constants that are not plain initializers: also graph inputs, computed, vectors; and the account of all constants."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, skipped_weights, small_cnn
from onnx import helper
from oracle import feeds_for, run

from requant_onnx import BiasType, Calibration, EdgeLayers, Form, QuantConfig, Refinement, inspect_model, quantize_model
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.float_constants import VECTOR, float_constants

EVERY_FORM = pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
IO = "net (float[1, 8, 6, 6] x) => (float[n, c, h, w] y)"
FULL = {"v": laplace(16, 8, 3, 3), "g": laplace(16, 1, 1, 1, seed=1) + 1}
COMPUTED = {
    "weight norm": "{ n = ReduceL2<axes = [1, 2, 3], keepdims = 1>(v) s = Div(g, n) w = Mul(v, s) y = Conv(x, w) }",
    "slice": "{ w = Slice(v, zero, eight, zero) u = Slice(v, eight, sixteen, zero) a = Conv(x, w) b = Conv(x, u) y = Add(a, b) }",
    "split": "{ w, u = Split<axis = 0>(v, halves) a = Conv(x, w) b = Conv(x, u) y = Add(a, b) }",
    "concat": "{ w = Concat<axis = 0>(v, other) y = Conv(x, w) }",
    "gather": "{ w = Gather(v, order) y = Conv(x, w) }",
    "bias": "{ b = Mul(d, d) y = Conv(x, v, b) }",
    "clipped from above": "{ w = Clip(v, , half) y = Conv(x, w) }",
    "scaled, behind a reshape": "{ r = Reshape(v, flat) s = Mul(r, half) w = Reshape(s, back) y = Conv(x, w) }",
}
CONSTANTS = {
    "zero": np.array([0]),
    "eight": np.array([8]),
    "sixteen": np.array([16]),
    "halves": np.array([8, 8]),
    "order": np.arange(15, -1, -1),
    "flat": np.array([16, -1]),
    "back": np.array([16, 8, 3, 3]),
    "half": np.array(0.5, np.float32),
    "d": laplace(16, seed=2),
    "other": laplace(4, 8, 3, 3, seed=3),
}


def near(made: onnx.ModelProto, source: onnx.ModelProto, error: float = 0.02) -> None:
    """error: tolerance relative to the largest output.  8 bits round a weight by at most 1/510 of its channel's range."""
    feeds = feeds_for(source)
    for y, expected in zip(run(made, feeds), run(source, feeds), strict=True):
        np.testing.assert_allclose(y, expected, atol=error * abs(expected).max())


@EVERY_FORM
@pytest.mark.parametrize("text", COMPUTED.values(), ids=COMPUTED)
def test_weights_computed_from_float_constants_are_converted(text: str, form: Form) -> None:
    read = {name: values for name, values in {**FULL, **CONSTANTS}.items() if name in re.findall(r"\w+", text)}
    source = parse(f"{IO}{text}", opset=17, **read)
    made, report = quantize_model(source, QuantConfig(8, form=form))
    assert report.converted
    assert not skipped_weights(report)
    assert not {"ReduceL2", "Div", "Concat"} & {node.op_type for node in made.graph.node}
    near(made, source)
    assert [weight.name for weight in inspect_model(source).weights] == [weight.name for weight in report.converted]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ c = Cast<to = 1>(codes) w = Mul(c, half) y = Conv(x, w) }", "is decoded from other constants (Mul)"),  # codes
        ("{ c = Cast<to = 1>(codes) w = Clip(c, , half) y = Conv(x, w) }", "is decoded from other constants (Clip)"),
        ("{ w = Gather(palette, indices) y = Conv(x, w) }", "is decoded from other constants (Gather)"),
        ("{ w = Tile(v, twice) y = Conv(x, w) }", "is decoded from other constants (Tile)"),  # the file would grow
        ("{ w = RandomNormal<shape = [16, 8, 3, 3]>() y = Conv(x, w) }", "is computed by RandomNormal ''"),
    ],
)
def test_decodes_of_codes_are_no_float_constants(text: str, reason: str) -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (16, 8, 3, 3))
    constants = {
        "codes": codes.astype(np.int8),
        "palette": laplace(16),
        "indices": abs(codes),
        "twice": np.array([2, 1, 1, 1]),
        "half": np.array(0.5, np.float32),
        "v": FULL["v"],
    }
    source = parse(IO + text, **{name: values for name, values in constants.items() if name in text})
    made, report = quantize_model(source, QuantConfig(4))
    assert [item.reason.partition(",")[0] for item in skipped_weights(report)][:1] == [reason]
    assert made == source


def test_a_constant_with_another_reader_counts_as_kept() -> None:
    """Two weights of half its size save nothing if the constant itself stays."""
    text = "{ w = Slice(v, zero, eight, zero) y = Conv(x, w) z = Identity(v) }"
    source = parse(IO[:-1] + ", float[16, 8, 3, 3] z)" + text, v=FULL["v"], zero=np.array([0]), eight=np.array([8]))
    _, report = quantize_model(source)
    assert [item.reason.partition(",")[0] for item in report.skipped] == [
        "is decoded from other constants (Slice)",
        "is read by Slice",
    ]


def with_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make every initializer an input too."""
    for item in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    return model


@EVERY_FORM
def test_weights_that_are_inputs_too_are_converted(form: Form) -> None:
    source = with_inputs(small_cnn())
    made, report = quantize_model(source, QuantConfig(8, form=form))
    assert len(report.converted) == 4
    assert [item.name for item in made.graph.input] == ["x"]
    assert any("6 weights and biases were also graph inputs" in note for note in report.notes)
    near(made, small_cnn())


def test_keep_inputs() -> None:
    source = with_inputs(small_cnn())
    made, report = quantize_model(source, QuantConfig(8, keep_inputs=True))
    assert not report.converted
    assert made == source
    assert {item.reason for item in skipped_weights(report)} == {"is also an input of the model, so a caller may replace it"}


def test_factors_of_a_weight_that_stay_inputs_are_not_computed() -> None:
    source = parse("net (float[2, 24] x) => (float[2, 40] y) { w = Mul(v, g) a = MatMul(x, w) b = MatMul(a, u) y = MatMul(b, t) }",
                   **FACTORS, u=laplace(40, 24), t=laplace(24, 40))  # fmt: skip
    source.graph.input.append(helper.make_tensor_value_info("g", 1, [1, 40]))
    made, report = quantize_model(source)
    assert [item.name for item in made.graph.input] == ["x", "g"]
    assert {weight.name for weight in report.converted} == {"v", "u", "t"}
    assert [item.reason for item in skipped_weights(report) if item.name == "w"] == [
        "is computed from inputs of the model (Mul), so a caller may replace it"
    ]
    feeds = {**feeds_for(source), "g": np.full((1, 40), 3, np.float32)}
    np.testing.assert_allclose(run(made, feeds)[0], run(source, feeds)[0], atol=0.1)


@pytest.mark.parametrize("form", Form)
def test_a_bias_that_stays_an_input_counts(form: Form) -> None:
    """So do the bounds of a Clip, which integer kernels absorb otherwise."""
    source = parse(
        "net (float[1, 3, 8, 8] x) => (float[1, 16, 8, 8] y) { a = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Clip(a, low, high) "
        "y = Conv<pads = [1, 1, 1, 1]>(r, v) }",
        w=laplace(16, 3, 3, 3), v=laplace(16, 16, 3, 3), b=laplace(16), low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    given = {"b": np.ones(16, np.float32), "high": np.array(2, np.float32)}
    source.graph.input.extend(helper.make_tensor_value_info(key, 1, values.shape) for key, values in given.items())
    config = QuantConfig(8, form=form, keep_inputs=True, int8_speed="all")
    made, report = quantize_model(source, config, calibration=Calibration(count=8))
    assert [item.name for item in made.graph.input] == ["x", *given]
    assert {weight.name for weight in report.converted} == {"w", "v"}
    feeds = feeds_for(source) | given
    expected = run(source, feeds)[0]
    np.testing.assert_allclose(run(made, feeds)[0], expected, atol=0.05 * abs(expected).max())


def test_inputs_that_are_no_weights_stay() -> None:
    text = "net (float[1, 8, 6, 6] x) => (float[n, c, h, w] y) { a = Conv(x, v) y = Clip(a, low, high) }"
    source = with_inputs(parse(text, v=FULL["v"], low=np.float32(-1), high=np.float32(1)))
    made, _ = quantize_model(source)
    assert [item.name for item in made.graph.input] == ["x", "low", "high"]


FACTORS = {"v": laplace(24, 40), "g": 1 + laplace(1, 40)}
DEFAULTS: dict[str, tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "states": (
        "net (float[5, 1, 16] x) => (float[5, 1, 1, 32] y) { y = LSTM<hidden_size = 32>(x, w, r, b, , h, c) }",
        {"w": laplace(1, 128, 16), "r": laplace(1, 128, 32), "b": laplace(1, 256)},
        {"h": np.zeros((1, 1, 32), np.float32), "c": np.zeros((1, 1, 32), np.float32)},
    ),
    "a mask": (
        "net (float[2, 24, 24] x) => (float[2, 24, 24] y) { a = MatMul(x, w) y = Add(a, m) }",
        {"w": laplace(24, 24)},
        {"m": np.zeros((1, 24, 24), np.float32)},
    ),
    "the left operand": (
        "net (float[2, 24] x) => (float[2, 40] y) { a = MatMul(x, w) b = MatMul(h, v) y = Add(a, b) }",
        {"w": laplace(24, 40), "v": laplace(24, 40)},
        {"h": np.zeros((2, 24), np.float32)},
    ),
    "the right operand": (
        "net (float[24, 2] x) => (float[40, 2] y) { a = MatMul(w, x) b = MatMul(v, h) y = Add(a, b) }",
        {"w": laplace(40, 24), "v": laplace(40, 24)},
        {"h": np.zeros((24, 2), np.float32)},
    ),
    "no past": (
        "net (float[2, 24] x) => (float[2, 40] y, float[2, 0] z) { y = MatMul(x, w) z = MatMul(x, p) }",
        {"w": laplace(24, 40)},
        {"p": np.zeros((24, 0), np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_inputs_with_a_default_value_stay(name: str) -> None:
    text, weights, defaults = DEFAULTS[name]
    source = parse(text, **weights, **defaults)
    source.graph.input.extend(helper.make_tensor_value_info(key, 1, values.shape) for key, values in defaults.items())
    made, report = quantize_model(source)
    assert [item.name for item in made.graph.input] == ["x", *defaults]
    assert "w" in {weight.name for weight in report.converted}


@pytest.mark.parametrize("name", ["states", "the left operand", "no past"])
def test_states_stay_where_every_initializer_is_an_input(name: str) -> None:
    text, weights, defaults = DEFAULTS[name]
    made, report = quantize_model(with_inputs(parse(text, **weights, **defaults)))
    assert [item.name for item in made.graph.input] == ["x", *defaults]
    assert {weight.name for weight in report.converted} == weights.keys() - {"b"}


def test_factors_of_a_weight_that_are_inputs_become_constant() -> None:
    source = with_inputs(parse("net (float[2, 24] x) => (float[2, 40] y) { w = Mul(v, g) y = MatMul(x, w) }", **FACTORS))
    made, report = quantize_model(source)
    assert [item.name for item in made.graph.input] == ["x"]
    assert [weight.name for weight in report.converted] == ["w_folded"]
    near(made, source)


def with_biases() -> onnx.ModelProto:
    text = """net (float[2, 32] x) => (float[a, b] y) {
        a = Gemm(x, w1, b1) c = Relu(a) d = Gemm(c, w2, b2) e = Relu(d) f = MatMul(e, w3) y = Add(f, b3) }"""
    weights = {f"w{k}": laplace(*shape, seed=k) for k, shape in enumerate([(32, 90), (90, 80), (80, 70)], 1)}
    return parse(text, **weights, **{f"b{k}": laplace(n, seed=10 + k) for k, n in enumerate((90, 80, 70), 1)})


@pytest.mark.parametrize(("form", "biases"), [(Form.FOLDED, BiasType.AUTO), (Form.QDQ, BiasType.HALF)])
def test_vectors_become_float16(form: Form, biases: BiasType) -> None:
    source = with_biases()
    made, report = quantize_model(source, QuantConfig(4, form=form, biases=biases, refinement=Refinement.NONE))
    assert report.vectors.count == 3
    assert report.vectors.bytes_after < report.vectors.bytes_before == 4 * 240
    assert report.coverage == 1.0
    readers = [node for node in made.graph.node if node.op_type == "Gemm" or node.output[0] == "y"]
    names = {f"b{k}": node.input[-1] for k, node in enumerate(readers, 1)}
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in source.graph.initializer}
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    for name, values in zip(names, run(made, feeds_for(source))[1:], strict=True):
        np.testing.assert_array_equal(values, stored[name].astype(np.float16).astype(np.float32))


def test_a_bias_whose_rounding_would_count_stays() -> None:
    source = with_biases()
    bias = next(item for item in source.graph.initializer if item.name == "b2")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.float32(1000) + laplace(80, seed=2), "b2"))
    _, report = quantize_model(source, QuantConfig(8, form=Form.FOLDED))
    assert [item.name for item in report.skipped] == ["b2"]


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan, 1e-9])
def test_a_vector_beyond_float16_stays(value: float) -> None:
    source = parse("net (float[1, 40] x) => (float[a, b] y) { m = MatMul(x, w) y = Add(m, b) }", w=laplace(40, 50), b=laplace(50))
    source.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.full(50, value, np.float32), "b"))
    _, report = quantize_model(source, QuantConfig(8, form=Form.FOLDED))
    assert report.vectors.count == 0


def test_vectors_of_positions_and_angles_stay() -> None:
    """Whole numbers beyond 2048 and steps that float16 cannot represent may be compared, and positions multiply frequencies."""
    text = """net (float[n, 1] p, float[n, 64] x, float[n, 64, 8] z)
            => (bool[n, 100] e, float[n, 64] r, float[n, 64, 8] i, float[n, 64] y) {
        d = Sub(p, places) f = Add(d, thirds) e = Greater(d, f)
        a = Mul(p, frequencies) b = Concat<axis = 1>(a) r = Sin(b)
        g = Mul(z, gains) i = InstanceNormalization<epsilon = 0.0>(g, scale, shift)
        m = MatMul(x, w) y = Add(m, bias) }"""
    vectors = {
        "places": np.arange(4000, 4100, dtype=np.float32),
        "thirds": np.arange(100, dtype=np.float32) / 3,
        "frequencies": (1e4 ** (-np.arange(64) / 64)).astype(np.float32),
        "gains": np.repeat(np.array([1, 1e-8], np.float32), 32).reshape(1, 64, 1),
        "scale": np.repeat(np.array([1, 1e-7], np.float32), 32),
        "shift": np.repeat(np.array([0.1, 1e-7], np.float32), 32),
        "bias": laplace(64, seed=1),
    }
    made, report = quantize_model(parse(text, w=laplace(64, 64), **vectors), QuantConfig(8, form=Form.FOLDED))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in made.graph.initializer}
    assert report.vectors.count == 2  # shift and bias, of which only the largest values matter
    for name in vectors.keys() - {"shift", "bias"}:
        np.testing.assert_array_equal(stored[name], vectors[name])


def test_a_weight_kept_in_float_is_no_vector() -> None:
    """The last layer of a model with one output has a single row."""
    text = "net (float[n, 64] x) => (float[n, 1] y) { a = MatMul(x, w) b = Relu(a) y = Gemm<transB = 1>(b, head) }"
    source = parse(text, w=laplace(64, 256), head=laplace(1, 256, seed=3))
    made, report = quantize_model(source, QuantConfig(8, form=Form.FOLDED, overrides={"head": "keep"}))
    assert report.vectors.count == 0
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in made.graph.initializer}
    np.testing.assert_array_equal(stored["head"], laplace(1, 256, seed=3))


def test_floats_that_are_no_tensors_are_constants_too() -> None:
    values = ", ".join(f"{value:.4f}" for value in laplace(16))
    text = f"""net (float[n, 8, 6, 6] x) => (float[n, c, h, w] y) {{
        b = Constant<value_floats = [{values}]>() two = Constant<value_float = 2.0>() c = Conv(x, v, b) y = Mul(c, two) }}"""
    source = parse(text, v=FULL["v"])
    feeds = [feeds_for(source, seed=k) for k in range(20)]
    made, report = quantize_model(source, QuantConfig(4, edge_layers=EdgeLayers.PLAIN), calibration=Calibration.from_feeds(feeds))
    assert (report.converted[0].why_nearest, report.converted[0].method != "nearest") == ("", True)
    assert report.floats == 4 * (16 * 72 + 16 + 1)
    (y,), (expected,) = run(made, feeds[0]), run(source, feeds[0])
    np.testing.assert_allclose(y, expected, atol=0.3 * abs(expected).max())


def test_every_float_constant_is_in_the_account() -> None:
    """Each is converted, skipped with a reason, or removed; the bytes add up to those of the input."""
    text = """net (float[1, 8, 6, 6] x) => (float[n, c, h, w] y) {
        k = Constant<value = float[2, 2] { 1.0, 2.0, 3.0, 4.0 }>()
        a = Conv(x, v, b) c = Clip(a, low) d = Mul(c, scale) e = MatMul(d, m) y = Pad(e, pads, low) }"""
    m, pads = laplace(4, 40, seed=3), np.zeros(8, np.int64)
    source = parse(text, v=FULL["v"], b=laplace(16), low=np.float32(-1), scale=laplace(1, 16, 1, 1), m=m, pads=pads)
    _, report = quantize_model(source, QuantConfig(8))
    total = sum(each.bytes for each in float_constants(source))
    assert report.floats == total == 4 * (16 * 72 + 16 + 1 + 16 + 160 + 4)
    assert report.bytes_before + sum(item.bytes for item in report.skipped) == total
    assert [(item.op, item.bytes) for item in report.skipped if item.reason == VECTOR] == [("Conv", 64), ("Mul", 64), ("Clip", 4)]
    assert [item.reason for item in report.skipped if item.name == "k"] == ["is read by no node"]


def test_equal_small_constants_are_stored_once() -> None:
    """Also those in bodies, but not constants that a body redefines under the same name, nor outputs."""
    text = """net (float[1, 8, 6, 6] x, bool c) => (float[n, c, h, w] y, int64[2] shape) {
        a = Conv(x, v) p = Squeeze(a, first) q = Unsqueeze(p, again)
        y = If (c) <
            then_branch = t () => (float[n, c, h, w] u) {
                s = Constant<value = int64[1] { 0 }>() m = Squeeze(q, s) u = Unsqueeze(m, s) },
            else_branch = e () => (float[n, c, h, w] u) {
                s = Constant<value = int64[1] { 0 }>() u = Identity(q) r = Identity(s) }
        > }"""
    axes = {"first": np.array([0]), "again": np.array([0]), "shape": np.array([1, 2])}
    source = parse(text, v=FULL["v"], **axes)
    made, _ = quantize_model(source, QuantConfig(8))
    assert not [node for graph in all_graphs(made.graph) for node in graph.node if node.op_type == "Constant"]
    integers = [item for item in made.graph.initializer if item.data_type == onnx.TensorProto.INT64]
    assert sorted(tuple(onnx.numpy_helper.to_array(item)) for item in integers) == [(0,), (1, 2)]
    feeds = {"x": feeds_for(source)["x"], "c": np.array(True)}
    for y, expected in zip(run(made, feeds), run(source, feeds), strict=True):
        np.testing.assert_allclose(y, expected, atol=0.05)


def test_what_no_runtime_needs_is_dropped() -> None:
    source = small_cnn()
    for node in source.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File ...")
        node.name = f"{node.output[0]}"
    source.graph.node[0].attribute.append(helper.make_attribute("group", 1))
    source.graph.node[0].attribute.append(helper.make_attribute("strides", [1, 1]))
    source = onnx.shape_inference.infer_shapes(source)
    source.graph.value_info.append(helper.make_tensor_value_info("nowhere", onnx.TensorProto.FLOAT, [7]))
    made, _ = quantize_model(source, QuantConfig(8))
    conv = next(node for node in made.graph.node if node.op_type == "Conv")
    assert [item.name for item in conv.attribute] == ["pads"]
    assert not any(node.metadata_props or node.name for node in made.graph.node)
    assert [item.name for item in made.graph.value_info] == ["nowhere"]  # inference does not determine it
    near(made, source)
