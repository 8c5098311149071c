"""Goals set options, which every other option overrides."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from conftest import small_cnn

from requant_onnx.cli.goals import GOALS, lines_of
from requant_onnx.cli.main import main


def config_of(folder: Path, *options: str) -> dict[str, object]:
    onnx.save(small_cnn(), folder / "in.onnx")
    command = ["convert", str(folder / "in.onnx"), str(folder / "out.onnx"), "--force", "--json", str(folder / "r.json"), *options]
    assert main([*command, "--calibrate-limit", "8", "--force-quality"]) == 0
    config = json.loads((folder / "r.json").read_text())["config"]
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal != "archive"])
def test_a_goal_is_its_options(goal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "--for", goal)
    assert lines_of(goal) in capsys.readouterr().out
    (tmp_path / "same.toml").write_text(lines_of(goal))
    assert config_of(tmp_path, "--config", str(tmp_path / "same.toml")) == config
    assert str(config["bits"]) == GOALS[goal].options["bits"]


def test_other_options_override_a_goal(tmp_path: Path) -> None:
    plain = ("--bits", "6", "--form", "qdq")
    assert config_of(tmp_path, "--for", "web", *plain) == config_of(tmp_path, "--runtime", "web", *plain)
    (tmp_path / "own.toml").write_text('for = "web"\nbits = 6\n')
    config = config_of(tmp_path, "--config", str(tmp_path / "own.toml"))
    assert (config["bits"], config["runtime"], config["form"]) == (6, "web", "folded")


def test_one_target_overrides_the_other_of_a_goal_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "--for", "archive", "--size", "9kB")
    assert (config["bits"], config["size"], config.get("target_sqnr")) == ("auto", 9000, None)
    assert "target-sqnr" not in capsys.readouterr().out
    (tmp_path / "own.toml").write_text('for = "archive"\nsize = "9kB"\n')
    assert config_of(tmp_path, "--config", str(tmp_path / "own.toml")) == config
    config = config_of(tmp_path, "--config", str(tmp_path / "own.toml"), "--target-sqnr", "10")
    assert (config["target_sqnr"], config.get("size")) == (10.0, None)
    command = ["convert", str(tmp_path / "in.onnx"), str(tmp_path / "no.onnx"), "--for", "archive"]
    assert main([*command, "--size", "9kB", "--target-sqnr", "20"]) == 2
    assert "needs one target" in capsys.readouterr().err


def test_only_options_that_nothing_overrides_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(tmp_path, "--for", "web", "--bits", "6")
    assert capsys.readouterr().out.splitlines()[1:3] == ['runtime = "web"', 'form = "folded"']


def test_help_lists_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    printed = capsys.readouterr().out
    assert all(goal.title in printed for goal in GOALS.values())


def test_transformers_js_finds_the_file_in_the_directory_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "repo").mkdir()
    onnx.save(small_cnn(), tmp_path / "net.onnx")
    quick = ("--for", "transformers.js", "--calibrate-limit", "8", "--force-quality")
    assert main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "repo"), *quick]) == 0
    assert 'model_q4.onnx; in transformers.js, its dtype is "q4"' in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "repo"), *quick]) == 2  # it exists
    onnx.save(small_cnn(), tmp_path / "repo" / "onnx" / "vision_model.onnx")
    command = ["convert", str(tmp_path / "repo" / "onnx" / "vision_model.onnx"), str(tmp_path / "repo"), *quick]
    assert main([*command, "--bits", "8"]) == 0
    names = {path.name for path in (tmp_path / "repo" / "onnx").iterdir()}
    assert names == {"model_q4.onnx", "vision_model.onnx", "vision_model_quantized.onnx"}


@pytest.mark.parametrize("is_file", [False, True])
def test_transformers_js_needs_the_directory_of_a_model(is_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "net.onnx")
    if is_file:
        (tmp_path / "repo").mkdir()
        (tmp_path / "repo" / "onnx").touch()
    assert main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "repo"), "--for", "transformers.js"]) == 2
    assert "give the directory of a model" in capsys.readouterr().err
