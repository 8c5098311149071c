"""Where the tests find data: CIFAR in $CIFAR_DIR (or the cache), trained models in $REQUANT_MODELS.

Missing data skips the tests that need it, visibly; with REQUIRE_DATA=1 it fails them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from cifar import find_cifar

ROOT = Path(__file__).parents[1]
OWN_MODEL = ROOT / "models" / "resnet20_cifar10.onnx"
MODEL_NAMES = (
    "resnet20_cifar10",
    "resnet20_cifar10_opset13_bn",
    "resnet56_cifar10",
    "googlenet_cifar10",
    "preact_resnet20_cifar10",
    "resnet8_cifar10",
    "resnet18_cifar10_fp16_weights",
    "rapidocr_cls",
    "silero_vad",
)


def parse(text: str, *, opset: Any = 18, ir: Any = 8, **weights: Any) -> onnx.ModelProto:
    """A model from the text of its graph (onnx.parser) and its initializers by name."""
    model: onnx.ModelProto = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    return model


def laplace(*shape: int, seed: int = 0) -> np.ndarray:
    """Random weights with the heavy tails of trained ones."""
    return np.random.default_rng(seed).laplace(scale=0.1, size=shape).astype(np.float32)


def small_cnn(**options: int) -> onnx.ModelProto:
    """Conv, Conv, Conv, Gemm: first, two middle and last layer."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 10] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(b, w2, b2)
        d = Relu(c)
        e = Conv<pads = [1, 1, 1, 1]>(d, w3)
        f = Relu(e)
        g = GlobalAveragePool(f)
        h = Flatten(g)
        y = Gemm<transB = 1>(h, w4, b4)
    }"""
    weights = {
        "w1": laplace(16, 3, 3, 3),
        "w2": laplace(16, 16, 3, 3, seed=1),
        "b2": laplace(16, seed=2),
        "w3": laplace(32, 16, 3, 3, seed=3),
        "w4": laplace(10, 32, seed=4),
        "b4": laplace(10, seed=5),
    }
    return parse(text, **weights, **options)


def missing(what: str) -> NoReturn:
    if os.environ.get("REQUIRE_DATA"):
        pytest.fail(f"{what}, and REQUIRE_DATA is set")
    pytest.skip(what)


def trained_model(name: str) -> Path:
    """A trained model of $REQUANT_MODELS; skips where it is missing."""
    folder = os.environ.get("REQUANT_MODELS")
    path = Path(folder or "") / f"{name}.onnx"
    if not folder or not path.is_file():
        missing(f"{name}.onnx is not in $REQUANT_MODELS")
    return path


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of CIFAR-10's .bin files; skips where it is missing."""
    folder = find_cifar("cifar10")
    if folder is None:
        missing("CIFAR-10 is neither in $CIFAR_DIR nor in the cache")
    return folder


@pytest.fixture(scope="session", params=MODEL_NAMES)
def trained(request: pytest.FixtureRequest) -> Path:
    """Every trained model of $REQUANT_MODELS in turn."""
    return trained_model(request.param)
