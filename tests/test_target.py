"""Targets: the smallest file that meets a target, on data that rounding has not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, ROOT, trained_model

from requant_onnx import (
    Calibration,
    ConfigError,
    Form,
    ImageSet,
    Normalization,
    QuantConfig,
    load_images,
    quantize_model,
    save_model,
)
from requant_onnx.cli.main import main
from requant_onnx.evaluate.target import Target, find_smallest

HOW = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FOLDED = QuantConfig(form=Form.FOLDED)


def sample() -> ImageSet:
    return load_images(str(ROOT / "models/sample_images.npz"))


def test_the_smallest_file_that_agrees() -> None:
    few = find_smallest(OWN_MODEL, FOLDED, Target(min_agreement=90), data=sample(), normalization=HOW)
    many = find_smallest(OWN_MODEL, FOLDED, Target(min_agreement=99), data=sample(), normalization=HOW)
    for found in (few, many):
        assert found.holds
        assert found.model.ByteSize() == min(trial.bytes for trial in found.trials if trial.holds)
        assert found.report.check is not None
    assert few.model.ByteSize() < many.model.ByteSize()
    assert "with 95 % confidence" in many.sentence


@pytest.mark.slow
def test_bits_of_their_own_save_more() -> None:
    calibration = Calibration(sample().first(100), HOW, count=24)
    rest = ImageSet(sample().x[100:], None)
    model = trained_model("resnet8_cifar10")
    found = find_smallest(model, FOLDED, Target(min_agreement=98), calibration=calibration, data=rest, normalization=HOW)
    assert found.holds
    assert any(trial.bits == "auto" for trial in found.trials)
    plain = min(trial.bytes for trial in found.trials if trial.holds and trial.bits != "auto")
    assert found.model.ByteSize() <= plain


def test_a_function_of_ones_own() -> None:
    """The score falls by 1 in files below 200 kB: 6 bits are the fewest that preserve it."""
    tried: list[int] = []

    def score(model: onnx.ModelProto) -> float:
        tried.append(model.ByteSize())
        return -1.0 if model.ByteSize() < 200_000 else 0.0

    found = find_smallest(OWN_MODEL, FOLDED, Target(max_drop=0.5), evaluate=score)
    assert found.holds
    assert 200_000 <= found.model.ByteSize() < 240_000  # 6 bits
    assert len(tried) == 1 + len(found.trials)


def test_what_cannot_be_kept_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8), y=rng.integers(0, 10, 60))
    command = ["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--max-drop", "50", "--size", "1kB", "--calibrate", "none"]
    data = ["--data", str(tmp_path / "data.npz")]
    assert main([*command, *data]) == 3
    assert "no file that was tried reaches the target" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()
    assert main([*command, *data, "--best-effort", "--force-quality"]) == 0
    assert (tmp_path / "a.onnx").is_file()


def test_a_function_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text("def score(model):\n    return 1.0\nNOT = 3\n")
    Path("broken.py").write_text("1 / 0\n")
    save_model(onnx.load(OWN_MODEL), tmp_path / "in.onnx")
    command = ["convert", "in.onnx", "out.onnx", "--max-drop", "0", "--calibrate", "none", "--force-quality"]
    assert main([*command, "--evaluate", "judge:score"]) == 0
    assert "note: target: the change in the score is 0.00" in " ".join(capsys.readouterr().out.split())
    for name, sentence in (
        ("judge:scores", "cannot be imported"),
        ("judges:score", "cannot be imported"),
        ("judge:NOT", "not a function"),
        (".judge:score", "cannot be imported"),
        ("broken:score", "cannot be imported (division by zero)"),
    ):
        assert main([*command, "--force", "--evaluate", name]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-drop", "0.5"], "measured on labels; give labeled --data"),
        (["--max-drop", "0.5", "--min-agreement", "99"], "give exactly one of the two"),
        (["--min-agreement", "101"], "at most 100 %"),
        (["--max-drop", "-1"], "must be 0 or more"),
        (["--max-drop", "much"], "--max-drop 'much' is not a number; write it like 0.5"),
        (["--max-drop", "30,5"], "--max-drop '30,5' is not a number; write it as 30.5"),
        (["--min-agreement", "99,5"], "write it as 99.5"),
        (["--bits", "auto", "--target-sqnr", "20,5"], "write it as 20.5"),
        (["--form", "int8", "--int8-min-sqnr", "15,5"], "write it as 15.5"),
        (["--min-agreement", "99", "--bits", "4"], "drop --bits"),
        (
            ["--min-agreement", "99", "--runtime", "tensorrt", "--form", "int8"],
            "has a single width, so a target has no choice; choose --form qdq, or give --bits 8 without a target",
        ),
        (["--min-agreement", "99", "--evaluate", "a:b"], "cannot be imported"),
        (["--data", "noise"], "--data needs --max-drop or --min-agreement"),
        (["--best-effort"], "--best-effort needs"),
    ],
)
def test_mistakes(options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "options", "sentence"),
    [
        (40, ["--max-drop", "5"], "a drop in accuracy is measured on labels; give labeled --data"),
        (6, ["--min-agreement", "90"], "the calibration uses all images, so a target cannot be measured; give --data"),
    ],
)
def test_calibration_images_are_no_test_set(
    count: int, options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "lab.npz", x=rng.integers(0, 256, (count, 32, 32, 3), np.uint8), y=rng.integers(0, 10, count))
    command = ["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--calibrate", str(tmp_path / "lab.npz")]
    assert main([*command, *options]) == 2
    assert sentence in capsys.readouterr().err


def test_data_and_functions_have_to_go_with_the_target() -> None:
    with pytest.raises(ConfigError, match="measured on data"):
        find_smallest(OWN_MODEL, FOLDED, Target(min_agreement=99))
    with pytest.raises(ConfigError, match="give --max-drop"):
        find_smallest(OWN_MODEL, FOLDED, Target(min_agreement=99), evaluate=lambda _: 0.0)


def test_a_file_that_is_too_large_does_not_ask_for_more_bits() -> None:
    """Every width agrees, and only few bits fit."""
    sizes = [quantize_model(OWN_MODEL, replace(FOLDED, bits=bits))[0].ByteSize() for bits in (3, 4)]
    target = Target(min_agreement=5, size=sum(sizes) // 2)
    found = find_smallest(OWN_MODEL, FOLDED, target, data=sample().first(20), normalization=HOW)
    assert found.holds
    assert found.model.ByteSize() <= sum(sizes) // 2
    missed = find_smallest(OWN_MODEL, FOLDED, replace(target, size=1000), data=sample().first(20), normalization=HOW)
    assert not missed.holds
    assert "reaches the target of 5 in at most 1,000 bytes; for the best, the agreement is" in missed.sentence


def test_nothing_is_sure_without_a_standard_error() -> None:
    five = ImageSet(sample().x[:5], np.zeros(5, np.int64))
    few = find_smallest(OWN_MODEL, FOLDED, Target(max_drop=0.5), data=five, normalization=HOW)
    assert few.holds
    assert "but not with 95 % confidence" in few.sentence
    own = find_smallest(OWN_MODEL, FOLDED, Target(max_drop=0.5), evaluate=lambda _: 1.0)
    assert "with an unknown standard error" in own.sentence
