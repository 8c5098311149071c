"""Each step of refinement helps: correction restores means, feedback and descent lower the output error."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, missing, parse, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession

from requant_onnx import (
    Calibration,
    EdgeLayers,
    Form,
    Granularity,
    ImageSet,
    Int8Speed,
    Normalization,
    QuantConfig,
    Refinement,
    Transform,
    quantize_model,
)
from requant_onnx.convert.layerwise import targets
from requant_onnx.convert.report import sqnr_db
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.layers import find_layers, give_biases
from requant_onnx.inputs.images import load_cifar
from requant_onnx.numerics.factor import DAMPING, factor
from requant_onnx.numerics.feedback import RowGrid, feedback, output_error, refine
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.moments import Moments
from requant_onnx.numerics.parallel import thread_limit
from requant_onnx.numerics.quantize import Grid, quantize_weight
from requant_onnx.runtime.stream import Chunk, Lanes, Stream


def correlated_inputs(columns: int, seed: int = 0) -> np.ndarray:
    """H = E[x x'] of correlated inputs, like those of a layer."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * columns, columns)) @ generator.normal(size=(columns, columns)) ** 3 / columns
    return np.asarray(x.T @ x / len(x))


def grid_of(w: np.ndarray, bits: int, exponent: float) -> tuple[RowGrid, np.ndarray]:
    q = quantize_weight(w.astype(np.float32), Grid(bits, PowerGrid(exponent), 0))
    offset = q.table.max_code - q.zero_point.astype(np.int64)
    return RowGrid(q.scale.astype(np.float64)[None], offset[None], q.table, np.zeros((1, len(w))), False), q.codes[None]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("exponent", [1.0, 0.75, 0.5])
def test_feedback_has_a_higher_weight_error_and_a_lower_output_error(bits: int, exponent: float) -> None:
    w, h = laplace(12, 150).astype(np.float64), correlated_inputs(150)
    grid, nearest = grid_of(w, bits, exponent)
    w, h = w[None], h[None]
    fed = feedback(w, factor(h.astype(np.float32)), grid)
    differences = [grid.decode(codes) - w for codes in (nearest, fed)]
    weight, output = ([float(f.sum()) for f in pair] for pair in (
        [d**2 for d in differences],
        [output_error(d, h) for d in differences],
    ))  # fmt: skip
    assert weight[1] > weight[0]
    assert output[1] < 0.7 * output[0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), exponent=st.sampled_from([1.0, 0.75, 0.5]), refit=st.booleans())
def test_descent_never_raises_the_error(seed: int, bits: int, exponent: float, refit: bool) -> None:
    w, h = laplace(4, 20, seed=seed).astype(np.float64), correlated_inputs(20, seed)
    grid, codes = grid_of(w, bits, exponent)
    w, h = w[None], h[None]
    refined, after = refine(w, h.astype(np.float32), grid, codes, refit=refit)
    before = output_error(grid.decode(codes) - w, h)
    floor = 1e-6 * output_error(w, h)  # products are in float32
    assert (output_error(after.decode(refined) - w, h) <= before + floor).all()
    assert after.scale.min() > 0.0


