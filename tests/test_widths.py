"""Fractional widths, wherever bits are given, chosen, stored, run or reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, small_cnn, trained_model

from requant_onnx import Calibration, ConfigError, EdgeLayers, Form, LayerRule, QuantConfig, Runtime, load_session, quantize_model
from requant_onnx.choices import LEVELS, width_of
from requant_onnx.cli.main import main
from requant_onnx.graph.decode.packing import PACKINGS
from requant_onnx.numerics.infer import infer_grid
from requant_onnx.numerics.kinds import UNIFORM
from requant_onnx.numerics.quantize import Grid, quantize_weight, to_rows
from requant_onnx.runtimes import RUNTIMES

FRACTIONS = [bits for bits in LEVELS if bits % 1]
X = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)


def answers(model: onnx.ModelProto | Path) -> np.ndarray:
    return np.asarray(load_session(model).run(None, {"x": X})[0])


def test_every_width_has_a_packing_and_more_levels_than_the_one_before() -> None:
    assert list(PACKINGS) == list(LEVELS) == sorted(LEVELS)
    assert list(LEVELS.values()) == sorted(set(LEVELS.values()))
    assert all(abs(np.log2(levels) - bits) < 0.09 for bits, levels in LEVELS.items())
    assert RUNTIMES[Runtime.TENSORRT].bits == (4, 8)


def test_widths_are_read_as_they_are_meant() -> None:
    assert [width_of(bits) for bits in (1.6, 7 / 3, 8 / 3, 2.0, 5.5, 2.5, 1, 9, True, "4")] == [
        *(1.6, 2.33, 2.67, 2, 5.5),
        *(None,) * 5,
    ]
    assert str(QuantConfig(2.0).bits) == "2"
    config = QuantConfig(7 / 3, overrides=["fc*=bits:1.6", LayerRule("stem", bits=4.0)])
    assert [str(rule) for rule in config.rules] == ["fc*=bits:1.6", "stem=bits:4"]
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"bits must be one of 1\.6, 2, 2\.33, .*7 or 8, not 2\.5"):
        QuantConfig(2.5)
    with pytest.raises(ConfigError, match=r"3\.67-bit codes do not work .*; choose --bits 4 or 8"):
        QuantConfig(3.67, runtime=Runtime.TENSORRT)


@pytest.mark.parametrize("bits", FRACTIONS)
@pytest.mark.parametrize("axis", [None, 0])
def test_grids_between_whole_numbers_are_found(bits: float, axis: int | None) -> None:
    q = quantize_weight(laplace(8, 64, 3, 3), Grid(bits, UNIFORM, axis, half_scales=True))
    found = infer_grid(to_rows(q.dequantize(), axis))
    assert found is not None
    assert found.table.bits == bits
    assert q.codes.max() == LEVELS[bits] - 1


@pytest.mark.parametrize("runtime", [Runtime.ORT, Runtime.PORTABLE])
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("bits", [1.6, 2.33, 3.67, 4.5])
def test_every_form_runs(bits: float, form: Form, runtime: Runtime) -> None:
    """A whole net; its outputs improve with the bits, and the report states the width."""
    made, report = quantize_model(small_cnn(), QuantConfig(bits, form=form, runtime=runtime), calibration=Calibration(count=8))
    assert {weight.bits for weight in report.converted} <= {bits, 7, 8}
    assert bits in {weight.bits for weight in report.converted}
    assert json.loads(made.metadata_props[0].value)["bits"] == bits
    exact = answers(small_cnn())
    error = np.square(answers(made) - exact).mean() / np.square(exact).mean()
    assert error < 3 * 4.0**-bits


def test_ternary_weights_have_one_value_to_each_side() -> None:
    made, _ = quantize_model(small_cnn(), QuantConfig(1.6, form=Form.FOLDED, edge_layers=EdgeLayers.PLAIN))
    assert not [item.name for item in made.graph.initializer if item.name.endswith(".z")]
    w = laplace(16, 16, 3, 3) + np.float32(0.3)
    for symmetric, codes in ((True, 3), (False, 3)):
        q = quantize_weight(w, Grid(1.6, UNIFORM, 0, symmetric=symmetric))
        assert max(len(np.unique(row)) for row in q.dequantize().reshape(16, -1)) == codes


def test_the_command_line_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made, report = (str(tmp_path / name) for name in ("in.onnx", "out.onnx", "report.json"))
    onnx.save(small_cnn(), source)
    options = ["--bits", "2.667", "--layer", "w3=bits:1.6", "--calibrate", "none", "--force-quality"]
    assert main(["convert", source, made, *options, "--json", report]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[3] for row in rows if len(row) > 4} == {"weight": "bits", "w1": "8", "w2": "2.67", "w3": "1.6", "w4": "8"}
    assert [weight["bits"] for weight in json.loads(Path(report).read_text())["converted"]] == [8, 2.67, 1.6, 8]
    assert main(["explain", made]) == 0
    assert main(["restore", made, str(tmp_path / "float.onnx")]) == 0
    np.testing.assert_allclose(answers(tmp_path / "float.onnx"), answers(Path(made)), rtol=1e-4, atol=1e-5)
    assert main(["compare", source, "--bits", "1.6,3", "--recipes", "max", "--limit", "4", "--no-cache"]) == 0
    assert "\t1.6\t" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet20_cifar10", ""])
def test_a_ternary_resnet_20_is_below_72_kb(name: str) -> None:
    path = trained_model(name) if name else OWN_MODEL
    made, report = quantize_model(path, QuantConfig(1.6, form=Form.FOLDED), check=False)
    assert len(made.SerializeToString()) < 72_000
    assert report.opset[0] == report.opset[1]
