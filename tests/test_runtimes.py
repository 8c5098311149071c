"""The contents of files for each runtime.  tools/check_runtimes runs such files in the runtimes themselves, except TensorRT."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn
from onnx import TensorProto, numpy_helper
from onnxruntime import InferenceSession

from requant_onnx import (
    BiasType,
    Budget,
    Calibration,
    ConfigError,
    Form,
    Int8Speed,
    QuantConfig,
    Refinement,
    Runtime,
    load_session,
    quantize_model,
)
from requant_onnx.runtimes import RUNTIMES

NOISE = Calibration(count=4)
BITS = ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")


def made_for(runtime: Runtime, form: Form, bits: int, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    calibration = NOISE if form is Form.INT8 else None
    refinement = Refinement.NONE if form is Form.INT8 else Refinement.DESCENT
    config = QuantConfig(bits, form=form, runtime=runtime, refinement=refinement, int8_speed=Int8Speed.ALL)
    made, report = quantize_model(model or small_cnn(), config, calibration=calibration)
    assert report.converted
    return made


def cases() -> list[tuple[Runtime, Form, int]]:
    """All combinations that are not rejected."""
    found = []
    for runtime, bits in itertools.product(Runtime, (2, 3, 4, 7, 8)):
        row = RUNTIMES[runtime]
        forms = [form for form in row.forms if row.checked or form is not Form.INT8 or bits == 8]
        found += [(runtime, form, bits) for form in forms if bits in row.bits]
    return found


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def shape_of(model: onnx.ModelProto, name: str) -> tuple[int, ...]:
    """The inferred shape of a tensor that the graph computes from constants."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = next(item for item in inferred.value_info if item.name == name)
    return tuple(d.dim_value for d in found.type.tensor_type.shape.dim)


