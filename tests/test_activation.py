"""Histograms of activations, grids from them, and noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import parse, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from requant_onnx import Form, ImageSet, Int8Speed, QuantConfig, quantize_model
from requant_onnx.choices import ActivationRange
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.synthetic import noise_images
from requant_onnx.numerics.activation import HALF, ActivationGrid, Histogram, activation_grid
from requant_onnx.runtime.activation_ranges import alphas_by_output
from requant_onnx.runtime.feeds import watch_activations

values = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32))


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


@settings(deadline=None)
@given(batches=st.lists(values, min_size=1, max_size=5))
def test_a_histogram_that_grew_equals_one_that_knew_the_range(batches: list[np.ndarray]) -> None:
    grown, everything = histogram_of(*batches), np.concatenate(batches)
    edges = (np.arange(2 * HALF + 1) - HALF) * grown.width
    expected, _ = np.histogram(everything[everything != 0.0].astype(np.float64), edges) if grown.width else (grown.counts, None)
    np.testing.assert_array_equal(grown.counts, expected)
    assert (grown.low, grown.high) == (min(0.0, everything.min()), max(0.0, everything.max()))
    assert grown.seen == everything.size


@pytest.mark.slow
@settings(deadline=None)
@given(x=values, method=st.sampled_from(ActivationRange))
def test_zero_is_exact_and_min_max_covers_all(x: np.ndarray, method: ActivationRange) -> None:
    grid = activation_grid(histogram_of(x), method)
    assert grid.low <= 0.0 <= grid.high
    assert grid.scale > 0.0
    if method is ActivationRange.MIN_MAX:
        slack = float(grid.scale) * 0.51  # the zero point is rounded to an integer
        assert grid.low - slack <= min(0.0, x.min())
        assert grid.high + slack >= max(0.0, x.max())


def error(x: np.ndarray, method: ActivationRange) -> float:
    grid = activation_grid(histogram_of(x), method)
    q = np.clip(np.rint(x / grid.scale) + int(grid.zero_point), 0, 255)
    return float((((q - int(grid.zero_point)) * grid.scale - x) ** 2).mean())


def test_the_mse_range_has_the_least_error_and_the_percentile_leaves_outliers_out() -> None:
    generator = np.random.default_rng(0)
    x = np.maximum(generator.laplace(size=200_000), 0).astype(np.float32)
    x[0] = 60.0
    errors = {method: error(x, method) for method in ActivationRange}
    assert errors[ActivationRange.MSE] < 0.95 * errors[ActivationRange.MIN_MAX]
    assert errors[ActivationRange.MSE] <= errors[ActivationRange.PERCENTILE]
    grid = activation_grid(histogram_of(x), ActivationRange.PERCENTILE)
    assert grid.high == pytest.approx(np.quantile(x, 0.9999), rel=0.02)
    assert (x > grid.high).mean() <= 1.5e-4


def test_relu_gets_the_zero_point_0() -> None:
    """With another zero point, ONNX Runtime does not absorb the Relu."""
    for method in ActivationRange:
        assert activation_grid(histogram_of(np.arange(100, dtype=np.float32)), method).zero_point == 0


def test_noise_looks_like_images() -> None:
    """The power of natural images falls as 1/f**2: about a factor of 4 per octave."""
    images = noise_images(64, 3, 32, 32)
    assert (images == noise_images(64, 3, 32, 32)).all()
    assert not (images == noise_images(64, 3, 32, 32, seed=1)).all()
    pixels = images / 255
    assert 0.4 < pixels.mean() < 0.52
    assert 0.2 < pixels.std() < 0.3
    power = (abs(np.fft.rfft2(pixels)) ** 2).mean((0, 1))
    assert 2.0 < power[2, 0] / power[4, 0] < 8.0
    assert 2.0 < power[4, 0] / power[8, 0] < 8.0
    red, green = pixels[:, 0].ravel(), pixels[:, 1].ravel()
    assert np.corrcoef(red, green)[0, 1] > 0.8


def test_batches_are_bounded_by_the_memory_of_what_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    one = 16 * 8 * 8 * 4  # bytes of the tensor b for one image
    monkeypatch.setattr("requant_onnx.runtime.feeds.BATCH_BYTES", 3 * one)
    found = watch_activations(small_cnn(), ["b"], Calibration(count=8), lambda done, total: sizes.append((done, total)))
    assert sizes == [(3, 8), (6, 8), (8, 8)]
    assert found["b"].seen == 8 * one // 4


def outliers_without_weight() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A model with a tiny weight on its second channel, where values are 100 times as large; and inputs."""
    model = parse("net (float[n, 2] x) => (float[n, 1] y) { y = MatMul(x, w) }", w=np.array([[1.0], [1e-4]], np.float32))
    x = np.random.default_rng(0).normal(size=(4, 64, 2)).astype(np.float32) * np.array([1, 100], np.float32)
    return model, [{"x": part} for part in x]


