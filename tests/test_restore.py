"""A converted file becomes a plain float model again, and is not converted a second time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from test_int8 import residual_net

from requant_onnx import (
    Calibration,
    ConfigError,
    ConvertedError,
    EdgeLayers,
    Form,
    Int8Speed,
    QuantConfig,
    Refinement,
    Runtime,
    explain,
    quantize_model,
    restore_model,
    save_model,
)
from requant_onnx.cli.main import main

NOISE = Calibration(count=4)
X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    options = SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def is_plain(model: onnx.ModelProto) -> bool:
    ops = {node.op_type for node in model.graph.node}
    kinds = {numpy_helper.to_array(item).dtype.kind for item in model.graph.initializer if item.data_type != onnx.TensorProto.INT64}
    return (
        not ops & {"QuantizeLinear", "DequantizeLinear", "Gather", "Cast", "Range"}
        and kinds <= {"f"}
        and "requant_onnx" not in {item.key for item in model.metadata_props}
    )


@pytest.mark.parametrize("runtime", [Runtime.ORT, Runtime.PORTABLE])
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("build", [small_cnn, residual_net])
def test_every_form_comes_back(build: object, bits: int, form: Form, runtime: Runtime) -> None:
    assert callable(build)
    source = build()
    config = QuantConfig(bits, form=form, runtime=runtime, refinement=Refinement.NONE, int8_speed=Int8Speed.ALL)
    made, report = quantize_model(source, config, calibration=NOISE if form is Form.INT8 else None)
    before = made.SerializeToString()
    restored, found = restore_model(made)
    assert made.SerializeToString() == before
    assert is_plain(restored)
    assert found.left == ()
    assert found.constants >= len(report.converted)
    assert (found.activations > 0) == (form is Form.INT8)
    weights = {item.name for item in restored.graph.initializer}
    assert {weight.name for weight in report.converted} <= weights  # under their own names
    exact, again = run(made), run(restored)
    rounding = 0.2 if form is Form.INT8 else 1e-5  # error of activations, or only rounding
    assert np.linalg.norm(again - exact) <= rounding * np.linalg.norm(exact)


def test_operators_are_those_of_the_float_model() -> None:
    config = QuantConfig(4, form=Form.INT8, refinement=Refinement.NONE, int8_speed=Int8Speed.ALL)
    restored, _ = restore_model(quantize_model(small_cnn(), config, calibration=NOISE)[0])
    kinds = [node.op_type for node in restored.graph.node]
    assert kinds == [node.op_type for node in small_cnn().graph.node if node.op_type != "BatchNormalization"]


def test_lookups_read_floats_again() -> None:
    text = "net (int64[n] i) => (float[n, 64] y) { e = Gather(table, i) y = MatMul(e, w) }"
    source = parse(text, table=laplace(200, 64), w=laplace(64, 64))
    made, _ = quantize_model(source, QuantConfig(8, edge_layers=EdgeLayers.PLAIN))
    assert "Cast" in {node.op_type for node in made.graph.node}
    restored, _ = restore_model(made)
    assert [node.op_type for node in restored.graph.node] == ["Gather", "MatMul"]
    indices = np.array([0, 7, 199])
    np.testing.assert_allclose(run(restored, indices), run(made, indices), rtol=1e-5, atol=1e-5)


def test_files_of_other_tools_come_back(tmp_path: Path) -> None:
    """Files of onnxruntime.quantization, QDQ, per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415  (slow, and it warns)
    from onnxruntime.quantization.calibrate import CalibrationDataReader  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"x": X}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    onnx.save(residual_net(), tmp_path / "in.onnx")
    quantize_static(
        tmp_path / "in.onnx", tmp_path / "out.onnx", Reader(), QuantFormat.QDQ, weight_type=QuantType.QInt8, per_channel=True
    )
    restored, found = restore_model(tmp_path / "out.onnx")
    assert is_plain(restored)
    assert found.activations > 0
    exact = run(residual_net())
    assert np.linalg.norm(run(restored) - exact) <= 0.05 * np.linalg.norm(exact)


def test_default_values_of_inputs_stay() -> None:
    text = "net (float[2, 24] x, float[3] unread) => (float[2, 40] y) { w = DequantizeLinear(q, s) y = MatMul(x, w) }"
    codes = np.random.default_rng(0).integers(-99, 99, (24, 40)).astype(np.int8)
    restored, report = restore_model(parse(text, q=codes, s=np.float32(0.01), unread=np.ones(3, np.float32)))
    assert report.constants == 1
    assert {item.name for item in restored.graph.initializer} == {"w", "unread"}


