"""ONNX Runtime decodes each form to exactly the weights that NumPy decodes, and folds what it promises to fold."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import laplace, small_cnn
from onnx import helper
from onnxruntime import InferenceSession, SessionOptions

from requant_onnx import QuantConfig, Transform, quantize_model
from requant_onnx.config import Form, Version
from requant_onnx.graph.decode import Constants, Decode
from requant_onnx.graph.forms import Target, decode_of, level_type, required_opset
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight

OLD, NEW = Version(1, 20), Version(1, 25)
NARROW = tuple(int(part) for part in onnxruntime.__version__.split(".")[:3]) >= (1, 24, 4)
EITHER = (False, True) if NARROW else (False,)


def run_decode(decode: Decode, opset: int, emit: int, shape: tuple[int, ...]) -> np.ndarray:
    """Execute the decode alone in ONNX Runtime."""
    output = helper.make_tensor_value_info("w", emit, shape)
    graph = helper.make_graph(decode.nodes, "decode", [], [output], [*decode.initializers, *decode.shared.values()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[0])


def decode(q: QuantizedWeight, target: Target, emit: int = onnx.TensorProto.FLOAT) -> Decode:
    return decode_of("w", q, emit, target, Constants(FreshNames(small_cnn())))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.75, 1 / 3])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("form", Form)
def test_decode_is_exact(bits: int, exponent: float, axis: int | None, form: Form) -> None:
    """Skewed weights have their zero point at an end of the range; 5 * 7 * 3 of them do not fill their last byte."""
    for skew, narrow in itertools.product((0.0, 1.0), EITHER):
        w = laplace(5, 7, 3) + np.float32(skew)
        q = quantize_weight(w, Grid(bits, exponent, axis))
        for opset in {required_opset(form, bits, exponent, narrow), 21}:
            found = run_decode(decode(q, Target(form, opset, narrow)), opset, onnx.TensorProto.FLOAT, w.shape)
            np.testing.assert_array_equal(found, q.dequantize())


@pytest.mark.parametrize("form", Form)
def test_float16_readers_get_float16(form: Form) -> None:
    q = quantize_weight(laplace(4, 6), Grid(4, 0.5, 0))
    found = run_decode(decode(q, Target(form, 21, NARROW), onnx.TensorProto.FLOAT16), 21, onnx.TensorProto.FLOAT16, (4, 6))
    np.testing.assert_array_equal(found, q.dequantize().astype(np.float16))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_payload_is_3_per_cent_above_the_true_size_at_most(bits: int, narrow: bool, form: Form) -> None:
    q = quantize_weight(laplace(64, 64, 3, 3), Grid(bits, 0.5, 0))
    made = decode(q, Target(form, 21, narrow))
    payload = sum(len(item.raw_data) for item in made.initializers)
    assert payload <= 1.03 * q.codes.size * bits / 8 + 5 * 64  # scales and zero points of 64 channels


def test_integer_type_of_the_levels() -> None:
    new, old = Target(Form.QDQ, 21, True), Target(Form.QDQ, 21, False)
    assert [level_type(n, new) for n in (121, 128, 32767, 65025)] == [np.int8, np.int16, np.int16, np.int32]
    assert level_type(121, old) is level_type(121, Target(Form.QDQ, 18, True)) is np.int32


def operators(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that are left after ONNX Runtime has optimised the model with default options."""
    options = SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize("transform", ["none", "sqrt", "power:0.75"])
@pytest.mark.parametrize("min_ort", [OLD, NEW] if NARROW else [OLD])
@pytest.mark.parametrize("bits", range(2, 9))
def test_onnx_runtime_folds_the_folded_form(bits: int, min_ort: Version, transform: str, tmp_path: Path) -> None:
    config = QuantConfig(bits, transform=Transform.parse(transform), form=Form.FOLDED, min_ort=min_ort)
    assert operators(quantize_model(small_cnn(), config)[0], tmp_path) == operators(small_cnn(), tmp_path)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_qdq_leaves_one_dequantizelinear_a_weight(bits: int, tmp_path: Path) -> None:
    left = operators(quantize_model(small_cnn(), QuantConfig(bits, transform=Transform(0.5)))[0], tmp_path)
    assert left.count("DequantizeLinear") == 4
    assert not {"Cast", "Sub", "Mul", "Abs", "BitShift"} & set(left)


def test_decodes_share_their_constants_and_use_standard_operators_only() -> None:
    converted, _ = quantize_model(small_cnn(), QuantConfig(3, form=Form.FOLDED))
    assert {node.domain for node in converted.graph.node} == {""}
    names = [item.name for item in converted.graph.initializer if item.name.startswith("decode.c")]
    assert len(names) == len(set(names))
    used = [name for node in converted.graph.node for name in node.input if name in names]
    assert len(used) > len(names)
