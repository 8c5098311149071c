"""The output appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx
import pytest
from conftest import small_cnn

from requant_onnx import ModelError, OutputError, save_model
from requant_onnx.graph.save import write_atomically


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


def test_an_invalid_model_is_never_written(tmp_path: Path) -> None:
    model = small_cnn()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError):
        save_model(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_atomically(tmp_path / "none" / "m.onnx", b"")
