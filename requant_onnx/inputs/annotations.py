"""Labels for detectors: boxes from a file in COCO format, in the coordinates of the images that a model takes.

https://cocodataset.org/#format-data: images with id and file_name; annotations with image_id, category_id, bbox [x, y, w, h]
and, if the box holds a crowd, iscrowd = 1; categories with id.  Boxes are resized and moved with their image; those
whose center is cropped away are dropped, and the others are clipped at the edge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from requant_onnx.errors import DataError
from requant_onnx.inputs.image_folder import FolderImages, Pipeline, size_of
from requant_onnx.numerics.arrays import AnyArray, Float64Array, Int64Array

FORMAT = "give a file with 'images' (id, file_name), 'annotations' (image_id, category_id, bbox) and 'categories' (id)"


@dataclass(frozen=True)
class Objects:
    """The labeled objects of one image.  boxes: corners x1, y1, x2, y2 in pixels, (k, 4).  categories, crowds: (k,)."""

    boxes: Float64Array
    categories: Int64Array
    crowds: AnyArray


@dataclass(frozen=True)
class ObjectLabels:
    """The objects of images.  categories: all ids in order; class k of a model is the k-th one.  images: one item per image."""

    categories: tuple[int, ...]
    images: tuple[Objects, ...]

    def subset(self, which: slice | Int64Array) -> ObjectLabels:
        """The labels of some of the images."""
        chosen = self.images[which] if isinstance(which, slice) else tuple(self.images[k] for k in which)
        return replace(self, images=chosen)


def load_objects(path: Path, images: FolderImages) -> ObjectLabels:
    """The boxes of a file for images in a directory.  Raises DataError if it is not in COCO format, or does not list an image.

    An image is matched by its file_name, or by the end of its path; images of the file that are not in the directory are skipped.
    """
    document = _document(path)
    try:
        categories = tuple(sorted({int(item["id"]) for item in document["categories"]}))
        names = {item["id"]: str(item["file_name"]) for item in document["images"]}
        rows: dict[str, list[list[float]]] = {name: [] for name in names.values()}
        for item in document["annotations"]:
            row = [*item["bbox"], item["category_id"], item.get("iscrowd", 0)]
            rows[names[item["image_id"]]].append([float(value) for value in row])
        found = {name: _objects(listed, categories) for name, listed in rows.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"'{path}' is not in COCO format ({type(error).__name__}: {error}); {FORMAT}") from None
    listed = [found[_name_in(found, image, path)] for image in images.paths]
    placed = [mapped(each, images.pipeline, size_of(image)) for each, image in zip(listed, images.paths, strict=True)]
    return ObjectLabels(categories, tuple(placed))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({error.strerror or error}); check the path of the labels") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise DataError(f"'{path}' is not JSON ({error}); {FORMAT}") from None
    if not isinstance(document, dict) or not all(
        isinstance(document.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise DataError(f"'{path}' is not in COCO format; {FORMAT}")
    return document


def _objects(rows: list[list[float]], categories: tuple[int, ...]) -> Objects:
    """The objects of an image.  rows: x, y, width, height, category and crowd of each object.  Raises ValueError if invalid."""
    values = np.array(rows, np.float64).reshape(-1, 6)  # raises ValueError if a box has the wrong number of values
    if not np.isfinite(values).all() or (values[:, 2:4] < 0).any():
        raise ValueError("a bbox is not a list of x, y, width and height")
    if not np.isin(values[:, 4], categories).all():
        raise ValueError("a category_id is not one of the categories")
    boxes = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:4]], 1)
    return Objects(boxes, values[:, 4].astype(np.int64), values[:, 5] != 0)


def _name_in(known: Mapping[str, Objects], image: Path, path: Path) -> str:
    """The listed file_name of an image: the longest end of its path that is listed."""
    parts = image.parts
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in known:
            return name
    raise DataError(f"the image '{image}' is not listed in '{path}'; give labels for all images, or only labeled images")


def mapped(objects: Objects, pipeline: Pipeline, size: tuple[int, int]) -> Objects:
    """The objects after the pipeline has processed their image.  size: (width, height) of the image before."""
    resized, left, top = pipeline.places(size)
    scale = np.array(resized) / np.array(size)
    boxes = objects.boxes * np.tile(scale, 2) - np.array([left, top, left, top])
    edge = np.array(pipeline.frame(resized))
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    seen = ((center >= 0) & (center <= edge)).all(1)
    return Objects(np.clip(boxes[seen], 0, np.tile(edge, 2)), objects.categories[seen], objects.crowds[seen])
