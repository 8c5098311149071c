"""All places and shapes of weights that exporters write: the bytes are really quantized, and the oracle holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, skipped_weights
from onnx import TensorProto, helper, numpy_helper
from oracle import check, run

from requant_onnx import Form, Granularity, ModelError, QuantConfig, QuantReport, Transform, inspect_model, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.graph.prepare.opset import raise_opset

IMAGES = "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y)"
ROWS = "net (float[n, 24] x) => (float[n, c] y)"
W = laplace(32, 4, 3, 3)
MATRIX = laplace(24, 40)
AXES = {"axes": np.array([2, 3], np.int64)}
SQUARE = {"shape": np.array([32, 4, 3, 3], np.int64)}
FLAT = {"shape": np.array([24, 40], np.int64)}
CONFIGS = {
    "qdq8": QuantConfig(),
    "folded4": QuantConfig(4, form=Form.FOLDED, transform=Transform(0.5)),
    "qdq3": QuantConfig(3, granularity=Granularity.PER_TENSOR),
}
STRUCTURES: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "identity": (IMAGES + "{ i = Identity(w) y = Conv(x, i) }", {"w": W}),
    "float16 behind a cast": (IMAGES + "{ i = Cast<to = 1>(w) y = Conv(x, i) }", {"w": W.astype(np.float16)}),
    "transposed": (
        IMAGES + "{ t = Transpose<perm = [3, 2, 0, 1]>(w) y = Conv(x, t) }",
        {"w": np.ascontiguousarray(W.transpose(2, 3, 1, 0))},
    ),
    "transposed matrix": (ROWS + "{ t = Transpose(w) y = MatMul(x, t) }", {"w": MATRIX.T.copy()}),
    "float16, transposed behind the cast": (
        ROWS + "{ f = Cast<to = 1>(w) t = Transpose(f) y = MatMul(x, t) }",
        {"w": MATRIX.T.astype(np.float16)},
    ),
    "reshaped": (IMAGES + "{ t = Reshape(w, shape) y = Conv(x, t) }", {"w": W.reshape(32, 36), **SQUARE}),
    "reshaped from one dimension": (IMAGES + "{ t = Reshape(w, shape) y = Conv(x, t) }", {"w": W.ravel(), **SQUARE}),
    "unsqueezed": (IMAGES + "{ t = Unsqueeze(w, axes) y = Conv(x, t) }", {"w": laplace(64, 4), **AXES}),
    "squeezed": (ROWS + "{ t = Squeeze(w, axes) y = MatMul(x, t) }", {"w": MATRIX[:, :, None, None], **AXES}),
    "flattened": (ROWS + "{ t = Flatten<axis = 1>(w) y = MatMul(x, t) }", {"w": MATRIX.reshape(24, 5, 8)}),
    "shared": (IMAGES + "{ a = Conv(x, w) b = Conv<pads = [1, 1, 1, 1]>(x, w) y = Conv<pads = [0, 0, 1, 1]>(x, w) }", {"w": W}),
    "shared along different axes": (
        "net (float[n, 24] x) => (float[n, 40] y, float[n, 24] z) { y = MatMul(x, w) t = Transpose(w) z = MatMul(y, t) }",
        {"w": MATRIX},
    ),
    "shared through shapes": (
        ROWS + "{ t = Reshape(w, shape) a = MatMul(x, t) u = Flatten<axis = 1>(w) b = MatMul(x, u) y = Add(a, b) }",
        {"w": MATRIX.reshape(24, 5, 8), **FLAT},
    ),
    "shared by another reader": (
        "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y, float[4, 3, 3] m) "
        "{ y = Conv(x, w) m = ReduceMax<keepdims = 0>(w, axes) }",
        {"w": W, "axes": np.array([0], np.int64)},
    ),
    "depthwise": (IMAGES + "{ y = Conv<group = 4>(x, w) }", {"w": laplace(64, 1, 5, 5)}),
    "grouped": (IMAGES + "{ y = Conv<group = 2>(x, w) }", {"w": laplace(64, 2, 3, 3)}),
    "one dimension": ("net (float[n, 4, 9] x) => (float[n, c, l] y) { y = Conv<dilations = [2]>(x, w) }", {"w": laplace(64, 4, 3)}),
    "three dimensions": (
        "net (float[n, 4, 5, 5, 5] x) => (float[n, c, d, h, w] y) { y = Conv<strides = [2, 1, 1]>(x, w) }",
        {"w": laplace(32, 4, 3, 3, 3)},
    ),
    "ConvTranspose": (IMAGES + "{ y = ConvTranspose<strides = [2, 2]>(x, w) }", {"w": laplace(4, 32, 3, 3)}),
    "grouped ConvTranspose": (IMAGES + "{ y = ConvTranspose<group = 2>(x, w) }", {"w": laplace(4, 32, 3, 3)}),
    "Gemm": (ROWS + "{ y = Gemm<alpha = 0.5, beta = 2.0>(x, w, b) }", {"w": MATRIX, "b": laplace(1, 40)}),
    "Gemm transB": (ROWS + "{ y = Gemm<transB = 1, alpha = 2.0>(x, w) }", {"w": MATRIX.T.copy()}),
    "Gemm transA": ("net (float[24, n] x) => (float[n, c] y) { y = Gemm<transA = 1>(x, w, b) }", {"w": MATRIX, "b": laplace(40)}),
    "Gemm transA transB": (
        "net (float[24, n] x) => (float[n, c] y) { y = Gemm<transA = 1, transB = 1>(x, w) }",
        {"w": MATRIX.T.copy()},
    ),
    "MatMul from the left": ("net (float[24, n] x) => (float[c, n] y) { y = MatMul(w, x) }", {"w": MATRIX.T.copy()}),
    "MatMul batched": ("net (float[n, 3, 2, 24] x) => (float[n, 3, 2, 40] y) { y = MatMul(x, w) }", {"w": laplace(3, 24, 40)}),
    "MatMul batched from the left": (
        "net (float[n, 3, 24, 2] x) => (float[n, 3, 40, 2] y) { y = MatMul(w, x) }",
        {"w": laplace(3, 40, 24)},
    ),
    "BatchNormalization before, after and shared": (
        IMAGES + "{ p = BatchNormalization(x, g, b, m, v) c = Conv(p, w) q = BatchNormalization(c, g2, b2, m2, v2) "
        "r = BatchNormalization(q, g2, b2, m2, v2) y = Relu(r) }",
        {
            "w": W,
            **{name: np.abs(laplace(4, seed=k)) + 0.5 for k, name in enumerate("gbmv")},
            **{f"{name}2": np.abs(laplace(32, seed=k)) + 0.5 for k, name in enumerate("gbmv")},
        },
    ),
    "dynamic size": ("net (float[n, 4, h, w] x) => (float[n, c, ho, wo] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }", {"w": W}),
    "fixed batch": ("net (float[3, 4, 6, 6] x) => (float[3, 32, 4, 4] y) { y = Conv(x, w) }", {"w": W}),
}  # fmt: skip


def quantized_bytes(report: QuantReport) -> int:
    return sum(weight.bytes_before for weight in report.converted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("structure", STRUCTURES.keys())
def test_structure(structure: str, config: QuantConfig) -> None:
    text, weights = STRUCTURES[structure]
    report = check(parse(text, **weights), config)
    assert quantized_bytes(report) == weights["w"].nbytes
    assert not skipped_weights(report)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 15, 18, 21, 23, 25])
@pytest.mark.parametrize("config", [CONFIGS["qdq8"], CONFIGS["folded4"]], ids=["qdq8", "folded4"])
def test_every_opset(config: QuantConfig, opset: int) -> None:
    text = IMAGES + "{ c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(p, v) }"
    model = parse(text, opset=opset, ir=3 if opset < 9 else 8, w=W, v=laplace(16, 32, 2, 2))
    if opset < 9:  # IR 3 requires initializers in the list of inputs
        model.graph.input.extend(helper.make_tensor_value_info(item.name, 1, item.dims) for item in model.graph.initializer)
    report = check(model, config)
    assert len(report.converted) == 2


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_unnamed_nodes_and_names_like_ours(config: QuantConfig) -> None:
    model = parse(IMAGES + "{ a = Relu(x) b = Conv(a, w) c = Relu(b) y = Identity(c) }", w=W)
    report = check(renamed(model, {"a": "d1.q", "b": "c0", "c": "d1.0"}), config)
    assert not skipped_weights(report)


def body(text: str, **weights: np.ndarray) -> onnx.GraphProto:
    return parse(text, **weights).graph


def with_if(then_branch: onnx.GraphProto, else_branch: onnx.GraphProto, **weights: np.ndarray) -> onnx.ModelProto:
    model = parse("net (float[n, 4, 6, 6] x, bool c) => (float[n, k, h, w] y) { }", **weights)
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch))
    return model


def images() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, 4, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("taken", [True, False])
def test_weights_of_the_same_name_in_two_branches(config: QuantConfig, taken: bool) -> None:
    text = "() => (float[n, k, h, w] z) { z = Conv(x, w) }"
    model = with_if(body("a " + text, w=W), body("b " + text, w=laplace(32, 4, 3, 3, seed=9)))
    report = check(model, config, {"x": images(), "c": np.array(taken)})
    assert quantized_bytes(report) == 2 * W.nbytes
    assert not skipped_weights(report)
    assert {item.name for item in inspect_model(model).weights} == {weight.name for weight in report.converted}


def test_what_a_branch_computes_from_activations_is_no_weight() -> None:
    """Even if its condition is constant: only the decode of `v` is folded, not the product's other operand."""
    text = "() => (float[n, k, h, w] z) { z = Conv(x, w) }"
    branch = with_if(body("a " + text, w=W), body("b " + text, w=W), c=np.array(True))
    del branch.graph.input[1:]
    branch.graph.node[0].output[0] = "z"
    branch.graph.node.append(helper.make_node("MatMul", ["v", "z"], ["y"]))
    branch.graph.initializer.append(numpy_helper.from_array(laplace(40, 4), "v"))
    report = check(branch, CONFIGS["folded4"])
    assert not skipped_weights(report)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_of_a_branch_in_a_constant_and_outside(config: QuantConfig) -> None:
    inner = body("a () => (float[n, k, h, w] z) { t = Transpose<perm = [3, 2, 0, 1]>(w) z = Conv(x, t) }")
    turned = np.ascontiguousarray(W.transpose(2, 3, 1, 0))
    inner.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(turned)))
    model = with_if(inner, body("b () => (float[n, k, h, w] z) { z = Conv(x, outside) }"), outside=laplace(32, 4, 3, 3, seed=9))
    for taken in (True, False):
        report = check(model, config, {"x": images(), "c": np.array(taken)})
    assert not skipped_weights(report)
    assert quantized_bytes(report) == 2 * W.nbytes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_of_a_loop_and_of_a_branch_in_it(config: QuantConfig) -> None:
    square = laplace(16, 16)
    branch = body("b () => (float[n, 16] z) { z = MatMul(state, w) }", w=laplace(16, 16, seed=5))
    inner = body("l (int64 i, bool go, float[n, 16] state) => (bool on, float[n, 16] after) { on = Identity(go) }", v=square)
    other = body("o () => (float[n, 16] z) { z = Gemm(state, v) }")
    inner.node.append(helper.make_node("If", ["go"], ["after"], then_branch=branch, else_branch=other))
    model = parse("net (float[n, 16] x, bool c) => (float[n, 16] y) { }", count=np.array(3, np.int64))
    model.graph.node.append(helper.make_node("Loop", ["count", "c", "x"], ["y"], body=inner))
    report = check(model, config)
    assert quantized_bytes(report) == 2 * square.nbytes
    assert not skipped_weights(report)


