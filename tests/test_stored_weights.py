"""Refinement on models as exporters write them: weights before other nodes, half precision, data-dependent sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import laplace, parse
from onnx import TensorProto, helper, numpy_helper

from requant_onnx import BiasType, Budget, Calibration, EdgeLayers, Form, Int8Speed, ModelError, QuantConfig, quantize_model
from requant_onnx.convert.layerwise import ExpectedOutputs
from requant_onnx.convert.steps import check_expected
from requant_onnx.runtime.sensitivity import outputs_of, relative_error
from requant_onnx.runtime.stream import Chunk

SAME_DB = 0.5  # tolerance of the output SQNR for other float sums, and for half precision of the weights
FEEDS: list[Chunk] = [{"x": np.random.default_rng(seed).normal(size=(4, 3, 8, 8)).astype(np.float32)} for seed in range(12)]
HELD_OUT: list[Chunk] = [{"x": np.random.default_rng(99).normal(size=(32, 3, 8, 8)).astype(np.float32)}]
WEIGHTS = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 16, 3, 3), "w4": (16, 16, 3, 3)}


def net() -> onnx.ModelProto:
    """A model of four Conv in a row: errors of the first ones that are missed cannot be compensated by the last ones."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 16, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(b, w2, b2) d = Relu(c)
        e = Conv<pads = [1, 1, 1, 1]>(d, w3, b3) f = Relu(e) y = Conv<pads = [1, 1, 1, 1]>(f, w4, b4) }"""
    weights = {name: laplace(*shape, seed=k) for k, (name, shape) in enumerate(WEIGHTS.items())}
    biases = {f"b{k}": laplace(16, seed=10 + k) for k in range(1, 5)}
    return parse(text, **{name: w.astype(np.float16).astype(np.float32) for name, w in weights.items()}, **biases)


Store = Callable[[onnx.ModelProto, onnx.TensorProto], list[onnx.NodeProto]]


def behind_cast(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    values = numpy_helper.to_array(tensor).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(values, f"{tensor.name}.half"))
    return [helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT)]


def behind_identity(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor), f"{tensor.name}.stored"))
    return [helper.make_node("Identity", [f"{tensor.name}.stored"], [tensor.name])]


def behind_transpose(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    values = np.ascontiguousarray(numpy_helper.to_array(tensor).transpose(1, 2, 3, 0))
    model.graph.initializer.append(numpy_helper.from_array(values, f"{tensor.name}.stored"))
    return [helper.make_node("Transpose", [f"{tensor.name}.stored"], [tensor.name], perm=[3, 0, 1, 2])]


def behind_reshape(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    shape = numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{tensor.name}.shape")
    stored = numpy_helper.from_array(numpy_helper.to_array(tensor).ravel(), f"{tensor.name}.stored")
    model.graph.initializer.extend([stored, shape])
    return [helper.make_node("Reshape", [f"{tensor.name}.stored", f"{tensor.name}.shape"], [tensor.name])]


def behind_squeeze(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    stored = numpy_helper.from_array(numpy_helper.to_array(tensor)[None], f"{tensor.name}.stored")
    axes = numpy_helper.from_array(np.array([0], np.int64), f"{tensor.name}.axes")
    model.graph.initializer.extend([stored, axes])
    return [helper.make_node("Squeeze", [f"{tensor.name}.stored", f"{tensor.name}.axes"], [tensor.name])]


def in_constant_node(model: onnx.ModelProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:  # noqa: ARG001
    return [helper.make_node("Constant", [], [tensor.name], value=tensor)]


STORES: dict[str, Store] = {
    "Cast": behind_cast,
    "Identity": behind_identity,
    "Transpose": behind_transpose,
    "Reshape": behind_reshape,
    "Squeeze": behind_squeeze,
    "Constant": in_constant_node,
}


def rewritten(store: Store, at_the_head: bool) -> onnx.ModelProto:
    """The net with its weights stored differently, with nodes at the head of the graph or each just before its reader."""
    model = net()
    tensors = [item for item in model.graph.initializer if item.name in WEIGHTS]
    kept = [item for item in model.graph.initializer if item.name not in WEIGHTS]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    made = {tensor.name: store(model, tensor) for tensor in tensors}
    order = [node for nodes in made.values() for node in nodes] if at_the_head else []
    for node in model.graph.node:
        order += [] if at_the_head else [new for name in node.input for new in made.get(name, [])]
        order.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def sqnr_db(model: onnx.ModelProto, form: Form, bits: int = 3) -> float:
    """The output SQNR on inputs that were not used for calibration."""
    config = QuantConfig(bits, form=form, int8_speed=Int8Speed.ALL)
    made, _ = quantize_model(model, config, calibration=Calibration.from_feeds(FEEDS))
    return float(-10 * np.log10(relative_error(outputs_of(net(), HELD_OUT), outputs_of(made, HELD_OUT))))


@pytest.fixture(scope="module", params=[Form.FOLDED, Form.INT8], ids=str)
def plain(request: pytest.FixtureRequest) -> tuple[Form, float]:
    return request.param, sqnr_db(net(), request.param)


@pytest.mark.parametrize("at_the_head", [True, False], ids=["head", "reader"])
@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
def test_the_result_does_not_depend_on_how_weights_are_stored(plain: tuple[Form, float], store: Store, at_the_head: bool) -> None:
    form, expected = plain
    assert sqnr_db(rewritten(store, at_the_head), form) == pytest.approx(expected, abs=SAME_DB)


def half(model: onnx.ModelProto, *, casts: bool) -> onnx.ModelProto:
    """The model in float16, including inputs and outputs, or with casts to float ones."""
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    if not casts:
        for item in (*model.graph.input, *model.graph.output):
            item.type.tensor_type.elem_type = TensorProto.FLOAT16
        return model
    model.graph.node[0].input[0] = "x.half"
    model.graph.node[-1].output[0] = "y.half"
    nodes = [helper.make_node("Cast", ["x"], ["x.half"], to=TensorProto.FLOAT16), *model.graph.node]
    nodes.append(helper.make_node("Cast", ["y.half"], ["y"], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED], ids=str)
@pytest.mark.parametrize("with_biases", [True, False])
@pytest.mark.parametrize("casts", [True, False])
def test_half_precision_is_refined_as_single_is(form: Form, with_biases: bool, casts: bool) -> None:
    """A new bias has the type of its node: ONNX Runtime rejects a float16 Conv with a float32 bias."""
    exact, model = net(), half(net(), casts=casts)
    if not with_biases:
        for each in (exact, model):
            for node in each.graph.node:
                del node.input[2:]
            kept = [item for item in each.graph.initializer if item.name in WEIGHTS]
            del each.graph.initializer[:]
            each.graph.initializer.extend(kept)
    kind = np.float32 if casts else np.float16
    feeds: list[Chunk] = [{"x": feed["x"].astype(kind)} for feed in FEEDS]
    held: list[Chunk] = [{"x": feed["x"].astype(kind)} for feed in HELD_OUT]
    expected, _ = quantize_model(exact, QuantConfig(3, form=Form.FOLDED), calibration=Calibration.from_feeds(FEEDS))
    made, report = quantize_model(
        model, QuantConfig(3, form=form, int8_speed=Int8Speed.ALL), calibration=Calibration.from_feeds(feeds)
    )
    assert all(weight.output_errors for weight in report.converted)  # each was refined
    outputs = outputs_of(exact, HELD_OUT)
    errors = [relative_error(outputs, found) for found in (outputs_of(expected, HELD_OUT), outputs_of(made, held))]
    assert errors[1] < 1.5 * errors[0]


def test_a_model_that_does_not_give_what_was_believed_is_refused() -> None:
    exact = outputs_of(net(), HELD_OUT)[0]
    near, names = [y * 1.001 for y in exact], [item.name for item in net().graph.output]
    check_expected(net(), ExpectedOutputs(dict(HELD_OUT[0]), names, list(exact), list(near)))
    far = net()
    next(item for item in far.graph.initializer if item.name == "w1").CopyFrom(
        numpy_helper.from_array(laplace(16, 3, 3, 3, seed=7), "w1")
    )
    with pytest.raises(ModelError, match=r"the converted model has an output SQNR of .* dB, but the refinement expected"):
        check_expected(far, ExpectedOutputs(dict(HELD_OUT[0]), names, list(exact), list(near)))


DEPENDS = "gets a number of inputs that depends on the data, and differs between the float and the quantized model"
CHOICES: list[tuple[int | Budget, Form]] = [(3, Form.QDQ), (3, Form.FOLDED), (3, Form.INT8), (Budget(size=6_000), Form.QDQ)]
CALIBRATED = pytest.mark.parametrize(
    "config",
    [QuantConfig(bits, form=form, int8_speed=Int8Speed.ALL, edge_layers=EdgeLayers.PLAIN) for bits, form in CHOICES],
    ids=["qdq", "folded", "int8", "auto"],
)


@CALIBRATED
@pytest.mark.parametrize("threshold", [2.0, 1e6], ids=["some rows", "no row"])
def test_layers_whose_number_of_inputs_depends_on_the_data_keep_nearest_levels(config: QuantConfig, threshold: float) -> None:
    """With rows above a threshold, as with boxes in NonMaxSuppression, the float and the quantized model select different ones."""
    text = """net (float[n, 8, 8, 8] x) => (float[k, 24] y) {
        a = Conv(x, w1, b1) h = Relu(a) p = Transpose<perm = [0, 2, 3, 1]>(h) r = Reshape(p, s)
        m = ReduceMax<keepdims = 0>(r, one) g = Greater(m, t) q = Compress<axis = 0>(r, g) y = Gemm(q, w2) }"""
    constants = {"s": np.array([-1, 16]), "one": np.array([1]), "t": np.array(threshold, np.float32)}
    weights = {"w1": laplace(16, 8, 3, 3), "b1": laplace(16, seed=1), "w2": laplace(16, 24, seed=2)}
    model = parse(text, **weights, **constants)
    generator = np.random.default_rng(0)
    feeds: list[Chunk] = [{"x": generator.normal(size=(2, 8, 8, 8)).astype(np.float32)} for _ in range(8)]
    made, report = quantize_model(model, config, calibration=Calibration.from_feeds(feeds))
    if not isinstance(config.bits, Budget):  # a budget may give the first layer so many bits that the same rows are selected
        last = next(weight for weight in report.converted if weight.name == "w2")
        assert last.method == "nearest"
        assert last.why_nearest == ("gets no input" if threshold > 1e3 else DEPENDS)
    assert outputs_of(made, feeds[:1])[0][0].shape[1] == 24


@CALIBRATED
def test_sequences_and_sparse_initializers_are_calibrated(config: QuantConfig) -> None:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, a, b] y) {
        c = Conv(x, w1) d = Conv(x, w2) s = SequenceConstruct(c, d) e = SequenceAt(s, i) f = Relu(e) y = Conv(f, w3, b3) }"""
    weights = {"w1": laplace(16, 3, 3, 3), "w2": laplace(16, 3, 3, 3, seed=1), "w3": laplace(8, 16, 3, 3, seed=2)}
    model = parse(text, **weights, i=np.array(1))
    values = numpy_helper.from_array(np.array([0.5, -0.25], np.float32), "b3")
    indices = numpy_helper.from_array(np.array([1, 6]), "b3.indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    made, report = quantize_model(model, config, calibration=Calibration.from_feeds(FEEDS))
    assert {weight.name for weight in report.converted} == set(weights)
    error = relative_error(outputs_of(model, HELD_OUT), outputs_of(made, HELD_OUT))
    assert error < 0.1


@CALIBRATED
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_empty_optionals_are_calibrated(kind: int, config: QuantConfig) -> None:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, a, b] y, bool z) {
        c = Conv(x, w1) o = Optional() d = Conv(c, w2) z = OptionalHasElement(o) y = Conv(d, w3) }"""
    weights = {"w1": laplace(16, 3, 3, 3), "w2": laplace(16, 16, 3, 3, seed=1), "w3": laplace(8, 16, 3, 3, seed=2)}
    model = parse(text, **weights)
    element = helper.make_tensor_type_proto(kind, None)
    model.graph.node[1].attribute.add(name="type", type=onnx.AttributeProto.TYPE_PROTO).tp.CopyFrom(element)
    _, report = quantize_model(model, config, calibration=Calibration.from_feeds(FEEDS))
    assert {weight.name for weight in report.converted} == set(weights)


def test_biases_stay_float32_where_float16_changes_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large biases that the next layer cancels: rounded to float16, they are the largest error of the model."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
        y = Conv(a, w2, b2)
    }"""
    w2 = laplace(128, 128, 1, 1, seed=1)
    w2 -= w2.mean(1, keepdims=True)
    weights = {"w1": laplace(128, 3, 3, 3), "w2": w2, "b1": 1000 + laplace(128, seed=2), "b2": laplace(128, seed=3)}
    config, calibration = QuantConfig(bits=8, form=Form.FOLDED), Calibration(count=16)
    _, careful = quantize_model(parse(text, **weights), config, calibration=calibration)
    monkeypatch.setattr("requant_onnx.graph.decode.vectors.PART", 1e12)
    made, report = quantize_model(parse(text, **weights), config, calibration=calibration)
    assert report.vectors.count == 0
    assert any("biases stay float32" in note for note in report.notes)
    assert not any("biases stay float32" in note for note in careful.notes)
    assert report.check is not None
    assert careful.check is not None
    assert report.check.sqnr_db == pytest.approx(careful.check.sqnr_db, abs=3)
    assert {item.data_type for item in made.graph.initializer if item.name in ("b1", "b2")} == {onnx.TensorProto.FLOAT}
    _, asked = quantize_model(parse(text, **weights), replace(config, biases=BiasType.HALF), calibration=calibration)
    assert asked.vectors.count == 2
