"""Files for compressed transfer: fewer bytes for the same error, and a size limit that the compressed file meets exactly."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import feeds_for, put, run
from test_feedback import correlated_inputs

from requant_onnx import (
    Budget,
    Calibration,
    ConfigError,
    EdgeLayers,
    Form,
    LayerRule,
    Normalization,
    OptimizeFor,
    QuantConfig,
    QuantReport,
    Refinement,
    quantize_model,
    save_model,
)
from requant_onnx.cli.main import main
from requant_onnx.convert.ladder import DOWNLOAD_SHRINKAGES
from requant_onnx.convert.nearest import Result
from requant_onnx.convert.prepare import Prepared
from requant_onnx.convert.report import sqnr_db
from requant_onnx.convert.widths import of_width
from requant_onnx.convert.write import Biases, Built, write
from requant_onnx.files.compressed import compress
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.prepare.transpose_gemm import transpose_gemm
from requant_onnx.numerics.factor import factor, shrunk
from requant_onnx.numerics.feedback import RowGrid, feedback, output_error, refine
from requant_onnx.numerics.price import RATE, REACH, ZERO, Price, entropy
from requant_onnx.numerics.quantize import Grid, quantize_weight
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import outputs_of, relative_error

ROUNDING = 1e-5  # relative to the largest output; float32 sums in another order (tests/test_oracle.py)
AIMS = [aim for aim in OptimizeFor if aim.compresses]
FEW = Calibration(count=8)
NOISE = Calibration(None, Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)), count=32)


def net() -> onnx.ModelProto:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1) b = Relu(a) c = Conv<pads = [1, 1, 1, 1], group = 16>(b, w2) d = Relu(c)
        e = Conv<pads = [1, 1, 1, 1]>(d, w3) f = Relu(e) y = Conv<pads = [1, 1, 1, 1]>(f, w4) }"""
    shapes = {"w1": (16, 3), "w2": (16, 1), "w3": (48, 16), "w4": (8, 48)}
    return parse(text, **{name: laplace(*shape, 3, 3, seed=k) for k, (name, shape) in enumerate(shapes.items())})


def grid_of(w: np.ndarray, step: float) -> RowGrid:
    q = quantize_weight(w.astype(np.float32), Grid.by_step(step, None, half_scales=False))
    scale, offset = np.full((1, len(w)), float(q.scale)), np.full((1, len(w)), q.table.max_code - ZERO)
    return RowGrid(scale, offset, q.table, np.zeros((1, len(w))), False)


def test_a_code_is_taken_for_its_bits() -> None:
    """By hand: for 0.6 steps, level 1 costs 0.16 and three bits, level 0 costs 0.36 and none."""
    bits = np.full(256, 9.0)
    bits[ZERO : ZERO + 2] = 0.0, 3.0
    for slope, level in ((0.06, 1), (0.07, 0)):
        found = Price(bits, slope).cheapest(np.array([0.6, -5.2]), np.array([ZERO + 1, ZERO - 5]), np.ones(2), np.ones(2))
        assert (found - ZERO).tolist() == [level, -5]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), step=st.floats(0.2, 3.0), slope=st.floats(0.0, 1.0))
def test_descent_never_raises_error_and_price(seed: int, step: float, slope: float) -> None:
    w, h = laplace(4, 20, seed=seed).astype(np.float64), correlated_inputs(20, seed)[None]
    grid = grid_of(w, step)
    codes = feedback(w[None], factor(h.astype(np.float32)), grid)
    price = Price.of(codes, slope)
    refined, _ = refine(w[None], h.astype(np.float32), grid, codes, refit=False, price=price)
    before, after = (output_error(grid.decode(each) - w, h).sum() + slope * price.bits[each].sum() for each in (codes, refined))
    assert after <= before + 1e-6 * output_error(w[None], h).sum()  # products are in float32


