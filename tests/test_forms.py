"""ONNX Runtime decodes each form to exactly the weights that NumPy decodes, and folds what the form promises."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, small_cnn
from onnx import helper
from onnxruntime import InferenceSession, SessionOptions

from requant_onnx import Granularity, QuantConfig, Transform, quantize_model
from requant_onnx.choices import LEVELS, Form
from requant_onnx.graph.decode.forms import Coded, Target, bytes_of_each, decode_of, group_weights, required_opset, wide_level_type
from requant_onnx.graph.decode.packing import PACKINGS
from requant_onnx.graph.decode.writer import Constants, Decode
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight

EITHER = (False, True)
FRACTIONS = [bits for bits in LEVELS if bits % 1]


def as_graph(decode: Decode, outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
    nodes = [*decode.shared_nodes.values(), *decode.nodes]
    return helper.make_graph(nodes, "decode", [], outputs, [*decode.initializers, *decode.shared.values()])


def run_decode(decode: Decode, opset: int, emit: int, shape: tuple[int, ...]) -> np.ndarray:
    """Execute the decode alone in ONNX Runtime."""
    output = helper.make_tensor_value_info("w", emit, shape)
    graph = helper.make_graph(
        [*decode.shared_nodes.values(), *decode.nodes], "decode", [], [output], [*decode.initializers, *decode.shared.values()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[0])


def run_group(decode: Decode, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        [*decode.shared_nodes.values(), *decode.nodes], "decode", [], outputs, [*decode.initializers, *decode.shared.values()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return list(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {}))


def decode(q: QuantizedWeight, form: Form, target: Target, emit: int = onnx.TensorProto.FLOAT) -> Decode:
    return decode_of([Coded("w", q, emit, form)], target, Constants(FreshNames(small_cnn())))


def grid(bits: float, exponent: float, axis: int | None, form: Form) -> Grid:
    limits = {Form.INT8: 64 if exponent < 1.0 or bits < 8 else 127}
    return Grid(bits, PowerGrid(exponent), axis, limit=limits.get(form), half_scales=form is not Form.QDQ)


@pytest.mark.parametrize(
    ("bits", "exponent", "axis"),
    [
        *itertools.product(range(2, 9), (1.0, 0.5, 0.75, 1 / 3), (None, 0, 1)),
        *itertools.product(FRACTIONS, (1.0, 0.75), (None, 0)),
    ],
)
@pytest.mark.parametrize("form", Form)
def test_decode_is_exact(bits: float, exponent: float, axis: int | None, form: Form) -> None:
    """Skewed weights have their zero point at an end of the range, slanted ones a separate one per channel; 5 * 7 * 3 of them do
    not fill their last byte, and channels of 8 * 3 in rows or columns fill whole bytes."""
    for shape, skew, uint4 in itertools.product(((5, 7, 3), (8, 5, 4), (8, 7, 3)), (0.0, 1.0, None), EITHER):
        slant = np.linspace(-0.6, 1.0, shape[axis or 0], dtype=np.float32).reshape(
            [-1 if k == (axis or 0) else 1 for k in range(3)]
        )
        w = laplace(*shape) + (slant if skew is None else np.float32(skew))
        q = quantize_weight(w, grid(bits, exponent, axis, form))
        for opset in {required_opset(form, bits, PowerGrid(exponent), uint4), 21}:
            found = run_decode(decode(q, form, Target(opset, uint4)), opset, onnx.TensorProto.FLOAT, w.shape)
            np.testing.assert_array_equal(found, q.dequantize())


@pytest.mark.parametrize("form", Form)
def test_float16_readers_get_float16(form: Form) -> None:
    q = quantize_weight(laplace(4, 6), Grid(4, PowerGrid(0.5), 0))
    found = run_decode(decode(q, form, Target(21), onnx.TensorProto.FLOAT16), 21, onnx.TensorProto.FLOAT16, (4, 6))
    np.testing.assert_array_equal(found, q.dequantize().astype(np.float16))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("uint4", EITHER)
@pytest.mark.parametrize("bits", LEVELS)
def test_payload_is_3_per_cent_above_the_true_size_at_most_and_all_of_it_is_read(bits: float, uint4: bool, form: Form) -> None:
    q = quantize_weight(laplace(64, 64, 3, 3), grid(bits, 0.5, 0, form))
    made = decode(q, form, Target(21, uint4))
    nodes = (*made.shared_nodes.values(), *made.nodes)
    assert {*made.shared, *made.shared_nodes, *(item.name for item in made.initializers)} <= {
        name for node in nodes for name in node.input
    }
    payload = sum(len(item.raw_data) for item in made.initializers)
    assert payload <= 1.03 * PACKINGS[bits].bytes_of(q.codes.size) + 5 * 64  # scales and zero points of 64 channels


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(
    ("bits", "exponent", "axis"),
    [
        *itertools.product((3, 4, 8), (1.0, 0.5, 0.75), (None, 0, 1)),
        *itertools.product((1.6, 2.33, 3.67), (1.0,), (None, 0)),
    ],
)
def test_weights_decoded_together_are_exact(form: Form, bits: float, exponent: float, axis: int | None) -> None:
    """Weights with different numbers of channels; with per-tensor scales, of one shape."""
    channels = (5, 7, 1) if axis is not None else (5, 5, 5)
    shapes = {f"w{k}": (n, 6, 3) if axis != 1 else (6, n, 3) for k, n in enumerate(channels)}
    coded = [
        Coded(name, quantize_weight(laplace(*shape, seed=k), grid(bits, exponent, axis, form)), onnx.TensorProto.FLOAT, form)
        for k, (name, shape) in enumerate(shapes.items())
    ]
    target, constants = Target(19), Constants(FreshNames(small_cnn()))
    groups = group_weights(coded, target)
    for group in groups:
        made = decode_of(group, target, constants)
        for weight, found in zip(group, run_group(made, {w.name: shapes[w.name] for w in group}), strict=True):
            np.testing.assert_array_equal(found, weight.quantized.dequantize())
        assert sum(bytes_of_each(group, made).values()) == made.bytes
    assert sorted(w.name for group in groups for w in group) == sorted(shapes)
    native = form is Form.QDQ and bits == 8 and exponent == 1.0
    assert native or max(len(group) for group in groups) >= 2


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.75])
@pytest.mark.parametrize("axis", [0, 1])
def test_two_bits_reach_further_to_either_side_without_zero_points(exponent: float, axis: int) -> None:
    """Channels with one more level above zero have a negative scale in the folded form."""
    w = laplace(12, 40, 12)
    q = quantize_weight(w, Grid(2, PowerGrid(exponent), axis, half_scales=True))
    assert set(q.zero_point.tolist()) == {1, 2}
    made = decode(q, Form.FOLDED, Target(19))
    assert q.mirrored().scale.min() < 0 < q.scale.min()
    assert not [item.name for item in made.initializers if item.name.endswith(".z")]
    np.testing.assert_array_equal(run_decode(made, 19, onnx.TensorProto.FLOAT, w.shape), q.dequantize())
    np.testing.assert_array_equal(q.mirrored().dequantize(), q.dequantize())


def test_a_group_does_not_outgrow_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant_onnx.graph.decode.forms.GROUP_ELEMENTS", 100)
    q = quantize_weight(laplace(4, 10), Grid(3, PowerGrid(1.0), 0))
    coded = [Coded(f"w{k}", q, onnx.TensorProto.FLOAT, Form.FOLDED) for k in range(5)]
    assert [len(group) for group in group_weights(coded, Target(19))] == [2, 2, 1]


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("exponent", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("limit", [64, 127])
def test_int8_levels_keep_the_limit(bits: float, exponent: float, limit: int) -> None:
    """The table is exact, not rounded, if the integers fit (4 bits with the square root: at most 64)."""
    q = quantize_weight(
        laplace(6, 50) + np.linspace(-1, 1, 6, dtype=np.float32)[:, None], Grid(bits, PowerGrid(exponent), 0, limit=limit)
    )
    levels = q.table.integers[q.table.max_code + q.codes.astype(int) - q.zero_point.astype(int)[:, None]]
    assert abs(levels).max() <= limit
    np.testing.assert_array_equal(q.dequantize(), levels.astype(np.float32) * q.scale[:, None])
    if exponent == 1.0:
        assert (q.table.limit is None) == (LEVELS[bits] // 2 <= limit)
    if exponent == 0.5:
        assert (q.table.limit is None) == ((LEVELS[bits] // 2) ** 2 <= limit)


def test_integer_type_of_levels_beyond_int8() -> None:
    assert [wide_level_type(n, Target(21)) for n in (128, 32767, 65025)] == [np.int16, np.int16, np.int32]
    assert wide_level_type(128, Target(19)) is np.int32


def operators(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that remain after ONNX Runtime has optimized the model with default options."""
    options = SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("transform", ["none", "sqrt", "power:0.75"])
