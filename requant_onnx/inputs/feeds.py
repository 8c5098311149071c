"""Inputs of a model by name, from an .npz file with one array per input."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from requant_onnx.errors import DataError
from requant_onnx.numerics.arrays import AnyArray, GenericArray

Shapes: TypeAlias = "Mapping[str, tuple[int | None, ...]]"
"""Shapes of inputs by name, with None for a free size."""

Feed: TypeAlias = "Mapping[str, AnyArray]"
"""The inputs of one run, by name."""

BY_NAME = "give the inputs by name: FILE.npz, written with numpy.savez('FILE.npz', NAME=array, ...)"


@dataclass(frozen=True)
class FeedSet:
    """Inputs by name for comparing models, one run each, without labels."""

    rows: tuple[Feed, ...]
    y = None

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int | None) -> FeedSet:
        """The first `count` rows (all of them when None)."""
        return FeedSet(self.rows[:count])

    def part(self, start: int, end: int) -> FeedSet:
        """The rows from `start` up to, not including, `end`."""
        return FeedSet(self.rows[start:end])

    def fingerprint(self) -> bytes:
        """Bytes that identify the rows."""
        digest = hashlib.sha256()
        for name, values in (item for row in self.rows for item in sorted(row.items())):
            digest.update(repr((name, values.shape, values.dtype.str)).encode() + np.ascontiguousarray(values).tobytes())
        return digest.digest()


@contextlib.contextmanager
def opened_npz(path: Path) -> Iterator[Mapping[str, GenericArray]]:
    """The arrays of an .npz file, read on access.  Raises DataError when it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and NumPy raise many types on damaged files
        raise DataError(f"cannot read '{path}' as .npz ({error}); write it with numpy.savez(x=..., y=...)") from None


def holds_images(path: Path, shapes: Shapes) -> bool:
    """Whether an .npz file holds images as x for a model with these inputs, not its inputs by name.

    Only a model with one input takes images; if that input is named x, both must have four dimensions.  Raises DataError when the
    file cannot be read.
    """
    with opened_npz(path) as arrays:
        if "x" not in arrays or len(shapes) != 1:
            return False
        named = set(arrays) - {"y"} == set(shapes)
        x = arrays["x"]
        return not named or (x.ndim == len(shapes["x"]) == 4 and x.dtype in (np.uint8, np.float32))


def load_feeds(path: Path, shapes: Shapes) -> list[dict[str, GenericArray]]:
    """Load the inputs of a model by name.  Each array is cut into rows, one per feed, by the shape of its input.

    An array with the rank of the input is cut along the first axis, `shape[0]` at a time (1 if free); an array with one more
    dimension, along that dimension.  An array with one row is repeated if others have more.
    Raises DataError when the file cannot be read, lacks an input, or has arrays with different numbers of rows.
    """
    with opened_npz(path) as arrays:
        missing = sorted(shapes.keys() - set(arrays))
        if missing:
            raise DataError(f"'{path}' contains {sorted(arrays)}, but the model takes {sorted(shapes)}; {BY_NAME}")
        inputs = {name: _rows(arrays[name], shape, name, path) for name, shape in shapes.items()}
    count = max(map(len, inputs.values()), default=0)
    odd = next((name for name, rows in inputs.items() if len(rows) not in (1, count)), None)
    if odd is not None or count == 0:
        counts = ", ".join(f"{name}: {len(rows)}" for name, rows in inputs.items())
        raise DataError(
            f"the arrays of '{path}' have different numbers of rows ({counts}); give the same number for each input, at least one"
        )
    return [{name: rows[k if len(rows) > 1 else 0] for name, rows in inputs.items()} for k in range(count)]


def _rows(values: GenericArray, shape: tuple[int | None, ...], name: str, path: Path) -> list[GenericArray]:
    if values.ndim == len(shape) + 1:
        return list(values)
    if values.ndim == len(shape) == 0:
        return [values]
    if values.ndim != len(shape):
        raise DataError(
            f"'{name}' in '{path}' has {values.ndim} dimensions, but the input of the model has {len(shape)}; give an array with "
            "the same number, or with one more to stack several inputs"
        )
    size = shape[0] or 1
    if len(values) % size:
        raise DataError(
            f"'{name}' in '{path}' has {len(values)} rows, but the model takes {size} at a time; give a multiple of that"
        )
    return [values[start : start + size] for start in range(0, len(values), size)]