FUNCTIONS = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
net (float[n, 24] x) => (float[n, 40] y) { h = local.deep (x, w) y = Relu(h) }
<opset_import: ["" : 18, "local" : 1], domain: "local"> deep (x, w) => (z) { a = local.inner (x) z = MatMul (a, w) }
<opset_import: ["" : 18], domain: "local"> inner (x) => (z) { z = MatMul (x, v) }
"""


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_in_functions_and_handed_to_them(config: QuantConfig) -> None:
    model = onnx.parser.parse_model(FUNCTIONS)
    inner = laplace(24, 24)
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(inner))
    next(function for function in model.functions if function.name == "inner").node.insert(0, constant)
    model.graph.initializer.append(numpy_helper.from_array(MATRIX, "w"))
    report = check(model, config)
    assert quantized_bytes(report) == MATRIX.nbytes + inner.nbytes
    assert not skipped_weights(report)


def test_functions_without_weights_stay() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "local" : 1]> net (float[n, 24] x) => (float[n, 40] y) '
        "{ h = local.act (x) y = MatMul(h, w) } "
        '<opset_import: ["" : 18], domain: "local"> act (x) => (z) { z = Relu (x) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(MATRIX, "w"))
    check(model, CONFIGS["qdq8"])
    assert [function.name for function in quantize_model(model)[0].functions] == ["act"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("last", "names"), [("Gemm<transB = 1>", ["w"]), ("MatMul", ["w_transposed", "w"])])
def test_a_transposed_weight_of_several_nodes_is_stored_once(last: str, names: list[str], config: QuantConfig) -> None:
    text = "net (float[n, 24] x) => (float[n, c] y) { a = Gemm<transB = 1>(x, w) b = Gemm<transB = 1>(a, w) y = LAST(b, w) }"
    report = check(parse(text.replace("LAST", last), w=laplace(24, 24)), config)
    assert [weight.name for weight in report.converted] == (["w"] if config.form is Form.FOLDED else names)


OLD = ROWS.replace("c] y", "40] y") + "{ h = MatMul(x, w) u = Unsqueeze<axes = [0]>(h) s = Squeeze<axes = [0]>(u) %s }"
"""A graph that only onnx.version_converter can raise above opset 12."""


def test_functions_without_weights_are_inlined_where_the_opset_is_converted() -> None:
    """The converter drops functions."""
    model = parse(OLD % "y = local.act(s)", opset=11, w=MATRIX)
    imports = [helper.make_opsetid("", 11), helper.make_opsetid("local", 1)]
    model.opset_import.append(imports[1])
    model.functions.append(helper.make_function("local", "act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports))
    check(model, CONFIGS["qdq8"])
    made, _ = quantize_model(model)
    assert not made.functions
    assert [node.op_type for node in made.graph.node][-1] == "Relu"
    model.functions[0].opset_import[0].version = 10
    with pytest.raises(ModelError, match="the function 'act' needs another opset"):
        raise_opset(model, 19)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Relu", ""  # now nothing calls it
    assert not raise_opset(model, 19).functions


@pytest.mark.parametrize("in_node", [False, True])
def test_sparse_tensors_become_dense_where_the_opset_is_converted(in_node: bool) -> None:
    """The converter loses sparse initializers and refuses sparse constants."""
    model = parse(OLD % "y = Mul(s, k)", opset=11, w=MATRIX)
    values, indices = np.array([1.5, 2.5], np.float32), np.array([3, 7], np.int64)
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(values, "k"), numpy_helper.from_array(indices, "i"), [40])
    if in_node:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], sparse_value=sparse))
    else:
        model.graph.sparse_initializer.append(sparse)
    check(model, CONFIGS["qdq8"])


@pytest.mark.parametrize("imports", [("",), ("", "ai.onnx"), ("ai.onnx",)])
def test_both_names_of_the_standard_domain(imports: tuple[str, ...]) -> None:
    """The converter knows only one."""
    model = parse(OLD % "y = Relu(s)", opset=11, w=MATRIX)
    for node in model.graph.node[1:]:
        node.domain = "ai.onnx"
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(name, 11) for name in imports)
    feeds = {"x": laplace(2, 24)}
    expected = run(model, feeds)
    raised = raise_opset(model, 19)
    np.testing.assert_allclose(run(raised, feeds)[0], expected[0], rtol=1e-6)
    assert not any(node.HasField("domain") for node in raised.graph.node)  # an empty text takes two bytes too


def bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_bfloat16(config: QuantConfig) -> None:
    behind_cast = parse(IMAGES + "{ f = Cast<to = 1>(w) y = Conv(x, f) }", w=bfloat16(W))
    report = check(behind_cast, config)
    assert not skipped_weights(report)
    assert report.bytes_before == W.size * 2
    throughout = parse("net (bfloat16[n, 24] x) => (bfloat16[n, 40] y) { y = MatMul(x, w) }", opset=22, w=bfloat16(MATRIX))
    converted, report = quantize_model(throughout, config)
    assert not skipped_weights(report)
    onnx.checker.check_model(converted, full_check=True)
    converted.graph.node[-1].CopyFrom(helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT))  # ONNX Runtime has no MatMul
    converted.graph.output[0].CopyFrom(helper.make_tensor_value_info("f", TensorProto.FLOAT, [24, 40]))
    del converted.graph.input[:]
    (w_hat,) = run(converted, {})
    assert np.mean((w_hat - bfloat16(MATRIX).astype(np.float32)) ** 2) == pytest.approx(report.converted[0].mse, rel=0.01)


@pytest.mark.parametrize(
    "model",
    [
        parse("net (float[n] x) => (float[n] y) { y = Relu(x) }"),
        parse(IMAGES + "{ y = Conv(x, w) }", w=np.zeros((0, 4, 3, 3), np.float32)),
        parse("net () => (float[4] w) { }", w=laplace(4)),
    ],
    ids=["no weights", "a weight of size zero", "no nodes"],
)
def test_nothing_to_convert_gives_the_model_back(model: onnx.ModelProto) -> None:
    converted, report = quantize_model(model)
    assert not report.converted
    assert converted == model


def test_everything_else_is_kept() -> None:
    model = parse(IMAGES + "{ a = other.Odd<k = 3>(x) y = Conv(a, w) }", w=W)
    model.opset_import.append(helper.make_opsetid("other", 7))
    model.metadata_props.add(key="author", value="somebody")
    model.doc_string, model.producer_name, model.graph.doc_string = "a model", "exporter", "its graph"
    model.graph.node[0].doc_string = "an odd node"
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 4, 6, 6]))
    model.training_info.add().algorithm.name = "sgd"
    converted, _ = quantize_model(model)
    assert helper.make_opsetid("other", 7) in converted.opset_import
    assert {entry.key for entry in converted.metadata_props} == {"author", "requant_onnx"}
    assert (converted.doc_string, converted.producer_name, converted.graph.doc_string) == ("a model", "exporter", "its graph")
    assert model.graph.node[0] in converted.graph.node
    assert model.graph.node[1] in converted.graph.node
    assert model.graph.value_info[0] in converted.graph.value_info
    assert converted.training_info[0].algorithm.name == "sgd"


def test_a_graph_without_nodes_is_copied(tmp_path: Path) -> None:
    """It is valid ONNX, and ONNX Runtime runs it (found by tools/soak.py)."""
    model = parse("net (float[n, 4] x) => (float[n, 4] x) { }")
    onnx.save(model, tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
