"""What trips a new user up: silence, advice that does not fit, labels in the wrong directories, words that nobody explains."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, small_cnn
from rich.console import Console

from requant_onnx import ImageSet, validate
from requant_onnx.cli import tables, terminal
from requant_onnx.cli.main import main
from requant_onnx.cli.values import CHECKED, calibration_of
from requant_onnx.convert.report import SelfCheck
from requant_onnx.evaluate.latency import compare_latency
from requant_onnx.numerics.outputs import OutputReport

image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def photos(directory: Path, count: int) -> Path:
    directory.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        image_module.fromarray(pixels).save(directory / f"{k:02}.png")
    return directory


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("requant_onnx.cli.terminal.time.monotonic", lambda: now[0])
    with terminal.progress_bar(argparse.Namespace(quiet=False), "quantizing") as progress:
        assert progress is not None
        for second in range(70):
            now[0] = float(second)
            progress("conv", second, 100)
    assert capsys.readouterr().err.splitlines() == ["quantizing: 30% (conv)", "quantizing: 60% (conv)"]


def test_the_report_says_what_the_model_was_calibrated_on(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = photos(model.parent / "photos", 16)
    assert main(["convert", str(model), str(model.with_name("a.onnx")), "--calibrate", f"images:{directory}", "--fit"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"calibrated on 14 of 16 images of images:{directory}, which are 8x8 pixels, normalized with mean 0.485," in printed
    assert "on 2 images not used in the conversion" in printed


@pytest.mark.parametrize(("given", "used"), [(1, 1), (7, 7), (8, 7), (200, 175), (1000, 256)])
def test_some_of_few_images_are_held_out_for_the_check(model: Path, given: int, used: int) -> None:
    np.savez(model.with_name("x.npz"), x=np.zeros((given, 8, 8, 3), np.uint8))
    names = ("calibrate_limit", "memory", "seed", "mean", "std", "resize", "crop", "fit", "letterbox", "stretch")
    args = argparse.Namespace(input=model, calibrate=str(model.with_name("x.npz")), from_file=(), **dict.fromkeys(names))
    calibration = calibration_of(args)
    assert calibration is not None
    assert calibration.count == used
    assert calibration.unseen(CHECKED)[1] == (given > used)


def test_steps_for_images_may_be_meant_for_the_data(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = photos(model.parent / "photos", 8)
    arguments = ["convert", str(model), str(model.with_name("a.onnx")), "--fit"]
    assert main([*arguments, "--min-agreement", "1", "--data", f"images:{directory}"]) == 0
    assert main([*arguments, "--force"]) == 2
    assert "the calibration inputs are noise; give --calibrate images:DIR, or drop --fit" in capsys.readouterr().err


def test_advice_depends_on_what_was_given(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(model.with_name("x.npz"), x=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8))
    monkeypatch.setattr(SelfCheck, "is_broken", True)
    command = ["convert", str(model), str(model.with_name("a.onnx"))]
    for given, advice in (
        (["--calibrate", "none"], "use more --bits, give your own inputs to --calibrate, or add --force-quality"),
        (["--calibrate", f"{model.with_name('x.npz')}"], "nothing was written; use more --bits, or add --force-quality"),
        (["--time-limit", "1h"], "nothing was written; raise --time-limit, use more --bits, give your own inputs"),
    ):
        assert main([*command, *given]) == 3
        assert advice in " ".join(capsys.readouterr().err.split())


def test_a_target_overrides_the_bits_of_a_goal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = photos(model.parent / "photos", 8)
    command = ["convert", str(model), str(model.with_name("a.onnx")), "--for", "web", "--min-agreement", "1"]
    command += ["--data", f"images:{directory}", "--fit"]
    assert main(command) == 0
    assert main([*command, "--force", "--bits", "4"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("has no time limit; drop --bits")


def test_a_directory_without_a_prefix_is_normalized_like_one_with_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = photos(model.parent / "photos", 4)
    printed = []
    for spec in (f"{directory}", f"images:{directory}"):
        assert main(["validate", str(model), str(model), "--data", spec, "--no-latency"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "mean 0.485," in printed[0]


@pytest.mark.parametrize(("option", "value"), [("--mean", "123.675,116.28,103.53"), ("--std", "58.4,57.1,57.4")])
def test_normalizations_in_units_of_pixels_are_refused(
    model: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = photos(model.parent / "photos", 4)
    assert main(["validate", str(model), str(model), "--data", f"images:{directory}", option, value]) == 2
    assert "is in units of pixel / 255, so divide it by 255" in capsys.readouterr().err


def test_a_wrong_path_is_told_from_a_wrong_kind(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spec, what in (
        (f"{model.parent}/photoz", "does not exist"),
        ("cifar11:x", "is not a known kind of data"),
        (f"{model}", "is not a known kind of data"),
    ):
        for command in (
            ["validate", str(model), str(model), "--data", spec],
            ["convert", str(model), f"{model}.a", "--calibrate", spec],
        ):
            assert main(command) == 2
            assert f"'{spec}' {what}; give cifar10:DIR" in capsys.readouterr().err


def test_few_answers_are_counted() -> None:
    def sentence(count: int, what: str = "top-1") -> str:
        output = OutputReport("y", (count, 10), "scores", 30.0, 1.0, 0.0, 0.9, what, count)
        return SelfCheck("some inputs", (output,)).sentence()

    assert sentence(30).endswith("and 27 of 30 top-1 answers agree with the float model")
    assert sentence(1000).endswith("and 90.0% of the top-1 answers agree with the float model")
    assert sentence(30, "detections").endswith("and 27 of 30 detections of the float model are found again")


def test_many_weights_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--bits", "4", "--calibrate", "none", "--force-quality"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("weights: 2 of 8 bits, 18 of 4 bits; the largest relative error is that of stages")
    assert "64x64x3x3" not in printed
    assert main([*command, "--force", "-v"]) == 0
    assert "64x64x3x3" in capsys.readouterr().out


def test_swapped_models_are_noted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("a.onnx")
    assert main(["convert", str(model), str(out), "--bits", "4", "--form", "folded"]) == 0
    capsys.readouterr()
    np.savez(model.with_name("x.npz"), x=np.zeros((4, 8, 8, 3), np.uint8))
    for first, second, noted in ((out, model, True), (model, out, False)):
        assert main(["validate", str(first), str(second), "--data", str(model.with_name("x.npz")), "--no-latency"]) == 0
        printed = capsys.readouterr().out
        assert ("give the float model first" in printed) == noted
        assert ("x larger" in printed) == noted


def test_what_stays_off_integers_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "convert",
        str(OWN_MODEL),
        str(tmp_path / "a.onnx"),
        "--form",
        "int8",
        "--int8-min-sqnr",
        "60",
        "--calibrate-limit",
        "8",
    ]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "would reduce the output SQNR below 60 dB (--int8-min-sqnr) in 8 bits" in printed
    assert main(["explain", str(tmp_path / "a.onnx")]) == 0
    explained = " ".join(capsys.readouterr().out.split())
    assert "kept it off integers" in explained
    assert "--form int8 quantizes them" not in explained


def test_labels_of_other_classes_than_the_model_s_are_doubted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cats", "dogs"):
        photos(model.parent / "val" / name, 4)
    command = ["validate", str(model), str(model), "--data", f"images:{model.parent / 'val'}", "--no-latency"]
    assert main(command) == 0
    assert "the models give 10 scores, but the images are in 2 subdirectories" in " ".join(capsys.readouterr().out.split())
    for k in range(8):
        photos(model.parent / "val" / f"x{k}", 1)
    assert main(command) == 0
    assert "subdirectories" not in capsys.readouterr().out


def test_the_ratio_of_latencies_is_that_of_the_latencies_shown() -> None:
    seconds = iter(np.random.default_rng(0).uniform(0.01, 0.05, 10_000))
    found = compare_latency(lambda: float(next(seconds)), lambda: float(next(seconds)))
    assert found.ratio == found.milliseconds[1] / found.milliseconds[0]


def test_weights_that_stay_folded_for_one_reason_share_a_line() -> None:
    weights = [argparse.Namespace(name=f"w{k}", op="Conv") for k in range(5)]
    assert tables._names(weights[:2]) == "w0 (Conv), w1 (Conv)"  # type: ignore[arg-type]
    assert tables._names(weights) == "5 weights; each"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "topic"), [("keep", "layers"), ("glossary", "terms"), ("Exit", "gates"), ("downlods", "downloads")]
)
def test_other_words_lead_to_a_topic(word: str, topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", word]) == 2
    assert f"did you mean '{topic}'?" in capsys.readouterr().err


def test_a_size_that_cannot_be_measured_does_not_hide_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    images = ImageSet(np.zeros((2, 3, 8, 8), np.float32), None)
    report = validate(small_cnn(), small_cnn(), images, latency_batch=None)
    tables.print_validation(Console(width=200), report, {"br": (None, 1234)})
    assert "too large to measure  1,234" in capsys.readouterr().out.replace("\t", "  ")
