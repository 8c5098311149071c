"""Directories of images: the pipeline, labels, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import small_cnn

from requant_onnx import Calibration, ConfigError, DataError, QuantConfig, load_images, quantize_model, validate
from requant_onnx.inputs.image_folder import FolderImages, Pipeline

image_module = pytest.importorskip("PIL.Image")


def write(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(pixels).save(path)
    return pixels


def test_images_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    pixels = [write(tmp_path / f"{name}.png", seed=k) for k, name in enumerate("abc")]
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(f"images:{tmp_path}")
    assert images.y is None
    assert images.x.shape == images.pixels.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(images.pixels.transpose(0, 2, 3, 1), pixels)
    np.testing.assert_array_equal(images.first(2).pixels, images.pixels[:2])
    drawn = images.drawn(2, seed=0)
    assert len(drawn) == 2
    assert {image.tobytes() for image in drawn.pixels} < {image.tobytes() for image in images.pixels}


def test_labels_are_the_places_of_the_classes(tmp_path: Path) -> None:
    for k, name in enumerate(["dog/1.png", "cat/2.PNG", "dog/deep/3.png", "ape/0.png"]):
        write(tmp_path / name, seed=k)
    (tmp_path / "cow").mkdir()  # a class without images keeps its index
    for k, name in enumerate([".ipynb_checkpoints/1.png", "dog/.ipynb_checkpoints/1.png", "dog/deep/.2.png"]):
        write(tmp_path / name, seed=k)
    for name in ("dog/._1.png", "._2.png"):  # which macOS makes on disks of other systems
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    images = load_images(f"images:{tmp_path}")
    assert images.y is not None
    assert images.y.tolist() == [0, 1, 3, 3]
    assert images.first(2).y is not None


def test_classes_are_in_the_order_of_names_with_upper_case_first(tmp_path: Path) -> None:
    for name in ["a/1.png", "B/1.png", "a/C.png", "a/b.png"]:
        write(tmp_path / name)
    images = load_images(tmp_path)
    assert isinstance(images.x, FolderImages)
    assert [path.relative_to(tmp_path).as_posix() for path in images.x.paths] == ["B/1.png", "a/1.png", "a/C.png", "a/b.png"]


RAMP = np.tile(np.arange(8) / 7, (8, 1))


@pytest.mark.parametrize(
    ("name", "pixels", "white"),
    [
        ("a.png", (RAMP * 65535).astype(np.uint16), 255),
        ("a.tif", (RAMP * 65535).astype(np.int32), 255),
        ("a.tif", (RAMP * 255).astype(np.int32), 255),
        ("a.tif", (RAMP * 255).astype(np.float32), 255),
        ("a.tif", (RAMP * 0).astype(np.float32), 0),
        ("a.png", (RAMP * 4095).astype(np.uint16), 15),  # 12 bits look like a dark image
    ],
)
def test_deep_images_get_8_bits(tmp_path: Path, name: str, pixels: np.ndarray, white: int) -> None:
    image_module.fromarray(pixels).save(tmp_path / name)
    found = load_images(tmp_path).pixels
    assert (found.min(), found.max()) == (0, white)


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (RAMP.astype(np.float32), "its pixels are floats up to 1 instead of 255"),
        ((RAMP * 65535).astype(np.float32), "its pixels are floats up to 6.554e.04 instead of 255"),
        (RAMP.astype(np.float32) + np.float32(np.nan), "its pixels are floats up to nan instead of 255"),
        ((RAMP * (1 << 20)).astype(np.int32), "its pixels are numbers up to 1048576 instead of 65535"),
    ],
)
def test_images_of_another_range_are_refused(tmp_path: Path, pixels: np.ndarray, text: str) -> None:
    """They would be black, or white, without a word."""
    image_module.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=text):
        load_images(tmp_path)


def test_an_error_without_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    write(tmp_path / "a.png")
    monkeypatch.setattr(Pipeline, "apply", fail)
    with pytest.raises(DataError, match=r"cannot read the image '.*a\.png' \(MemoryError\)"):
        load_images(tmp_path)


def test_gray_and_transparent_images_become_color(tmp_path: Path) -> None:
    image_module.new("L", (8, 8), 7).save(tmp_path / "a.png")
    image_module.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "b.png")
    assert load_images(f"images:{tmp_path}").pixels[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((500, 375), (341, 256)),
        ((375, 500), (256, 341)),
        ((256, 300), (256, 300)),
        ((100, 100), (256, 256)),
        ((10, 33), (256, 844)),
    ],
)
def test_resize_sets_the_shorter_side_as_torchvision_does(size: tuple[int, int], resized: tuple[int, int]) -> None:
    """As torchvision.transforms.functional._compute_resized_output_size: (size, int(size * long / short))."""
    assert Pipeline(resize=256).apply(image_module.new("RGB", size[::-1])).size == resized[::-1]


def test_the_crop_is_of_the_center(tmp_path: Path) -> None:
    pixels = write(tmp_path / "a.png", 9, 12)
    cropped = load_images(f"images:{tmp_path}", pipeline=Pipeline(crop=(4, 6))).pixels[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(cropped, pixels[2:6, 3:9])  # round(2.5) is 2 in Python, and therefore in torchvision


def test_a_crop_larger_than_the_image_is_padded_with_black(tmp_path: Path) -> None:
    pixels = write(tmp_path / "a.png", 4, 4)
    cropped = load_images(f"images:{tmp_path}", pipeline=Pipeline(crop=(8, 8))).pixels[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(cropped, np.pad(pixels, ((2, 2), (2, 2), (0, 0))))


def test_fit_does_not_touch_images_of_the_right_size() -> None:
    fit = Pipeline(9, (8, 6), only_others=True)
    assert fit.places((6, 8)) == ((6, 8), 0, 0)
    assert fit.places((8, 6)) == Pipeline(9, (8, 6)).places((8, 6))
    assert Pipeline(9, (8, 6)).places((6, 8))[0] == (9, 12)


@pytest.mark.parametrize(("height", "width"), [(9, 12), (12, 9), (16, 16), (3, 40), (90, 120)])
@pytest.mark.parametrize("gray", [False, True])
def test_a_letterbox_shows_the_whole_image_in_gray(height: int, width: int, gray: bool) -> None:
    """As LetterBox of Ultralytics: the same scale in both directions, in the center of a border of 114."""
    image = image_module.new("L" if gray else "RGB", (width, height), 255 if gray else (255, 255, 255))
    pixels = np.asarray(Pipeline(letterbox=(24, 32)).apply(image)).reshape(24, 32, -1)
    assert set(np.unique(pixels)) <= {114, 255}
    y, x, _ = np.nonzero(pixels == 255)
    tall, wide = np.ptp(y) + 1, np.ptp(x) + 1
    assert tall == 24 or wide == 32
    assert abs(tall / height - wide / width) * min(height, width) <= 1  # in pixels
    assert abs(y.min() - (24 - tall) / 2) <= 0.5
    assert abs(x.min() - (32 - wide) / 2) <= 0.5


def test_images_are_stretched_to_a_size() -> None:
    image = image_module.fromarray(np.arange(8, dtype=np.uint8).repeat(6).reshape(8, 6) * 30)
    pixels = np.asarray(Pipeline(stretch=(16, 4)).apply(image))
    assert pixels.shape == (16, 4)
    assert (pixels[0] == 0).all()
    assert (pixels[-1] == 210).all()


def test_only_one_way_to_a_size_is_given() -> None:
    with pytest.raises(ConfigError, match="--resize and --letterbox exclude each other; drop all but one"):
        Pipeline(8, letterbox=(8, 8))
    with pytest.raises(ConfigError, match="--letterbox and --stretch exclude each other"):
        Pipeline(letterbox=(8, 8), stretch=(8, 8))


def test_images_of_several_sizes_need_a_pipeline(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 8, 8)
    write(tmp_path / "b.png", 16, 8)
    images = load_images(f"images:{tmp_path}")
    with pytest.raises(DataError, match=r"b\.png' is 16x8, but 'a\.png' is 8x8; give --fit, --letterbox, --stretch, or"):
        images.pixels  # noqa: B018
    assert load_images(f"images:{tmp_path}", pipeline=Pipeline(8, (8, 8))).pixels.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("files", [[], ["a.txt"], ["a.png", "class/b.png"]])
def test_folders_without_images_or_with_a_mixture_are_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        write(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"has no images|contains both images"):
        load_images(f"images:{tmp_path}")


def test_damaged_images_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the directory"):
        load_images(f"images:{tmp_path / 'none'}")
    write(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read the image .*a\.png"):
            load_images(f"images:{tmp_path}")


@pytest.mark.parametrize(
    "pipeline", [{"resize": 0}, {"crop": (0, 3)}, {"resize": 1 << 20}, {"crop": (-1, 3)}, {"letterbox": (8, 0)}]
)
def test_sizes_out_of_range_are_refused(pipeline: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"1 to 16384"):
        Pipeline(**pipeline)  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", [{"letterbox": 640}, {"crop": (8,)}, {"stretch": "8x8"}])
def test_sizes_must_be_pairs(pipeline: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be a pair of a height and a width"):
        Pipeline(**pipeline)  # type: ignore[arg-type]
    assert Pipeline(crop=[8, 6]) == Pipeline(crop=(8, 6))  # type: ignore[arg-type]


def test_a_folder_calibrates_and_validates(tmp_path: Path) -> None:
    for k in range(12):
        write(tmp_path / f"{'ab'[k % 2]}/{k:02}.png", 10, 14, seed=k)
    images = load_images(f"images:{tmp_path}", pipeline=Pipeline(9, (8, 8)))
    made, report = quantize_model(small_cnn(), QuantConfig(bits=4), calibration=Calibration(images))
    assert all(weight.output_errors for weight in report.converted)
    found = validate(small_cnn(), made, images)
    assert found.images == 12
    assert found.top1 is not None
