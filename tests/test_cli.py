"""The command line: its files, its output, and one sentence with exit code 2 for every bad input."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, ROOT, laplace, parse, small_cnn

from requant_onnx.cli.main import main
from requant_onnx.config import METADATA_KEY
from requant_onnx.progress import Progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_convert_writes_a_model_and_a_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    output, report = model.with_name("out.onnx"), model.with_name("report.json")
    assert main(["convert", str(model), str(output), "--bits", "4", "--json", str(report)]) == 0
    assert model.read_bytes() == before
    onnx.checker.check_model(onnx.load(output), full_check=True)
    found = json.loads(report.read_text())
    assert [weight["bits"] for weight in found["converted"]] == [8, 4, 4, 8]
    assert found["file_bytes"] == [model.stat().st_size, output.stat().st_size]
    printed = capsys.readouterr().out
    assert "16x16x3x3" in printed
    assert "4 converted" in printed


def test_options_on_top_of_the_recipe(model: Path) -> None:
    output = model.with_name("out.onnx")
    assert main(["convert", str(model), str(output), "--recipe", "paper", "--bits", "6", "--edge-layers", "float"]) == 0
    entry = {item.key: item.value for item in onnx.load(output).metadata_props}[METADATA_KEY]
    made = json.loads(entry)
    assert (made["bits"], made["transform"], made["edge_layers"], made["rounding"]) == (6, "sqrt", "float", "transformed")


def test_nothing_to_convert_is_a_warning_and_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(parse("net (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"), source)
    assert main(["convert", str(source), str(output)]) == 0
    assert output.read_bytes() == source.read_bytes()
    assert "warning: nothing to convert" in capsys.readouterr().err


def test_external_data_comes_along_when_there_is_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model = parse("net (float[n, 3] x) => (float[n, 3] y) { y = Add(x, w) }", w=laplace(3))
    onnx.save(model, tmp_path / "a" / "in.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert main(["convert", str(tmp_path / "a" / "in.onnx"), str(tmp_path / "b" / "out.onnx")]) == 0
    assert onnx.load(tmp_path / "b" / "out.onnx").graph.initializer[0].raw_data == laplace(3).tobytes()


def test_a_report_replaces_nothing_but_reports(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, report = model.with_name("notes.txt"), model.with_name("report.json")
    notes.write_text("precious")
    report.write_text("{}")
    assert main(["inspect", str(model), "--json", str(notes)]) == 2
    expect_one_sentence(capsys, "exists and is not a .json file")
    assert notes.read_text() == "precious"
    assert main(["inspect", str(model), "--json", str(report)]) == 0


def test_nothing_replaces_a_file_that_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of options, and the data of models, even with --force."""
    monkeypatch.chdir(model.parent)
    external, toml = model.with_name("external.onnx"), model.with_name("requant.json")
    onnx.save(small_cnn(), external, save_as_external_data=True, location="weights.json", size_threshold=0)
    toml.write_text("limit = 4\n")
    for name in ("labels.json", "x.npz"):
        model.with_name(name).write_text("precious")
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    for command in (
        "validate in.onnx in.onnx --data . --labels labels.json --json labels.json",
        "validate in.onnx external.onnx --data noise --json weights.json",
        "validate in.onnx in.onnx --data noise --config requant.json --json requant.json",
        "convert in.onnx x.npz --calibrate x.npz --force",
        "convert in.onnx out.onnx --calibrate x.npz --html x.npz --force",
        "restore external.onnx out.onnx --json weights.json",
        "report in.onnx in.onnx x.npz --data x.npz --force",
        "compare in.onnx --data x.npz --csv x.npz --force",
        "inspect external.onnx --json weights.json",
        "explain external.onnx --json weights.json",
    ):
        assert main(command.split()) == 2, command
        expect_one_sentence(capsys, "would replace a file that this command")
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before


def test_names_that_look_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = parse("net (float[n, 40] x) => (float[n, 40] y) { y = MatMul(x, w) }", w=laplace(40, 40))
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "[/b]:fire:"
    onnx.save(model, tmp_path / "in.onnx")
    assert main(["inspect", str(tmp_path / "in.onnx")]) == 0
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert capsys.readouterr().out.count("[/b]:fire:") == 2


