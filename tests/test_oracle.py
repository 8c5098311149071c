"""ONNX Runtime on the converted file equals ONNX Runtime on the float file with w_hat in its place: rewriting adds no error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import skipped_weights, small_cnn
from onnxruntime import InferenceSession, SessionOptions
from oracle import check as check_rewrite
from oracle import put

from requant_onnx import BiasType, Form, Granularity, QuantConfig, Refinement, Transform, quantize_model
from requant_onnx.convert.plan import plan_conversion
from requant_onnx.files.load import ModelLike, load_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.prepare.transpose_gemm import transpose_gemm
from requant_onnx.graph.weights import find_weights
from requant_onnx.numerics.quantize import quantize_weight

ROUNDING = 1e-5
"""Tolerance relative to the largest output.  The weights are bitwise equal (test_forms.py); only the order of the float32 sums
differs, because Conv after DequantizeLinear runs without the blocked layout: 6e-8 per addition, times sqrt(4608 additions) per
layer, is 4e-6, and normalized layers do not amplify errors; at most 9e-7 was measured on the trained models."""
SPATIAL = {"rapidocr_cls": (48, 192)}
PLAIN = Refinement.NONE  # biases stay; their changes are tested in test_channel_means.py and test_feedback.py
CONFIGS = {
    "default": QuantConfig(refinement=PLAIN),
    "paper4": QuantConfig.paper(4),
    "paper6": QuantConfig.paper(6),
    "paper8": QuantConfig.paper(8),
    "channel4": QuantConfig(bits=4, transform=Transform(0.5), refinement=PLAIN),
    "uniform4": QuantConfig(bits=4, granularity=Granularity.PER_TENSOR, refinement=PLAIN),
    "folded3": QuantConfig(bits=3, transform=Transform(0.5), form=Form.FOLDED, refinement=PLAIN, biases=BiasType.FLOAT),
    "power5": QuantConfig(bits=5, transform=Transform(0.7), refinement=PLAIN),
}


def with_decoded_weights(source: ModelLike, config: QuantConfig, converted: set[str]) -> onnx.ModelProto:
    """The float model with BatchNormalization folded, and w_hat from NumPy in place of each converted weight."""
    model = load_model(source)
    fold_batchnorm(ModelGraph.of(model))
    if config.form is Form.QDQ:
        transpose_gemm(ModelGraph.of(model), {weight.name for weight in find_weights(ModelGraph.of(model)).weights})
    for planned in plan_conversion(find_weights(ModelGraph.of(model)), config).planned:
        if planned.weight.name in converted:
            w_hat = quantize_weight(planned.weight.load(), planned.grid).dequantize()
            put(model.graph, planned.weight.name, w_hat)
    return model


def outputs(model: onnx.ModelProto, size: tuple[int, int]) -> np.ndarray:
    options = SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else MatMul rounds its activations to int8
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    item = session.get_inputs()[0]
    shape = [n if isinstance(n, int) and n > 0 else other for n, other in zip(item.shape, (4, 3, *size), strict=True)]
    scale = 255 if "resnet8" in model.graph.name else 1
    x = np.random.default_rng(7).normal(size=shape).astype(np.float32) * scale
    return np.asarray(session.run(None, {item.name: x})[0])


def check(source: ModelLike, config: QuantConfig, size: tuple[int, int]) -> None:
    converted, report = quantize_model(source, config)
    onnx.checker.check_model(converted, full_check=True)
    expected = outputs(with_decoded_weights(source, config, {weight.name for weight in report.converted}), size)
    np.testing.assert_allclose(outputs(converted, size), expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_small_model(config: QuantConfig) -> None:
    check(small_cnn(), config, (8, 8))


@pytest.mark.parametrize("name", ["default", "paper4", "paper6", "power5", "folded3"])
def test_trained_model(trained: Path, name: str) -> None:
    if trained.stem == "silero_vad":  # all weights are in branches by sampling rate; half of them are of LSTM, and computed there
        for rate, samples in ((16_000, 512), (8_000, 256)):
            sound = np.random.default_rng(7).normal(size=(2, samples)).astype(np.float32)
            feeds: dict[str, np.ndarray] = {
                "input": sound,
                "state": np.zeros((2, 2, 128), np.float32),
                "sr": np.array(rate, np.int64),
            }
            report = check_rewrite(load_model(trained), CONFIGS[name], feeds)
        assert report.coverage > 0.98
        assert not skipped_weights(report)
    else:
        check(trained, CONFIGS[name], SPATIAL.get(trained.stem, (32, 32)))