@pytest.mark.parametrize("step", [1.0, 2.0])
def test_codes_that_know_their_price_take_fewer_bits_at_equal_error(step: float) -> None:
    """The bits of plain rounding, with the step that gives the same error, compared with those of rounding by price."""
    w, h = laplace(64, 150).astype(np.float64)[None], correlated_inputs(150)[None]
    triangle, moments, step = factor(h.astype(np.float32)), h.astype(np.float32), step * float(w.std())

    def rounded(step: float, slope: float) -> tuple[float, float]:
        grid = grid_of(w[0], step)
        price = Price.of(feedback(w, triangle, grid), slope * step**2 * float(triangle.variances().mean()))
        codes = feedback(w, triangle, grid, price)
        codes, _ = refine(w, moments, grid, codes, refit=False, price=price.again(codes))
        return entropy(codes), float(output_error(grid.decode(codes) - w, h).sum())

    bits, error = rounded(step, RATE)
    plain = [rounded(step * more, 0.0) for more in np.linspace(0.8, 1.6, 9)]
    at_equal_error = np.interp(error, [each[1] for each in plain], [each[0] for each in plain])
    assert bits < 0.99 * at_equal_error


def test_moments_of_a_few_places_are_better_held_to_their_diagonal() -> None:
    """60 places for 150 inputs, evaluated with the moments of their distribution."""
    w, h = laplace(32, 150).astype(np.float64)[None], correlated_inputs(150)
    x = np.random.default_rng(1).multivariate_normal(np.zeros(150), h, 60)
    seen = (x.T @ x / 60).astype(np.float32)[None]
    grid = grid_of(w[0], float(w.std()))
    errors = [
        output_error(grid.decode(feedback(w, factor(shrunk(seen, share)), grid)) - w, h[None]).sum()
        for share in DOWNLOAD_SHRINKAGES
    ]
    assert errors[2] < 0.9 * errors[0]


@pytest.mark.parametrize("step", [0.01, 0.7])
def test_levels_reach_as_far_as_the_weights(step: float) -> None:
    w = laplace(8, 30)
    q = quantize_weight(w, Grid.by_step(step, 0, half_scales=True))
    assert np.abs(q.levels()).max() <= REACH
    assert np.abs(q.dequantize() - w).max() <= 2 * q.scale.max()  # toward zero, at most one level beyond the nearest


@given(low=st.integers(-9, 0), high=st.integers(0, 9), bits=st.sampled_from([2, 4]))
def test_narrow_codes_have_the_same_levels(low: int, high: int, bits: int) -> None:
    w = np.array([low, high] + [0] * 40, np.float32).reshape(2, 21)
    q = quantize_weight(w, Grid.by_step(1.0, None, half_scales=False))
    narrow = of_width(q, bits)
    zeros = (2 ** (bits - 1) - 1, 2 ** (bits - 1))
    fits = [q.levels().min() >= -zero and q.levels().max() < 2**bits - zero for zero in zeros]
    assert (narrow is not None) == any(fits)
    if narrow is not None:
        assert narrow.codes.max() < 2**bits
        np.testing.assert_array_equal(narrow.dequantize(), q.dequantize())


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("calibration", [None, FEW])
def test_the_compressed_file_is_never_above_the_size(aim: OptimizeFor, calibration: Calibration | None, tmp_path: Path) -> None:
    for size in (3_500, 6_000):
        config = QuantConfig(Budget(size=size), form=Form.FOLDED, optimize_for=aim)
        made, report = quantize_model(net(), config, calibration=calibration)
        save_model(made, tmp_path / "made.onnx")
        sent = len(compress((tmp_path / "made.onnx").read_bytes(), aim))
        assert 0.97 * size < sent <= size
        assert report.download_bytes == sent


def test_gzip_is_gzip() -> None:
    data = bytes(1000) + b"requant"
    assert gzip.decompress(compress(data, OptimizeFor.GZIP)) == data


