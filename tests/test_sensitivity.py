"""inspect --sensitivity: the cost of quantizing each weight alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, small_cnn

from requant_onnx import Calibration, Form, QuantConfig, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.evaluate.sensitivity import WIDTHS, sensitivity
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import outputs_of, relative_error


def test_it_is_the_output_with_one_weight_replaced() -> None:
    noise = Calibration(count=16)
    costs = {cost.name: cost for cost in sensitivity(small_cnn(), noise)}
    assert costs.keys() == {"w1", "w2", "w3", "w4"}
    chunks = calibration_chunks(small_cnn(), noise)
    for name in ("w2", "w3"):
        others = [f"{other}=float" for other in costs if other != name]
        config = QuantConfig(3, form=Form.FOLDED, overrides=[*others, f"{name}=bits:3,transform:none"])
        alone, _ = quantize_model(small_cnn(), config)
        error = relative_error(outputs_of(small_cnn(), chunks), outputs_of(alone, chunks))
        assert costs[name].sqnr_db[3] == pytest.approx(-10 * np.log10(error), abs=0.01)
    for cost in costs.values():
        assert list(cost.sqnr_db) == list(cost.bytes) == list(WIDTHS)
        assert cost.sqnr_db[8] > cost.sqnr_db[4] > cost.sqnr_db[2]
        assert cost.bytes[8] > cost.bytes[4] > cost.bytes[2]


def test_the_command_lists_the_most_sensitive_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    command = ["inspect", str(tmp_path / "in.onnx"), "--json", str(tmp_path / "r.json")]
    assert main([*command, "--sensitivity", "--limit", "8"]) == 0
    printed = capsys.readouterr().out
    assert "inputs: x (float nx3x8x8)" in printed
    assert "outputs: y (float nx10)" in printed
    assert "of all float constants" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    worst = [cost["sqnr_db"]["2"] for cost in report["sensitivity"]]
    assert worst == sorted(worst)
    assert 0.9 < report["coverage"] <= 1.0
    assert main([*command, "--data", "noise"]) == 2
    assert "--data needs --sensitivity" in capsys.readouterr().err
    assert main(["inspect", str(OWN_MODEL)]) == 0
    assert "sensitivity" not in capsys.readouterr().out
