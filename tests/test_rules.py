"""Rules for single layers, from the command line, TOML and Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, skipped_weights

from requant_onnx import Budget, Calibration, ConfigError, Form, LayerRule, QuantConfig, QuantReport, Transform, quantize_model
from requant_onnx.cli.main import main

NOISE = Calibration(count=8)


def bits_of(report: QuantReport) -> dict[str, float]:
    return {weight.name: weight.bits for weight in report.converted}


def test_a_name_a_glob_an_expression_and_a_type() -> None:
    expression = r"re:stages\.2\.conv[12]\.weight=bits:5"
    rules = ("stages.0.conv1.weight=bits:2", "stages.1.*=bits:3", expression, "op:Gemm=float")
    _, report = quantize_model(OWN_MODEL, QuantConfig(4, overrides=rules), check=False)
    bits = bits_of(report)
    assert bits["stages.0.conv1.weight"] == 2
    assert {bits["stages.1.conv1.weight"], bits["stages.1.conv2.weight"]} == {3}
    assert {bits["stages.2.conv1.weight"], bits["stages.2.conv2.weight"]} == {5}
    assert bits["stages.3.conv1.weight"] == 4
    assert bits["conv.weight"] == 8  # an edge layer
    (kept,) = [item for item in report.skipped if item.name == "fc.weight"]
    assert kept.reason == "is kept in float by the rule 'op:Gemm'"


def test_names_of_nodes_match_too() -> None:
    model = onnx.load(OWN_MODEL)
    node = next(node for node in model.graph.node if "stages.4.conv1.weight" in node.input)
    node.name = "the/middle"
    _, report = quantize_model(model, QuantConfig(4, overrides=["*/middle=bits:6"]))
    assert [name for name, bits in bits_of(report).items() if bits == 6] == ["stages.4.conv1.weight"]


CONV = "Conv<pads = [1, 1, 1, 1]>"
REWRITTEN = {
    "directions": (
        'net (float[5, 1, 16] x) => (float[5, 2, 1, 32] y) { y = LSTM<hidden_size = 32, direction = "bidirectional">(x, w, r) }',
        {"w": laplace(2, 128, 16), "r": laplace(2, 128, 32)},
    ),
    "normalizations": (
        f"net (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) {{ a = {CONV}(x, w) b = BatchNormalization(a, g, g, g, g) "
        f"c = {CONV}(b, w) y = BatchNormalization(c, g, g, g, g) }}",
        {"w": laplace(16, 16, 3, 3), "g": np.linspace(0.5, 1.5, 16, dtype=np.float32)},
    ),
    "a transposed weight": (
        "net (float[n, 24] x) => (float[n, 24] y) { a = Gemm<transB = 1>(x, w) y = MatMul(a, w) }",
        {"w": laplace(24, 24)},
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rules_hold_for_weights_that_are_rewritten(name: str) -> None:
    text, weights = REWRITTEN[name]
    model = parse(text, **weights)
    _, report = quantize_model(model, QuantConfig(4, overrides={"w": {"bits": 6}}, edge_layers="plain"))
    assert all((bits == 6) == item.startswith("w") for item, bits in bits_of(report).items())
    assert not skipped_weights(report)
    _, report = quantize_model(model, QuantConfig(4, overrides={"w": "keep"}, edge_layers="plain"))
    assert {item.reason for item in skipped_weights(report)} == {"is kept in float by the rule 'w'"}
    assert not any(item.startswith("w") for item in bits_of(report))


def test_the_last_rule_that_sets_something_wins() -> None:
    rules = {"stages.*": {"bits": 3, "transform": "sqrt"}, "stages.0.*": {"bits": 5}}
    _, report = quantize_model(OWN_MODEL, QuantConfig(4, overrides=rules), check=False)
    first, second = (next(w for w in report.converted if w.name == f"stages.{k}.conv1.weight") for k in (0, 1))
    assert (first.bits, first.transform) == (5, "sqrt")
    assert (second.bits, second.transform) == (3, "sqrt")


def test_bits_of_a_rule_hold_for_edge_layers() -> None:
    _, report = quantize_model(OWN_MODEL, QuantConfig(4, overrides=["fc*=bits:3"]))
    assert bits_of(report)["fc.weight"] == 3


@pytest.mark.parametrize(("whole", "own"), [(Form.QDQ, "folded"), (Form.FOLDED, "qdq"), (Form.INT8, "folded")])
def test_layers_may_have_forms_of_their_own(whole: Form, own: str) -> None:
    rule = f"stages.5.*=form:{own}"
    made, report = quantize_model(OWN_MODEL, QuantConfig(4, form=whole, overrides=[rule]), calibration=NOISE)
    forms = {weight.name: weight.form for weight in report.converted}
    assert forms["stages.5.conv1.weight"] == own
    assert forms["stages.6.conv1.weight"] == whole.value
    onnx.checker.check_model(made)


def test_within_a_budget_rules_are_constraints() -> None:
    rules = ["stages.0.*=bits:8", "stages.1.*=float"]
    made, report = quantize_model(OWN_MODEL, QuantConfig(Budget(size=200_000), form=Form.FOLDED, overrides=rules))
    bits = bits_of(report)
    assert {bits["stages.0.conv1.weight"], bits["stages.0.conv2.weight"]} == {8}
    assert "stages.1.conv1.weight" not in bits
    assert made.ByteSize() <= 200_000
    assert len({bits[name] for name in bits if name.startswith("stages") and not name.startswith("stages.0.")}) > 1


def test_the_command_line_and_a_file_say_the_same(tmp_path: Path) -> None:
    head = ("[convert]", "bits = 4", 'calibrate = "none"', 'keep = ["fc*"]')
    lines = (*head, "[convert.layer]", '"stages.0.*" = { bits = 6 }', '"stages.1.*" = "float"')
    (tmp_path / "a.toml").write_text("\n".join(lines))
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--config", str(tmp_path / "a.toml")]) == 0
    options = ["--bits", "4", "--calibrate", "none", "--layer", "stages.0.*=bits:6", "--layer", "stages.1.*=float", "--keep", "fc*"]
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "b.onnx"), *options]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    rules: list[LayerRule | str] = ["stages.0.*=bits:6", LayerRule("stages.1.*", keep=True), LayerRule.of("fc*", "float")]
    made, report = quantize_model(OWN_MODEL, QuantConfig(4, overrides=rules), check=False)
    assert made.SerializeToString(deterministic=True) == onnx.load(tmp_path / "b.onnx").SerializeToString(deterministic=True)
    again = QuantConfig.from_dict(report.config)
    assert again == QuantConfig(4, overrides=rules)
    assert again.to_dict() == report.config


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--keep", "stages.O.conv1*"], "matches no weight of the model; similar names are 'stages.8.conv1.weight'"),
        (["--keep", "op:Convolution"], "similar names are 'op:Conv'"),
        (["--layer", "fc.weight"], "sets nothing"),
        (["--layer", "fc*=bits:9"], "give 1.6, 2, 2.33"),
        (["--layer", "fc*=bits:few"], "give 1.6, 2, 2.33"),
        (["--layer", "fc*=speed:9"], "sets 'speed'"),
        (["--layer", "fc*=form:fast"], "is not one of"),
        (["--layer", "fc*=form:int8"], "use --form int8"),
        (["--layer", "re:(=bits:8"], "not a regular expression"),
        (["--layer", "=bits:8"], "empty pattern"),
        (["--layer", "fc*=form:folded", "--runtime", "tensorrt"], "the folded form does not work with TensorRT"),
    ],
)
def test_mistakes_are_one_sentence(option: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), *option]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_list_of_rules_is_refused() -> None:
    for given in ("fc*=float", 3, [("fc*", 3)]):
        with pytest.raises(ConfigError, match="layer rule"):
            QuantConfig(overrides=given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="converts them"):
        LayerRule("a", keep=True, transform=Transform(0.5))
