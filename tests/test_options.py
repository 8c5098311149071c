"""Options from a file and from the command line, and the amount of output."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import parsed, small_cnn
from test_image_folder import write

from requant_onnx.cli.main import main
from requant_onnx.config import METADATA_KEY


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def settings_of(path: Path) -> dict[str, object]:
    entry = {item.key: item.value for item in onnx.load(path).metadata_props}[METADATA_KEY]
    return dict(json.loads(entry))


def config(folder: Path, text: str) -> str:
    (folder / "requant.toml").write_text(text, "utf-8")
    return str(folder / "requant.toml")


def test_a_file_sets_options_and_the_command_line_overrides_them(model: Path) -> None:
    output = model.with_name("out.onnx")
    written = config(model.parent, 'bits = 4\nform = "folded"\nedge-layers = "float"\n[convert]\nedge_layers = "plain"\n')
    assert main(["convert", str(model), str(output), "--config", written, "--bits", "3"]) == 0
    made = settings_of(output)
    assert (made["bits"], made["form"], made["edge_layers"]) == (3, "folded", "plain")


def test_lists_numbers_and_switches_of_a_file(model: Path) -> None:
    np.savez(model.with_name("i.npz"), x=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8))
    report = model.with_name("r.json")
    text = f"""calibrate = {json.dumps(str(model.with_name("i.npz")))}
        mean = [0.5, 0.4, 0.3]
        std = 0.25
        force = true
        [validate]
        limit = 3"""
    command = [
        "convert",
        str(model),
        str(model.with_name("out.onnx")),
        "--config",
        config(model.parent, text),
        "--json",
        str(report),
    ]
    assert main(command) == 0
    assert main(command) == 0  # force
    assert 'mean = "0.5,0.4,0.3"' in json.loads(report.read_text())["toml"]


def test_the_report_holds_the_file_that_makes_the_same_again(model: Path) -> None:
    first, second, report = (model.with_name(name) for name in ("1.onnx", "2.onnx", "r.json"))
    options = ["--bits", "3", "--form", "folded", "--calibrate", "noise", "--calibrate-limit", "16", "--seed", "5"]
    assert main(["convert", str(model), str(first), "--json", str(report), *options]) == 0
    again = config(model.parent, json.loads(report.read_text())["toml"])
    assert main(["convert", str(model), str(second), "--config", again]) == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "is not TOML"),
        ("bit = 4", "'bit', which is not an option here; did you mean 'bits'?"),
        ("zzz = 4", "see --help"),
        ("[validate]\nbits = 4\n[convrt]\nbits = 4", "a table 'convrt', which is not a command"),
        ("[convert]\nrecipes = 'x'", "'recipes', which is not an option here"),
        ("bits = true", "it takes a text, a number"),
        ("mean = []", "it takes a text, a number"),
        ("force = 1", "takes true or false"),
        ("bits = 9", "bits"),
        ("help = true", "only allowed on the command line"),
        ("csv = 'a.csv'", "only allowed on the command line, as --csv"),
        ("[convert]\nbits = 'x'", "not one of 1.6, 2, 2.33"),
        ("for = 'wbe'", "sets 'for' to 'wbe', which is not one of its choices; did you mean 'web'?"),
        ("form = 'foldd'", "sets 'form' to 'foldd', which is not one of its choices; did you mean 'folded'?"),
        ("range = 'x'", "sets 'range' to 'x', which is not one of its choices; choose from search, max"),
    ],
)
def test_files_that_make_no_sense_are_refused(model: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    written = config(model.parent, text)
    assert main(["convert", str(model), str(model.with_name("out.onnx")), "--config", written]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not model.with_name("out.onnx").exists()


def test_options_of_other_commands_are_left_to_them(model: Path) -> None:
    written = config(model.parent, "data = 'none.npz'\nbits = 9\n[validate]\nlimit = 'x'")
    assert main(["inspect", str(model), "--config", written, "-q"]) == 0


def test_files_that_cannot_be_read_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "bad.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "bad.toml", "."):
        assert main(["inspect", str(model), "--config", str(model.parent / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_quiet_prints_nothing_and_verbose_more(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--force", "--bits", "4", "--calibrate", "noise"]
    printed = {}
    for option in ("-q", "-v", ""):
        assert main([*command, *option.split()]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        printed[option] = captured.out
    assert printed["-q"] == ""
    assert printed[""] in printed["-v"]
    assert "nearest" in printed["-v"].removeprefix(printed[""])
    for name in ("inspect", "explain"):
        assert main([name, str(model), "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["convert", str(model), str(model.with_name("out.onnx")), "-q"]) == 2  # errors are printed
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_no_color_codes_without_a_terminal_or_with_no_color(model: Path) -> None:
    script = shutil.which("script")
    command = [sys.executable, "-m", "requant_onnx", "inspect", str(model)]
    assert b"\x1b" not in subprocess.run(command, capture_output=True, check=True).stdout
    if script is not None:  # a terminal
        shown = {
            name: subprocess.run(
                [script, "-qec", " ".join(command), "/dev/null"], capture_output=True, check=True, env={"TERM": "xterm", **extra}
            ).stdout
            for name, extra in (("color", {}), ("none", {"NO_COLOR": "1"}))
        }
        assert b"\x1b[1m" in shown["color"]
        assert b"\x1b[3" not in shown["none"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_know_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    assert "calibrate-limit" in capsys.readouterr().out


def test_bash_completes_options(tmp_path: Path) -> None:
    script = subprocess.run([sys.executable, "-m", "requant_onnx", "--print-completion", "bash"], capture_output=True, check=True)
    (tmp_path / "c.sh").write_bytes(script.stdout)
    asked = 'source c.sh; COMP_WORDS=(requant convert --cali); COMP_CWORD=2; _shtab_requant; echo "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["--calibrate", "--calibrate-limit"]


def test_images_are_resized_and_cropped_as_asked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(8):
        write(model.parent / f"photos/{'ab'[k % 2]}/{k}.png", 20 + k, 30, seed=k)
    photos, output = f"images:{model.parent / 'photos'}", str(model.with_name("out.onnx"))
    pipeline = ["--resize", "9", "--crop", "8"]
    assert main(["convert", str(model), output, "--bits", "4", "--calibrate", photos, *pipeline]) == 0
    assert main(["validate", str(model), output, "--data", photos, *pipeline]) == 0
    printed = capsys.readouterr().out
    assert "mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225" in printed
    assert "top-1" in printed
    for wrong in (["--crop", "8xx"], ["--resize", "0"], ["--resize", "9", "--crop", "7"], []):
        assert main(["validate", str(model), output, "--data", photos, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_inputs_by_name_calibrate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = onnx.load(model)
    graph.graph.input[0].name = graph.graph.node[0].input[0] = "pixels"
    onnx.save(graph, model)
    path = model.with_name("inputs.npz")
    np.savez(path, pixels=np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32))
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--bits", "4", "--calibrate", str(path)]
    assert main([*command, "-v"]) == 0
    assert "feedback" in capsys.readouterr().out
    for arrays, said in (
        ({}, "contains [], but the model takes ['pixels']; give the inputs by name"),
        ({"b": np.zeros(3)}, "contains ['b'], but the model takes ['pixels']"),
        ({"pixels": np.zeros(())}, "has 0 dimensions, but the input of the model has 4"),
        ({"pixels": np.zeros((0, 3, 8, 8))}, "the same number for each input, at least one"),
    ):
        np.savez(path, **arrays)
        assert main([*command, "--force"]) == 2
        assert said in capsys.readouterr().err


def test_memory_is_also_for_inputs_by_name(model: Path) -> None:
    from requant_onnx.cli.values import calibration_of  # noqa: PLC0415

    path = model.with_name("inputs.npz")
    np.savez(path, x=np.zeros((20, 3, 8, 8), np.float64))
    calibration = calibration_of(parsed(f"requant convert {model} out.onnx --calibrate {path} --memory 5MB"))
    assert calibration is not None
    assert (len(calibration.feeds), calibration.memory) == (20, 5_000_000)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("report in.onnx in.onnx page.html --limit 10", "--limit needs --data; give --data, for example noise, or drop --limit"),
        ("inspect in.onnx --limit 10", "--limit needs --sensitivity; give --sensitivity, or drop --limit"),
        ("inspect in.onnx --resize 9", "--resize needs --sensitivity"),
        ("inspect in.onnx --mean 0.5", "--mean needs --sensitivity"),
        ("convert in.onnx out.onnx --max-drop 1 --evaluate a:b --data noise", "--data has no effect with --evaluate"),
        ("convert in.onnx out.onnx --max-drop 1 --evaluate a:b --limit 9", "--limit has no effect with --evaluate"),
        ("convert in.onnx out.onnx --min-agreement 90 --limit 9", "--limit needs --data; give --data, or drop --limit"),
        ("convert in.onnx out.onnx --calibrate none --time-limit 9s", "--time-limit needs --calibrate"),
        ("convert in.onnx out.onnx --calibrate none --refinement descent", "--refinement needs --calibrate"),
        ("convert in.onnx out.onnx --optimize-for download:gz --transform sqrt", "--transform has no effect with --optimize-for"),
        ("convert in.onnx out.onnx --for download --range max", "--range has no effect with --optimize-for download:br"),
        ("convert in.onnx out.onnx --for download --granularity per-tensor", "--granularity has no effect"),
        ("convert in.onnx out.onnx --for download --recipe paper", "--recipe has no effect"),
    ],
)
def test_options_without_any_effect_are_refused(
    model: Path, command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    assert main(command.split()) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert list(model.parent.iterdir()) == [model]


def test_options_without_any_effect_may_be_in_a_file(model: Path) -> None:
    text = "limit = 9\nresize = 9\n[convert]\ntime-limit = '9s'\nrefinement = 'descent'\ntransform = 'sqrt'\n"
    written = config(model.parent, text)
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--config", written, "--force"]
    assert main([*command, "--calibrate", "none"]) == 0
    download = ["--optimize-for", "download:gz", "--form", "folded", "--calibrate-limit", "8"]
    assert main([*command, *download, "--json", str(model.with_name("r.json"))]) == 0
    assert json.loads(model.with_name("r.json").read_text())["config"]["transform"] == "auto"
    assert main(["inspect", str(model), "--config", written]) == 0
    assert main([*command, "--calibrate", "none", "--refinement", "bias"]) == 0  # which the means of channels allow


def test_the_command_line_overrides_a_target_of_a_file(model: Path) -> None:
    written = config(model.parent, "max-drop = 0.5\n")
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--config", written, "--force"]
    assert main([*command, "--bits", "4", "--calibrate", "none"]) == 0
    assert main([*command, "--bits", "auto", "--target-sqnr", "10", "--calibrate", "noise", "--calibrate-limit", "8"]) == 0


def test_a_recipe_of_a_file_does_not_apply_to_downloads(model: Path) -> None:
    report = model.with_name("r.json")
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--optimize-for", "download:gz", "--form", "folded"]
    command += ["--config", config(model.parent, "recipe = 'paper'\n"), "--calibrate-limit", "8", "--json", str(report)]
    assert main(command) == 0
    assert json.loads(report.read_text())["config"]["biases"] == "auto"  # which the recipe sets to float32


def _commands() -> dict[str, argparse.ArgumentParser]:
    from requant_onnx.cli.options import parser_of  # noqa: PLC0415
    from requant_onnx.cli.parser import commands_of  # noqa: PLC0415

    def nothing(_: argparse.Namespace) -> None: ...

    return commands_of(parser_of(*[nothing] * 9))


def test_every_option_of_convert_can_be_in_a_file() -> None:
    from requant_onnx.cli.toml_options import _options  # noqa: PLC0415

    known = set(_options(_commands()["convert"]))
    assert {"bits", "size", "calibrate", "crop", "int8-levels", "external-data", "force"} <= known


def test_what_is_for_other_commands_in_a_file_is_no_error(model: Path) -> None:
    """The mean applies to validate; and options on the command line may make those of the file irrelevant."""
    images = model.with_name("images.npz")
    np.savez(images, x=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(model.with_name("floats.npz"), x=np.zeros((4, 3, 8, 8), np.float32))
    shared = "mean = [0.5, 0.5, 0.5]\nstd = [0.2, 0.2, 0.2]\n[convert]\nresize = 9\ncrop = 8\n"
    written = config(model.parent, shared)
    command = ["convert", str(model), str(model.with_name("out.onnx")), "--force", "--config", written]
    for more in ([], ["--calibrate", "none"], ["--calibrate", "noise"], ["--calibrate", str(images)]):
        assert main([*command, *more]) == 0
    assert main([*command, "--calibrate", str(model.with_name("floats.npz"))]) == 0
    assert main([*command, "--calibrate", "noise", "--crop", "8"]) == 2  # given on this command line
    assert main([*command, "--mean", "0.5", "--calibrate", "none"]) == 2


def test_help_is_grouped_and_help_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from requant_onnx.cli.parser import HIDDEN  # noqa: PLC0415

    for name, parser in _commands().items():
        if name == "help":  # it has no options
            continue
        texts = {}
        for flag in ("--help", "--help-all"):
            with pytest.raises(SystemExit) as stopped:
                main([name, flag])
            assert stopped.value.code == 0
            texts[flag] = capsys.readouterr().out
        hidden = [group for group in parser._action_groups if group.title in HIDDEN]
        unseen = {action.option_strings[-1] for group in hidden for action in group._group_actions}
        ungrouped = {text for action in parser._optionals._group_actions for text in action.option_strings}
        assert ungrouped == {"-h", "--help", "--config", "--help-all"}
        for option in (text for text in parser._option_string_actions if text.startswith("--")):
            shown = re.compile(rf"^  (-\w, )?{option}\b(?!-)", re.MULTILINE)
            assert shown.search(texts["--help-all"])
            assert bool(shown.search(texts["--help"])) == (option not in unseen)
        assert f"{len(unseen)} more options: requant {name} --help-all" in texts["--help"]