def test_a_range_by_output_clips_what_does_not_matter_and_a_range_by_its_own_error_does_not() -> None:
    model, chunks = outliers_without_weight()
    histogram = histogram_of(*(chunk["x"] for chunk in chunks))

    def grid_at(_name: str, alpha: float) -> ActivationGrid:
        return activation_grid(histogram, ActivationRange.OUTPUT, alpha=alpha)

    own = activation_grid(histogram, ActivationRange.MSE)
    start = float(own.scale / grid_at("x", 1.0).scale)
    alpha = alphas_by_output(model, {"x": start}, grid_at, chunks, corrected=False)["x"]
    assert start > 0.5
    assert alpha < 0.1
    weights, fine = np.array([1.0, 1e-4]), grid_at("x", alpha)
    x = np.concatenate([chunk["x"] for chunk in chunks])
    error, coarse = (float(np.square((grid.rounded(x) - x) @ weights).mean()) for grid in (fine, own))
    clipped = float(np.square(x[:, 1] * weights[1]).mean())  # the whole contribution of the second channel
    assert error <= 2 * ((fine.scale / 2) ** 2 + clipped) < coarse  # (a + b)**2 <= 2 a**2 + 2 b**2


def test_ranges_by_output_stay_where_they_start_when_the_time_is_over() -> None:
    model, chunks = outliers_without_weight()
    histogram = histogram_of(*(chunk["x"] for chunk in chunks))

    def grid_at(_name: str, alpha: float) -> ActivationGrid:
        return activation_grid(histogram, ActivationRange.OUTPUT, alpha=alpha)

    asked: list[tuple[int, int]] = []

    def never(done: int, total: int) -> bool:
        asked.append((done, total))
        return False

    assert alphas_by_output(model, {"x": 0.9}, grid_at, chunks, corrected=False, goes_on=never) == {"x": 0.9}
    assert asked == [(0, 1)]


def test_a_time_limit_also_ends_the_choice_of_activation_ranges() -> None:
    steps: list[str] = []
    images = Calibration(ImageSet(noise_images(8, 3, 8, 8, seed=1), None), count=8)
    config = QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL)

    def progress(what: str, _done: int, _total: int) -> None:
        steps.append(what)

    for limit in (None, 1e-6):
        steps.clear()
        _, report = quantize_model(small_cnn(), config, calibration=images, progress=progress, time_limit=limit)
        assert (steps.count("choosing activation ranges") > 1) == (limit is None)
        assert len(report.activations) > 1


def test_rounded_values_lie_on_the_grid() -> None:
    grid = ActivationGrid(np.float32(0.5), np.uint8(2))
    assert grid.rounded(np.array([-9.0, -0.6, 0.2, 0.3, 500.0], np.float32)).tolist() == [-1.0, -0.5, 0.0, 0.5, 126.5]


def test_on_noise_ranges_by_output_are_those_of_all_values() -> None:
    config = QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL)
    made = [
        quantize_model(small_cnn(), replace(config, activation_range=method), calibration=Calibration(count=8))[1].activations
        for method in (ActivationRange.OUTPUT, ActivationRange.MIN_MAX)
    ]
    assert made[0] == made[1]