def test_the_readme_job_on_what_comes_with_the_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    assert main(["convert", str(OWN_MODEL), str(output)]) == 0
    sample = ROOT / "models" / "sample_images.npz"
    arguments = ["validate", str(OWN_MODEL), str(output), "--data", str(sample), "--json", str(report), "--limit", "100"]
    assert main([*arguments, "--mean", "0.49,0.48,0.45", "--std", "0.25,0.24,0.26"]) == 0
    found = json.loads(report.read_text())
    assert found["agreement"] >= 0.95
    assert found["sqnr_db"] > 25
    assert found["top1"] is None
    assert "no labels" in capsys.readouterr().out


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = model.with_name("report.json")
    assert main(["inspect", str(model), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["ops"] == {"Conv": 3, "Relu": 3, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert [weight["edge"] for weight in found["weights"]] == [True, False, False, True]
    assert "first or last" in capsys.readouterr().out


def broken_inputs(folder: Path) -> dict[str, Path]:
    """Files that are not usable models."""
    names = ("empty", "text", "short", "nan", "old", "future", "invalid", "external", "long")
    files = {name: folder / f"{name}.onnx" for name in names}
    files["empty"].write_bytes(b"")
    files["text"].write_text("this is no model")
    files["short"].write_bytes(small_cnn().SerializeToString()[:-2000])
    holed = laplace(5, 4, 3, 3)
    holed[0, 0, 0, 0] = np.nan
    onnx.save(parse("net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y) { y = Conv(x, w) }", w=holed), files["nan"])
    onnx.save(small_cnn(opset=6, ir=3), files["old"])
    future = small_cnn()
    future.opset_import[0].version = 999
    onnx.save(future, files["future"])
    onnx.save(parse("net (float[n] x) => (float[n] y) { y = Relu(z) }"), files["invalid"])
    onnx.save(small_cnn(), files["external"], save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    long = parse("net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y) { y = Conv(x, w) }", w=laplace(5, 4, 3, 3))
    long.graph.initializer[0].raw_data += bytes(8)
    onnx.save(long, files["long"])
    return {**files, "missing": folder / "none.onnx", "folder": folder}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("empty", "contains no ONNX graph"),
        ("text", "not an ONNX file or is incomplete"),
        ("short", "not an ONNX file or is incomplete"),
        ("nan", "the weight 'w' contains 1 NaN or infinite"),
        ("old", "uses opset 6, but only opsets 7 to"),
        ("future", "uses opset 999"),
        ("invalid", "is not valid ONNX"),
        ("external", "weights.bin"),
        ("long", "bytes, but its shape and type FLOAT need 720"),
        ("missing", "does not exist"),
        ("folder", "is a directory"),
    ],
)
def test_bad_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, message: str) -> None:
    path = broken_inputs(tmp_path)[which]
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(path), str(tmp_path / "out.onnx")]) == 2
    expect_one_sentence(capsys, message)
    assert sorted(tmp_path.iterdir()) == before


