"""Bits chosen by their cost: never above the budget, and no worse than uniform bits."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from requant_onnx import (
    Budget,
    Calibration,
    ConfigError,
    EdgeLayers,
    Form,
    Granularity,
    ImageSet,
    Normalization,
    QuantConfig,
    Refinement,
    quantize_model,
)
from requant_onnx.convert.budget import _decibels
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import output_errors, outputs_of, relative_error

NOISE = Calibration(None, Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)), count=32)


def net() -> onnx.ModelProto:
    """A model of five Conv, of which the third hardly affects the output."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1) b = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(b, w2) d = Conv<pads = [1, 1, 1, 1]>(b, w3)
        e = Mul(d, little) f = Add(c, e) g = Relu(f) h = Conv<pads = [1, 1, 1, 1]>(g, w4) y = Conv<pads = [1, 1, 1, 1]>(h, w5) }"""
    shapes = {"w1": (16, 3), "w2": (24, 16), "w3": (24, 16), "w4": (24, 24), "w5": (8, 24)}
    weights = {name: laplace(*shape, 3, 3, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    return parse(text, **weights, little=np.float32(0.01))


def bits_of(config: QuantConfig, calibration: Calibration | None = None) -> dict[str, float]:
    return {weight.name: weight.bits for weight in quantize_model(net(), config, calibration=calibration)[1].converted}


@pytest.mark.parametrize(
    ("form", "calibration"),
    [
        (Form.QDQ, None),
        (Form.FOLDED, None),
        *(pytest.param(form, Calibration(count=8), marks=pytest.mark.slow) for form in Form),
    ],
)
def test_the_file_is_never_above_the_budget(form: Form, calibration: Calibration | None) -> None:
    sizes = [quantize_model(net(), QuantConfig(bits, form=form), calibration=calibration)[0].ByteSize() for bits in (2, 5)]
    for size in np.linspace(sizes[0] + 500, sizes[1] - 1000, 3).astype(int):
        made, report = quantize_model(net(), QuantConfig(Budget(size=int(size)), form=form), calibration=calibration)
        assert 0.85 * size < len(made.SerializeToString()) <= size
        assert {weight.bits for weight in report.converted} - {7, 8}


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
def test_budgets_are_spent_on_widths_between_whole_numbers(form: Form) -> None:
    """Also below the size of 2 bits, and never above the budget."""
    sizes = [quantize_model(net(), QuantConfig(bits, form=form))[0].ByteSize() for bits in (1.6, 2, 3)]
    for size in (sum(sizes[:2]) // 2, sum(sizes[1:]) // 2):
        made, report = quantize_model(net(), QuantConfig(Budget(size=size), form=form))
        assert 0.9 * size < len(made.SerializeToString()) <= size
    assert {weight.bits % 1 for weight in report.converted} != {0}


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(size=st.integers(9_000, 21_000), granularity=st.sampled_from(Granularity), edges=st.sampled_from(EdgeLayers))
def test_every_budget_is_kept_or_refused(size: int, granularity: Granularity, edges: EdgeLayers) -> None:
    config = QuantConfig(Budget(size=size), granularity, form=Form.FOLDED, edge_layers=edges)
    try:
        assert quantize_model(net(), config)[0].ByteSize() <= size
    except ConfigError as error:
        assert "the smallest possible file has" in str(error)  # noqa: PT017


def test_what_the_output_hardly_notices_gets_few_bits() -> None:
    found = bits_of(QuantConfig(Budget(size=13_000), form=Form.FOLDED), Calibration(count=16))
    assert found["w3"] == 2
    assert found["w2"] > 3
    assert bits_of(QuantConfig(Budget(size=13_000), form=Form.FOLDED))["w3"] > 2  # by the error of the weights alone


def test_more_bytes_give_less_error_and_the_front_says_so() -> None:
    _, report = quantize_model(net(), QuantConfig(Budget(size=13_000), form=Form.FOLDED), calibration=Calibration(count=8))
    assert len(report.front) > 5
    sizes, decibels = ([getattr(point, name) for point in report.front] for name in ("bytes", "sqnr_db"))
    assert sizes == sorted(sizes)
    assert decibels == sorted(decibels)
    assert decibels[-1] > decibels[0] + 20
    assert report.to_dict()["front"][0] == {"bytes": sizes[0], "sqnr_db": decibels[0]}
    assert (report.config["bits"], report.config["size"]) == ("auto", 13_000)


@pytest.mark.parametrize("refinement", [Refinement.NONE, Refinement.DESCENT])
def test_a_target_is_reached_in_less_than_the_same_bits_everywhere(refinement: Refinement) -> None:
    calibration = Calibration(count=16)
    target = 18.0
    config = QuantConfig(Budget(sqnr_db=target), form=Form.FOLDED, refinement=refinement)
    made, _ = quantize_model(net(), config, calibration=calibration)
    chunks = calibration_chunks(net(), calibration)
    held = chunks[3::4]
    assert -10 * np.log10(relative_error(outputs_of(net(), held), outputs_of(made, held))) >= target
    assert made.ByteSize() < quantize_model(net(), QuantConfig(6, form=Form.FOLDED))[0].ByteSize()


@pytest.mark.slow
def test_auto_is_no_worse_than_the_same_bits_everywhere() -> None:
    """Our ResNet-20 at the size of 3 bits, without data: the output error on other noise images, within 0.5 dB of chance."""
    others = calibration_chunks(onnx.load(OWN_MODEL), Calibration(None, NOISE.normalization, count=64, seed=1))
    exact = outputs_of(onnx.load(OWN_MODEL), others)
    same, _ = quantize_model(OWN_MODEL, QuantConfig(3, form=Form.FOLDED), calibration=NOISE)
    auto, _ = quantize_model(OWN_MODEL, QuantConfig(Budget(size=same.ByteSize()), form=Form.FOLDED), calibration=NOISE)
    assert auto.ByteSize() <= same.ByteSize()
    assert relative_error(exact, outputs_of(auto, others)) < 10**0.05 * relative_error(exact, outputs_of(same, others))


def test_the_output_error_of_each_weight_is_that_of_the_model_with_it_replaced() -> None:
    chunks = calibration_chunks(net(), Calibration(count=8))
    coarse = {
        name: laplace(*shape, 3, 3, seed=k).round(1) for k, (name, shape) in enumerate({"w1": (16, 3), "w2": (24, 16)}.items())
    }
    found = list(output_errors(net(), [{"w1": coarse["w1"]}, {"w2": coarse["w2"]}], {"w1", "w2"}, chunks))
    for (name, values), error in zip(coarse.items(), found, strict=True):
        changed = net()
        for initializer in changed.graph.initializer:
            if initializer.name == name:
                initializer.CopyFrom(onnx.numpy_helper.from_array(values, name))
        assert error == pytest.approx(relative_error(outputs_of(net(), chunks), outputs_of(changed, chunks)), rel=1e-3)


@pytest.mark.parametrize(
    ("budget", "calibration", "message"),
    [
        (Budget(size=5_000), None, "the smallest possible file has"),
        (Budget(sqnr_db=20.0), None, "give --calibrate"),
        (Budget(sqnr_db=90.0), Calibration(count=8), "below the target of 90 dB; lower the target"),
    ],
)
def test_what_cannot_be_is_refused(budget: Budget, calibration: Calibration | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_model(net(), QuantConfig(budget, form=Form.FOLDED), calibration=calibration)


def test_budgets_and_sizes() -> None:
    for size, sqnr in ((None, None), (1, 1.0), (0, None), (None, float("nan"))):
        with pytest.raises(ConfigError):
            Budget(size, sqnr)
    parsed = {text: Budget.parse_size(text) for text in ("180000", "180kB", "1.5MB", "176KiB", "2MiB", "1 GB", "0.5K")}
    assert list(parsed.values()) == [180_000, 180_000, 1_500_000, 180_224, 2_097_152, 10**9, 500]
    for text in ("", "kB", "-1", "1e3", "12 parsecs", "nan"):
        with pytest.raises(ConfigError, match="write it as"):
            Budget.parse_size(text)


def test_nothing_to_convert_is_copied_if_it_fits() -> None:
    model = parse("net (float[n] x) => (float[n] y) { y = Relu(x) }")
    made, report = quantize_model(model, QuantConfig(Budget(size=model.ByteSize())))
    assert (made, report.converted) == (model, ())
    with pytest.raises(ConfigError, match="no weight can be converted, so the file keeps"):
        quantize_model(model, QuantConfig(Budget(size=model.ByteSize() - 1)))


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes() -> None:
    config = QuantConfig(Budget(size=13_000), form=Form.FOLDED)
    images = Calibration(ImageSet(np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32), None))
    made = [quantize_model(net(), config, calibration=images, threads=t)[0].SerializeToString() for t in (1, 2)]
    assert made[0] == made[1]


def test_infinities_among_the_outputs_do_not_meet_a_target() -> None:
    """The error of an output with infinities is unknown, so it is not better than the target."""
    assert math.isnan(_decibels(math.nan))
    assert _decibels(0.0) == math.inf
    assert _decibels(0.01) == pytest.approx(20.0)
