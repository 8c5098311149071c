"""Custom operators: a library named by the user is loaded into every session (onnxruntime-extensions, from its wheel)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import missing, parse, small_cnn, wheel_of
from onnx import helper

from requant_onnx import ConfigError, quantize_model, use_custom_ops
from requant_onnx.cli.main import main

DOMAIN = "ai.onnx.contrib"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel = wheel_of("onnxruntime_extensions")
    if wheel is None:
        missing("the wheel of onnxruntime_extensions is not in $REQUANT_PACKAGES")
    with zipfile.ZipFile(wheel) as archive:
        name = next(item for item in archive.namelist() if item.endswith((".so", ".pyd", ".dylib")))
        return Path(archive.extract(name, tmp_path_factory.mktemp("library")))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    use_custom_ops()


def with_custom_op(path: Path) -> Path:
    """Write a model with a custom operator between two layers."""
    model = small_cnn()
    relu = model.graph.node[3]
    relu.output[0] = "positive"
    model.graph.node.insert(4, helper.make_node("NegPos", ["positive"], ["negative", "d"], domain=DOMAIN))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, path)
    return path


def test_without_the_library_calibration_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_custom_op(tmp_path / "in.onnx")
    assert main(["convert", str(path), str(tmp_path / "out.onnx"), "--calibrate", "noise"]) == 2
    assert "does not load in ONNX Runtime" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["qdq", "folded", "int8"])
def test_every_command_loads_the_library(form: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = str(with_custom_op(tmp_path / "in.onnx")), str(tmp_path / "out.onnx")
    ops = ["--custom-ops", str(library)]
    convert = ["convert", source, made, "--bits", "4", "--form", form, "--calibrate", "noise", "--calibrate-limit", "16", *ops]
    assert main(convert) == 0, capsys.readouterr().err
    assert main(["validate", source, made, "--data", "noise", "--limit", "8", *ops]) == 0
    assert main(["explain", made, *ops]) == 0
    assert main(["compare", source, "--bits", "8", "--recipes", "max", "--limit", "8", "--no-cache", "--jobs", "2", *ops]) == 0


def test_what_is_no_library_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(ConfigError, match="as a library of custom operators"):
        use_custom_ops(tmp_path / "x.so")
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert main(["explain", str(tmp_path / "in.onnx"), "--custom-ops", str(tmp_path / "missing.so")]) == 2
    assert "as a library of custom operators" in capsys.readouterr().err


def test_a_library_changes_nothing_for_other_models(library: Path) -> None:
    use_custom_ops(library)
    model = parse("net (float[1, 40] x) => (float[a, b] y) { y = MatMul(x, w) }", w=np.ones((40, 30), np.float32))
    assert quantize_model(model)[1].converted