def expect_one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "1"], "--bits '1' is not one of 1.6, 2, 2.33, 2.67, 3, 3.33, 3.67, 4, 4.5, 5, 5.5, 6, 7 or 8"),
        (["--bits", "four"], "--bits 'four' is not one of 1.6, 2, 2.33"),
        (["--granularity", "per-row"], "--granularity 'per-row' is not one of per-tensor, per-channel"),
        (["--transform", "log"], "--transform 'log' is not valid"),
        (["--transform", "power:x"], "--transform 'power:x' is not valid"),
        (["--transform", "power:7"], "the exponent 7.0 is outside 1/3 .. 1"),
        (["--range", "min"], "--range 'min' is not one of search, max"),
        (["--edge-layers", "4bit"], "--edge-layers '4bit' is not one of plain, float, 8bit"),
        (["--recipe", "best"], "--recipe 'best' is unknown"),
        (["--json", "no/such/folder/r.json"], "cannot write the report"),
        (["--json", "IN"], "would replace a file that this command uses"),
    ],
)
def test_bad_options(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    options = [str(model) if option == "IN" else option for option in options]
    assert main(["convert", str(model), str(model.with_name("out.onnx")), *options]) == 2
    expect_one_sentence(capsys, message)
    assert list(model.parent.iterdir()) == [model]


def test_bad_outputs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existing = model.with_name("there.onnx")
    existing.write_bytes(b"precious")
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    cases = {
        existing: "exists; give another path, or --force",
        model: "is the input",
        link: "is the input",
        model.parent: "is a directory",
    }
    cases[model.parent / "none" / "out.onnx"] = "does not exist; create it first"
    for output, message in cases.items():
        options = ["--force"] if "is the input" in message else []
        assert main(["convert", str(model), str(output), *options]) == 2
        expect_one_sentence(capsys, message)
    assert existing.read_bytes() == b"precious"
    assert main(["convert", str(model), str(existing), "--force"]) == 0
    assert existing.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cifar10:none"], "cannot read"),
        (["--data", "IMAGES", "--limit", "0"], "--limit 0 leaves no image"),
        (["--data", "IMAGES", "--mean", "a,b,c"], "--mean 'a,b,c' is not a list of numbers"),
        (["--data", "IMAGES", "--std", "0"], "std above 0"),
        (["--data", "IMAGES"], "the images are 3x9x9, but the reference"),
    ],
)
def test_bad_data(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    images = model.with_name("images.npz")
    np.savez(images, x=np.zeros((2, 9, 9, 3), np.uint8))
    options = [str(images) if option == "IMAGES" else option for option in options]
    assert main(["validate", str(model), str(model), *options]) == 2
    expect_one_sentence(capsys, message)


@pytest.mark.slow
def test_python_m_and_usage_errors_leave_with_2() -> None:
    runs = {
        arguments: subprocess.run([sys.executable, "-m", "requant_onnx", *arguments], capture_output=True, text=True, check=False)
        for arguments in (("--version",), ("convert", "--help"), ("convert",))
    }
    assert [run.returncode for run in runs.values()] == [0, 0, 2]
    assert "examples:" in runs["convert", "--help"].stdout


def test_int8_with_images_noise_and_external_data(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output, report = model.with_name("x.npz"), model.with_name("out.onnx"), model.with_name("r.json")
    np.savez(images, x=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8))
    int8 = ["convert", str(model), str(output), "--form", "int8", "--int8-speed", "all", "--bits", "4", "--force"]
    assert main([*int8, "--calibrate", str(images), "--mean", "0.5", "--std", "0.25", "--json", str(report)]) == 0
    assert "activation tensors on 8-bit integers: 6" in capsys.readouterr().out
    made = json.loads(report.read_text())
    assert {weight["form"] for weight in made["converted"]} == {"int8"}
    assert len(made["activations"]) == 6
    assert main([*int8, "--calibrate", "noise", "--calibrate-limit", "3", "--external-data"]) == 0
    assert model.with_name("out.onnx.data").is_file()
    assert main(["explain", str(output), "--json", str(report)]) == 0
    assert {weight["fate"] for weight in json.loads(report.read_text())["weights"]} == {"fused"}
    assert "weights: 4 fused" in capsys.readouterr().out


def test_a_budget_of_bytes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = model.with_name("out.onnx"), model.with_name("r.json")
    budget = ["--bits", "auto", "--size", "7kB", "--form", "folded", "--calibrate", "none", "--json", str(report)]
    assert main(["convert", str(model), str(output), *budget]) == 0
    assert output.stat().st_size <= 7_000
    front = json.loads(report.read_text())["front"]
    printed = capsys.readouterr().out
    assert f"{front[0]['bytes']:,}" in printed
    assert "because without --calibrate the output is unknown" in printed


def test_few_bits_without_calibration_are_noted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noted = {}
    none = "--calibrate none --force-quality"
    for options in (f"--bits 4 {none}", f"--bits 8 {none}", "--bits 4", f"--bits 4 --refinement none {none}"):
        assert main(["convert", str(model), str(model.with_name("out.onnx")), "--force", *options.split()]) == 0
        noted[options] = "at few bits, --calibrate improves the accuracy" in capsys.readouterr().out
    assert [options for options, was in noted.items() if was] == [f"--bits 4 {none}"]


def test_an_interrupted_conversion_writes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def interrupted(_: object, __: str) -> Iterator[Progress]:
        def report(_: str, done: int, *__: int) -> None:
            if done >= 2:
                raise KeyboardInterrupt

        yield report

    monkeypatch.setattr("requant_onnx.cli.commands.progress_bar", interrupted)
    before = set(model.parent.iterdir())
    for options in ([], ["--calibrate", "noise"], ["--bits", "auto", "--size", "7kB"]):
        assert main(["convert", str(model), str(model.with_name("out.onnx")), *options]) == 130
        assert capsys.readouterr().err == "interrupted; no file was left half-written\n"
    assert set(model.parent.iterdir()) == before


def test_bad_calibration_is_one_sentence(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--bits", "auto"], "either --size, for example 180kB, or --target-sqnr"),
        (["--bits", "auto", "--size", "1kB", "--target-sqnr", "20"], "either --size"),
        (["--size", "180kB"], "--size needs --bits auto; give --bits auto, or drop --size"),
        (["--bits", "4", "--target-sqnr", "20"], "--target-sqnr needs --bits auto"),
        (["--bits", "auto", "--size", "big"], "the size 'big' is not valid"),
        (["--bits", "auto", "--size", "180kB", "--external-data"], "--size is the size of a single file"),
        (["--bits", "auto", "--target-sqnr", "20", "--calibrate", "none"], "give --calibrate"),
        (["--bits", "auto", "--size", "1kB"], "the smallest possible file has"),
        (["--form", "int8", "--calibrate", "none"], "give --calibrate with images, or --calibrate noise"),
        (["--calibrate", "noise", "--refinement", "none"], "drop --calibrate"),
        (["--calibrate", "noisy"], "FILE.npz or noise"),
        (["--form", "int8", "--calibrate", "noise", "--mean", "0"], "both --mean and --std"),
        (["--int8-levels", "127"], "--int8-levels needs --form int8; give --form int8, or drop --int8-levels"),
        (["--form", "int8", "--calibrate", "nowhere.npz"], "nowhere.npz"),
        (["--form", "int8", "--calibrate", "noise:big"], "write it as noise:224x224"),
        (["--form", "int8", "--calibrate", "noise", "--calibrate-limit", "0"], "calibration inputs must be 1 or more"),
        (["--form", "int8", "--calibrate", "noise", "--int8-levels", "100"], "--int8-levels '100' is not one of 64, 127, auto"),
        (["--form", "int8", "--calibrate", "noise", "--activation-range", "x"], "is not one of output, minmax, mse, percentile"),
        (["--calibrate", "none", "--mean", "0.5"], "--mean needs --calibrate; give --calibrate, or drop --mean"),
        (["--mean", "0.5"], "both --mean and --std"),
    ]
    for options, message in cases:
        assert main(["convert", str(model), str(model.with_name("out.onnx")), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not model.with_name("out.onnx").exists()
    assert main(["explain", str(model.with_name("none.onnx"))]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_devices_pipes_and_folders_are_no_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, folder = model.with_name("pipe"), model.with_name("folder")
    os.mkfifo(pipe)
    folder.mkdir()
    for output in (pipe, Path("/dev/null"), folder):
        for arguments in (["convert", str(model), str(output)], ["restore", str(model), str(output)]):
            assert main([*arguments, "--force"]) == 2
            assert "give the path of the file to write" in capsys.readouterr().err
    assert main(["inspect", str(model), "--json", str(pipe)]) == 2
    assert "is a device, a pipe or a socket" in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_keeps_pointing_to_what_is_replaced(model: Path) -> None:
    target, link = model.with_name("target.onnx"), model.with_name("link.onnx")
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert main(["convert", str(model), str(link), "--calibrate", "none", "--force"]) == 0
    assert link.is_symlink()
    onnx.checker.check_model(target)


def test_a_report_on_standard_output_is_alone_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", str(model)], ["convert", str(model), str(model.with_name("out.onnx"))]):
        assert main([*command, "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", [[], ["--json", "-"]])
def test_exit_codes_count_even_if_nobody_reads_the_output(model: Path, form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `requant validate ... | head -1`, once head has ended."""
    output = str(model.with_name("out.onnx"))
    command = ["validate", str(model), output, "--data", "noise", "--limit", "4", "--no-latency"]
    for arguments, code in (
        (["convert", str(model), output, "--bits", "4", "--calibrate", "none"], 0),
        ([*command, "--fail-below", "sqnr=5"], 0),
        ([*command, "--fail-below", "sqnr=90"], 4),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert main([*arguments, *form]) == code
