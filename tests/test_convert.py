"""The conversion as a whole: what changes and what must not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import laplace, parse, small_cnn
from onnx import numpy_helper
from onnxruntime import InferenceSession
from oracle import run

from requant_onnx import (
    BiasType,
    Calibration,
    EdgeLayers,
    Form,
    Granularity,
    ImageSet,
    Int8Speed,
    QuantConfig,
    RangeMode,
    Refinement,
    Space,
    Transform,
    quantize_model,
)
from requant_onnx.config import METADATA_KEY
from requant_onnx.errors import ConfigError
from requant_onnx.graph.prepare.opset import raise_opset


def nodes_of(model: onnx.ModelProto) -> list[bytes]:
    return [node.SerializeToString() for node in model.graph.node]


@pytest.mark.parametrize("transform", ["sqrt", "none", "power:0.75"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_only_weights_change(bits: int, transform: str) -> None:
    model = small_cnn(opset=21, ir=10)
    converted, report = quantize_model(model, QuantConfig(bits=bits, transform=Transform.parse(transform)))
    onnx.checker.check_model(converted, full_check=True)
    assert [weight.name for weight in report.converted] == ["w1", "w2", "w3", "w4"]
    kept = nodes_of(converted)[-len(model.graph.node) :]  # in their order, after the decodes
    assert kept[:-1] == nodes_of(model)[:-1]
    assert (converted.graph.node[-1].op_type, list(converted.graph.node[-1].attribute)) == ("Gemm", [])  # transB: it was transposed
    assert converted.graph.input == model.graph.input
    assert converted.graph.output == model.graph.output
    assert "b2" in [item.name for item in converted.graph.initializer]


def test_the_model_given_never_changes() -> None:
    model = small_cnn(opset=13)
    before = model.SerializeToString()
    quantize_model(model, QuantConfig(bits=4))
    assert model.SerializeToString() == before


def test_metadata_survives_and_gains_one_entry() -> None:
    model = small_cnn(opset=13)
    model.metadata_props.add(key="author", value="someone")
    model.doc_string, model.graph.doc_string, model.producer_name = "a", "b", "c"
    converted, _ = quantize_model(model, QuantConfig(bits=4))
    entries = {entry.key: entry.value for entry in converted.metadata_props}
    assert entries.keys() == {"author", METADATA_KEY}
    assert json.loads(entries[METADATA_KEY])["bits"] == 4
    assert (converted.doc_string, converted.graph.doc_string, converted.producer_name) == ("a", "b", "c")


def test_same_input_same_bytes_whatever_the_threads() -> None:
    results = [quantize_model(small_cnn(), QuantConfig(bits=4), threads=threads)[0] for threads in (1, 3, 3)]
    assert len({model.SerializeToString(deterministic=True) for model in results}) == 1


def test_less_than_one_thread_is_refused() -> None:
    with pytest.raises(ConfigError, match="threads must be 1 or more"):
        quantize_model(small_cnn(), threads=0)


def test_names_that_the_model_uses_already_are_avoided() -> None:
    text = """net (float[n, 4, 6, 6] x) => (float[n, 50, h, v] y) {
        w_codes = Relu(x) w_scale = Conv(w_codes, w) y = Relu(w_scale) }"""
    converted, report = quantize_model(parse(text, w=laplace(50, 4, 3, 3)))
    onnx.checker.check_model(converted, full_check=True)
    assert len(report.converted) == 1


def bits_and_transforms(edge_layers: EdgeLayers) -> list[tuple[str, float, str]]:
    config = QuantConfig(bits=4, transform=Transform(0.5), edge_layers=edge_layers)
    return [(weight.name, weight.bits, weight.transform) for weight in quantize_model(small_cnn(), config)[1].converted]


def test_edge_layers() -> None:
    middle = [("w2", 4, "sqrt"), ("w3", 4, "sqrt")]
    assert bits_and_transforms(EdgeLayers.PLAIN) == [("w1", 4, "none"), *middle, ("w4", 4, "none")]
    assert bits_and_transforms(EdgeLayers.EIGHT_BIT) == [("w1", 8, "none"), *middle, ("w4", 8, "none")]
    assert bits_and_transforms(EdgeLayers.FLOAT) == middle


def test_the_paper_recipe_is_the_paper() -> None:
    config = QuantConfig.paper(6).to_dict()
    assert config == {
        "bits": 6,
        "granularity": "per-tensor",
        "transform": "sqrt",
        "range_mode": "search",
        "edge_layers": "plain",
        "objective": "weight",
        "rounding": "transformed",
        "form": "qdq",
        "runtime": "ort",
        "symmetric": False,
        "refinement": "none",
        "biases": "float32",
        "keep_inputs": False,
        "optimize_for": "file",
    }


def test_max_range_takes_alpha_1_and_search_is_never_worse() -> None:
    reports = [quantize_model(small_cnn(), QuantConfig(bits=3, range_mode=mode))[1].converted for mode in RangeMode]
    for searched, largest in zip(*reports, strict=True):
        assert largest.alpha == (1.0, 1.0)
        assert searched.mse <= largest.mse


def test_per_channel_scales_lie_on_the_channel_axis() -> None:
    _, report = quantize_model(small_cnn(), QuantConfig(granularity=Granularity.PER_CHANNEL))
    assert [weight.axis for weight in report.converted] == [0, 0, 0, 1]  # the Gemm is transposed


def test_a_weight_that_would_not_shrink_is_skipped() -> None:
    converted, report = quantize_model(parse("net (float[n, 2] x) => (float[n, 1] y) { y = MatMul(x, w) }", w=laplace(2, 1)))
    assert "would not get smaller" in report.skipped[0].reason
    assert [node.op_type for node in converted.graph.node] == ["MatMul"]


def test_levels_beyond_float_are_skipped() -> None:
    w = np.full((40, 40), 3.4e38, np.float32)
    w[0] = -3.3e38
    config = QuantConfig(range_mode=RangeMode.MAX, bits=2, edge_layers=EdgeLayers.PLAIN)
    _, report = quantize_model(parse("net (float[n, 40] x) => (float[n, 40] y) { y = MatMul(x, w) }", w=w), config)
    assert [item.reason for item in report.skipped] == ["has levels beyond the largest float"]


@pytest.mark.parametrize("opset", [8, 9, 11, 13, 17])
def test_the_opset_is_raised_when_needed(opset: int) -> None:
    converted, report = quantize_model(small_cnn(opset=opset, ir=4), QuantConfig(bits=4))
    assert report.opset == (opset, 21)
    assert converted.ir_version >= 10
    onnx.checker.check_model(converted, full_check=True)


def test_opset_conversion_keeps_nodes_where_nothing_changed() -> None:
    model = small_cnn(opset=17)
    before = nodes_of(model)
    assert nodes_of(raise_opset(model, 21)) == before


def test_opset_conversion_adapts_nodes_where_something_changed() -> None:
    model = parse("net (float[n, 2, 3] x) => (float[n, 2, 3] y) { y = Softmax(x) }", opset=11)
    model.metadata_props.add(key="k", value="v")
    raised = raise_opset(model, 21)
    assert len(raised.graph.node) > 1  # Softmax flattened to 2-D before opset 13
    assert [entry.key for entry in raised.metadata_props] == ["k"]


def test_custom_domains_are_kept_when_the_opset_is_raised() -> None:
    model = parse("net (float[n, 40] x) => (float[n, 40] y) { a = MatMul(x, w) y = Relu(a) }", opset=13, w=laplace(40, 40))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Special", "my.domain"
    model.opset_import.add(domain="my.domain", version=3)
    converted, report = quantize_model(model, QuantConfig(bits=4))
    assert len(report.converted) == 1
    assert {entry.domain: entry.version for entry in converted.opset_import} == {"": 21, "my.domain": 3}
    assert converted.graph.node[-1] == model.graph.node[1]


def outputs(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    return np.asarray(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0])


@pytest.mark.parametrize(("opset", "op"), [(10, "Resize"), (9, "Upsample")])
def test_scaling_before_opset_11_stays_without_the_half_pixel_shift(opset: int, op: str) -> None:
    """With onnx.version_converter alone, the SQNR is only 7 dB here."""
    text = "net (float[1, 3, 9, 9] x) => (float[1, 16, h, v] y) { a = Conv(x, w) y = " + op + '<mode = "linear">(a, s) }'
    model = parse(text, opset=opset, ir=5, w=laplace(16, 3, 3, 3), s=np.array([1, 1, 2, 2], np.float32))
    x = np.random.default_rng(0).normal(size=(1, 3, 9, 9)).astype(np.float32)
    expected, found = (outputs(each, x=x) for each in (model, quantize_model(model)[0]))
    assert ((expected - found) ** 2).sum() < 1e-3 * (expected**2).sum()


def test_a_float16_weight_whose_type_is_noted_in_value_info() -> None:
    text = "net (float[n, 40] x) => (float[n, 40] y) { f = Cast<to = 1>(w) y = MatMul(x, f) }"
    model = parse(text, w=laplace(40, 40).astype(np.float16))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT16, [40, 40]))
    onnx.checker.check_model(quantize_model(model)[0], full_check=True)


def test_functions_move_to_the_new_opset_with_the_model() -> None:
    nodes, opsets = [onnx.helper.make_node("Relu", ["x"], ["y"])], [onnx.helper.make_opsetid("", 13)]
    model = parse("net (float[n, 40] x) => (float[n, 40] y) { a = MatMul(x, w) }", opset=13, w=laplace(40, 40))
    model.functions.append(onnx.helper.make_function("my", "Block", ["x"], ["y"], nodes, opsets))
    model.graph.node.append(onnx.helper.make_node("Block", ["a"], ["y"], domain="my"))
    model.opset_import.add(domain="my", version=1)
    converted, report = quantize_model(model, QuantConfig(bits=4))
    onnx.checker.check_model(converted, full_check=True)
    assert report.opset == (13, 21)
    assert converted.functions[0].opset_import[0].version == 21


@pytest.mark.parametrize(("count", "converted"), [(2, False), (400, True)])
def test_sparse_weights_are_converted_where_that_is_smaller(count: int, converted: bool) -> None:
    model = parse("net (float[n, 40] x) => (float[n, 40] y) { y = MatMul(x, w) }")
    values = onnx.numpy_helper.from_array(laplace(count), "w")
    indices = onnx.numpy_helper.from_array(np.arange(count) * 3, "w_indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [40, 40]))
    made, report = quantize_model(model)
    assert bool(report.converted) is converted
    assert sum(item.bytes for item in report.skipped) == (0 if converted else 4 * count)
    feeds = {"x": np.ones((2, 40), np.float32)}
    np.testing.assert_allclose(run(made, feeds)[0], run(model, feeds)[0], atol=0.02)


@pytest.mark.parametrize("refinement", [Refinement.FEEDBACK, Refinement.DESCENT])
def test_rounding_in_transformed_space_is_for_nearest_levels(refinement: Refinement) -> None:
    """Refinement chooses levels by the output error, so the setting would have no effect."""
    config = QuantConfig(4, transform=Transform(0.5), rounding=Space.TRANSFORMED, refinement=refinement)
    with pytest.raises(ConfigError, match=f"refinement '{refinement}' chooses levels by the output error; drop --rounding"):
        quantize_model(small_cnn(), config, calibration=Calibration(count=8))
    assert quantize_model(small_cnn(), config)[1].converted


@pytest.mark.slow
def test_a_conversion_imports_the_graph_once_for_each_of_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As given, with BatchNormalization folded, and prepared; again for refinement, and for the check in ONNX Runtime."""
    imports: list[int] = []
    original = gs.import_onnx

    def counted(model: onnx.ModelProto) -> Any:
        imports.append(1)
        return original(model)

    monkeypatch.setattr("requant_onnx.graph.constants.gs.import_onnx", counted)
    for config, calibration, expected in (
        (QuantConfig(8), None, 3),
        (QuantConfig(4, form=Form.FOLDED), None, 4),
        (QuantConfig(4, form=Form.FOLDED), Calibration(count=8), 5),
        (QuantConfig(4, form=Form.INT8, int8_speed=Int8Speed.ALL), Calibration(count=8), 5),
    ):
        imports.clear()
        quantize_model(small_cnn(), config, calibration=calibration)
        assert len(imports) == expected