@pytest.mark.filterwarnings("error")
def test_inputs_without_power_move_no_weight() -> None:
    """The second moments of tiny inputs may round to 0 or less."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 24))
    h = (x.T @ x / 200)[None]
    h[:, 3], h[:, :, 3] = 0.0, 0.0
    h[:, 7, 7] = -1e-9
    w = rng.normal(size=(1, 16, 24))
    q = quantize_weight(w[0].astype(np.float32), Grid(3, PowerGrid(0.5), 0))
    zero_points = q.table.max_code - q.zero_point.astype(np.int64)[None]
    grid = RowGrid(q.scale.astype(np.float64)[None], zero_points, q.table, np.zeros((1, 16)), False)
    refined, _ = refine(w, h.astype(np.float32), grid, q.codes[None], refit=False)
    assert (refined[..., [3, 7]] == q.codes[None][..., [3, 7]]).all()
    assert (refined != q.codes[None]).any()


def test_feedback_of_independent_inputs_is_nearest_rounding() -> None:
    w = laplace(5, 40).astype(np.float64)
    grid, nearest = grid_of(w, 4, 1.0)
    np.testing.assert_array_equal(feedback(w[None], factor(np.eye(40, dtype=np.float32)[None]), grid), nearest)


def test_the_factor_solves_and_tells_what_is_left_of_each_input() -> None:
    """In blocks of two sizes, and for groups; feedback with it equals the textbook version with the inverse."""
    for groups, n in ((1, 700), (3, 40)):
        h = np.stack([correlated_inputs(n, seed) for seed in range(groups)])
        made = factor(h.astype(np.float32))
        damped = h + DAMPING * np.diagonal(h, axis1=1, axis2=2).mean(1)[:, None, None] * np.eye(n)
        b = np.random.default_rng(0).normal(size=(groups, 5, n))
        solved = made.solve(b)
        assert np.linalg.norm(solved @ damped - b) <= 1e-3 * np.linalg.norm(b)
        for g in range(groups):
            order = made.order[g]
            upper = np.linalg.cholesky(np.linalg.inv(damped[g][np.ix_(order, order)])).T
            np.testing.assert_allclose(made.variances()[g][order], np.diag(upper) ** -2.0, rtol=1e-3)


def test_feedback_is_that_of_the_textbook() -> None:
    """GPTQ as published: the error of each weight, divided by U_jj, times row j of U, is propagated to those not yet rounded."""
    w, h = laplace(6, 300).astype(np.float64), correlated_inputs(300)
    grid, _ = grid_of(w, 3, 1.0)
    made = factor(h.astype(np.float32)[None])
    order = made.order[0]
    damped = h + DAMPING * np.mean(np.diag(h)) * np.eye(300)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, codes = w[:, order].copy(), np.empty(w.shape, np.int64)
    for j in range(300):
        levels = grid.table.integers[grid.offset[0][:, None] + np.arange(8)] * grid.scale[0][:, None]
        codes[:, j] = abs(levels - left[:, j : j + 1]).argmin(1)
        error = (left[:, j] - levels[np.arange(6), codes[:, j]]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    found = feedback(w[None], made, grid)[0][:, order]
    assert (found == codes).mean() > 0.99  # float32 decides for weights between two levels


@pytest.mark.parametrize("groups", [1, 40])
def test_results_do_not_depend_on_the_number_of_threads(groups: int) -> None:
    """The results of sums, factors, feedback and descent, for layers wider than a strip."""
    n, rows = (1200, 300) if groups == 1 else (9, 2)
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(groups, 2 * n, k)).astype(np.float32) for k in (n, rows))
    w = laplace(groups * rows, n).astype(np.float64)
    grid, _ = grid_of(w, 3, 1.0)
    w = w.reshape(groups, rows, n)
    shaped = replace(grid, **{name: getattr(grid, name).reshape(groups, rows) for name in ("scale", "offset", "min_scale")})
    results = []
    for threads in (1, 2, 4):
        with thread_limit(threads):
            moments = Moments.empty(groups, n, rows)
            moments.add(x, y)
            xx, _ = moments.centered()
            codes = feedback(w, factor(xx), shaped)
            results.append((xx.copy(), codes, *(np.asarray(part) for part in (refine(w, xx, shaped, codes, refit=True)[0],))))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_lanes_run_fewer_chunks_where_memory_is_short() -> None:
    """The second of three stops has large tensors; after it, the omitted chunks catch up with the others."""
    text = """net (float[n, 2, 4, 4] x) => (float[n, 2] y) { a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c)
        e = GlobalAveragePool(d) f = Flatten(e) y = Gemm(f, u) }"""
    model = parse(text, w=laplace(200, 2, 1, 1), v=laplace(2, 200, 1, 1), u=laplace(2, 2))
    chunks: list[Chunk] = [{"x": np.full((1, 2, 4, 4), k, np.float32)} for k in range(12)]
    lanes = Lanes(model, chunks, 2, [0, 2, 6], 100_000)
    counts = []
    for stop in (0, 2, 6):
        lanes.advance(stop, ({}, {}))
        counts.append([len(run.values) for run in lanes.runs])
    assert counts == [[4, 4], [4, 4], [12, 12]]
    session = InferenceSession(model.SerializeToString())
    for run, chunk in itertools.product(lanes.runs, range(12)):
        found = next(itertools.islice(run.output(6), chunk, None))
        np.testing.assert_allclose(np.asarray(found, np.float32), session.run(None, chunks[chunk])[0], rtol=1e-4, atol=1e-5)


def test_a_stream_runs_the_model_and_keeps_only_what_is_still_read() -> None:
    model, x = small_cnn(), np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    stream = Stream(model, [{"x": x[:2]}, {"x": x[2:]}])
    stream.advance(2, {})
    assert [set(chunk) for chunk in stream.values] == [{"b"}, {"b"}]
    last = len(model.graph.node) - 1
    stream.advance(last, {})
    found = np.concatenate([np.asarray(y) for y in stream.output(last)])
    expected = np.asarray(InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_conv_gets_a_bias_of_its_own() -> None:
    text = """net (float[n, 4, 6, 6] x) => (float[n, 4, a, b] y) { c = Conv(x, w, s) d = Conv(c, v, s) y = Conv(d, u) }"""
    weights: dict[str, Any] = {name: laplace(4, 4, 3, 3) for name in "wvu"}
    model = parse(text, s=laplace(4), **weights)
    give_biases(ModelGraph.of(model), set(weights))
    biases = [node.input[2] for node in model.graph.node]
    assert len(set(biases)) == 3
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    np.testing.assert_array_equal(stored[biases[1]], laplace(4))
    np.testing.assert_array_equal(stored[biases[2]], np.zeros(4, np.float32))


def images(count: int = 256) -> ImageSet:
    generator = np.random.default_rng(0)
    return ImageSet(np.maximum(generator.normal(0.5, 1.0, size=(count, 3, 8, 8)), 0).astype(np.float32), None)


def output_sqnr(config: QuantConfig, calibration: Calibration | None, model: onnx.ModelProto) -> float:
    x = np.random.default_rng(1).normal(0.5, 1.0, size=(64, 3, 8, 8)).clip(0).astype(np.float32)
    made, _ = quantize_model(model, config, calibration=calibration)
    y, y_hat = (np.asarray(InferenceSession(m.SerializeToString()).run(None, {"x": x})[0], np.float64) for m in (model, made))
    return sqnr_db(float((y**2).sum()), float(((y - y_hat) ** 2).sum()))


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
@pytest.mark.parametrize("granularity", Granularity)
def test_each_rung_improves_the_output(form: Form, granularity: Granularity) -> None:
    found = [
        output_sqnr(
            QuantConfig(3, granularity, form=form, int8_speed=Int8Speed.ALL, refinement=r),
            Calibration(images()) if r is not Refinement.NONE else None,
            small_cnn(),
        )
        for r in Refinement
    ]
    assert found[1] > found[0] + 0.2  # dB
    assert found[2] > found[1] + 1.0
    assert found[3] >= found[2] - 0.5


def test_every_decision_is_reported_and_none_is_worse_than_nearest() -> None:
    _, report = quantize_model(small_cnn(), QuantConfig(3), calibration=Calibration(images()))
    for weight in report.converted:
        assert weight.output_errors[weight.method] == min(weight.output_errors.values())
        assert {"nearest", "bias correction", "feedback", "feedback to the float output"} < weight.output_errors.keys()


def heavy_tailed_net() -> onnx.ModelProto:
    """A model of three Conv; the weights of the middle one have tails too heavy for a uniform grid."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 64, a, b] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w) d = Conv<pads = [1, 1, 1, 1]>(c, v) y = Conv(d, u) }"""
    middle = np.random.default_rng(0).standard_t(2.0, size=(16, 16, 3, 3)).astype(np.float32)
    return parse(text, w=laplace(16, 3, 3, 3), v=middle, u=laplace(64, 16, 1, 1))