@pytest.mark.parametrize(("ir_version", "domain"), [(3, ""), (10, ""), (10, "com.microsoft")])
def test_codes_that_are_listed_as_inputs_are_float_again(ir_version: int, domain: str) -> None:
    text = "net (float[2, 24] x) => (float[2, 40] y) { w = DequantizeLinear(q, s, z) y = MatMul(x, w) }"
    codes = np.random.default_rng(0).integers(-99, 99, (24, 40)).astype(np.int8)
    model = parse(text, q=codes, s=np.float32(0.01), z=np.int8(3), opset=13, ir=ir_version)
    model.graph.node[0].domain = domain
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    for name, kind, shape in (
        ("q", onnx.TensorProto.INT8, (24, 40)),
        ("s", onnx.TensorProto.FLOAT, ()),
        ("z", onnx.TensorProto.INT8, ()),
    ):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    restored, report = restore_model(model)
    assert report.constants == 1
    assert [item.name for item in restored.graph.input] == ["x"]
    x = np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
    assert run(restored, x) == pytest.approx(x @ ((codes.astype(np.float32) - 3) * np.float32(0.01)), rel=1e-5, abs=1e-5)


def test_an_input_with_a_default_value_is_not_quantized_away() -> None:
    text = """net (float[2, 24] x) => (float[2, 40] y) {
        d = QuantizeLinear(x, s, z) a = DequantizeLinear(d, s, z) w = DequantizeLinear(q, s, z) y = MatMul(a, w) }"""
    codes = np.random.default_rng(0).integers(-99, 99, (24, 40)).astype(np.int8)
    restored, _ = restore_model(parse(text, q=codes, s=np.float32(0.01), z=np.int8(0), x=np.ones((2, 24), np.float32)))
    assert [item.name for item in restored.graph.input] == ["x"]
    assert "x" in {item.name for item in restored.graph.initializer}


def test_codes_with_a_default_value_remain_the_only_input() -> None:
    text = (
        "net (int8[2, 24] x) => (float[2, 40] y) { a = DequantizeLinear(x, s, z) w = DequantizeLinear(q, s, z) y = MatMul(a, w) }"
    )
    codes = np.random.default_rng(0).integers(-99, 99, (24, 40)).astype(np.int8)
    stored = {"q": codes, "s": np.float32(0.01), "z": np.int8(0), "x": np.ones((2, 24), np.int8)}
    restored, _ = restore_model(parse(text, **stored))
    assert [item.name for item in restored.graph.input] == ["x"]
    assert {node.op_type for node in restored.graph.node} == {"DequantizeLinear", "MatMul"}


RELU = "net (float[n, 64] x) => (float[n, 64] y) {{ a = Add(x, x) {} y = MatMul(d, w) }}"
PAIR = "q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)"