def test_more_answers_are_right_in_the_same_download() -> None:
    """Compared with the usual bits, refined and compressed afterwards."""
    chunks = calibration_chunks(net(), Calibration(count=32, seed=1))
    exact, config = outputs_of(net(), chunks), QuantConfig(3, form=Form.FOLDED)
    packed, _ = quantize_model(net(), config, calibration=Calibration(count=64))
    size = len(compress(packed.SerializeToString(), OptimizeFor.GZIP))
    config = QuantConfig(Budget(size=size), form=Form.FOLDED, optimize_for=OptimizeFor.GZIP)
    made, report = quantize_model(net(), config, calibration=Calibration(count=64))
    assert (report.download_bytes or 0) <= size
    gained = [sqnr_db(1.0, relative_error(exact, outputs_of(model, chunks))) for model in (packed, made)]
    assert gained[1] > gained[0] + 1.0


@pytest.mark.parametrize("form", [Form.FOLDED, Form.QDQ])
@pytest.mark.parametrize("bits", [2, 6])
def test_the_model_is_that_with_the_decoded_weights(form: Form, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: dict[str, np.ndarray] = {}

    def watch(prepared: Prepared, results: Iterable[Result], biases: Biases) -> Built:
        every = list(results)
        weights.update((result.planned.weight.name, result.quantized.dequantize()) for result in every)
        return write(prepared, every, biases)

    monkeypatch.setattr("requant_onnx.convert.steps.write", watch)
    config = QuantConfig(bits, form=form, optimize_for=OptimizeFor.GZIP, refinement=Refinement.NONE)
    made, report = quantize_model(small_cnn(), config)
    assert weights.keys() == {weight.name for weight in report.converted}
    source = small_cnn()
    fold_batchnorm(ModelGraph.of(source))
    if form is Form.QDQ:
        transpose_gemm(ModelGraph.of(source), weights.keys())
    for name, values in weights.items():
        put(source.graph, name, values)
    feeds = feeds_for(source)
    for y, z in zip(run(source, feeds), run(made, feeds), strict=True):
        np.testing.assert_allclose(z, y, rtol=0, atol=ROUNDING * np.abs(y).max())


def test_the_same_bytes_for_every_number_of_threads() -> None:
    config = QuantConfig(2, form=Form.FOLDED, optimize_for=OptimizeFor.GZIP)
    files = {quantize_model(net(), config, calibration=FEW, threads=n)[0].SerializeToString() for n in (1, 2)}
    assert len(files) == 1


def test_bits_are_those_that_a_weight_takes_compressed() -> None:
    def bits(asked: int) -> float:
        _, report = convert(QuantConfig(asked, form=Form.FOLDED, optimize_for=OptimizeFor.GZIP))
        return 8 * (report.download_bytes or 0) / sum(np.prod(weight.shape) for weight in report.converted)

    assert 0.8 < bits(3) - bits(2) < 1.2


def convert(config: QuantConfig) -> tuple[onnx.ModelProto, QuantReport]:
    return quantize_model(net(), config, calibration=FEW)


def test_an_output_sqnr_is_reached() -> None:
    config = QuantConfig(Budget(sqnr_db=18.0), form=Form.FOLDED, optimize_for=OptimizeFor.GZIP)
    calibration = Calibration(count=16)
    made, _ = quantize_model(net(), config, calibration=calibration)
    held = calibration_chunks(net(), calibration)[3::4] or calibration_chunks(net(), calibration)
    assert 18.0 <= sqnr_db(1.0, relative_error(outputs_of(net(), held), outputs_of(made, held))) < 19.0


def test_rules_keep_their_grids() -> None:
    rules = (LayerRule("w3", bits=7), LayerRule("w1", keep=True))
    _, report = convert(QuantConfig(3, form=Form.FOLDED, optimize_for=OptimizeFor.GZIP, overrides=rules))
    assert {weight.name: weight.bits for weight in report.converted}["w3"] == 7
    assert "w1" not in {weight.name for weight in report.converted}


def test_a_rule_without_effect_is_refused() -> None:
    config = QuantConfig(3, form=Form.FOLDED, optimize_for=OptimizeFor.GZIP)
    with pytest.raises(ConfigError, match="'w3' sets a granularity, which has no effect with --optimize-for download:gz"):
        convert(replace(config, overrides=("w3=granularity:per-tensor", "w2=bits:4")))
    for rules in (("w3=granularity:per-tensor,bits:4",), ("w*=granularity:per-tensor", "w3=bits:4")):
        _, report = convert(replace(config, overrides=rules))
        assert {weight.name: weight.axis for weight in report.converted}["w3"] is None


def test_what_the_outputs_do_not_notice_gets_few_bits() -> None:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 24, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1) b = Conv<pads = [1, 1, 1, 1]>(x, w2) c = Mul(b, little) y = Add(a, c) }"""
    weights = {name: laplace(24, 3, 3, 3, seed=k) for k, name in enumerate(("w1", "w2"))}
    model = parse(text, little=np.float32(0.1), **weights)
    _, report = quantize_model(
        model, QuantConfig(3, form=Form.FOLDED, optimize_for=OptimizeFor.GZIP, edge_layers=EdgeLayers.PLAIN), calibration=FEW
    )
    scales = {weight.name: weight.scale.high for weight in report.converted}
    assert 5 < scales["w2"] / scales["w1"] < 20


def test_configurations_keep_it() -> None:
    config = QuantConfig(Budget(size=1000), form=Form.FOLDED, optimize_for=OptimizeFor.ZSTD)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert OptimizeFor("download") is OptimizeFor.BROTLI


@pytest.mark.parametrize(("aim", "package"), [(OptimizeFor.BROTLI, "brotli"), (OptimizeFor.ZSTD, "zstandard")])
def test_what_is_not_installed_is_named(aim: OptimizeFor, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs '{package}'; install it with: pip install 'requant_onnx\[download\]'"):
        quantize_model(net(), QuantConfig(4, form=Form.FOLDED, optimize_for=aim))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimize-for", "upload"], "--optimize-for 'upload' is not one of file, download:br, download:gz, download:zst"),
        (["--optimize-for", "download:gz", "--form", "int8"], "the int8 form cannot be optimized for downloads"),
        (["--optimize-for", "download:gz", "--bits", "auto", "--size", "300"], "the smallest file found has"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    onnx.save(net(), tmp_path / "net.onnx")
    files = [str(tmp_path / name) for name in ("net.onnx", "small.onnx")]
    assert main(["convert", *files, "--calibrate", "none", "--form", "folded", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_says_both_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(net(), tmp_path / "net.onnx")
    options = ["--bits", "auto", "--size", "5kB", "--optimize-for", "download:gz", "--form", "folded", "--calibrate", "none"]
    assert main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "small.onnx"), *options, "--force-quality"]) == 0
    sent = len(compress((tmp_path / "small.onnx").read_bytes(), OptimizeFor.GZIP))
    assert sent <= 5_000
    assert f"{sent:,} bytes as gzip" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trained_network_answers_better_in_the_same_download() -> None:
    """Our ResNet-20 in the compressed size of 3 refined bits, without data: at least 2 dB better, on other noise images."""
    chunks = calibration_chunks(onnx.load(OWN_MODEL), Calibration(None, NOISE.normalization, count=64, seed=1))
    exact = outputs_of(onnx.load(OWN_MODEL), chunks)
    packed, _ = quantize_model(OWN_MODEL, QuantConfig(3, form=Form.FOLDED), calibration=NOISE)
    size = len(compress(packed.SerializeToString(), OptimizeFor.BROTLI))
    config = QuantConfig(Budget(size=size), form=Form.FOLDED, optimize_for=OptimizeFor.BROTLI)
    made, _ = quantize_model(OWN_MODEL, config, calibration=NOISE)
    found = [sqnr_db(1.0, relative_error(exact, outputs_of(model, chunks))) for model in (packed, made)]
    assert found[1] > found[0] + 2.0
