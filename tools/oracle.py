"""The oracle: a converted model must return the outputs of the float model with w_hat in place of w."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnxruntime import InferenceSession, SessionOptions

from requant_onnx import BiasType, QuantConfig, QuantReport, Refinement, quantize_model
from requant_onnx.convert.prepare import prepare
from requant_onnx.convert.schedule import Clock
from requant_onnx.convert.steps import quantize
from requant_onnx.files.load import load_model
from requant_onnx.graph.edit import tensor_proto

ROUNDING = 2e-5
"""The tolerance relative to the largest output; only the order of float32 sums differs (test_oracle.py)."""
Feeds = dict[str, np.ndarray]


def run(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    options = SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else MatMul rounds its activations to int8
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(values) for values in session.run(None, feeds)]


def feeds_for(model: onnx.ModelProto, seed: int = 7, free: int = 2) -> Feeds:
    """Random values for every input.  free: size of free dimensions."""
    generator = np.random.default_rng(seed)
    stored = {item.name for item in model.graph.initializer}
    feeds = {}
    for item in model.graph.input:
        if item.name not in stored:
            shape = [d.dim_value if d.dim_value > 0 else free for d in item.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
            feeds[item.name] = np.ones(shape, dtype) if dtype.kind in "bi" else generator.normal(size=shape).astype(dtype)
    return feeds


def with_decoded_weights(source: onnx.ModelProto, config: QuantConfig, converted: set[str]) -> onnx.ModelProto:
    """The normalized model with each converted weight replaced by w_hat from NumPy."""
    prepared = prepare(load_model(source), config, None, (), Clock(), None)
    for result in quantize(prepared, prepared.plan.planned, None, None).results:
        weight = result.planned.weight
        if weight.name in converted:
            stored = onnx.helper.tensor_dtype_to_np_dtype(weight.emit)
            w_hat = result.quantized.dequantize().astype(stored)
            put(prepared.model.graph, weight.name, w_hat)
    return prepared.model


def put(graph: onnx.GraphProto, name: str, values: np.ndarray) -> None:
    for item in graph.initializer:
        if item.name == name:
            item.CopyFrom(tensor_proto(values, name))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            node.attribute[0].t.CopyFrom(tensor_proto(values, name))


def same(found: list[np.ndarray], expected: list[np.ndarray], rounding: float) -> None:
    for one, other in zip(found, expected, strict=True):
        if other.dtype.kind != "f":
            np.testing.assert_array_equal(one, other)
            continue
        largest = float(np.abs(other[np.isfinite(other)]).max(initial=0.0))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=0, atol=rounding * max(largest, 1e-30))


def check(source: onnx.ModelProto, config: QuantConfig, feeds: Feeds | None = None, rounding: float = ROUNDING) -> QuantReport:
    """Convert without refinement, with float biases; compare the result with the oracle, the normalized model with the source."""
    config = replace(config, refinement=Refinement.NONE, biases=BiasType.FLOAT)
    feeds = feeds or feeds_for(source)
    converted, report = quantize_model(source, config)
    onnx.checker.check_model(converted, full_check=True)
    kept = {weight.name for weight in report.converted}
    same(run(converted, feeds), run(with_decoded_weights(source, config, kept), feeds), rounding)
    same(run(prepare(load_model(source), config, None, (), Clock(), None).model, feeds), run(source, feeds), rounding)
    return report
