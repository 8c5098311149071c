"""Models run on the requested execution provider; constants are computed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import OWN_MODEL

from requant_onnx import Calibration, ConfigError, Form, QuantConfig, quantize_model, use_provider
from requant_onnx.cli.main import main
from requant_onnx.runtime.sessions import provider_in_use

OTHER = "AzureExecutionProvider"  # in every build of ONNX Runtime for Python; leaves all ONNX operators to the CPU


@pytest.fixture(autouse=True)
def _back_to_the_cpu() -> Iterator[None]:
    yield
    use_provider(None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The providers of every session that is created."""
    seen: list[list[str]] = []
    make = onnxruntime.InferenceSession

    def recorded(source: object, options: object, providers: list[str]) -> onnxruntime.InferenceSession:
        seen.append(providers)
        return make(source, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    return seen


@pytest.mark.parametrize("name", ["azure", "AzureExecutionProvider", "AZURE"])
def test_names_are_read_as_they_are_written(name: str) -> None:
    use_provider(name)
    assert provider_in_use() == OTHER


def test_layers_are_refined_on_the_provider(asked: list[list[str]]) -> None:
    use_provider("azure")
    made, _ = quantize_model(OWN_MODEL, QuantConfig(4, form=Form.FOLDED), calibration=Calibration(count=8))
    assert [OTHER, "CPUExecutionProvider"] in asked  # the layers
    assert ["CPUExecutionProvider"] in asked  # the promise of the form
    use_provider(None)
    again, _ = quantize_model(OWN_MODEL, QuantConfig(4, form=Form.FOLDED), calibration=Calibration(count=8))
    assert made.SerializeToString() == again.SerializeToString()


def test_the_command_line_runs_on_the_provider(tmp_path: Path, asked: list[list[str]]) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 3, 32, 32), np.float32), y=np.zeros(4, np.int64))
    assert main(["validate", str(OWN_MODEL), str(OWN_MODEL), "--data", str(tmp_path / "x.npz"), "--provider", "azure"]) == 0
    assert asked
    assert all(providers[0] == OTHER for providers in asked)
    assert main(["inspect", str(OWN_MODEL)]) == 0  # it runs nothing and has no provider option
    asked.clear()
    assert main(["validate", str(OWN_MODEL), str(OWN_MODEL), "--data", str(tmp_path / "x.npz")]) == 0
    assert all(providers == ["CPUExecutionProvider"] for providers in asked)


def test_a_provider_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--provider", "abacus"]) == 2
    error = capsys.readouterr().err
    assert "no execution provider 'abacus'; it has azure, cpu" in error
    assert not (tmp_path / "a.onnx").exists()


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    use_provider("cuda")
    with pytest.warns(UserWarning, match="not in available provider"), pytest.raises(ConfigError, match="does not start"):
        quantize_model(OWN_MODEL, QuantConfig(4), calibration=Calibration(count=8))