def test_a_large_classifier_gets_the_bits_asked_for() -> None:
    """At 8 bits it would dominate the file size, but hardly affect the outputs; a small one costs nothing."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, classes] y) {
        a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) d = Relu(c) e = Conv(d, w3)
        f = GlobalAveragePool(e) g = Flatten(f) y = MatMul(g, w4) }"""
    convolutions = {"w1": laplace(64, 3, 3, 3), "w2": laplace(64, 64, 3, 3, seed=1), "w3": laplace(128, 64, 3, 3, seed=2)}
    for classes, bits in ((1000, 4), (10, 8)):
        model = parse(text.replace("classes", str(classes)), **convolutions, w4=laplace(128, classes, seed=3))
        found = {weight.name: weight.bits for weight in quantize_model(model, QuantConfig(4))[1].converted}
        assert found == {"w1": 8, "w2": 4, "w3": 4, "w4": bits}


def test_the_bias_of_a_weight_that_stays_float_does_not_change() -> None:
    """The small matrix is refined with the others, but would not get smaller."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 400] y)
        { a = Conv(x, w1) b = Relu(a) c = GlobalAveragePool(b) d = Flatten(c)
          e = MatMul(d, w2) f = Gemm(e, w3, b3) y = MatMul(f, w4) }"""
    weights = {"w1": laplace(32, 3, 3, 3), "w2": laplace(32, 2), "w3": laplace(2, 4), "w4": laplace(4, 400)}
    model = parse(text, **weights, b3=np.zeros(4, np.float32))
    images = ImageSet(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8), None)
    for calibration in (None, Calibration(images, count=32)):
        config = QuantConfig(2, form=Form.FOLDED, biases=BiasType.FLOAT)
        made, report = quantize_model(model, config, calibration=calibration)
        assert "w3" in {weight.name for weight in report.skipped}
        bias = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}["b3"]
        assert (bias == 0).all()