def test_the_transform_is_chosen_where_it_costs_nothing() -> None:
    def transforms(form: Form, calibration: Calibration | None, bits: int = 3) -> list[str]:
        config = QuantConfig(bits, form=form, int8_speed=Int8Speed.ALL, edge_layers=EdgeLayers.PLAIN)
        return [weight.transform for weight in quantize_model(heavy_tailed_net(), config, calibration=calibration)[1].converted]

    noise = Calibration(count=16)
    plain = ["none", "none", "none"]
    for form in (Form.FOLDED, Form.INT8):
        found = transforms(form, noise)
        assert found[1] != "none"
        assert (found[0], found[2]) == ("none", "none")  # edge layers are never transformed
    assert transforms(Form.FOLDED, None) == plain
    assert transforms(Form.FOLDED, noise, bits=8) == plain
    assert transforms(Form.QDQ, noise) == plain


def test_the_chosen_transform_lowers_the_error() -> None:
    errors = []
    for transform in (Transform(1.0), Transform(None)):
        config = QuantConfig(3, transform=transform, form=Form.FOLDED)
        _, report = quantize_model(heavy_tailed_net(), config, calibration=Calibration(count=64))
        errors.append(report.converted[1].output_errors[report.converted[1].method])
    assert errors[1] < 0.8 * errors[0]


