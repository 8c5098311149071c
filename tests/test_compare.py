"""The comparison: the same table, wherever its items run."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn
from rich.console import Console
from test_image_folder import write

from requant_onnx import Calibration, ConfigError, DataError, Form, ImageSet, QuantConfig, RequantError, quantize_model, validate
from requant_onnx.choices import Runtime
from requant_onnx.cli.commands import USUAL_BITS, _as_csv, _usual_bits
from requant_onnx.cli.main import main
from requant_onnx.cli.tables import print_comparison
from requant_onnx.evaluate.cache import Cache, key_of
from requant_onnx.evaluate.jobs import open_executor, run_all
from requant_onnx.evaluate.recipes import FLOAT, RECIPES, Comparison, Trial, _hits, _trial, compare
from requant_onnx.inputs.calibration import NATURAL
from requant_onnx.inputs.synthetic import noise_images
from requant_onnx.runtime.sessions import CUSTOM_OPS, PROVIDER

pytestmark = pytest.mark.xdist_group("compare")  # one reference table, and no race for free ports
RNG = np.random.default_rng(0)
IMAGES = ImageSet(RNG.integers(0, 256, (1200, 3, 8, 8)).astype(np.uint8), RNG.integers(0, 10, 1200))
CALIBRATION = Calibration(IMAGES.first(40))
MODEL = small_cnn().SerializeToString()


def table(executor: Executor, **options: Any) -> Comparison:
    return compare(MODEL, [4, 3], ["max", "paper", "best"], IMAGES, None, CALIBRATION, executor, **options)


@pytest.fixture(scope="module")
def expected() -> Comparison:
    with open_executor(1) as executor:
        return table(executor)


def test_each_line_is_what_convert_and_validate_say(expected: Comparison) -> None:
    assert expected.images == 1200
    assert [trial.bits for trial in expected.trials] == [4, 4, 4, 3, 3, 3]
    for few in (expected.trials[:3], expected.trials[3:]):
        decibels = [trial.sqnr_db or 0.0 for trial in few]
        assert decibels == sorted(decibels, reverse=True)
    for trial in expected.trials:
        calibration = CALIBRATION if trial.recipe == "best" else None
        made, _ = quantize_model(MODEL, RECIPES[trial.recipe](trial.bits), calibration=calibration)
        found = validate(MODEL, made, IMAGES)
        assert found.top1 == pytest.approx((expected.top1, trial.top1))
        assert (found.agreement, found.sqnr_db) == pytest.approx((trial.agreement, trial.sqnr_db), rel=1e-5)
        assert found.bytes == (expected.bytes, trial.bytes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_differ_from_each_other(recipe: str) -> None:
    others = [QuantConfig.paper(4) if name == "paper" else make(4) for name, make in RECIPES.items() if name != recipe]
    assert RECIPES[recipe](4) not in others


@pytest.mark.slow
def test_processes_give_the_same_table(expected: Comparison) -> None:
    with open_executor(2) as executor:
        assert table(executor) == expected


class _Refusing(ThreadPoolExecutor):
    def submit(self, fn: Any, /, *_: Any, **__: Any) -> Future[Any]:
        raise AssertionError(f"{fn.__name__} is done again")


def test_a_second_run_does_nothing_again(tmp_path: Path, expected: Comparison) -> None:
    cache = Cache(tmp_path / "cache")
    with open_executor(1) as executor:
        assert table(executor, cache=cache) == expected
    steps = []
    assert table(_Refusing(), cache=cache, progress=lambda *step: steps.append(step)) == expected
    assert [done for _, done, _ in steps] == list(range(1, 6 + 3 * 7 + 1))
    with pytest.raises(AssertionError, match="convert_item"):
        table(_Refusing(), cache=cache, form=Form.FOLDED)
    other = ImageSet(IMAGES.pixels[::-1], IMAGES.y)
    with pytest.raises(AssertionError, match="score_item"):
        compare(MODEL, [4], ["max"], other, None, CALIBRATION, _Refusing(), cache=cache)


def test_results_of_another_provider_or_library_are_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")

    def compared(executor: Executor) -> Comparison:
        return compare(MODEL, [4], ["max"], IMAGES.first(20), None, None, executor, cache=cache)

    with open_executor(1) as executor:
        compared(executor)
    compared(_Refusing())
    (tmp_path / "library.so").write_bytes(b"changed")
    for name, value in ((PROVIDER, "OtherExecutionProvider"), (CUSTOM_OPS, str(tmp_path / "library.so"))):
        with monkeypatch.context() as patch:
            patch.setattr("requant_onnx.evaluate.recipes._probe", lambda *_: True)  # ONNX Runtime has neither
            patch.setenv(name, value)
            with pytest.raises(AssertionError, match="convert_item"):
                compared(_Refusing())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, expected: Comparison) -> None:
    cache, seen = Cache(tmp_path / "cache"), []

    def interrupt(_: str, done: int, total: int) -> None:
        seen.append(done)
        if done == total // 2 and len(seen) == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_executor(1) as executor:
        table(executor, cache=cache, progress=interrupt)
    kept = len(list((tmp_path / "cache").iterdir()))
    assert kept >= len(seen)
    with open_executor(1) as executor:
        assert table(executor, cache=cache, progress=interrupt) == expected
    assert len(list((tmp_path / "cache").iterdir())) == 6 + 3 * 7 > kept


def test_the_cache_keeps_to_its_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "thesis.txt").write_bytes(bytes(1000))  # a user's own file, the oldest
    os.utime(tmp_path / "thesis.txt", (0, 0))
    keys = [key_of(str(k)) for k in range(5)]
    for k, key in enumerate(keys):
        cache.put(key, bytes(100))
        os.utime(tmp_path / key, (k, k))
    assert cache.get(keys[0]) == bytes(100)  # now the most recently used
    cache.trim(250)
    assert {path.name for path in tmp_path.iterdir()} == {keys[0], keys[4], "thesis.txt"}
    Cache(tmp_path / "no" / "folder").trim()
    (tmp_path / "file").write_text("")
    Cache(tmp_path / "file").put("a", b"b")  # a result that cannot be stored is dropped
    assert Cache(tmp_path / "file").get("a") is None
    assert Cache(None).get("a") is None


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse() -> None:
    raise DataError("one sentence")


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_others_pass_through() -> None:
    with pytest.raises(RequantError, match="a worker process was killed"), open_executor(2) as executor:
        run_all(executor, {1: (_end, ())}, lambda *_: None)
    with pytest.raises(DataError, match="one sentence"), open_executor(2) as executor:
        run_all(executor, {1: (_refuse, ())}, lambda *_: None)
    with pytest.raises(ConfigError, match="--jobs must be 1 or more"), open_executor(0):
        pass


# ------------------------------------------------------------------------------------------------ Dask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers on loopback, as (address, workers)."""
    pytest.importorskip("distributed")
    address = f"tcp://127.0.0.1:{_free_port()}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    dask = [sys.executable, "-m", "distributed.cli.dask_"]
    scheduler = [
        *dask[:2],
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        address.rpartition(":")[2],
        "--no-dashboard",
    ]
    worker = [
        *dask[:2],
        "distributed.cli.dask_worker",
        address,
        "--nthreads",
        "1",
        "--no-nanny",
        "--no-dashboard",
        "--host",
        "127.0.0.1",
    ]
    started = [subprocess.Popen(command, **quiet) for command in (scheduler, worker, worker)]  # type: ignore[call-overload]
    yield address, started[1:]
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_cluster_gives_the_same_table_though_a_worker_is_killed(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], expected: Comparison
) -> None:
    from distributed import Client  # noqa: PLC0415

    address, workers = cluster
    with Client(address, timeout="30s", set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)

    def kill_one(_: str, done: int, total: int) -> None:
        if done == total // 2:
            workers[0].send_signal(signal.SIGKILL)

    with open_executor(dask=address) as executor:
        assert table(executor, progress=kill_one) == expected
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert workers[1].poll() is None


