"""Loading images: accepted inputs, and the error sentence for others."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_MODEL, ROOT
from render_sample import render

from requant_onnx import DataError, ImageSet, load_images
from requant_onnx.inputs.images import load_cifar


def write_cifar10(folder: Path, count: int = 3) -> np.ndarray:
    records = np.random.default_rng(0).integers(0, 256, (count, 3073), np.uint8)
    records[:, 0] = np.arange(count) % 10
    records.tofile(folder / "test_batch.bin")
    return records


def test_cifar10_is_read_as_planes(tmp_path: Path) -> None:
    records = write_cifar10(tmp_path)
    images = load_images(f"cifar10:{tmp_path}")
    assert images.y is not None
    assert images.y.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(images.pixels[1].ravel(), records[1, 1:])


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    record = np.zeros(3074, np.uint8)
    record[:2] = (7, 93)
    record.tofile(tmp_path / "test.bin")
    images = load_cifar("cifar100", tmp_path, "test")
    assert images.y is not None
    assert images.y.tolist() == [93]


def test_npz_of_pixels_becomes_channels_first(tmp_path: Path) -> None:
    x = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(tmp_path / "x.npz", x=x, y=np.array([1, 0]))
    images = load_images(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(images.x, x.transpose(0, 3, 1, 2))
    assert images.first(1).x.shape == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "has no array named 'x'"),
        ({"x": np.zeros((0, 4, 4, 3), np.uint8)}, "contains no images"),
        ({"x": np.zeros((4, 4, 3), np.uint8)}, r"shape \(4, 4, 3\)"),
        ({"x": np.zeros((1, 3, 4, 4))}, "type float64"),
        ({"x": np.full((1, 3, 4, 4), np.nan, np.float32)}, "NaN or infinite pixels"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.zeros(3, np.int64)}, "must be 2 integer class indices"),
        ({"x": np.array([{}], dtype=object)}, "cannot read"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", allow_pickle=True, **arrays)
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("spec", "message"), [("nothing", "does not exist"), ("cifar10:/none", "cannot read"), ("a.npz", "cannot read")]
)
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(spec)


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("x", "this is no array")
    for spec in (f"cifar10:{tmp_path}", f"{tmp_path}/x.npz", f"{tmp_path}/array.npz", f"{tmp_path}/member.npz"):
        with pytest.raises(DataError):
            load_images(spec)


def test_the_sample_is_what_the_tool_renders() -> None:
    """Within one level, because the last bit of exp and sin differs between machines."""
    shipped = load_images(str(ROOT / "models" / "sample_images.npz")).x
    rendered = render(OWN_MODEL, 20, 2026).transpose(0, 3, 1, 2)
    assert np.abs(shipped[:20].astype(int) - rendered.astype(int)).max() <= 1


def test_images_are_drawn_the_same_for_the_same_seed() -> None:
    images = ImageSet(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40))
    drawn = images.drawn(10, seed=1)
    assert drawn.pixels.ravel().tolist() == sorted(set(drawn.pixels.ravel().tolist()))
    assert drawn.y is not None
    assert drawn.y.tolist() == drawn.pixels.ravel().tolist() == images.drawn(10, seed=1).pixels.ravel().tolist()
    assert drawn.y.tolist() != images.drawn(10, seed=2).pixels.ravel().tolist()
    assert len(images.drawn(99, seed=1)) == 40
