"""Unusual models that run in ONNX Runtime are converted; hostile ones are rejected (test_hostile.py)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import small_cnn
from onnxruntime import InferenceSession

from requant_onnx import Calibration, Form, Int8Speed, ModelError, QuantConfig, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.files.load import MAX_OPSET

WAYS = [
    (Form.QDQ, None),
    (Form.QDQ, Calibration(count=8)),
    (Form.FOLDED, None),
    (Form.FOLDED, Calibration(count=8)),
    (Form.INT8, Calibration(count=8)),
]
EVERY_WAY = pytest.mark.parametrize(
    ("form", "calibration"), WAYS, ids=[f"{form}{'' if c is None else ' calibrated'}" for form, c in WAYS]
)
links = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


@EVERY_WAY
@pytest.mark.parametrize("field", ["shape", "type"])
@pytest.mark.parametrize("opset", [9, 18])
def test_outputs_without_type_or_shape(field: str, opset: int, form: Form, calibration: Calibration | None) -> None:
    model = small_cnn(opset=opset)
    output = model.graph.output[0]
    (output.type.tensor_type if field == "shape" else output).ClearField(field)
    made, report = quantize_model(model, QuantConfig(4, form=form, int8_speed=Int8Speed.ALL), calibration=calibration)
    assert len(report.converted) == 4
    assert "is required but missing" in report.complaint
    assert any(note.startswith("the onnx checker rejects the model") for note in report.notes)
    InferenceSession(made.SerializeToString()).run(None, {"x": np.ones((1, 3, 8, 8), np.float32)})


def test_the_command_writes_what_only_the_checker_dislikes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_cnn()
    model.graph.output[0].ClearField("type")
    onnx.save(model, tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert "note: the onnx checker" in capsys.readouterr().out
    InferenceSession(tmp_path / "out.onnx")


def test_what_neither_takes_is_refused() -> None:
    model = small_cnn()
    model.graph.node[3].input[0] = "nowhere"
    with pytest.raises(ModelError, match="is not valid ONNX"):
        quantize_model(model)


def external(path: Path) -> None:
    onnx.save(small_cnn(), path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=100)


@links
def test_a_cache_of_links_into_a_folder_of_blobs(tmp_path: Path) -> None:
    """The layout of huggingface_hub."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    external(tmp_path / "model.onnx")
    for name, blob in (("model.onnx", "aa"), ("model.onnx_data", "bb")):
        (tmp_path / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    _, report = quantize_model(snapshot / "model.onnx", QuantConfig(4))
    assert len(report.converted) == 4


@links
def test_a_link_to_anywhere_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    external(tmp_path / "models" / "model.onnx")
    (tmp_path / "models" / "model.onnx_data").rename(tmp_path / "secret")
    (tmp_path / "models" / "model.onnx_data").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="links to a place outside the directory of the model"):
        quantize_model(tmp_path / "models" / "model.onnx")


@pytest.mark.parametrize("inside", [True, False])
def test_absolute_paths_of_data_files(tmp_path: Path, inside: bool) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "model.onnx"
    external(path)
    data = path.with_name("model.onnx_data") if inside else path.with_name("model.onnx_data").rename(tmp_path / "data")
    model = onnx.load(path, load_external_data=False)
    for entry in (entry for item in model.graph.initializer for entry in item.external_data if entry.key == "location"):
        entry.value = str(data.resolve())
    onnx.save(model, path)
    if inside:
        assert len(quantize_model(path)[1].converted) == 4
        return
    with pytest.raises(ModelError, match="outside the directory of the model"):
        quantize_model(path)


def test_the_newest_opset() -> None:
    made, report = quantize_model(small_cnn(opset=MAX_OPSET), QuantConfig(4, form=Form.FOLDED))
    assert len(report.converted) == 4
    onnx.checker.check_model(made)


@EVERY_WAY
def test_external_data_that_stay_in_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form, calibration: Calibration | None
) -> None:
    """As for more than FETCHED_BYTES, with one constant that is not converted."""
    monkeypatch.setattr("requant_onnx.files.load.FETCHED_BYTES", 0)
    model = small_cnn()
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(onnx.helper.make_node("Pow", ["z", "p"], ["y"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 10), 2, np.float32), "p"))
    onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    made, report = quantize_model(
        tmp_path / "in.onnx", QuantConfig(4, form=form, int8_speed=Int8Speed.ALL), calibration=calibration
    )
    assert len(report.converted) == 4
    InferenceSession(made.SerializeToString()).run(None, {"x": np.ones((1, 3, 8, 8), np.float32)})