def test_no_scheduler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("requant_onnx.evaluate.jobs.PATIENCE", "1s")
    started = time.monotonic()
    wrong = {f"tcp://127.0.0.1:{_free_port()}": "no Dask scheduler answers", "nonsense://": "write it as", "foo": "write it as"}
    for address, said in wrong.items():
        with pytest.raises(ConfigError, match=said), open_executor(dask=address):
            pass
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_scheduler_without_workers_is_an_error(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, workers = cluster
    for worker in workers:
        worker.kill()
        worker.wait()
    monkeypatch.setattr("requant_onnx.evaluate.jobs.PATIENCE", "5s")
    with pytest.raises(ConfigError, match="has no worker"), open_executor(dask=address):
        pass


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_the_table_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert IMAGES.y is not None
    np.savez(tmp_path / "i.npz", x=IMAGES.pixels[:300].transpose(0, 2, 3, 1), y=IMAGES.y[:300])
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "html")}
    command = ["compare", str(tmp_path / "in.onnx"), "--data", str(tmp_path / "i.npz"), "--cache", str(tmp_path / "cache")]
    command += ["--bits", "4,2", "--recipes", "max,channel", "--jobs", "1"]
    assert main([*command, *(part for kind, path in files.items() for part in (f"--{kind}", str(path)))]) == 0
    printed = capsys.readouterr().out
    told = json.loads(files["json"].read_text())
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["recipe"], row["bits"]) for row in rows] == [(trial["recipe"], str(trial["bits"])) for trial in told["trials"]]
    assert len(rows) == 4
    for row in rows:
        assert f"{int(row['bytes']):,}" in printed
        assert f"{int(row['bytes']):,}" in files["html"].read_text()
    assert main([*command, "--csv", str(files["csv"])]) == 2  # exists already
    assert main([*command, "--csv", str(files["csv"]), "--force", "-q"]) == 0


