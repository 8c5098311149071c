"""The int8 form: which nodes run on integers, whether they compute what plain QDQ defines, and the accuracy."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import OWN_MODEL, OWN_NORMALIZATION, laplace, parse, small_cnn, top1, trained_model
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from requant_onnx import (
    Calibration,
    ConfigError,
    DataError,
    EdgeLayers,
    Form,
    Granularity,
    ImageSet,
    Int8Levels,
    Int8Speed,
    ModelError,
    Normalization,
    QuantConfig,
    Refinement,
    Runtime,
    Transform,
    ValidationReport,
    explain,
    load_images,
    quantize_model,
    validate,
)
from requant_onnx.graph.constants import ModelGraph, from_constants
from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.integer.plan import plan_integers
from requant_onnx.runtime import cpu

INT8 = QuantConfig(bits=4, form=Form.INT8, int8_speed=Int8Speed.ALL)
NOISE = Calibration(count=8)
CIFAR = OWN_NORMALIZATION
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLOAT_OPERATORS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Concat", "AveragePool", "GlobalAveragePool"}
RESIDUAL = """net (float[n, 3, 8, 8] x) => (float[n, 10] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)   r = Relu(a)
    b = Conv<pads = [1, 1, 1, 1]>(r, w2, b2)   s = Add(b, r)   t = Relu(s)
    c = Conv<pads = [1, 1, 1, 1]>(t, w2, b1)   d = Clip(c, low, high)
    e = Conv(t, w3)                            f = Clip(e, low, high)
    g = Concat<axis = 1>(d, f, t)
    m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(g)
    p = Pad(m, pads)
    q = AveragePool<kernel_shape = [2, 2]>(p)
    u = GlobalAveragePool(q)
    v = Flatten(u)
    y = Gemm<transB = 1>(v, w4, b4)
}"""


def residual_net() -> onnx.ModelProto:
    """A residual and an inception block with shared weights, with every kind of node that runs on integers."""
    return parse(
        RESIDUAL,
        w1=laplace(8, 3, 3, 3),
        b1=laplace(8, seed=1),
        w2=laplace(8, 8, 3, 3, seed=2),
        b2=laplace(8, seed=3),
        w3=laplace(8, 8, 1, 1, seed=4),
        w4=laplace(10, 24, seed=5),
        b4=laplace(10, seed=6),
        low=np.float32(0),
        high=np.float32(6),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    )


def run(model: onnx.ModelProto, x: np.ndarray, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def with_plain_levels(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with each int8 weight stored directly, as decoded by onnx's reference implementation in NumPy."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    decodes = [node.outputs[0].name for node in ModelGraph.of(model).nodes if node.outputs and from_constants(node.outputs[0])]
    front = onnx.helper.make_graph(
        [node for node in graph.node if node.output[0] in decodes and node.op_type != "DequantizeLinear"],
        "f",
        [],
        [],
        graph.initializer,
    )
    made = {name for node in front.node for name in node.output}
    read = [n.input[k] for n in graph.node for k in range(len(n.input)) if n.op_type == "DequantizeLinear" and n.input[k] in made]
    front.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(read))
    values = ReferenceEvaluator(onnx.helper.make_model(front, opset_imports=model.opset_import)).run(None, {})
    delete_where(graph.node, [k for k, node in enumerate(graph.node) if node.output[0] in made])
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), item.name) for v, item in zip(values, front.output, strict=True)
    )
    return plain


@pytest.mark.parametrize(
    "config",
    [
        INT8,
        QuantConfig(bits=4, form=Form.INT8, int8_speed=Int8Speed.ALL, transform=Transform(0.5)),
        QuantConfig(bits=5, form=Form.INT8, int8_speed=Int8Speed.ALL, transform=Transform(0.7), granularity=Granularity.PER_TENSOR),
        QuantConfig(bits=8, form=Form.INT8, int8_speed=Int8Speed.ALL, int8_levels=Int8Levels.FULL),
        QuantConfig(bits=2, form=Form.INT8, int8_speed=Int8Speed.ALL, edge_layers=EdgeLayers.FLOAT),
    ],
)
@pytest.mark.parametrize("build", [small_cnn, residual_net])
def test_it_computes_what_plain_int8_qdq_of_the_same_codes_does(config: QuantConfig, build: object) -> None:
    model, _ = quantize_model(build(), config, calibration=NOISE)  # type: ignore[operator]
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(model, x), run(with_plain_levels(model), x))


def test_whole_blocks_stay_on_integers() -> None:
    """Residual and inception blocks, pools, Pad, Relu and Clip: one QuantizeLinear at the start, nothing else between kernels."""
    model, report = quantize_model(residual_net(), INT8, calibration=NOISE)
    assert {weight.form for weight in report.converted} == {"int8"}
    explanation = explain(model)
    assert {weight.fate.value for weight in explanation.weights} == {"fused"}
    assert not FLOAT_OPERATORS & explanation.operators.keys()
    assert explanation.operators["QuantizeLinear"] == 1
    assert "DequantizeLinear" not in explanation.operators
    assert not {"Relu", "Clip"} & explanation.operators.keys()


def test_kernels_agree_with_the_definition() -> None:
    """Integer kernels compared with the same graph run by operators in float: a step or two of the last activation."""
    model, report = quantize_model(residual_net(), QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
    x = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)
    fast, slow = run(model, x), run(model, x, "ORT_DISABLE_ALL")
    assert abs(fast - slow).max() <= 0.02 * abs(slow).max()
    float_model = run(residual_net(), x, "ORT_DISABLE_ALL")  # otherwise ONNX Runtime 1.20 averages wrongly over the padding
    assert ((fast - float_model) ** 2).sum() <= 1e-2 * (float_model**2).sum()  # 20 dB
    assert all(item.range[0] <= 0.0 <= item.range[1] for item in report.activations)


def test_a_bias_far_above_the_weights_is_kept() -> None:
    """The steps of a channel with weights of 1e-9 would be far too fine for its bias of 1000 in int32."""
    w, b = laplace(4, 3, 3, 3), np.array([1000.0, -1000.0, 0.1, -3.0], np.float32)
    w[0] *= 1e-9
    w[1] = 0.0
    text = "net (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { y = Conv(x, w, b) }"
    model, _ = quantize_model(parse(text, w=w, b=b), QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
    y = run(model, np.zeros((1, 3, 8, 8), np.float32))
    np.testing.assert_allclose(y[0, :2, 0, 0], b[:2], rtol=0.01)


def test_what_has_no_integer_kernel_stays_float() -> None:
    text = """net (float[n, 4, 8, 8] x) => (float[n, 8, a, b] y) {
        c = ConvTranspose(x, w1)  r = Relu(c)  d = Conv(r, w2)  e = Softplus(d)  f = Conv(e, w3, k)  y = Exp(f) }"""
    weights = {"w1": laplace(4, 16, 3, 3), "w2": laplace(16, 16, 3, 3), "w3": laplace(8, 16, 3, 3), "k": laplace(8)}
    model, report = quantize_model(parse(text, **weights), QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
    assert {weight.name: weight.form for weight in report.converted} == {"w1": "folded", "w2": "int8", "w3": "int8"}
    assert [weight.why_not_int8 for weight in report.converted] == [
        "is read by ConvTranspose, for which ONNX Runtime has no integer kernel", "", "",
    ]  # fmt: skip
    assert {"Softplus", "Exp", "ConvTranspose"} <= explain(model).operators.keys()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_weight_of_three_dimensions_stays_float(batch: int) -> None:
    model = parse("net (float[2, n, 24] x) => (float[2, n, 32] y) { y = MatMul(x, w) }", w=laplace(batch, 24, 32))
    calibration = Calibration.from_feeds([{"x": laplace(2, 6, 24, seed=k)} for k in range(6)])
    _, report = quantize_model(model, QuantConfig(8, form=Form.INT8, int8_speed="all"), calibration=calibration)
    assert [(weight.form, "more than two dimensions" in weight.why_not_int8) for weight in report.converted] == [("folded", True)]


def test_plan_of_a_tensor_with_other_readers() -> None:
    """A Relu that is not the only reader of a Conv is not absorbed; an output of the model keeps its name."""
    text = """net (float[n, 4, 8, 8] x) => (float[n, 4, a, b] c, float[n, 4, d, e] y) {
        c = Conv(x, w)  r = Relu(c)  y = Conv(r, w) }"""
    model = parse(text, w=laplace(4, 4, 3, 3))
    plan = plan_integers(ModelGraph.of(model), {"w"})
    assert set(plan.source) == {"x", "c", "r", "y"}
    assert plan.floats == {"x", "r"}
    converted, _ = quantize_model(model, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
    assert [item.name for item in converted.graph.output] == ["c", "y"]


def test_it_needs_calibration_and_only_it_does() -> None:
    with pytest.raises(ConfigError, match="give --calibrate"):
        quantize_model(small_cnn(), INT8)
    with pytest.raises(ConfigError, match="drop --calibrate"):
        quantize_model(small_cnn(), QuantConfig(refinement=Refinement.NONE), calibration=NOISE)


def test_calibration_images_must_fit() -> None:
    wrong = Calibration(ImageSet(np.zeros((2, 3, 5, 5), np.uint8), None))
    with pytest.raises(DataError, match="the images are 3x5x5"):
        quantize_model(small_cnn(), INT8, calibration=wrong)
    with pytest.raises(DataError, match="no calibration images"):
        Calibration(ImageSet(np.zeros((0, 3, 8, 8), np.uint8), None))
    with pytest.raises(DataError, match="count as normalized"):
        Calibration(ImageSet(np.zeros((1, 3, 8, 8), np.float32), None), CIFAR)
    huge = Calibration(ImageSet(np.full((1, 3, 8, 8), 3e38, np.float32), None))
    with pytest.raises(ModelError, match="NaN or infinite values on the calibration inputs"):
        quantize_model(small_cnn(), INT8, calibration=huge)
    free = parse("net (float[n, 3, h, v] x) => (float[n, 4, a, b] y) { y = Conv(x, w) }", w=laplace(4, 3, 3, 3))
    with pytest.raises(DataError, match="leaves the size of images free"):
        quantize_model(free, INT8, calibration=NOISE)
    assert quantize_model(free, INT8, calibration=Calibration(count=4, size=(9, 7)))[1].converted


X = "net (float[n, 3, 8, 8] x) => (float[n, a, b, c] y) "
FLAT = "net (float[n, 16] x) => (float[n, k] y) "
W1, W2 = laplace(16, 3, 3, 3), laplace(8, 16, 3, 3, seed=1)
STRUCTURES = {
    "ReLU6 that binds": (X + "{ a = Conv(x, w) r = Clip(a, lo, hi) y = Conv(r, v) }", {"lo": np.float32(0), "hi": np.float32(0.3)}),
    "Pad with axes": (
        X + "{ a = Conv(x, w) r = Pad(a, p, , q) y = Conv(r, v) }",
        {"p": np.ones(4, np.int64), "q": np.array([2, 3])},
    ),
    "one weight, two axes": (
        FLAT + "{ m = Gemm(x, u, b) t = Relu(m) y = Gemm<transB = 1>(t, u) }",
        {"u": laplace(16, 16), "b": laplace(16)},
    ),
    "MatMul of the input": (FLAT + "{ y = MatMul(x, u) }", {"u": laplace(16, 32)}),
    "Gemm with one bias": (FLAT + "{ y = Gemm(x, u, b) }", {"u": laplace(16, 32), "b": laplace(1)}),
    "a constant activation": (X + "{ k = Conv(c, w) a = Conv(x, w) s = Add(k, a) y = Conv(s, v) }", {"c": laplace(1, 3, 8, 8)}),
    "tiny weights": (X + "{ a = Conv(x, t, b) r = Relu(a) y = Conv(r, v) }", {"t": W1 * np.float32(1e-40), "b": laplace(16)}),
    "squeeze and excite": (
        X + "{ a = Conv(x, w) g = GlobalAveragePool(a) e = Conv(g, e1) s = Sigmoid(e) m = Mul(a, s) y = Conv(m, v) }",
        {"e1": laplace(16, 16, 1, 1)},
    ),
    "depthwise": (
        X + "{ a = Conv(x, w) r = LeakyRelu(a) d = Conv<group = 16>(r, d1) y = Conv(d, v) }",
        {"d1": laplace(16, 1, 3, 3)},
    ),
}


@pytest.mark.parametrize("refinement", [Refinement.NONE, Refinement.DESCENT])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str, refinement: Refinement) -> None:
    """The result is close to the float model, whichever part of it runs on integers."""
    text, weights = STRUCTURES[name]
    used = {key: value for key, value in {"w": W1, "v": W2, **weights}.items() if re.search(rf"[(, ]{key}[,)]", text)}
    model = parse(text, opset=19, ir=9, **used)
    generator = np.random.default_rng(0)
    shape = (32, 16) if "float[n, 16]" in text else (32, 3, 8, 8)
    x = generator.normal(size=shape).astype(np.float32)
    if len(shape) == 2:  # calibration requires images
        with pytest.raises(ModelError, match="input has 4 dimensions"):
            quantize_model(model, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=NOISE)
        return
    calibration = Calibration(ImageSet(x, None))
    made, _ = quantize_model(
        model, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL, refinement=refinement), calibration=calibration
    )
    onnx.checker.check_model(made, full_check=True)
    y, y_hat = run(model, x, "ORT_DISABLE_ALL"), run(made, x)
    assert ((y - y_hat) ** 2).sum() <= 3e-3 * (y**2).sum()  # 25 dB


def test_a_relu_in_a_body_is_not_taken_for_one_behind_the_conv() -> None:
    body = parse("body () => (float[n, c, h, w] z) { z = Relu(a) }").graph
    model = parse("net (float[n, 3, 8, 8] x, bool c) => (float[n, d, e, f] y) { a = Conv(x, w) }", w=laplace(4, 3, 3, 3))
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    assert set(plan_integers(ModelGraph.of(model), {"w"}).source) == {"x", "a"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet56_cifar10", "googlenet_cifar10"])
def test_accuracy_is_within_0_3_points_of_float_activations(name: str, cifar10: Path) -> None:
    """Both have the same 4-bit weights; calibration uses 256 images of the train split."""
    path, norm = trained_model(name), (CIFAR if name.startswith("google") else IMAGENET)
    train = Calibration(load_images(f"cifar10:{cifar10}", split="train").first(256), norm)
    config = QuantConfig(bits=4, edge_layers=EdgeLayers.PLAIN, form=Form.INT8, int8_speed=Int8Speed.ALL, refinement=Refinement.NONE)
    integer, _ = quantize_model(path, config, calibration=train)
    floating, _ = quantize_model(path, replace(config, form=Form.FOLDED))
    report = validate(floating, integer, load_images(f"cifar10:{cifar10}"), norm)
    assert report.top1 is not None
    assert abs(report.top1[1] - report.top1[0]) <= 0.003


@pytest.mark.slow
@pytest.mark.xdist_group("own_report")
def test_own_model_keeps_its_accuracy_without_any_data(cifar10: Path, own_report: ValidationReport) -> None:
    integer, _ = quantize_model(OWN_MODEL, QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=Calibration())
    assert own_report.top1 is not None
    assert top1(integer, load_images(f"cifar10:{cifar10}"), OWN_NORMALIZATION) >= own_report.top1[0] - 0.005


def hard_swish_net(channels: int) -> onnx.ModelProto:
    """A model of 1x1 convolutions with HardSwish between them, which has no integer kernel."""
    text = f"""net (float[n, 3, 32, 32] x) => (float[n, {channels}, 32, 32] y) {{ a = Conv(x, w0) b = HardSwish(a) c = Conv(b, w1)
        d = HardSwish(c) e = Conv(d, w2) f = HardSwish(e) y = Conv(f, w3) }}"""
    shapes = {"w0": (channels, 3, 1, 1), **{f"w{k}": (channels, channels, 1, 1) for k in (1, 2, 3)}}
    return parse(text, **{name: laplace(*shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(("channels", "on_integers"), [(32, False), (384, True)])
def test_layers_that_integers_make_slower_stay_float(channels: int, on_integers: bool) -> None:
    """Only many products compensate for the cost of quantizing, decoding and a separate HardSwish."""
    config = QuantConfig(form=Form.INT8, refinement=Refinement.NONE)
    _, report = quantize_model(hard_swish_net(channels), config, calibration=NOISE)
    assert any(weight.form == "int8" for weight in report.converted) == on_integers
    reasons = {weight.why_not_int8 for weight in report.converted if weight.form != "int8"}
    assert on_integers or reasons == {"would be slower on integers; --int8-speed all converts it anyway"}


def test_a_chain_of_layers_stays_on_integers_and_a_depthwise_one_on_the_web_does_not() -> None:
    text = """net (float[n, 64, 32, 32] x) => (float[n, 64, 32, 32] y) { a = Conv(x, w0) b = Relu(a) c = Conv(b, w1) d = Relu(c)
        e = Conv(d, w2) f = Relu(e) y = Conv(f, w3) }"""
    dense = parse(text, **{f"w{k}": laplace(64, 64, 1, 1, seed=k) for k in range(4)})
    text = text.replace("Conv(", "Conv<group = 64, pads = [1, 1, 1, 1]>(")
    depthwise = parse(text, **{f"w{k}": laplace(64, 1, 3, 3, seed=k) for k in range(4)})
    x = np.random.default_rng(0).normal(size=(2, 64, 32, 32)).astype(np.float32)
    forms = {}
    for name, model in (("dense", dense), ("depthwise", depthwise)):
        for runtime in (Runtime.ORT, Runtime.WEB):
            config = QuantConfig(form=Form.INT8, runtime=runtime, refinement=Refinement.NONE)
            _, report = quantize_model(model, config, calibration=Calibration(ImageSet(x, None)))
            forms[name, runtime] = {weight.form for weight in report.converted}
    assert forms["dense", Runtime.ORT] == {"int8"}
    assert forms["depthwise", Runtime.WEB] == {"folded"}


def test_levels_auto_are_those_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantConfig(form=Form.INT8, refinement=Refinement.NONE, int8_levels=Int8Levels.AUTO)
    for exact, levels in ((True, "127"), (False, "64")):
        monkeypatch.setattr("requant_onnx.convert.pipeline.adds_exactly", lambda exact=exact: exact)
        _, report = quantize_model(small_cnn(), config, calibration=NOISE)
        assert report.config["int8_levels"] == levels
    _, report = quantize_model(small_cnn(), QuantConfig(form=Form.INT8, refinement=Refinement.NONE), calibration=NOISE)
    monkeypatch.setattr("requant_onnx.convert.pipeline.adds_exactly", lambda: True)
    _, other = quantize_model(small_cnn(), QuantConfig(form=Form.INT8, refinement=Refinement.NONE), calibration=NOISE)
    assert any("--int8-levels 127" in note for note in other.notes)
    assert not any("--int8-levels 127" in note for note in report.notes)


def test_the_cpu_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for machine, text, exact in (
        ("x86_64", "flags: avx2 avx512_vnni", True),
        ("AMD64", "flags: avx2", False),
        ("aarch64", "", True),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        assert cpu.adds_exactly() == exact
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert not cpu.adds_exactly()


def unequal_channels() -> onnx.ModelProto:
    """A model with one channel between two layers a thousand times larger than the others, but no more important."""
    text = """net (float[n, 8, 12, 12] x) => (float[n, 10] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, u) b = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(b, v) d = Relu(c)
        e = Conv<pads = [1, 1, 1, 1]>(d, w) g = GlobalAveragePool(e) f = Flatten(g) y = MatMul(f, t) }"""
    u, v, w, t = laplace(64, 8, 3, 3), laplace(64, 64, 3, 3, seed=1), laplace(64, 64, 3, 3, seed=2), laplace(64, 10, seed=3)
    u[0] *= 1000
    v[:, 0] /= 1000
    return parse(text, u=u, v=v, w=w, t=t)


def test_nodes_whose_activations_8_bits_do_not_hold_stay_float() -> None:
    images = ImageSet(np.random.default_rng(0).normal(size=(40, 8, 12, 12)).astype(np.float32), None)
    calibration = Calibration(images, count=24)
    found, kept = {}, {}
    for least in (-math.inf, 15.0):
        config = QuantConfig(8, form=Form.INT8, int8_speed=Int8Speed.ALL, int8_min_sqnr=least)
        _, report = quantize_model(unequal_channels(), config, calibration=calibration)
        assert report.check is not None
        found[least] = report
        kept[least] = report.check.sqnr_db or 0.0
    assert kept[-math.inf] < 12
    assert kept[15.0] >= 15
    forms = {weight.name: (weight.form, weight.why_not_int8) for weight in found[15.0].converted}
    assert forms["w"][0] == "int8"
    assert forms["v"][0] == "folded"
    assert "activations that would reduce the output SQNR" in forms["v"][1]
    assert QuantConfig.from_dict(found[-math.inf].config).int8_min_sqnr == -math.inf


@pytest.mark.parametrize("least", [True, math.nan, "much"])
def test_a_least_sqnr_is_a_number(least: object) -> None:
    with pytest.raises(ConfigError, match="int8_min_sqnr must be a number"):
        QuantConfig(form=Form.INT8, int8_min_sqnr=least)  # type: ignore[arg-type]


def test_files_of_full_levels_load_with_the_precision_that_they_need() -> None:
    """ONNX Runtime then replaces the zero points of weights, and fails if two weights share one."""
    model = parse(
        """net (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w1)
            b = Relu(a)
            c = Conv<pads = [1, 1, 1, 1]>(b, w2)
            d = Relu(c)
            y = Conv<pads = [1, 1, 1, 1]>(d, w3)
        }""",
        **{f"w{k}": laplace(16, 16, 3, 3, seed=k) for k in (1, 2, 3)},
    )
    config = QuantConfig(bits=8, form=Form.INT8, int8_speed=Int8Speed.ALL, int8_levels=Int8Levels.FULL)
    made, report = quantize_model(model, config, calibration=Calibration(count=8))
    assert report.check is not None
    assert report.check.sqnr_db is not None
    assert report.check.sqnr_db > 20
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((1, 16, 8, 8), np.float32)})


@pytest.mark.parametrize("given", [8, 40])
def test_ranges_are_compared_on_as_many_inputs_as_there_are(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default number of calibration inputs, 256, is no reason to use only a part of fewer inputs."""
    used: list[int] = []

    def alphas(_: object, starts: dict[str, float], __: object, chunks: list[object], **___: object) -> dict[str, float]:
        used.append(len(chunks))
        return starts

    monkeypatch.setattr("requant_onnx.convert.integer_ranges.alphas_by_output", alphas)
    values = np.random.default_rng(0).normal(size=(given, 1, 3, 8, 8)).astype(np.float32)
    calibration = Calibration.from_feeds([{"x": each} for each in values])
    quantize_model(small_cnn(), QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=calibration)
    assert used == [given]


def test_nan_is_no_reason_to_keep_activations_on_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output with infinities has an error of NaN, which does not keep `int8_min_sqnr`."""
    monkeypatch.setattr("requant_onnx.convert.integer_ranges.activation_loss", lambda *_: lambda names: math.nan if names else 0.0)
    calibration = Calibration(ImageSet(np.zeros((4, 3, 8, 8), np.uint8), None))
    _, report = quantize_model(small_cnn(), QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL), calibration=calibration)
    assert not report.activations
