"""A time limit: refinement is spent where it gains most per second, and skipped layers are reported."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
from conftest import OWN_MODEL

from requant_onnx import Budget, Calibration, ConfigError, Form, QuantConfig, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.convert.schedule import RESERVE, Clock, Cost, Schedule

NOISE = Calibration(count=32)


class Now:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return Now(monkeypatch)


def test_without_a_limit_every_layer_is_refined(now: Now) -> None:  # noqa: ARG001
    schedule = Schedule(Clock(), [Cost(1.0, 1.0, 50.0, 0.0)] * 3)
    assert all(schedule.is_full(k) for k in range(3))
    assert not schedule.is_over


def test_the_largest_gain_per_second_comes_first(now: Now) -> None:  # noqa: ARG001
    costs = [Cost(1.0, 1.0, 11.0, 1.0), Cost(1.0, 1.0, 11.0, 3.0), Cost(1.0, 1.0, 2.0, 0.5), Cost(1.0, 1.0, 101.0, 9.0)]
    schedule = Schedule(Clock(20.0 / (1 - RESERVE)), costs)  # 8 s for all of them, 12 s for refinement: 10 and 1 fit
    assert [schedule.is_full(k) for k in range(4)] == [False, True, True, False]


def test_what_layers_took_corrects_what_the_rest_will_take(now: Now) -> None:
    schedule = Schedule(Clock(100.0), [Cost(1.0, 1.0, 10.0, 1.0)] * 4)
    assert all(schedule.is_full(k) for k in range(4))
    now.seconds += 42.0
    schedule.done(0, 2.0, 40.0)  # nearly four times as long as estimated
    assert schedule.full == 1
    assert [schedule.is_full(k) for k in (1, 2, 3)].count(True) == 1
    now.seconds += 60.0
    assert schedule.is_over


def test_the_fraction_is_that_of_the_time_and_never_falls(now: Now) -> None:
    schedule = Schedule(Clock(), [Cost(1.0, 0.0, 9.0, 0.0)] * 10)
    shown = []
    for number in range(10):
        now.seconds += 30.0 if number == 5 else 10.0
        schedule.done(number, 1.0, 29.0 if number == 5 else 9.0)
        shown.append(schedule.fraction(number))
    assert shown[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert shown == sorted(shown)
    assert shown[-1] == 1.0


def test_a_limit_that_suffices_changes_no_byte() -> None:
    config = QuantConfig(4, form=Form.FOLDED)
    made, report = quantize_model(OWN_MODEL, config, calibration=NOISE, time_limit=3600.0)
    whole, _ = quantize_model(OWN_MODEL, config, calibration=NOISE)
    assert made.SerializeToString() == whole.SerializeToString()
    assert not any("time limit" in note for note in report.notes)


def test_a_limit_too_short_for_anything_gives_the_nearest_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "convert",
        str(OWN_MODEL),
        str(tmp_path / "a.onnx"),
        "--bits",
        "4",
        "--calibrate",
        "noise",
        "--calibrate-limit",
        "8",
    ]
    assert main([*arguments, "--time-limit", "0.01s"]) == 0
    assert "within the time limit of 0.01 s, 0 of 20 layers were refined" in " ".join(capsys.readouterr().out.split())
    onnx.checker.check_model(tmp_path / "a.onnx")


@pytest.mark.parametrize("text", ["soon", "-5s", "0", "5 parsecs", "inf", "1e400"])
def test_what_is_no_time_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--calibrate", "noise", f"--time-limit={text}"]
    assert main(arguments) == 2
    assert "--time-limit" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_in_python_are_checked(limit: float) -> None:
    with pytest.raises(ConfigError, match="time limit"):
        quantize_model(OWN_MODEL, time_limit=limit)


def test_a_budget_takes_no_limit() -> None:
    with pytest.raises(ConfigError, match="--bits auto"):
        quantize_model(OWN_MODEL, QuantConfig(Budget(size=100_000)), calibration=NOISE, time_limit=5.0)