@pytest.mark.parametrize("kind", ["UINT8", "INT8", "UINT4", "UINT16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_removed_relu_comes_back_for_every_type_of_codes(kind: str, dtype: type) -> None:
    """In files of other tools, codes that begin at 0 replace a Relu."""
    number = onnx.TensorProto.DataType.Value(kind)
    text = RELU.format(PAIR) if dtype is np.float32 else RELU.format(PAIR).replace("float[", "float16[")
    model = parse(text, opset=21, ir=10, w=laplace(64, 64).astype(dtype), s=dtype(0.01 if kind != "UINT4" else 0.2))
    model.graph.initializer.append(onnx.helper.make_tensor("z", number, [], [-128 if kind == "INT8" else 0]))
    x: np.ndarray = np.random.default_rng(0).normal(size=(4, 64)).astype(dtype)
    restored, found = restore_model(model)
    assert (found.activations, [node.op_type for node in restored.graph.node]) == (1, ["Add", "Clip", "MatMul"])
    assert np.linalg.norm(run(restored, x) - run(model, x)) <= 0.1 * np.linalg.norm(run(model, x))


@pytest.mark.parametrize(
    ("codes", "constants"),
    [
        ("q = QuantizeLinear(a, s) d = DequantizeLinear(q, s)", {"s": np.float32(0.02)}),
        ("s = Constant<value = float {0.02}>() z = Constant<value = uint8 {0}>() " + PAIR, {}),
    ],
)
def test_a_removed_relu_comes_back_wherever_its_constants_are(codes: str, constants: dict[str, np.ndarray]) -> None:
    model = parse(RELU.format(codes), opset=19, ir=9, w=laplace(64, 64), **constants)
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    restored, _ = restore_model(model)
    assert [node.op_type for node in restored.graph.node] == ["Add", "Clip", "MatMul"]
    assert np.linalg.norm(run(restored, x) - run(model, x)) <= 0.05 * np.linalg.norm(run(model, x))


def test_activations_in_floats_of_8_bits_are_float_again() -> None:
    model = parse(RELU.format(PAIR), opset=19, ir=9, w=laplace(64, 64), s=np.float32(0.1))
    model.graph.initializer.append(onnx.helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))
    restored, _ = restore_model(model)
    assert [node.op_type for node in restored.graph.node] == ["Add", "MatMul"]


def test_codes_that_pass_other_nodes_lose_their_types() -> None:
    """Padding with code 50 means -1.5, and value_info of codes says uint8."""
    text = """net (float16[n, 4, 4, 4] x) => (float16[n, c, h, w] y) {
        a = Add(x, x) q = QuantizeLinear(a, s, z) p = Pad(q, pads, filling) m = MaxPool<kernel_shape = [2, 2]>(p)
        y = DequantizeLinear(m, s, z) }"""
    constants = {"z": np.uint8(200), "filling": np.uint8(50), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    model = onnx.shape_inference.infer_shapes(parse(text, opset=19, ir=9, s=np.float16(0.01), **constants))
    x = np.random.default_rng(0).uniform(-0.9, 0.25, size=(2, 4, 4, 4)).astype(np.float16)
    restored, _ = restore_model(model)
    np.testing.assert_allclose(run(restored, x), run(model, x), atol=0.01)


def test_codes_that_bodies_decode_are_float_again() -> None:
    text = """net (float[n, 64] x) => (float[n, 64] y) {
        r = Relu(x) q = QuantizeLinear(r, s, z) c = Constant<value = bool {1}>() y = If (c) <
            then_branch = t () => (float[n, 64] o) { d = DequantizeLinear(q, s, z) o = MatMul(d, w) },
            else_branch = e () => (float[n, 64] p) { d2 = DequantizeLinear(q, s, z) p = Relu(d2) }
        > }"""
    model = parse(text, opset=19, ir=9, w=laplace(64, 64), s=np.float32(0.02), z=np.uint8(0))
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    restored, found = restore_model(model)
    assert (found.activations, found.left) == (1, ())
    assert np.linalg.norm(run(restored, x) - run(model, x)) <= 0.05 * np.linalg.norm(run(model, x))


def test_what_is_not_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing in the model is quantized"):
        restore_model(small_cnn())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(quantize_model(small_cnn(), QuantConfig(4))[0], tmp_path / "small.onnx")
    arguments = ["restore", str(tmp_path / "small.onnx"), str(tmp_path / "float.onnx")]
    assert main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    assert "4 constants (weights, biases and other vectors) and 0 activations are float again" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["constants"] == 4
    assert is_plain(onnx.load(tmp_path / "float.onnx"))
    assert main(arguments) == 2  # it exists
    assert main(["convert", str(tmp_path / "float.onnx"), str(tmp_path / "again.onnx")]) == 0


def test_a_second_conversion_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = quantize_model(small_cnn(), QuantConfig(3, form=Form.FOLDED))
    with pytest.raises(ConvertedError, match=r"already converted, by requant_onnx 0.*bits 3, form folded.*requant restore"):
        quantize_model(made)
    save_model(made, tmp_path / "small.onnx")
    assert main(["convert", str(tmp_path / "small.onnx"), str(tmp_path / "out.onnx")]) == 3
    assert not (tmp_path / "out.onnx").exists()
    assert "error: the model is already converted" in capsys.readouterr().err
    assert "expand this file" in explain(made).notes[0]
    assert explain(small_cnn()).notes == ()


def test_an_entry_of_somebody_else_is_no_conversion() -> None:
    model = small_cnn()
    model.metadata_props.add(key="requant_onnx", value="no JSON")
    quantize_model(model)