def test_a_layer_makes_up_for_the_error_of_its_shortcut() -> None:
    """The target of the Conv before the sum is the exact sum minus the rounded shortcut, not its own float output."""
    text = """net (float[n, 3, 8, 8] x) => (float[n, 16, a, b] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w) d = Conv<pads = [1, 1, 1, 1]>(c, v) y = Add(c, d) }"""
    model = parse(text, w=laplace(16, 3, 3, 3), v=laplace(16, 16, 3, 3, seed=1))
    layers = find_layers(ModelGraph.of(model), {"w", "v"})
    assert [layer.added_to for layer in layers] == ["", "c"]
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    exact, rounded = Stream(model, [{"x": x}]), Stream(model, [{"x": x}])
    coarse = onnx.numpy_helper.from_array(laplace(16, 3, 3, 3).round(), "w")
    for stream, replaced in ((exact, {}), (rounded, {"w": coarse})):
        stream.advance(1, replaced)
    target = np.asarray(next(targets(layers[1], exact, rounded)))
    d = np.asarray(next(exact.output(1)), np.float32)
    expected = d + np.asarray(exact.values[0]["c"], np.float32) - np.asarray(rounded.values[0]["c"], np.float32)
    np.testing.assert_allclose(target, expected, atol=1e-5)
    assert abs(target - d).max() > 0.1


@pytest.mark.parametrize("step", ["Cast<to = 1>", "Identity"])
def test_a_weight_that_two_nodes_read_behind_another_node_is_rounded_to_nearest(step: str) -> None:
    text = f"net (float[n, 24] x) => (float[n, 24] y) {{ t = {step}(w) a = MatMul(x, t) b = MatMul(a, v) y = MatMul(b, t) }}"
    model = parse(text, w=laplace(24, 24).astype(np.float16 if "Cast" in step else np.float32), v=laplace(24, 24, seed=1))
    assert [layer.weight for layer in find_layers(ModelGraph.of(model), {"w", "v"})] == ["v"]
    feeds = [{"x": laplace(4, 24, seed=k)} for k in range(16)]
    _, report = quantize_model(model, QuantConfig(3), calibration=Calibration.from_feeds(feeds))
    assert {weight.name: weight.method == "nearest" for weight in report.converted} == {"w": True, "v": False}


def test_the_same_input_gives_the_same_bytes() -> None:
    made = [
        quantize_model(small_cnn(), QuantConfig(3), calibration=Calibration(), threads=t)[0].SerializeToString() for t in (1, 2)
    ]
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_accuracy_of_our_model_without_any_data(bits: int) -> None:
    """Agreement with float on 1,000 CIFAR-10 train images, calibrated on noise; nearest levels: 88 % at 3 bits, 97 % at 4."""
    from cifar import find_cifar  # noqa: PLC0415

    folder = find_cifar("cifar10")
    if folder is None:
        missing("CIFAR-10 is neither in $CIFAR_DIR nor in the cache")
    cifar = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    x = cifar.apply(load_cifar("cifar10", folder, "train").x[-1000:])
    config = QuantConfig(bits, form=Form.FOLDED)
    made, _ = quantize_model(OWN_MODEL, config, calibration=Calibration(None, cifar))
    tops = []
    for model in (onnx.load(OWN_MODEL), made):
        session = InferenceSession(model.SerializeToString())
        name = session.get_inputs()[0].name
        tops.append(
            np.concatenate([np.asarray(session.run(None, {name: x[k : k + 100]})[0]).argmax(1) for k in range(0, 1000, 100)])
        )
    assert (tops[0] == tops[1]).mean() >= {3: 0.965, 4: 0.985}[bits]


def test_second_moments_of_few_places_are_held_to_their_diagonal() -> None:
    """Moments of many places are not shrunk, which would only take time."""
    for count, expected in ((2, True), (64, False)):
        _, report = quantize_model(small_cnn(), QuantConfig(3), calibration=Calibration(images().first(count), count=count))
        steps = {step for weight in report.converted[:3] for step in weight.output_errors}  # 64 places per image, 27 to 144 inputs
        assert any("shrinkage" in step for step in steps) == expected
