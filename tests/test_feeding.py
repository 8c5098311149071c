"""Any model can be fed: noise of any number of channels, arrays by name in any layout, unmodified directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import laplace, parse, small_cnn

from requant_onnx import Calibration, DataError, ImageSet, Normalization, QuantConfig, load_images, quantize_model, validate
from requant_onnx.cli.main import main
from requant_onnx.files.load import input_shapes
from requant_onnx.inputs.feeds import holds_images, load_feeds
from requant_onnx.runtime.feeds import calibration_chunks, counts_in

image_module = pytest.importorskip("PIL.Image")
Net = tuple[str, dict[str, np.ndarray]]


def net(channels: int, kind: str = "float", before: str = "a = Identity(x)") -> onnx.ModelProto:
    """A small net whose image has this number of channels, or obtains it through the nodes `before`."""
    shape = {"float": f"n, {channels}, 16, 16", "uint8": f"n, 16, 16, {channels}"}.get(kind, f"n, {channels}, 16, 16")
    text = f"net ({kind}[{shape}] x) => (float[n, 8] y) {{ {before} b = Conv(a, w) c = GlobalAveragePool(b) y = Flatten(c) }}"
    return parse(text, w=laplace(8, channels, 3, 3), v=laplace(8, 8, seed=1))


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_noise_is_normalized_whatever_its_channels(channels: int) -> None:
    chunks = calibration_chunks(net(channels), Calibration(count=16))
    x = np.concatenate([chunk["x"] for chunk in chunks])
    assert x.min() < -1.5
    assert x.max() > 2
    assert abs(x.mean()) < 0.5


@pytest.mark.parametrize(("count", "batch"), [(9, 8), (3, 8), (16, 8), (17, 5), (1, 4), (33, 32)])
def test_all_images_count_about_equally_in_fixed_batches(count: int, batch: int) -> None:
    text = f"net (float[{batch}, 1, 2, 2] x) => (float[{batch}, 8] y) {{ f = Flatten(x) y = MatMul(f, w) }}"
    images = ImageSet(np.repeat(np.arange(count, dtype=np.float32), 4).reshape(count, 1, 2, 2), None)
    chunks = calibration_chunks(parse(text, w=laplace(4, 8)), Calibration(images, count=count))
    given = np.bincount(np.concatenate([chunk["x"][:, 0, 0, 0] for chunk in chunks]).astype(int))
    assert len(given) == count
    assert given.max() - given.min() <= 1
    assert given.sum() % batch == 0
    assert sum(counts_in(chunks)) == count


def test_a_model_with_one_channel_gets_gray_images(tmp_path: Path) -> None:
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        image_module.fromarray(pixels).save(tmp_path / f"{k:02}.png")
    gray = np.stack([np.asarray(image_module.open(tmp_path / f"{k:02}.png").convert("L")) for k in range(12)])[:, None]
    images, color = load_images(tmp_path), Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    chunks = calibration_chunks(net(1), Calibration(images, color, count=12))
    np.testing.assert_allclose(np.concatenate([chunk["x"] for chunk in chunks]), (gray / 255 - 0.5) / 0.3, atol=1e-5)
    made, _ = quantize_model(net(1), QuantConfig(8))
    array = ImageSet(gray, None)
    for how in (None, color):
        found = validate(net(1), made, images, how, latency_batch=None)
        other = validate(net(1), made, array, None if how is None else Normalization((0.5,), (0.3,)), latency_batch=None)
        assert found.sqnr_db == pytest.approx(other.sqnr_db, abs=1e-3)


def test_images_with_other_channels_than_the_model_are_refused() -> None:
    images = ImageSet(np.zeros((4, 3, 16, 16), np.uint8), None)
    with pytest.raises(DataError, match=r"the images are 3x16x16, but the model takes 1x16x16; give an \.npz file"):
        calibration_chunks(net(1), Calibration(images))


def test_noise_for_a_model_that_takes_pixels() -> None:
    before = "f = Cast<to = 1>(x) s = Div(f, k) a = Transpose<perm = [0, 3, 1, 2]>(s)"
    model = net(3, "uint8", before)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(255), "k"))
    (chunk, *_) = calibration_chunks(model, Calibration(count=8))
    assert chunk["x"].dtype == np.uint8
    assert chunk["x"].shape[1:] == (16, 16, 3)
    assert chunk["x"].max() > 200
    _, report = quantize_model(model, QuantConfig(4), calibration=Calibration(count=16))
    assert report.converted[0].method != "nearest"
    assert not any("normalized" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_noise_for_other_float_inputs(kind: str) -> None:
    model = net(3, kind, "a = Cast<to = 1>(x)")
    _, report = quantize_model(model, QuantConfig(4), calibration=Calibration(count=16))
    assert report.converted[0].method != "nearest"


def save(folder: Path, model: onnx.ModelProto, **arrays: Any) -> list[str]:
    onnx.save(model, folder / "in.onnx")
    np.savez(folder / "data.npz", **arrays)
    out = str(folder / "out.onnx")
    return ["convert", str(folder / "in.onnx"), out, "--bits", "4", "--calibrate", str(folder / "data.npz"), "-v", "--force"]


TWO = "net (float[n, 32] x, float z) => (float[n, 24] y) { m = MatMul(x, w) y = Mul(m, z) }"
STATE = "net (float[2, n, 8] h, float[1, 32] a) => (float[1, 24] y, float[2, n, 8] g) { y = MatMul(a, w) g = Relu(h) }"
AUDIO = "net (float[n, m] x) => (float[n, c, k] y) { a = Unsqueeze(x, one) y = Conv(a, v) }"
W = {"w": laplace(32, 24)}
V = {"v": laplace(24, 1, 9), "one": np.array([1])}
IMAGE = "net (float[8, 8, 3] x) => (float[a, b, c, d] y) { a = Unsqueeze(x, one) y = Conv(a, v) }"
V2 = {"v": laplace(24, 8, 1, 3), "one": np.array([0])}
RNG = np.random.default_rng(0)
FEEDS = [
    (TWO, W, {"x": RNG.normal(size=(40, 32)), "z": RNG.normal(size=40)}),  # an input called x; scalars; float64
    (TWO, W, {"x": RNG.normal(size=(40, 1, 32)).astype(np.float32), "z": np.float32(2)}),  # stacked; one scalar for all
    (TWO, W, {"x": RNG.integers(0, 9, (40, 32)), "z": np.ones(40, np.uint8)}),  # integers
    (STATE, W, {"h": np.zeros((40, 2, 1, 8), np.float32), "a": RNG.normal(size=(40, 32)).astype(np.float32)}),
    (STATE, W, {"h": np.zeros((2, 1, 8), np.float32), "a": RNG.normal(size=(40, 32)).astype(np.float32)}),  # one state for all
    (IMAGE, V2, {"x": RNG.normal(size=(40, 8, 8, 3)).astype(np.float32)}),  # one image without a batch
    (AUDIO, V, {"x": RNG.normal(size=(40, 100)).astype(np.float32)}),
]


@pytest.mark.parametrize(("text", "weights", "arrays"), FEEDS)
def test_arrays_by_name(
    text: str, weights: dict[str, np.ndarray], arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = save(tmp_path, parse(text, **weights), **arrays)
    assert main(command) == 0, capsys.readouterr().err
    assert "feedback" in capsys.readouterr().out
    feeds = load_feeds(tmp_path / "data.npz", input_shapes(tmp_path / "in.onnx"))
    assert len(feeds) == 40
    source, made, data = str(tmp_path / "in.onnx"), command[2], ["--data", str(tmp_path / "data.npz")]
    assert main(["validate", source, made, *data, "--limit", "30"]) == 0
    told = capsys.readouterr().out
    assert "30 images" not in told
    assert "output SQNR" in told
    assert main(["report", source, made, str(tmp_path / "page.html"), *data]) == 0
    assert main(["compare", source, *data, "--calibrate", data[1], "--bits", "8", "--jobs", "1", "--no-cache"]) == 0


def test_images_called_x_stay_images(tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.zeros(4, np.int64))
    assert holds_images(tmp_path / "data.npz", input_shapes(tmp_path / "in.onnx"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((4, 32))}, "contains ['x'], but the model takes ['x', 'z']"),
        ({"x": np.zeros((4, 32)), "z": np.zeros(3)}, "different numbers of rows (x: 4, z: 3)"),
        ({"x": np.zeros((5, 32)), "z": np.zeros((4, 1, 1))}, "'z' in"),
        ({"x": np.zeros((4, 31)), "z": np.zeros(4)}, "takes float32 of shape ?x32"),
        ({"x": np.full((4, 32), 1e300), "z": np.zeros(4)}, "has type float64 and shape 1x32, but the model takes float32"),
    ],
)
def test_arrays_that_do_not_fit(
    arrays: dict[str, np.ndarray], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(save(tmp_path, parse(TWO, **W), **arrays)) == 2
    assert said in capsys.readouterr().err


def test_rows_that_do_not_fill_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "net (float[8, 32] a) => (float[8, 24] y) { y = MatMul(a, w) }"
    assert main(save(tmp_path, parse(text, **W), a=np.zeros((20, 32), np.float32))) == 2
    assert "has 20 rows, but the model takes 8 at a time" in capsys.readouterr().err


def test_a_model_of_two_inputs_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = save(tmp_path, parse(TWO, **W))
    command[command.index("--calibrate") + 1] = "noise"
    assert main(command) == 2
    assert "give the inputs by name: FILE.npz" in capsys.readouterr().err


def test_float_images_with_channels_last(tmp_path: Path) -> None:
    pixels = RNG.normal(size=(4, 8, 9, 3)).astype(np.float32)
    np.savez(tmp_path / "last.npz", x=pixels)
    np.testing.assert_array_equal(load_images(tmp_path / "last.npz").pixels, pixels.transpose(0, 3, 1, 2))


def folder(place: Path, count: int, size: tuple[int, int] = (20, 30)) -> Path:
    place.mkdir()
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (*size, 3)).astype(np.uint8)
        image_module.fromarray(pixels).save(place / f"{k:04}.jpg")
    return place


def test_a_bare_folder_that_fits_itself_to_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    images = str(folder(tmp_path / "images", 12))
    command = ["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--calibrate", images]
    assert main(command) == 2
    assert "for a directory, use --fit or --letterbox" in capsys.readouterr().err
    assert main([*command, "--fit"]) == 0
    validate = ["validate", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--data", images, "--fit"]
    assert main(validate) == 0
    assert main([*validate, "--crop", "8"]) == 2
    assert "--fit chooses the size and the crop; drop --fit, or --crop" in capsys.readouterr().err


def test_the_command_line_replaces_how_a_file_fits_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    (tmp_path / "file.toml").write_text("resize = 20\ncrop = 16\n")
    command = [
        "convert",
        str(tmp_path / "in.onnx"),
        str(tmp_path / "out.onnx"),
        "--calibrate",
        str(folder(tmp_path / "images", 12)),
    ]
    assert main([*command, "--config", str(tmp_path / "file.toml")]) == 2
    assert "the images are 3x16x16" in capsys.readouterr().err
    for how in (["--letterbox", "8"], ["--stretch", "8x8"], ["--fit"]):
        assert main([*command, "--config", str(tmp_path / "file.toml"), "--force", *how]) == 0
        assert main([*command, "--force", "--resize", "8", *how]) == 2
        assert "drop" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [100, 500])
def test_damaged_images_of_a_folder_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    place = folder(tmp_path / "images", 101, (8, 8))
    (place / "0050.jpg").write_bytes((place / "0050.jpg").read_bytes()[:cut])
    assert len(load_images(place)) == 100
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    assert main(["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--calibrate", str(place)]) == 0
    assert "note: 1 of 101 images are damaged and were skipped" in capsys.readouterr().err
    (place / "0051.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0050\.jpg"):
        load_images(place)


def test_16_bit_images_are_scaled(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image_module.fromarray(deep).save(tmp_path / "a.png")
    pixels = load_images(tmp_path).pixels
    np.testing.assert_array_equal(pixels, np.broadcast_to((deep >> 8).astype(np.uint8), (1, 3, 8, 8)))
