"""Progressive files: each stage refines the one before it, and needs only a beginning of the data file."""

from __future__ import annotations

import errno
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, OWN_NORMALIZATION, ROOT, laplace, missing, parse, small_cnn
from demo import serve
from onnxruntime import InferenceSession

from requant_onnx import (
    Calibration,
    ConfigError,
    Form,
    Granularity,
    OptimizeFor,
    OutputError,
    QuantConfig,
    Refinement,
    Runtime,
    Stage,
    load_images,
    quantize_model,
    quantize_progressively,
    save_progressive,
)
from requant_onnx.cli.main import main
from requant_onnx.convert.report import SelfCheck
from requant_onnx.graph.decode.forms import Coded, Fate, Target, decode_of
from requant_onnx.graph.decode.writer import Constants
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.quantize import Grid, decoded_sum, quantize_weight
from requant_onnx.runtime.explain import explain

PAGE = ROOT / "requant_onnx" / "graph" / "decode" / "README.md"


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return quantize_progressively(small_cnn(), calibration=Calibration(count=16))


def outputs(model: onnx.ModelProto | Path | str, x: np.ndarray) -> np.ndarray:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = InferenceSession(source, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def error(model: onnx.ModelProto | Path, source: onnx.ModelProto | Path, x: np.ndarray) -> float:
    expected = outputs(source, x)
    return float(np.square(outputs(model, x) - expected).sum() / np.square(expected).sum())


def pixels(shape: tuple[int, ...] = (64, 3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def test_the_quality_grows_from_stage_to_stage(stages: list[Stage]) -> None:
    assert [stage.bits for stage in stages] == [2, 4, 8]
    errors = [error(stage.model, small_cnn(), pixels()) for stage in stages]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]
    checks = [stage.report.check for stage in stages]
    found = [check.sqnr_db for check in checks if check is not None and check.sqnr_db is not None]
    assert found == sorted(found)
    assert len(found) == 3


def test_reports_state_the_bits_of_all_planes(stages: list[Stage]) -> None:
    """The first and the last layer have 8 bits, and the same codes, in all stages."""
    widths = [[weight.bits for weight in stage.report.converted] for stage in stages]
    assert widths == [[8, 2, 2, 8], [8, 4, 4, 8], [8, 8, 8, 8]]
    assert [stage.report.config["bits"] for stage in stages] == [2, 4, 8]


def test_onnx_runtime_folds_the_sums(stages: list[Stage]) -> None:
    for stage in stages:
        assert {weight.fate for weight in explain(stage.model).weights} == {Fate.FOLDED}
    assert "Add" not in explain(stages[-1].model).operators


def test_stages_are_added_as_a_graph_adds_them() -> None:
    """Weights decoded together, whose later scales fit into float16 for one of them only."""
    coded = []
    for k, size in enumerate((1.0, 1e-5)):
        w = laplace(6, 5, 4, seed=k) * np.float32(size)
        q = quantize_weight(w, Grid(2, PowerGrid(0.5), 0, half_scales=True))
        base = (q, quantize_weight(w - q.dequantize(), Grid(2, PowerGrid(1.0), 0, half_scales=True)))
        rest = quantize_weight(w - decoded_sum(base), Grid(4, PowerGrid(1.0), 0, half_scales=True))
        coded.append(Coded(f"w{k}", rest, onnx.TensorProto.FLOAT, Form.FOLDED, base=base))
    made = decode_of(coded, Target(19), Constants(FreshNames(small_cnn())))
    graph = onnx.helper.make_graph(
        [*made.shared_nodes.values(), *made.nodes],
        "g",
        [],
        [onnx.helper.make_tensor_value_info(each.name, onnx.TensorProto.FLOAT, None) for each in coded],
        [*made.shared.values(), *made.initializers],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    found = InferenceSession(model.SerializeToString()).run(None, {})
    for each, values in zip(coded, found, strict=True):
        np.testing.assert_array_equal(values, decoded_sum(each.stages))


def test_scales_of_small_corrections_are_float16() -> None:
    w = laplace(16, 40) * np.float32(1e-3)
    grid = Grid(4, PowerGrid(0.5), 0, half_scales=True)
    assert not quantize_weight(w, grid).has_half_scale
    tiny = quantize_weight(w, replace(grid, tiny_scales=True))
    assert tiny.has_half_scale
    exact = quantize_weight(w, grid)
    before, after = (float(np.linalg.norm(q.dequantize() - w)) for q in (exact, tiny))
    digits = float(np.abs(tiny.scale / exact.scale - 1).max())
    assert digits <= 2**-4  # half a step of 2**-24 at 2**-21, the smallest such scale
    assert after <= before + digits * float(np.linalg.norm(exact.dequantize()))  # the same codes would have at most this error


def test_each_graph_runs_on_the_beginning_of_the_data(stages: list[Stage], tmp_path: Path) -> None:
    saved = save_progressive(stages, tmp_path / "net.onnx")
    assert [each.graph.name for each in saved] == ["net.2bit.onnx", "net.4bit.onnx", "net.onnx"]
    data = saved[-1].data.read_bytes()
    assert saved[0].data_bytes < saved[1].data_bytes < saved[2].data_bytes == len(data)
    for each, stage in zip(saved, stages, strict=True):
        folder = tmp_path / f"{each.bits}"
        folder.mkdir()
        shutil.copy(each.graph, folder)
        (folder / each.data.name).write_bytes(data[: each.data_bytes])
        np.testing.assert_array_equal(outputs(folder / each.graph.name, pixels()), outputs(stage.model, pixels()))


def test_planes_are_stored_once(stages: list[Stage], tmp_path: Path) -> None:
    """The later graphs refer to the same bytes as the earlier ones, and not much more is stored than in the plain files."""
    saved = save_progressive(stages, tmp_path / "net.onnx")
    places = [
        {
            (entry["offset"], entry["length"])
            for item in onnx.load(each.graph, load_external_data=False).graph.initializer
            if (entry := {pair.key: pair.value for pair in item.external_data})
        }
        for each in saved
    ]
    first = {place for place in places[0] if int(place[1]) >= 1024}
    assert first
    assert first <= places[1] <= places[1] | places[2]
    assert first <= places[2]


def test_the_same_bytes_for_every_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 3):
        (tmp_path / f"{threads}").mkdir()
        made = quantize_progressively(small_cnn(), calibration=Calibration(count=8), threads=threads, check=False)
        save_progressive(made, tmp_path / f"{threads}" / "net.onnx")
    files = [{path.name: path.read_bytes() for path in (tmp_path / f"{threads}").iterdir()} for threads in (1, 3)]
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_without_calibration_and_with_other_settings() -> None:
    """Nearest levels, one scale for each weight, float16 weights, layers with bits of their own, and layers that stay in float."""
    config = QuantConfig(
        form=Form.FOLDED, refinement=Refinement.NONE, granularity=Granularity.PER_TENSOR, overrides=("w2=bits:4", "w1=float")
    )
    made = quantize_progressively(small_cnn(), config, check=False)
    widths = [{weight.name: weight.bits for weight in stage.report.converted} for stage in made]
    assert [each.get("w2") for each in widths] == [4, 4, 4]
    assert [each.get("w3") for each in widths] == [2, 4, 8]
    assert all("w1" not in each for each in widths)
    half = parse(
        "net (float16[n, 64] x) => (float16[n, 8] y) { a = MatMul(x, w1) b = MatMul(a, w2) c = MatMul(b, w3) y = MatMul(c, w4) }",
        **{f"w{k}": laplace(64, 64 if k < 4 else 8, seed=k).astype(np.float16) for k in (1, 2, 3, 4)},
    )
    found = quantize_progressively(half, QuantConfig(form=Form.FOLDED, refinement=Refinement.NONE), check=False)
    x = pixels((4, 64)).astype(np.float16)
    assert [error(stage.model, half, x) for stage in found] == sorted((error(s.model, half, x) for s in found), reverse=True)


@pytest.mark.parametrize("runtime", [Runtime.PORTABLE, Runtime.OPENVINO, Runtime.WEB])
def test_other_runtimes(runtime: Runtime) -> None:
    made = quantize_progressively(
        small_cnn(), QuantConfig(form=Form.FOLDED, runtime=runtime, refinement=Refinement.NONE), check=False
    )
    errors = [error(stage.model, small_cnn(), pixels()) for stage in made]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]


def test_short_rows_have_8_bits_from_the_start() -> None:
    model = parse(
        """net (float[n, 3, 8, 8] x) => (float[n, 64, 8, 8] y) {
            a = Conv(x, w1)  b = Conv<pads = [1, 1, 1, 1], group = 64>(a, w2)  c = Conv(b, w3)  y = Conv(c, w4)
        }""",
        w1=laplace(64, 3, 1, 1),
        w2=laplace(64, 1, 3, 3),
        w3=laplace(64, 64, 1, 1),
        w4=laplace(64, 64, 1, 1),
    )
    made = quantize_progressively(model, check=False)
    assert [[weight.bits for weight in stage.report.converted][1:3] for stage in made] == [[8, 2], [8, 4], [8, 8]]


def truncated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the higher 4 of the 8 bits of the codes of its middle weights, decoded to the middle of each interval."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    for item in cut.graph.initializer:
        if item.name in ("w2", "w3"):
            w = onnx.numpy_helper.to_array(item)
            q = quantize_weight(w, Grid(8, PowerGrid(1.0), 0))
            high = q.codes & 0xF0
            zero, scale = (q.broadcast(each).astype(np.float32) for each in (q.zero_point, q.scale))
            item.CopyFrom(onnx.numpy_helper.from_array((high + np.float32(7.5) - zero) * scale, item.name))
    return cut


def test_the_second_stage_is_better_than_truncated_codes(stages: list[Stage]) -> None:
    assert error(stages[1].model, small_cnn(), pixels()) < error(truncated(small_cnn()), small_cnn(), pixels())


@pytest.mark.slow
def test_sizes_and_errors_of_a_trained_model(tmp_path: Path, cifar10: Path) -> None:
    images = load_images(f"cifar10:{cifar10}", "train")
    calibration = Calibration(images, OWN_NORMALIZATION, 64)
    made = quantize_progressively(OWN_MODEL, calibration=calibration, check=False)
    saved = save_progressive(made, tmp_path / "net.onnx")
    x = OWN_NORMALIZATION.apply(images.x[1000:1064])
    errors = [error(stage.model, OWN_MODEL, x) for stage in made]
    assert errors[0] > 3 * errors[1] > 12 * errors[2]
    total = sum(each.graph_bytes for each in saved) + saved[-1].data_bytes
    plain, _ = quantize_model(OWN_MODEL, QuantConfig(form=Form.FOLDED), check=False)
    assert total < 1.12 * plain.ByteSize()  # 1.10 here: three graphs instead of one, of 10 kB each
    assert saved[-1].data_bytes < plain.ByteSize()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(), "have the folded form"),
        (QuantConfig(4, form=Form.FOLDED), "the bits must be 8"),
        (QuantConfig(form=Form.FOLDED, optimize_for=OptimizeFor.GZIP), "drop --optimize-for"),
    ],
)
def test_settings_that_make_no_sense(config: QuantConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_progressively(small_cnn(), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--form qdq", "needs --form folded"),
        ("--form int8", "needs --form folded"),
        ("--bits 4", "drop --bits, or --progressive"),
        ("--bits auto --size 9kB", "drop --bits, or --progressive"),
        ("--size 9kB", "drop --size, or --progressive"),
        ("--max-drop 1", "drop --max-drop, or --progressive"),
        ("--optimize-for download", "drop --optimize-for"),
        ("--runtime tensorrt", "drop --runtime tensorrt"),
        ("--runtime mobile", "drop --runtime mobile"),
        ("--time-limit 9s", "drop --time-limit, or --progressive"),
        ("--external-data", "drop --external-data, or --progressive"),
        ("--html page.html", "drop --html, or --progressive"),
        ("--for transformers.js", "use --for web"),
        ("--for download", "cannot be optimized for downloads, but --for download sets --optimize-for; use --for web"),
        ("--for server", "needs --form folded, but --for server sets --form; use --for web"),
        ("--data noise", "--data needs --max-drop or --min-agreement"),
    ],
)
def test_options_that_make_no_sense(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_cnn(), "in.onnx")
    assert main(["convert", "in.onnx", "out.onnx", "--progressive", *options.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_options_of_a_file_that_do_not_fit_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_cnn(), "in.onnx")
    Path("own.toml").write_text('form = "qdq"\noptimize-for = "download:gz"\nbits = 3\n')
    command = ["convert", "in.onnx", "out.onnx", "--config", "own.toml", "--calibrate-limit", "8", "--force-quality"]
    assert main([*command, "--progressive"]) == 0
    assert Path("out.planes.bin").is_file()


def test_the_command_writes_all_files_and_a_row_for_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_cnn(), "in.onnx")
    command = ["convert", "in.onnx", "out.onnx", "--progressive", "--for", "web", "--calibrate-limit", "8", "--json", "r.json"]
    assert main([*command, "--force-quality"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    table = [row for row in rows if row[0] in ("2", "4", "8") and len(row) == 7]
    names = ["out.2bit.onnx", "out.4bit.onnx", "out.onnx"]
    assert [row[1] for row in table] == names
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(files) == ["in.onnx", *names, "out.planes.bin", "r.json"]
    total = sum(files[name] for name in (*names, "out.planes.bin"))
    assert table[-1][4] == f"{total:,}"
    report = json.loads(Path("r.json").read_text())
    assert report["file_bytes"][1] == total
    assert [stage["bits"] for stage in report["stages"]] == [2, 4, 8]
    assert main(command) == 2  # without --force
    assert "exists" in capsys.readouterr().err


def test_a_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(parse("net (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }"), tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--progressive"]) == 2
    assert "no weight that can be converted" in capsys.readouterr().err


def test_a_broken_early_stage_is_a_warning_and_a_broken_last_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bias correction only, 2 bits are not enough for eight layers."""
    nodes = " ".join(f"a{k + 1} = Gemm(a{k}, w{k})" for k in range(8))
    weights = {f"w{k}": np.random.default_rng(k).standard_normal((64, 64)).astype(np.float32) / 8 for k in range(8)}
    onnx.save(parse(f"net (float[n, 64] a0) => (float[n, 64] a8) {{ {nodes} }}", **weights), tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", a0=pixels((32, 64)))
    command = [
        "convert",
        str(tmp_path / "in.onnx"),
        str(tmp_path / "out.onnx"),
        "--progressive",
        "--calibrate",
        str(tmp_path / "x.npz"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(SelfCheck, "is_broken", True)
        assert main([*command, "--refinement", "bias"]) == 3
    assert "at 8 bits, on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "x.npz"]
    assert main([*command, "--refinement", "bias"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: at 2 bits, on" in printed
    assert "warning: at 4 bits" not in printed


def test_files_are_replaced_together(stages: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves the former files; a success removes the former data."""
    save_progressive(stages, tmp_path / "net.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="No space left"):
            save_progressive(stages, tmp_path / "net.onnx")
    for path in tmp_path.iterdir():
        if path.name in before:
            assert path.suffix == ".onnx" or path.read_bytes() == before[path.name]
    for name in ("net.2bit.onnx", "net.4bit.onnx", "net.onnx"):
        outputs(tmp_path / name, pixels((1, 3, 8, 8)))
    save_progressive(stages, tmp_path / "net.onnx")
    assert len(list(tmp_path.glob("net.planes*.bin"))) == 1


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server of files that knows Range: bytes=START-END, as common servers do."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(found[1]) : int(found[2]) + 1] if found else data
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None: ...


def loader() -> str:
    """The lines of JavaScript in the documentation."""
    text = PAGE.read_text("utf-8").partition("## Progressive files")[2]
    code = re.search(r"```javascript\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert code[1].count("\n") <= 16
    return code[1]


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_loader_of_the_documentation(stages: list[Stage], tmp_path: Path) -> None:
    if shutil.which("node") is None:
        missing("node is missing, which runs onnxruntime-web")
    try:
        modules = serve.install_runtime().parents[1]
    except serve.DemoError as error:
        missing(str(error))
    saved = save_progressive(stages, tmp_path / "page.onnx")
    server = http.server.ThreadingHTTPServer(("localhost", 0), lambda *args: Ranges(*args, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    x = pixels((2, 3, 8, 8))
    table = json.dumps([[each.graph.name, each.data_bytes] for each in saved])
    code = re.sub(r"(?s)const stages = .*", "", loader())
    code += f"""
        const x = new ort.Tensor("float32", {json.dumps(x.ravel().tolist())}, {json.dumps(x.shape)});
        for await (const session of sessions("http://localhost:{server.server_address[1]}", {table})) {{
            const {{ y }} = await session.run({{ x }});
            console.log(JSON.stringify([...y.data]));
        }}
        process.exit(0);"""
    script = modules.parent / f"progressive-{os.getpid()}.mjs"
    try:
        script.write_text(code)
        done = subprocess.run(["node", script.name], cwd=modules.parent, capture_output=True, text=True, check=False, timeout=300)
    finally:
        script.unlink()
        server.shutdown()
        server.server_close()
        thread.join()
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for stage, found in zip(stages, lines, strict=True):
        np.testing.assert_allclose(np.reshape(found, (2, -1)), outputs(stage.model, x), rtol=1e-3, atol=1e-3)
