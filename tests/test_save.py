"""The output appears complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import small_cnn
from onnxruntime import InferenceSession

from requant_onnx import (
    ImageSet,
    ModelError,
    OutputError,
    explain,
    load_session,
    quantize_model,
    save_model,
    validate,
)
from requant_onnx.files.atomic import write_atomically
from requant_onnx.files.load import data_files, load_model
from requant_onnx.files.planes import save_progressive


def test_saved_models_load_and_carry_ordinary_permissions(tmp_path: Path) -> None:
    size = save_model(small_cnn(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size == size
    assert onnx.load(tmp_path / "m.onnx") == small_cnn()
    (tmp_path / "other").touch()
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(_: int) -> None:
        raise failure

    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_atomically(tmp_path / "m.onnx", b"new")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("where", ["{}.onnx", "{}/model.onnx"])
@pytest.mark.parametrize("external", [False, True])
def test_a_path_that_is_no_unicode_text_is_read(tmp_path: Path, where: str, external: bool) -> None:
    """Names of any bytes occur in archives of old systems; neither ONNX Runtime nor a model can contain them."""
    path = tmp_path / where.format(os.fsdecode(b"caf\xe9"))
    try:
        path.parent.mkdir(exist_ok=True)
        onnx.save(small_cnn(), tmp_path / "a.onnx", save_as_external_data=external, location="data", size_threshold=0)
        (tmp_path / "a.onnx").rename(path)
        if external:
            (tmp_path / "data").rename(path.parent / "data")
    except (OSError, UnicodeEncodeError):
        pytest.skip("the file system allows only names in Unicode")
    assert len(explain(path).weights) == 4
    made, report = quantize_model(path)
    assert len(report.converted) == 4
    images = ImageSet(np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8), None)
    save_model(made, path.with_suffix(".small"))
    assert validate(path, path.with_suffix(".small"), images, latency_batch=None).agreement == 1.0
    assert len(load_session(path).get_inputs()) == 1


@pytest.mark.parametrize("name", ["m" * 249, "\u6a21" * 80 + "m"], ids=["ascii", "chinese"])
def test_a_long_name_is_written(tmp_path: Path, name: str) -> None:
    """The name of the temporary file is longer, but file systems allow 255 bytes."""
    save_model(small_cnn(), tmp_path / f"{name}.onnx")
    assert os.listdir(tmp_path) == [f"{name}.onnx"]


def test_an_invalid_model_is_never_written(tmp_path: Path) -> None:
    model = small_cnn()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError):
        save_model(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_atomically(tmp_path / "none" / "m.onnx", b"")


def stored(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], dict[str, bytes]]:
    return list(model.graph.node), {item.name: item.raw_data for item in model.graph.initializer}


def files_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_external_data_lies_beside_the_model_and_is_replaced_with_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    size = save_model(small_cnn(), path, external_data=True)
    assert files_in(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert size == sum(item.stat().st_size for item in tmp_path.iterdir())
    assert stored(load_model(path)) == stored(small_cnn())
    x = np.ones((1, 3, 8, 8), np.float32)
    expected, found = (InferenceSession(m).run(None, {"x": x})[0] for m in (small_cnn().SerializeToString(), str(path)))
    np.testing.assert_array_equal(found, expected)
    save_model(small_cnn(), path, external_data=True)  # under a new name first, so that no model ever refers to the data of another
    assert files_in(tmp_path) == ["m.onnx", "m.onnx.2.data"]
    assert stored(load_model(path)) == stored(small_cnn())
    save_model(small_cnn(), path)
    assert files_in(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("external_data", [False, True])
def test_data_that_another_model_reads_stays(tmp_path: Path, external_data: bool) -> None:
    """A renamed or copied model still refers to the data file, whose name is that of the model before."""
    path, renamed, data = tmp_path / "m.onnx", tmp_path / "m_v1.onnx", tmp_path / "m.onnx.data"
    save_model(small_cnn(), path, external_data=True)
    path.rename(renamed)
    for _ in range(2):
        save_model(small_cnn(), path, external_data=external_data)
        assert load_model(renamed) == small_cnn()
    renamed.unlink()
    save_model(small_cnn(), path, external_data=external_data)
    assert not data.exists()


def test_models_without_the_name_of_a_data_file_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory of many models, that would take longer than saving one."""
    for k in range(3):
        save_model(small_cnn(), tmp_path / f"other{k}.onnx")
    (tmp_path / "empty.onnx").touch()
    parsed: list[Path] = []

    def noted(path: Path) -> list[Path]:
        parsed.append(path)
        return data_files(path)

    monkeypatch.setattr("requant_onnx.files.save.data_files", noted)
    for _ in range(2):
        save_model(small_cnn(), tmp_path / "m.onnx", external_data=True)
    assert set(parsed) == {tmp_path / "m.onnx"}


def test_failing_with_external_data_keeps_the_old_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    save_model(small_cnn(), path, external_data=True)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    for failing in (1, 2):  # the data file, the model
        calls: list[int] = []

        def fail(_: int, calls: list[int] = calls, failing: int = failing) -> None:
            calls.append(1)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="No space left"):
            save_model(small_cnn(), path, external_data=True)
        assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_a_model_above_2_gb_needs_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered so that a small model exceeds it, because a real one would be too large for a test."""
    monkeypatch.setattr("requant_onnx.files.load.LARGE_BYTES", 10_000)
    with pytest.raises(ModelError, match=r"larger than 2 GB.*use --external-data"):
        save_model(small_cnn(), tmp_path / "m.onnx")
    save_model(small_cnn(), tmp_path / "m.onnx", external_data=True)
    assert load_model(tmp_path / "m.onnx").graph.initializer[0].raw_data == small_cnn().graph.initializer[0].raw_data
    assert explain(tmp_path / "m.onnx").weights
    with pytest.raises(ModelError, match="more than ONNX Runtime can load from memory"):
        explain(small_cnn())


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_the_name_of_a_data_file_is_unicode(tmp_path: Path) -> None:
    """The model contains it as text."""
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    with pytest.raises(OutputError, match="is not Unicode, as the name of a data file must be; give another name"):
        save_model(small_cnn(), path, external_data=True)
    with pytest.raises(OutputError, match="is not Unicode"):
        save_progressive([(8, small_cnn(), None)], path)
    save_model(small_cnn(), path)
    assert load_model(path) == small_cnn()