@pytest.mark.parametrize(("runtime", "form", "bits"), cases())
def test_a_file_keeps_the_rules_of_its_runtime(runtime: Runtime, form: Form, bits: int) -> None:
    row, model = RUNTIMES[runtime], made_for(runtime, form, bits)
    stored, kinds = values(model), {item.name: item.data_type for item in model.graph.initializer}
    ops = {node.op_type for node in model.graph.node}
    assert not ops & set(BITS)
    if "DequantizeLinear" in ops:
        assert model.opset_import[0].version >= 19
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            x, scale, zero_point = node.input  # always with a zero point
            assert stored[zero_point].shape == (stored[scale].shape if scale in stored else shape_of(model, scale))
            if row.symmetric:
                assert not np.any(stored[zero_point])
            if row.signed and x in stored:
                assert kinds[x] in (TensorProto.INT8, TensorProto.INT4, TensorProto.INT32)
    if not row.native4:
        assert not {TensorProto.UINT4, TensorProto.INT4} & set(kinds.values())
    if not row.half:
        assert TensorProto.FLOAT16 not in kinds.values()
    if not row.grouped:
        assert "Split" not in ops
    if row.signed and bits == 8:
        assert not ops & {"Gather", "Range", "Sub"}  # codes are read directly
    onnx.checker.check_model(model, full_check=True)
    InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def ops_of(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


PARSED_BY_TENSORRT = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Add", "Flatten", "GlobalAveragePool", "MaxPool"}
PARSED_BY_TENSORRT |= {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape"}


@pytest.mark.parametrize(("form", "bits"), [(Form.QDQ, 8), (Form.QDQ, 4), (Form.INT8, 8)])
def test_files_for_tensorrt_keep_the_rules_of_its_parser(form: Form, bits: int) -> None:
    """https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md

    Only INT8 and INT4, symmetric, weights per channel, INT4 with an even last dimension; no UINT8; float biases.
    """
    text = """net (float[n, 3, 8, 8] x) => (float[n, 10] y) { a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(b, w2, b2) d = Relu(c) e = GlobalAveragePool(d) f = Flatten(e) g = MatMul(f, w3) h = Relu(g)
        i = MatMul(h, w4) j = Relu(i) y = Gemm<transB = 1>(j, w5, b5) }"""
    shapes = {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (32, 64), "w4": (64, 31), "w5": (10, 31)}
    biases = {"b1": laplace(16), "b2": laplace(32), "b5": laplace(10)}
    model = made_for(Runtime.TENSORRT, form, bits, parse(text, **{n: laplace(*s) for n, s in shapes.items()}, **biases))
    stored, kinds = values(model), {item.name: item.data_type for item in model.graph.initializer}
    assert ops_of(model) <= PARSED_BY_TENSORRT
    assert TensorProto.UINT8 not in kinds.values()
    weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    assert len(weights) == 5
    for node in weights:
        kind, shape = kinds[node.input[0]], stored[node.input[0]].shape
        even = bits == 4 and shape[-1] % 2 == 0 and shape not in ((16, 3, 3, 3), (10, 31), (31, 10))
        assert kind == (TensorProto.INT4 if even else TensorProto.INT8)
        assert stored[node.input[1]].size == shape[next((item.i for item in node.attribute if item.name == "axis"), 1)]
        assert (stored[node.input[1]] > 0).all()
    assert all(kinds[name] == TensorProto.FLOAT for name in ("b1", "b2", "b5"))
    if bits == 4:
        assert model.opset_import[0].version >= 21


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("calibration", [None, NOISE])
def test_symmetric_zero_points_are_in_the_middle(bits: int, calibration: Calibration | None) -> None:
    made, _ = quantize_model(small_cnn(), QuantConfig(bits, symmetric=True), calibration=calibration)
    stored, kinds = values(made), {item.name: item.data_type for item in made.graph.initializer}
    zero_points = [node.input[2] for node in made.graph.node if node.op_type == "DequantizeLinear"]
    assert len(zero_points) == 4
    for name in zero_points:
        middle = 8 if kinds[name] == TensorProto.UINT4 else 128
        assert (stored[name].astype(int) == middle).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": Form.FOLDED, "runtime": Runtime.TENSORRT}, "the folded form does not work with TensorRT"),
        ({"form": Form.FOLDED, "runtime": Runtime.MOBILE}, "choose --form qdq or int8"),
        ({"bits": 6, "runtime": Runtime.TENSORRT}, "6-bit codes do not work"),
        ({"bits": 4, "form": Form.INT8, "runtime": Runtime.TENSORRT}, "has codes of 8 bits"),
        ({"biases": BiasType.HALF, "runtime": Runtime.PORTABLE}, "cannot hold float16"),
        ({"runtime": "abacus"}, "runtime 'abacus' is not one of"),
        ({"runtime": 3}, "runtime must be a Runtime"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**settings)  # type: ignore[arg-type]


def test_a_budget_offers_what_the_runtime_reads() -> None:
    model = small_cnn()
    size = quantize_model(model, QuantConfig(8, runtime=Runtime.TENSORRT))[0].ByteSize()
    _, report = quantize_model(model, QuantConfig(Budget(size=size), runtime=Runtime.TENSORRT))
    assert {weight.bits for weight in report.converted} <= {4, 8}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bits"), [(Form.QDQ, 8), (Form.QDQ, 4), (Form.INT8, 8), (Form.INT8, 3)])
def test_ort_files_of_both_styles_load_and_answer_the_same(form: Form, bits: int, tmp_path: Path) -> None:
    """ONNX Runtime's format for mobile; without optimization at 8 bits, with full optimization at others."""
    model = made_for(Runtime.MOBILE, form, bits)
    onnx.save(model, tmp_path / "small.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    exact = np.asarray(load_session(model).run(None, {"x": x})[0])
    level = {"ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL": "disable" if bits == 8 else "all"}
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(tmp_path)]
    command += ["--optimization_style", "Fixed", "Runtime"]
    subprocess.run(command, env={**os.environ, **level}, capture_output=True, check=True)
    files = sorted(tmp_path.glob("*.ort"))
    assert len(files) == 2
    for path in files:
        found = np.asarray(InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])
        assert np.linalg.norm(found - exact) <= 0.02 * np.linalg.norm(exact)  # MatMulNBits rounds its inputs