def test_large_files_have_fewer_compressed_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    large, small = Trial("max", 8, 9, 1.0, None, None, 1.0, 40.0), Trial("max", 4, 4, 2.0, None, None, 0.9, 20.0)
    trials = (replace(large, downloads={"gz": 8}), replace(small, downloads={"gz": 3, "br": 2}))
    comparison = Comparison(9, None, 1, trials)
    rows = list(csv.DictReader(_as_csv(comparison).splitlines()))
    assert [(row["bytes_gz"], row["bytes_br"]) for row in rows] == [("8", ""), ("3", "2")]
    print_comparison(Console(width=200), comparison)
    assert "brotli bytes" in capsys.readouterr().out


def test_without_data_the_models_are_compared_on_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert main(["compare", str(tmp_path / "in.onnx"), "--bits", "4", "--no-cache", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "without labels" in printed
    assert "top-1" not in printed


def test_noise_has_the_size_and_number_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_cnn()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    onnx.save(model, tmp_path / "in.onnx")
    command = ["compare", str(tmp_path / "in.onnx"), "--bits", "4", "--recipes", "max,best", "--no-cache", "--jobs", "1"]
    assert main(command) == 2
    assert "give noise with a size" in capsys.readouterr().err
    assert main([*command, "--calibrate", "noise:9x7", "--limit", "20"]) == 0
    assert "20 images without labels" in capsys.readouterr().out
    assert main([*command, "--calibrate", "noise:9x7", "--data", "noise:8x8"]) == 0


def test_files_are_for_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    command = ["compare", str(tmp_path / "in.onnx"), "--no-cache", "--jobs", "1", "--recipes", "channel", "--limit", "8"]
    report = ["--json", str(tmp_path / "r.json"), "-q"]
    assert main([*command, "--runtime", "tensorrt", *report]) == 0
    assert [trial["bits"] for trial in json.loads((tmp_path / "r.json").read_text())["trials"]] == [8, 4]
    sizes = {}
    for options in ("--runtime web", "--runtime web --form folded", "--runtime web --form qdq"):
        assert main([*command, "--bits", "4", *options.split(), *report]) == 0
        sizes[options] = json.loads((tmp_path / "r.json").read_text())["trials"][0]["bytes"]
    assert sizes["--runtime web"] == sizes["--runtime web --form folded"] != sizes["--runtime web --form qdq"]
    assert main([*command, "--runtime", "tensorrt", "--bits", "3"]) == 2
    assert "3-bit codes do not work with TensorRT (--runtime tensorrt); choose --bits 4 or 8" in capsys.readouterr().err


def test_labels_have_to_be_classes_of_the_model() -> None:
    labels = np.array([0, 1, 5000])
    with pytest.raises(DataError, match="the labels are 0 to 5000, but the model gives 10 scores"):
        compare(MODEL, [4], ["max"], ImageSet(IMAGES.pixels[:3], labels), None, None, _Refusing())


def test_scores_with_nan_are_no_answer() -> None:
    """NumPy's argmax would choose the NaN."""
    exact = np.array([[1, 0], [0, 1], [np.nan, 0], [0, 1]], np.float32)
    scores = np.array([[np.nan, 0], [np.nan, 0], [np.nan, 0], [0, 1]], np.float32)
    images = ImageSet(IMAGES.pixels[:4], np.array([0, 1, 0, 1]))
    assert _hits(exact, images) == 0.75
    trial = _trial(FLOAT, 1, 1, exact, scores, images, 0.75)
    assert (trial.top1, trial.agreement) == (0.25, 0.25)


def test_without_calibration_only_what_needs_none_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    command = ["compare", str(tmp_path / "in.onnx"), "--bits", "4", "--no-cache", "--jobs", "1", "--calibrate", "none"]
    assert main([*command, "--recipes", "max"]) == 0
    for options, said in (
        ([], "the recipe 'best' needs calibration inputs; give --calibrate, or other --recipes"),
        (["--recipes", "max", "--form", "int8"], "the int8 form needs calibration inputs; give --calibrate, or another --form"),
        (["--recipes", "max", "--seed", "1"], "--seed needs --calibrate"),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err


def test_a_model_that_returns_classes_has_an_accuracy() -> None:
    text = "net (float[n, 3, 4, 4] x) => (int64[n] y) { f = Flatten (x) s = MatMul (f, w) y = ArgMax <axis = 1, keepdims = 0> (s) }"
    model = parse(text, w=laplace(48, 9)).SerializeToString()
    images = ImageSet(np.random.default_rng(0).integers(0, 255, (40, 3, 4, 4)).astype(np.uint8), np.arange(40) % 9)
    with open_executor(1, None) as executor:
        found = compare(model, [2, 3], ["max", "channel"], images, None, None, executor)
    assert found.top1 is not None
    assert [trial.bits for trial in found.trials] == [3, 3, 2, 2]
    for trial in found.trials:
        assert trial.top1 is not None
        assert trial.change == pytest.approx(trial.top1 - found.top1)
        assert trial.sqnr_db is None
    for better, worse in (found.trials[:2], found.trials[2:]):
        assert (better.agreement or 0) >= (worse.agreement or 0)


def test_calibrate_auto_is_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    command = ["compare", str(tmp_path / "in.onnx"), "--bits", "4", "--no-cache", "--jobs", "1", "--limit", "8"]
    printed = []
    for options in ([], ["--calibrate", "auto"]):
        assert main([*command, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "recipe" in printed[0]


def test_options_of_the_data_need_no_calibration(tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    for k in range(2):
        write(tmp_path / "images" / f"{k}.png", 9, 9, seed=k)
    command = ["compare", str(tmp_path / "in.onnx"), "--bits", "4", "--no-cache", "--jobs", "1", "--calibrate", "none"]
    given = ["--data", f"images:{tmp_path / 'images'}", "--fit", "--mean", "0.5", "--std", "0.5"]
    assert main([*command, "--recipes", "max", *given]) == 0


def test_the_usual_widths_are_those_that_the_form_has() -> None:
    assert _usual_bits(Form.INT8, Runtime.TENSORRT) == [8]
    assert _usual_bits(Form.QDQ, Runtime.ORT) == list(USUAL_BITS)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
def test_ctrl_c_is_one_line_while_processes_start(tmp_path: Path, seconds: float) -> None:
    """As in a terminal, sent to all processes at once.  seconds: time after the first process has started."""
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    command = [sys.executable, "-m", "requant_onnx", "compare", str(tmp_path / "in.onnx"), "--no-cache", "--jobs", "2"]
    command += ["--bits", "8,7,6,5.5,5,4.5,4,3.67,3.33,3,2.67,2.33,2,1.6"]  # takes longer than the largest of `seconds`
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text() and started.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(started.pid, signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert error.decode() == "interrupted; no file was left half-written\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--cache", "/dev/null/x"],
        ["--csv", "same", "--json", "same"],
        ["--limit", "0"],
        ["--data", "images:"],
        ["--bits", "9"],
        ["--bits", "x"],
        ["--recipes", "nothing"],
        pytest.param(["--recipes", ""], marks=pytest.mark.slow),  # starts processes first
        ["--jobs", "0"],
        ["--form", "x"],
        ["--data", "x"],
    ],
)
def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert main(["compare", str(tmp_path / "in.onnx"), "--no-cache", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("recipes", ["", " ", ",", "max,,best"])
def test_an_empty_recipe_is_refused_with_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipes: str) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert main(["compare", str(tmp_path / "in.onnx"), "--no-cache", "--jobs", "1", "--recipes", recipes]) == 2
    error = capsys.readouterr().err
    assert error == f"error: the list of recipes is empty or has an empty name; choose from {', '.join(RECIPES)}\n"


def test_models_whose_outputs_are_no_scores_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "net (float[n, 3, 16, 16] x) => (float[n, 2, 16, 16] y) { a = Conv<pads = [1, 1, 1, 1]>(x, v) b = Relu(a) y = Conv(b, w) }"
    )
    model = parse(text, v=laplace(24, 3, 3, 3), w=laplace(2, 24, 1, 1, seed=1))
    onnx.save(model, tmp_path / "in.onnx")
    command = ["compare", str(tmp_path / "in.onnx"), "--bits", "8,3", "--recipes", "max,channel", "--limit", "8", "--jobs", "1"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert main([*command, *cache, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 0
    trials = json.loads((tmp_path / "a.json").read_text())["trials"]
    assert [trial["agreement_of"] for trial in trials] == ["pixels"] * 4
    made, _ = quantize_model(model, RECIPES["channel"](3))
    images = ImageSet(noise_images(8, 3, 16, 16, seed=1), None)
    alone = validate(model, made, images, NATURAL, latency_batch=None)
    (same,) = [trial for trial in trials if (trial["recipe"], trial["bits"]) == ("channel", 3)]
    assert (same["agreement"], same["sqnr_db"]) == pytest.approx((alone.agreement, alone.sqnr_db), rel=1e-6)
    assert main([*command, *cache, "--json", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    np.savez(tmp_path / "labeled.npz", x=np.zeros((4, 16, 16, 3), np.uint8), y=np.zeros(4, np.int64))
    assert main([*command, "--no-cache", "--data", str(tmp_path / "labeled.npz")]) == 2
    assert "is not one row of scores" in capsys.readouterr().err
