"""ONNX Runtime decodes each form to exactly the weights that NumPy decodes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, small_cnn
from onnx import helper
from onnxruntime import InferenceSession

from requant_onnx.graph.forms import Decode, DecodeWriter, decode_of, level_type, required_opset
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.quantize import Grid, quantize_weight


def run_decode(decode: Decode, opset: int, emit: int, shape: tuple[int, ...]) -> np.ndarray:
    """Execute the decode alone in ONNX Runtime."""
    output = helper.make_tensor_value_info("w", emit, shape)
    shared = [decode.shared] if decode.shared else []
    graph = helper.make_graph(decode.nodes, "decode", [], [output], [*decode.initializers, *shared])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[0])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.75, 1 / 3])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_decode_is_exact(bits: int, exponent: float, axis: int | None, skew: float) -> None:
    w = laplace(6, 5, 3, 3) + np.float32(skew)  # skewed weights have their zero point at an end of the range
    q = quantize_weight(w, Grid(bits, exponent, axis))
    for opset in {required_opset(bits), 21}:
        decode = decode_of("w", q, onnx.TensorProto.FLOAT, DecodeWriter(opset, FreshNames(small_cnn())))
        np.testing.assert_array_equal(run_decode(decode, opset, onnx.TensorProto.FLOAT, w.shape), q.dequantize())


def test_float16_readers_get_float16() -> None:
    q = quantize_weight(laplace(4, 6), Grid(4, 0.5, 0))
    decode = decode_of("w", q, onnx.TensorProto.FLOAT16, DecodeWriter(21, FreshNames(small_cnn())))
    np.testing.assert_array_equal(run_decode(decode, 21, onnx.TensorProto.FLOAT16, (4, 6)), q.dequantize().astype(np.float16))


def test_codes_take_their_nominal_bytes() -> None:
    for bits, expected in ((4, 500), (8, 1000)):
        q = quantize_weight(laplace(10, 100), Grid(bits, 1.0, None))
        decode = decode_of("w", q, onnx.TensorProto.FLOAT, DecodeWriter(21, FreshNames(small_cnn())))
        assert len(decode.initializers[0].raw_data) == expected


def test_integer_type_of_the_levels() -> None:
    assert [level_type(n, 21) for n in (121, 128, 32767, 65025)] == [np.int8, np.int16, np.int16, np.int32]
    assert level_type(121, 13) is np.int32  # Sub and Mul take 8 and 16 bits from opset 14 on, 4-bit codes need 21 anyway


def test_one_level_table_serves_all_weights_of_a_grid() -> None:
    writer = DecodeWriter(13, FreshNames(small_cnn()))
    decodes = [decode_of(name, quantize_weight(laplace(4, 6), Grid(6, 0.75, 0)), 1, writer) for name in ("w1", "w2")]
    assert decodes[0].shared is decodes[1].shared is not None
