"""Malicious or corrupt files: one sentence and exit code 2, no file written, none read outside the model's directory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from requant_onnx import Form, ModelError, OutputError, QuantConfig, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.files.atomic import write_atomically
from requant_onnx.files.load import load_model
from requant_onnx.graph.constants import load_proto

Change = Callable[[onnx.ModelProto], None]
IMAGES = "net (float[n, 4, 6, 6] x) => (float[n, c, h, w] y)"


def refused(folder: Path, data: bytes, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The error of converting a file; nothing else may appear in its directory or on standard output."""
    path = folder / "in.onnx"
    path.write_bytes(data)
    before = sorted(folder.rglob("*"))
    assert main(["convert", str(path), str(folder / "out.onnx"), *options]) == 2
    assert sorted(folder.rglob("*")) == before
    assert path.read_bytes() == data
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def referring(location: str, offset: str | None = None, length: str | None = None) -> bytes:
    """A model whose first weight, (16, 3, 3, 3), 1,728 bytes, is in a file."""
    model = small_cnn()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return bytes(model.SerializeToString())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a data file and links to the outside, next to another directory."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "w.bin").write_bytes(bytes(4096))
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "parent").symlink_to(tmp_path)
    (folder / "round").symlink_to(folder / "round")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../outside.bin", "only files in the directory of the model are read"),
        ("sub/../../outside.bin", "only files in the directory of the model are read"),
        ("/etc/passwd", "a place outside the directory of the model"),
        ("C:\\secret", "only files in the directory of the model are read"),
        ("..\\outside.bin", "only files in the directory of the model are read"),
        ("", "only files in the directory of the model are read"),
        ("w.bin\0", "only files in the directory of the model are read"),
        ("link.bin", "links to a place outside"),
        ("parent/outside.bin", "links to a place outside"),
        ("missing.bin", "does not exist"),
        ("round", ""),
        ("pipe", "is not a file"),
        (".", "is not a file"),
        ("w" * 5000, ""),
    ],
)
def test_data_files_outside_the_folder(home: Path, location: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(home, referring(location), capsys)


@pytest.mark.parametrize(
    ("offset", "length"),
    [("4000", "1728"), ("0", "4"), ("0", "4096"), ("-4", "1728"), ("x", None), (None, "1e3"), ("9" * 30, None), (str(2**63), None)],
)
def test_offsets_and_lengths_that_do_not_fit(
    home: Path, offset: str | None, length: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(home, referring("w.bin", offset, length), capsys)


def test_data_in_the_folder_is_read(home: Path) -> None:
    values = laplace(16, 3, 3, 3)
    (home / "w.bin").write_bytes(b"1234" + values.tobytes())
    (home / "in.onnx").write_bytes(referring("w.bin", "4", "1728"))
    assert np.array_equal(numpy_helper.to_array(load_model(home / "in.onnx").graph.initializer[0]), values)


def shorter(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-1]


def longer(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data += b"1234"


def overflowing(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**32, 2**32, 2**32, 1]


def wrapping(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**62, 4, 1, 1]  # 2**64 elements, which overflows to 0 in 64 bits


def negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-16, -3, 3, 3]


def of_no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 9999


def too_few_values(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0] * 7)


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[3].output[0]


def twice_the_same_output(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def of_another_group(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute.append(helper.make_attribute("group", 7))


def of_no_group(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute.append(helper.make_attribute("group", 0))


def not_a_number(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((16, 3, 3, 3), np.nan, np.float32), "w1"))


def infinite(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((16, 3, 3, 3), np.inf, np.float32), "w1"))


def calling_itself(model: onnx.ModelProto) -> None:
    call(model, {"again": ["again"]})


def calling_each_other(model: onnx.ModelProto) -> None:
    call(model, {"again": ["other", "other"], "other": ["again", "again"]})


def call(model: onnx.ModelProto, functions: dict[str, list[str]]) -> None:
    """Add functions that contain a Conv and call others, and a call of the first."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    for name, called in functions.items():
        nodes = [helper.make_node(other, ["x"], [f"t{k}"], domain="local") for k, other in enumerate(called)]
        nodes.append(helper.make_node("Conv", ["x", "x"], ["z"]))
        model.functions.append(helper.make_function("local", name, ["x"], ["z"], nodes, imports))
    model.graph.node.append(helper.make_node(next(iter(functions)), ["x"], ["fz"], domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))


@pytest.mark.parametrize(
    "change",
    [
        shorter, longer, overflowing, wrapping, negative, of_no_type, too_few_values, cyclic, twice_the_same_output,
        of_another_group, of_no_group, not_a_number, infinite, calling_itself, calling_each_other,
    ],
)  # fmt: skip
def test_models_that_contradict_themselves(tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_cnn()
    change(model)
    said = refused(tmp_path, model.SerializeToString(), capsys)
    if change in (shorter, longer, negative, overflowing, wrapping, not_a_number, infinite, too_few_values):
        assert "'w1'" in said


def test_functions_that_multiply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each calls the next one eight times: a file of a few kB, but 8**12 nodes after inlining."""
    model = small_cnn()
    call(model, {f"f{k}": [f"f{k + 1}"] * 8 if k < 12 else [] for k in range(13)})
    assert "too many nodes" in refused(tmp_path, model.SerializeToString(), capsys)


@pytest.mark.parametrize("depth", [10, 24, 40, 2000])
def test_deeply_nested_bodies(tmp_path: Path, depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    """They are converted, or rejected at the limits of protobuf or ONNX Runtime."""
    text = "() => (float[n, k, h, w] z) { z = Conv(x, w) }"
    inner = parse("a " + text, w=laplace(32, 4, 3, 3)).graph.SerializeToString()
    for _ in range(depth):
        node = field(1, b"c") + field(2, b"z") + field(4, b"If")
        for name in (b"then_branch", b"else_branch")[:1]:
            node += field(5, field(1, name) + b"\xa0\x01\x05" + field(6, inner))
        inner = field(1, node) + field(2, b"g") + field(12, named(b"z"))
    model = parse("net (float[n, 4, 6, 6] x, bool c) => (float[n, k, h, w] y) { y = Identity(x) }")
    data = model.SerializeToString() + field(7, inner)
    refused(tmp_path, data, capsys)


def field(number: int, data: bytes) -> bytes:
    """A field in the wire format of protobuf."""
    size, coded = len(data), bytearray()
    while size > 127:
        coded.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes([*coded, size]) + data


def named(name: bytes) -> bytes:
    return bytes(helper.make_tensor_value_info(name.decode(), TensorProto.FLOAT, ["n"]).SerializeToString())


def test_a_huge_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = parse("net (float[n, 4, 2147483648, 5] x) => (float[n, c, h, w] y) { y = Conv(x, w) }", w=laplace(32, 4, 3, 3))
    said = refused(tmp_path, model.SerializeToString(), capsys, "--bits", "4", "--calibrate", "noise")
    assert "do not fit in memory" in said
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_files_that_are_cut_short(tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_cnn().SerializeToString()
    refused(tmp_path, data[: int(share * len(data))], capsys)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, np.random.default_rng(seed).bytes(10 ** (seed % 5)), capsys)


BOMB = """
import resource, sys
from requant_onnx.cli.main import main
code = main(["convert", sys.argv[1], sys.argv[2]])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", [b"\x0a\x00", b"\x2a\x00", field(1, b"\x0a\x00" * 40), field(1, field(5, b"") * 40)])
def test_a_bomb_takes_no_memory(tmp_path: Path, unit: bytes) -> None:
    """60 MB of empty nodes or similar, which would parse to 1 GB or more."""
    (tmp_path / "in.onnx").write_bytes(b"\x08\x08" + field(7, unit * (60_000_000 // len(unit))))
    command = [sys.executable, "-c", BOMB, str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    limit = 6 << 30
    made = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    code, kilobytes = map(int, made.stdout.split())
    assert code == 2
    assert "parts" in made.stderr
    assert kilobytes < 700_000


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e30, -3e38, 1e-40, 1e-45])
@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weights_all_equal_huge_or_denormal(value: float, form: Form, bits: int) -> None:
    """They are converted to finite weights of the same magnitude within 1 %; denormal ones may become 0."""
    w = np.full((32, 4, 3, 3), value, np.float32)
    converted, report = quantize_model(parse(IMAGES + "{ y = Conv(x, w) }", w=w), QuantConfig(bits, form=form))
    assert len(report.converted) == 1
    ones = np.zeros((1, 4, 6, 6), np.float32)
    ones[0, 0, 1, 1] = 1.0
    (found,) = InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": ones})
    assert np.isfinite(np.asarray(found)).all()
    assert np.abs(np.asarray(found)).max() == pytest.approx(abs(value), rel=0.01, abs=1e-38)


def test_one_huge_weight_among_small_ones() -> None:
    w = laplace(32, 4, 3, 3)
    w[3, 1, 1, 1] = 1e30
    _, report = quantize_model(parse(IMAGES + "{ y = Conv(x, w) }", w=w), QuantConfig(4))
    assert np.isfinite(report.converted[0].mse)


def test_a_model_proto_with_data_elsewhere() -> None:
    model = onnx.ModelProto()
    model.ParseFromString(referring("w.bin"))
    with pytest.raises(ModelError, match="give the path of the model"):
        quantize_model(model)


def test_an_error_is_not_put_into_another(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our errors are also ValueErrors and OSErrors, which some functions translate."""
    large = home / "large.onnx"
    with large.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space
    with pytest.raises(ModelError, match=r"^'[^']+large.onnx' is larger than 2 GB"):
        load_model(large)
    with pytest.raises(OutputError, match=r"^'[^']+home' is a directory; give the path of the file to write$"):
        write_atomically(home, b"")
    (home / "in.onnx").write_bytes(referring("w.bin", length="1728"))
    monkeypatch.setattr("requant_onnx.files.load.FETCHED_BYTES", 0)
    tensor = load_model(home / "in.onnx").graph.initializer[0]
    (home / "w.bin").write_bytes(bytes(100))
    with pytest.raises(ModelError, match=r"^the data file '[^']+w.bin' of '\w+' became shorter"):
        load_proto(tensor)