@pytest.mark.parametrize("bits", LEVELS)
def test_onnx_runtime_folds_the_folded_form(bits: float, transform: str, tmp_path: Path) -> None:
    config = QuantConfig(bits, transform=Transform.parse(transform), form=Form.FOLDED)
    assert operators(quantize_model(small_cnn(), config)[0], tmp_path) == operators(small_cnn(), tmp_path)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_qdq_leaves_one_dequantizelinear_a_weight(bits: int, tmp_path: Path) -> None:
    left = operators(quantize_model(small_cnn(), QuantConfig(bits, transform=Transform(0.5)))[0], tmp_path)
    fused = left.count("MatMulNBits")  # from ONNX Runtime 1.26 on
    assert (left.count("DequantizeLinear"), fused) in ((4, 0), (3, 1))
    assert not {"Cast", "Sub", "Mul", "Abs", "BitShift"} & set(left)


def test_decodes_share_their_constants_and_use_standard_operators_only() -> None:
    converted, _ = quantize_model(small_cnn(), QuantConfig(3, Granularity.PER_TENSOR, form=Form.FOLDED))
    assert {node.domain for node in converted.graph.node} == {""}
    names = [item.name for item in converted.graph.initializer if re.fullmatch(r"c\d+", item.name)]
    assert len(names) == len(set(names))
    used = [name for node in converted.graph.node for name in node.input if name in names]
    assert len(used) > len(names)
