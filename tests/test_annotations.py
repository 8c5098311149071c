"""Labeled boxes are transformed with their image, and found by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_image_folder import write

from requant_onnx import load_images
from requant_onnx.inputs.annotations import Objects, mapped
from requant_onnx.inputs.image_folder import Pipeline

image_module = pytest.importorskip("PIL.Image")


def objects(boxes: Any, categories: Any, crowds: Any = None) -> Objects:
    crowd = np.zeros(len(boxes), bool) if crowds is None else np.array(crowds)
    return Objects(np.array(boxes, float).reshape(-1, 4), np.array(categories, np.int64), crowd)


@pytest.mark.parametrize(
    ("pipeline", "size", "expected"),
    [
        (Pipeline(), (200, 100), [10, 20, 30, 60]),
        (Pipeline(resize=50), (200, 100), [5, 10, 15, 30]),
        (Pipeline(resize=50), (100, 200), [5, 10, 15, 30]),
        (Pipeline(crop=(80, 160)), (200, 100), [0, 10, 10, 50]),  # 20 cropped at the left and 10 at the top; clipped at the edge
        (Pipeline(resize=50, crop=(40, 40)), (200, 100), None),  # 100x50, 30 cropped at the left: the center, at 10, is outside
        (Pipeline(crop=(100, 16)), (16, 100), None),  # the center, at 20, is beyond the right edge
        (Pipeline(crop=(120, 220)), (200, 100), [20, 30, 40, 70]),  # with a black border
        (Pipeline(resize=99), (201, 100), [10 * 198 / 201, 20 * 0.99, 30 * 198 / 201, 60 * 0.99]),  # 198x99
        (Pipeline(letterbox=(100, 100)), (200, 100), [5, 10 + 25, 15, 30 + 25]),  # 100x50, below a border of 25
        (Pipeline(letterbox=(400, 600)), (100, 200), [20 + 200, 40, 60 + 200, 120]),  # 200x400, beside a border of 200
        (Pipeline(stretch=(50, 400)), (200, 100), [20, 10, 60, 30]),
    ],
)
def test_boxes_follow_their_image(pipeline: Pipeline, size: tuple[int, int], expected: list[float] | None) -> None:
    each = mapped(objects([[10, 20, 30, 60]], [3]), pipeline, size)
    np.testing.assert_allclose(each.boxes, np.array(expected or [], float).reshape(-1, 4))
    assert len(each.categories) == len(each.crowds) == len(each.boxes)


@pytest.mark.parametrize(
    "pipeline", [Pipeline(60, (48, 64)), Pipeline(letterbox=(64, 64)), Pipeline(letterbox=(200, 180)), Pipeline(stretch=(70, 50))]
)
def test_boxes_lie_where_the_pixels_are(tmp_path: Path, pipeline: Pipeline) -> None:
    """The box of a white rectangle covers the bright pixels after every pipeline."""
    pixels = np.zeros((90, 150, 3), np.uint8)
    pixels[30:60, 60:100] = 255
    image_module.fromarray(pixels).save(tmp_path / "a.png")
    labels = coco(tmp_path / "labels.json", {"a.png": [[60, 30, 40, 30]]})
    images = load_images(f"images:{tmp_path}", pipeline=pipeline, labels=labels)
    assert images.objects is not None
    y, x = np.nonzero(images.pixels[0, 0] > 127)
    expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    np.testing.assert_allclose(images.objects.images[0].boxes, [expected], atol=1.0)  # in pixels


def coco(path: Path, boxes: dict[str, list[list[float]]], category: int = 7, **changes: Any) -> Path:
    """Write labels of one category, or of two if `changes` contains them."""
    listed = [(k, box) for k, each in enumerate(boxes.values()) for box in each]
    document = {
        "images": [{"id": k, "file_name": name} for k, name in enumerate(boxes)],
        "annotations": [{"id": n, "image_id": k, "category_id": category, "bbox": box} for n, (k, box) in enumerate(listed)],
        "categories": [{"id": category, "name": "letter"}],
    }
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_images_are_found_by_name_and_by_the_end_of_their_path(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/b.png", "y/a.png"):
        write(tmp_path / "val" / name)
    boxes: dict[str, list[list[float]]] = {
        "b.png": [[0, 0, 1, 1]],
        "y/a.png": [[0, 0, 2, 2]],
        "a.png": [[0, 0, 3, 3]],
        "other.png": [],
    }
    images = load_images(f"images:{tmp_path / 'val'}", labels=coco(tmp_path / "l.json", boxes))
    assert images.objects is not None
    assert images.y is None
    assert [each.boxes[0, 2] for each in images.objects.images] == [3, 1, 2]
    for part in (images.part(1, 3), images.not_drawn(1, 0)):
        assert part.objects is not None
        assert len(part.objects.images) == 2
    assert [each.boxes[0, 2] for each in (images.first(2).objects or images.objects).images] == [3, 1]
