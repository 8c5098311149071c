"""The data of the tests: CIFAR in $CIFAR_DIR (or the cache), trained models in $REQUANT_MODELS.

Tests whose data is missing are skipped, visibly; with REQUIRE_DATA=1 they fail.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest
from cifar import find_cifar
from threadpoolctl import threadpool_limits

from requant_onnx import ImageSet, Normalization, QuantReport, ValidationReport, load_images, quantize_model, validate
from requant_onnx.cli.options import parser_of
from requant_onnx.cli.parser import parse as parse_options
from requant_onnx.convert.report import InspectReport
from requant_onnx.errors import RequantError
from requant_onnx.graph.float_constants import VECTOR
from requant_onnx.graph.weights import SkippedWeight, View

ROOT = Path(__file__).parents[1]
OWN_MODEL = ROOT / "models" / "resnet20_cifar10.onnx"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of several workers of pytest-xdist
OWN_NORMALIZATION = Normalization((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))
MODEL_NAMES = (
    "resnet20_cifar10",
    "resnet20_cifar10_opset13_bn",
    pytest.param("resnet56_cifar10", marks=pytest.mark.slow),
    "googlenet_cifar10",
    "preact_resnet20_cifar10",
    "resnet8_cifar10",
    pytest.param("resnet18_cifar10_fp16_weights", marks=pytest.mark.slow),
    pytest.param("rapidocr_cls", marks=pytest.mark.slow),
    pytest.param("silero_vad", marks=pytest.mark.slow),
)


def parse(text: str, *, opset: Any = 18, ir: Any = 8, **weights: Any) -> onnx.ModelProto:
    """A model from the text of its graph (onnx.parser) and its initializers by name."""
    model: onnx.ModelProto = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    return model


def parsed(command: str) -> argparse.Namespace:
    """A documented command line, as requant parses it; raises SystemExit if it is invalid."""
    words = shlex.split(command, comments=True)
    assert words[0] == "requant"
    return parse_options(parser_of(**dict.fromkeys(inspect.signature(parser_of).parameters, print)), words[1:])


def laplace(*shape: int, seed: int = 0) -> np.ndarray:
    """Random weights with the heavy tails of trained ones."""
    return np.random.default_rng(seed).laplace(scale=0.1, size=shape).astype(np.float32)


def skipped_weights(report: QuantReport | InspectReport | View) -> list[SkippedWeight]:
    """The skipped weights, without vectors, which many conversions do not change."""
    return [item for item in report.skipped if item.reason != VECTOR]


def small_cnn(**options: int) -> onnx.ModelProto:
    """A model of Conv, Conv, Conv, Gemm: first, two middle and last layer."""
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that quick ones can fill the time while another worker finishes its last slow test."""
    if IS_WORKER:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def missing(what: str) -> NoReturn:
    if os.environ.get("REQUIRE_DATA"):
        pytest.fail(f"{what}, and REQUIRE_DATA is set")
    pytest.skip(what)


def trained_model(name: str) -> Path:
    """A trained model of $REQUANT_MODELS; skips the test if it is missing."""
    folder = os.environ.get("REQUANT_MODELS")
    path = Path(folder or "") / f"{name}.onnx"
    if not folder or not path.is_file():
        missing(f"{name}.onnx is not in $REQUANT_MODELS")
    return path


def wheel_of(package: str) -> Path | None:
    """The wheel of a package in $REQUANT_PACKAGES."""
    folder = os.environ.get("REQUANT_PACKAGES")
    return next(iter(sorted(Path(folder).glob(f"{package}-*.whl"))), None) if folder else None


@pytest.fixture(scope="session", autouse=True)
def one_thread_each() -> Iterator[None]:
    """In workers of pytest-xdist, let ONNX Runtime and BLAS use one thread unless a test sets another number.

    By default they start one per core in every worker, and those of ONNX Runtime spin while they wait: two workers on two cores
    then mostly block each other.  Without pytest-xdist nothing changes.
    """
    if not IS_WORKER:
        yield
        return
    start = onnxruntime.InferenceSession.__init__

    def start_with_one(
        session: onnxruntime.InferenceSession,
        model: str | bytes | os.PathLike[str],
        sess_options: onnxruntime.SessionOptions | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        if options.intra_op_num_threads == 0:  # not set
            options.intra_op_num_threads = 1
        start(session, model, options, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, threadpool_limits(limits=1, user_api="blas"):
        patch.setattr(onnxruntime.InferenceSession, "__init__", start_with_one)
        for library in ("OMP", "OPENBLAS", "MKL"):  # for the processes that tests start
            patch.setenv(f"{library}_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_error_in_an_error() -> Iterator[None]:
    """Fail where one of our errors is caught as the ValueError or OSError that it also is, and put into another one of ours."""

    def check(self: RequantError, *args: object) -> None:
        inner = sys.exc_info()[1]
        text = str(args[0]) if args else ""
        assert not isinstance(inner, RequantError) or f"({inner})" not in text or "the converted model (" in text, text
        Exception.__init__(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequantError, "__init__", check)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each worker its own directory for temporary files, including those of the processes that tests start.

    Some tests count the files that conversions leave there, and a conversion deletes files that seem left by a killed one.
    """
    if not IS_WORKER:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)  # makes it read $TMPDIR again
        yield


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The directory of CIFAR-10's .bin files; skips the test if it is missing."""
    folder = find_cifar("cifar10")
    if folder is None:
        missing("CIFAR-10 is neither in $CIFAR_DIR nor in the cache")
    return folder


@pytest.fixture(scope="session")
def own_report(cifar10: Path) -> ValidationReport:
    """The comparison of our model with itself in 8 bits, on all test images.  It is slow, so its tests share one xdist_group."""
    converted, _ = quantize_model(OWN_MODEL)
    return validate(OWN_MODEL, converted, load_images(f"cifar10:{cifar10}"), OWN_NORMALIZATION)


def top1(model: Path | onnx.ModelProto, images: ImageSet, normalization: Normalization) -> float:
    """The accuracy of a single model with ONNX Runtime's default options, as in validate(), which runs two."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert images.y is not None
    right = 0
    for start in range(0, len(images), 250):
        x = normalization.apply(images.x[start : start + 250])
        right += int((np.asarray(session.run(None, {name: x})[0]).argmax(1) == images.y[start : start + 250]).sum())
    return right / len(images)


@pytest.fixture(scope="session", params=MODEL_NAMES)
def trained(request: pytest.FixtureRequest) -> Path:
    """Every trained model of $REQUANT_MODELS in turn."""
    return trained_model(request.param)
