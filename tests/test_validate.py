"""Validation: figures by hand, shapes, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn, top1, trained_model

from requant_onnx import (
    Calibration,
    DataError,
    Form,
    ImageSet,
    ModelError,
    Normalization,
    QuantConfig,
    ValidationReport,
    load_images,
    quantize_model,
    save_model,
    validate,
)
from requant_onnx.cli.main import main
from requant_onnx.errors import ConfigError
from requant_onnx.inputs.feeds import FeedSet

SUMS = "{ s = ReduceMean<axes = [2, 3], keepdims = 0>(x) y = Mul(s, w) }"
MEANS = "net (float[n, 3, 2, 2] x) => (float[n, 3] y) " + SUMS
ONE_AT_A_TIME = "net (float[1, 3, 2, 2] x) => (float[1, 3] y) " + SUMS
FEWER = "net (float[n, 3, 2, 2] x) => (float[n, 2] y) { s = ReduceMean<axes = [2, 3], keepdims = 0>(x) y = Gemm(s, w) }"
CHANNELS_LAST = "net (float[n, 2, 2, 3] x) => (float[n, 3] y) { s = ReduceMean<axes = [1, 2], keepdims = 0>(x) y = Mul(s, w) }"


def scorer(text: str, *factors: float) -> onnx.ModelProto:
    """A model whose scores are the mean of each channel times its factor."""
    return parse(text, opset=13, w=np.array(factors, np.float32))


def pictures(*brightest: int, labels: tuple[int, ...] | None = None) -> ImageSet:
    """Images of 2x2, 255 in one channel, 102 in the others."""
    x = np.full((len(brightest), 3, 2, 2), 102, np.uint8)
    for image, channel in zip(x, brightest, strict=True):
        image[channel] = 255
    return ImageSet(x, None if labels is None else np.array(labels, np.int64))


def test_figures_by_hand() -> None:
    """The candidate triples channel 0, so it always answers 0: 102 * 3 > 255."""
    reference, candidate = scorer(MEANS, 1, 1, 1), scorer(MEANS, 3, 1, 1)
    report = validate(reference, candidate, pictures(0, 1, 2, 2, labels=(0, 1, 2, 1)))
    assert report.top1 == (0.75, 0.25)
    assert report.agreement == 0.25
    signal, noise = 4 * (1 + 2 * 0.4**2), 2**2 * (1 + 3 * 0.4**2)
    assert report.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


@pytest.mark.parametrize("text", [MEANS, ONE_AT_A_TIME, CHANNELS_LAST])
def test_batches_and_layouts(text: str) -> None:
    model = scorer(text, 1, 1, 1)
    report = validate(model, model, pictures(0, 1, 2, labels=(0, 1, 2)))
    assert (report.top1, report.agreement, report.sqnr_db, report.latency_batch) == ((1.0, 1.0), 1.0, math.inf, 1)


def test_a_fixed_batch_is_filled() -> None:
    model = scorer(MEANS.replace("n,", "2,"), 1, 1, 1)
    assert validate(model, model, pictures(0, 1, 2, labels=(0, 1, 2))).images == 3


def test_a_fixed_batch_of_100() -> None:
    model = scorer(MEANS.replace("n,", "100,"), 1, 1, 1)
    assert validate(model, model, pictures(*[0, 1] * 75)).images == 150


def test_scores_that_are_no_numbers_are_noted() -> None:
    report = validate(scorer(MEANS, 1, 1, 1), scorer(MEANS, np.nan, 1, 1), pictures(0, 1))
    assert report.notes == ("the candidate gives NaN or infinity for 2 images",)
    assert report.to_dict()["sqnr_db"] == "nan"


def test_without_labels_there_is_no_accuracy() -> None:
    model = scorer(MEANS, 1, 1, 1)
    assert validate(model, model, pictures(0, 1)).top1 is None


def test_normalization() -> None:
    x = Normalization((0.5, 0.0, 0.0), (0.5, 1.0, 2.0)).apply(np.full((1, 3, 1, 1), 255, np.uint8))
    assert x.ravel().tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("std", [(0.0,), (-1.0,), (math.nan,), ()])
def test_impossible_normalization(std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        Normalization((0.0,), std)


def test_refusals() -> None:
    model = scorer(MEANS, 1, 1, 1)
    two = parse("net (float[n, 3, 2, 2] x, float[n, 3, 2, 2] z) => (float[n, 3, 2, 2] y) { y = Add(x, z) }")
    flat = parse("net (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
    picture = parse("net (float[n, 3, 2, 2] x) => (float[n, 3, 2, 2] y) { y = Relu(x) }")
    floats = ImageSet(np.zeros((1, 3, 2, 2), np.float32), None)
    cases = [
        (two, pictures(0), None, ModelError, r"has 2 inputs \('x', 'z'\)"),
        (flat, pictures(0), None, ModelError, "input has 4 dimensions"),
        (picture, pictures(0, labels=(0,)), None, DataError, "not one row of scores"),
        (model, ImageSet(np.zeros((1, 3, 5, 5), np.uint8), None), None, DataError, "the images are 3x5x5"),
        (model, pictures(0, labels=(7,)), None, DataError, "the labels are 7 to 7"),
        (model, pictures(0), Normalization((0.0, 0.0), (1.0,)), DataError, "mean has 2 values"),
        (model, floats, Normalization(), DataError, "count as normalized"),
    ]
    for reference, images, normalization, error, message in cases:
        with pytest.raises(error, match=message):
            validate(reference, reference, images, normalization)
    fewer = parse(FEWER, opset=13, w=laplace(3, 2))
    with pytest.raises(DataError, match="gives 3 scores per image, but the candidate 2"):
        validate(model, fewer, pictures(0))


def test_a_matmul_with_rounded_activations_is_noted() -> None:
    text = "net (float[n, 3, 8, 8] x) => (float[n, 40] y) { f = Flatten(x) y = MatMul(f, w) }"
    model = parse(text, w=laplace(192, 40))
    images = ImageSet(np.zeros((1, 3, 8, 8), np.float32), None)
    assert "rounds the activations of w to int8" in validate(model, quantize_model(model)[0], images).notes[0]
    assert "activations of w4 to int8" in validate(small_cnn(), quantize_model(small_cnn())[0], images).notes[0]
    folded = quantize_model(small_cnn(), QuantConfig(form=Form.FOLDED))[0]
    assert not validate(small_cnn(), folded, images).notes


@pytest.mark.slow
@pytest.mark.xdist_group("own_report")
def test_own_model_reaches_the_accuracy_it_is_published_with(own_report: ValidationReport) -> None:
    assert own_report.top1 is not None
    assert own_report.top1[0] >= 0.91
    assert abs(own_report.top1[1] - own_report.top1[0]) <= 0.002  # 8 bits: within 0.2 points, 20 of 10,000 images


@pytest.mark.slow
def test_published_model_keeps_its_accuracy_at_8_and_6_bits(cifar10: Path) -> None:
    path = trained_model("resnet20_cifar10")
    images = load_images(f"cifar10:{cifar10}")
    imagenet = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    report = validate(path, quantize_model(path, QuantConfig(bits=8))[0], images, imagenet)
    assert report.top1 is not None
    assert report.top1[0] == pytest.approx(0.9173, abs=5e-4)
    for found in (report.top1[1], top1(quantize_model(path, QuantConfig(bits=6))[0], images, imagenet)):
        assert abs(found - report.top1[0]) <= 0.002


def test_renamed_outputs_are_compared_by_the_positions_left() -> None:
    """`b` is found by its name, so the output `a` is the one that the candidate calls `c`."""
    text = "net (float[n, 4] x) => (float[n, 3] {0}, float[n, 3] {1}) {{ {0} = MatMul(x, {2}) {1} = MatMul(x, {3}) }}"
    weights: dict[str, Any] = {"v": laplace(4, 3), "w": laplace(4, 3, seed=1)}
    reference = parse(text.format("a", "b", "v", "w"), **weights)
    candidate = parse(text.format("b", "c", "w", "v"), **weights)
    report = validate(reference, candidate, FeedSet(({"x": np.ones((1, 4), np.float32)},)), latency_batch=None)
    assert [(each.name, each.sqnr_db) for each in report.outputs] == [("a", math.inf), ("b", math.inf)]


def test_models_are_not_compared_on_the_noise_of_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own noise, a calibrated model looks better than it is."""
    seeds: list[int] = []

    def drawn(_: object, calibration: Calibration) -> NoReturn:
        seeds.append(calibration.seed)
        raise ConfigError("enough")

    monkeypatch.setattr("requant_onnx.cli.commands.calibration_images", drawn)
    save_model(small_cnn(), tmp_path / "m.onnx")
    path = str(tmp_path / "m.onnx")
    for command in (["validate", path, path], ["compare", path], ["convert", path, f"{path}.out", "--min-agreement", "9"]):
        assert main([*command, "--data", "noise"]) == 2
    assert len(seeds) == 3
    assert Calibration().seed not in seeds
