"""convert-many: one table and one record; failures do not stop the run, and a second run converts only missing files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse

from requant_onnx import RequantError
from requant_onnx.cli.main import main
from requant_onnx.cli.many import _data_digest
from requant_onnx.evaluate.jobs import run_each
from requant_onnx.files.save import save_model


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Three files in two directories, one of which is not a model."""
    for folder in ("zoo/a", "zoo/b"):
        (tmp_path / folder).mkdir(parents=True)
    text = "net (float[n, 64] x) => (float[n, 32] y) { y = MatMul(x, w) }"
    save_model(parse(text, w=laplace(64, 32)), tmp_path / "zoo/a/dense.onnx", external_data=True)
    shutil.copy(OWN_MODEL, tmp_path / "zoo/b/resnet.onnx")
    (tmp_path / "zoo/b/broken.onnx").write_bytes(b"this is no model")
    return tmp_path / "zoo"


def record(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "requant.jsonl").read_text("utf-8").splitlines()]
    assert len({line["model"] for line in lines}) == len(lines)
    return {line["model"]: line for line in lines}


def test_what_fails_stops_nothing_and_the_rest_goes_on_later(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["convert-many", str(zoo), str(out), "--bits", "4", "--calibrate", "none", "--jobs", "2"]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "failed: b/broken.onnx: '" in printed.out
    assert "1 of 3 models failed" in printed.err
    lines = record(out)
    assert {name: line["status"] for name, line in lines.items()} == {
        "a/dense.onnx": "converted", "b/broken.onnx": "failed", "b/resnet.onnx": "converted",
    }  # fmt: skip
    assert lines["b/resnet.onnx"]["bytes_after"] == (out / "b/resnet.onnx").stat().st_size
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "alone.onnx"), "--bits", "4", "--calibrate", "none"]) == 0
    assert (tmp_path / "alone.onnx").read_bytes() == (out / "b/resnet.onnx").read_bytes()
    onnx.checker.check_model(out / "a/dense.onnx")

    before = (out / "b/resnet.onnx").stat().st_mtime_ns
    shutil.copy(OWN_MODEL, zoo / "b/broken.onnx")
    capsys.readouterr()
    assert main(command) == 0
    assert "3 of 3 converted, 2 of them by an earlier run" in capsys.readouterr().out
    assert (out / "b/resnet.onnx").stat().st_mtime_ns == before
    assert record(out)["b/broken.onnx"]["status"] == "converted"


def test_other_settings_replace_nothing_without_force(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, out = str(zoo / "**/r*.onnx"), tmp_path / "out"
    none = ("--calibrate", "none", "--force-quality")
    assert main(["convert-many", pattern, str(out), "--jobs", "1", *none]) == 0
    lines, data = record(out), (out / "resnet.onnx").read_bytes()
    assert main(["convert-many", pattern, str(out), "--bits", "3", *none]) == 2
    assert "--force" in capsys.readouterr().out
    assert (record(out), (out / "resnet.onnx").read_bytes()) == (lines, data)
    assert main(["convert-many", pattern, str(out), "--bits", "3", "--force", "--jobs", "1", *none]) == 0
    assert (out / "resnet.onnx").stat().st_size < len(data)


def test_incomplete_results_are_made_again(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert-many", str(zoo / "a"), str(tmp_path / "out"), "--jobs", "1", "--calibrate", "none", "--external-data"]
    assert main(command) == 0
    data = tmp_path / "out/dense.onnx.data"
    data.unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "1 of 1 converted, 8,361" in capsys.readouterr().out
    assert data.is_file()
    assert main(command) == 0
    assert "1 of them by an earlier run" in capsys.readouterr().out


def test_changed_calibration_data_are_other_settings(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 64), np.float32))
    command = ["convert-many", str(zoo / "a"), str(tmp_path / "out"), "--jobs", "1", "--calibrate", str(tmp_path / "x.npz")]
    assert main([*command, "--force-quality"]) == 0
    assert main([*command, "--force-quality"]) == 0
    assert "1 of them by an earlier run" in capsys.readouterr().out
    np.savez(tmp_path / "x.npz", x=np.ones((9, 64), np.float32))
    assert main([*command, "--force-quality"]) == 2
    assert "with different settings, data or model; give another directory" in capsys.readouterr().out


def test_a_directory_of_data_is_identified_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"1")
    first = _data_digest(f"images:{tmp_path}")
    assert first == _data_digest(str(tmp_path))
    for hidden in (".DS_Store", "a/.DS_Store", "a/.thumbs/1.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"3")
    assert first == _data_digest(str(tmp_path))
    (tmp_path / "a/2.png").write_bytes(b"2")
    assert first != _data_digest(str(tmp_path))
    assert {_data_digest(spec) for spec in (None, "none", "auto", "noise", "noise:8x8", "images:")} == {""}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere/*.onnx", "out"], "there is no model at 'nowhere/*.onnx'"),
        (["zoo", "zoo/b/resnet.onnx"], "is not a directory"),
        (["zoo", "out", "--bits", "9"], "bits"),
        (["zoo", "out", "--jobs", "0"], "--jobs must be 1 or more, not 0"),
        (["zoo", "out", "--dask", "here"], "not the address of a Dask scheduler"),
    ],
)
def test_mistakes_are_found_before_the_work(
    arguments: list[str], sentence: str, zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(zoo.parent)
    assert main(["convert-many", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(zoo.parent.glob("out/*"))


def test_results_inside_the_folder_of_models_are_no_models(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "b/broken.onnx").unlink()
    command = ["convert-many", str(zoo), str(zoo / "small"), "--jobs", "1", "--calibrate", "none"]
    assert main(command) == 0
    assert main(command) == 0
    assert "2 of 2 converted, 2 of them by an earlier run" in capsys.readouterr().out


def test_it_runs_on_a_dask_cluster(zoo: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert (
            main(["convert-many", str(zoo), str(tmp_path / "dask"), "--bits", "4", "--calibrate", "none", "--dask", address]) == 2
        )
    assert main(["convert-many", str(zoo), str(tmp_path / "here"), "--bits", "4", "--calibrate", "none"]) == 2
    for name in ("a/dense.onnx", "b/resnet.onnx"):
        assert (tmp_path / "dask" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert {line["status"] for line in record(tmp_path / "dask").values()} == {"converted", "failed"}
    assert record(tmp_path / "dask")["b/broken.onnx"]["error"].startswith("'broken.onnx' ")


def _die_if(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise ValueError("two")
    return number


def test_a_process_that_dies_fails_only_its_own_item() -> None:
    results: dict[int, object] = {}
    run_each(2, None, {number: (_die_if, (number,)) for number in range(5)}, results.__setitem__)
    assert {key: value for key, value in results.items() if isinstance(value, int)} == {0: 0, 3: 3, 4: 4}
    assert isinstance(results[1], RequantError)
    assert isinstance(results[2], ValueError)
