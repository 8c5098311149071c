"""Progressive files: models that share one data file, each of which reads a longer prefix of it than the model before.

    out.2bit.onnx   graph of the 2-bit model      reads [0, a) of the data file
    out.4bit.onnx   graph of the 4-bit model      reads [0, b)
    out.onnx        graph of the 8-bit model      reads [0, c), all of it
    out.planes.bin  2 bits [0, a) | 2 more bits [a, b) | 4 more bits [b, c)

A tensor that several models contain is stored once, in the part of the first of these models.  Small tensors stay in the graphs.
https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import onnx

from requant_onnx.errors import ModelError
from requant_onnx.files.atomic import replacing, reporting_errors
from requant_onnx.files.load import data_files, is_large
from requant_onnx.files.save import EXTERNAL_BYTES, check_data_name, check_valid, unshared
from requant_onnx.files.wire import copy_fields

ALIGNMENT = 4  # alignment of tensors in the data file, in bytes
REFERENCE = 72  # approximate bytes of a reference to the data file


class SavedStage(NamedTuple):
    """A saved model.  bits: bits of its weights.  graph: path of its graph.  data: path of the common data file.

    graph_bytes: size of the graph file.  data_bytes: length of the prefix of the data file that the model reads.
    """

    bits: int
    graph: Path
    data: Path
    graph_bytes: int
    data_bytes: int


def stage_paths(path: Path, widths: Sequence[int]) -> list[Path]:
    """The paths of the graphs.  path: path of the last one.  widths: bits of all models.

    >>> [path.name for path in stage_paths(Path("net.onnx"), (2, 4, 8))]
    ['net.2bit.onnx', 'net.4bit.onnx', 'net.onnx']
    """
    return [*(path.with_name(f"{path.stem}.{bits}bit{path.suffix}") for bits in widths[:-1]), path]


def save_progressive(
    stages: Sequence[tuple[int, onnx.ModelProto, object]], path: str | os.PathLike[str], *, check: bool = True
) -> list[SavedStage]:
    """Check the models and write them with their common data file.  Returns the saved models.

    stages: (bits, model, anything) of each model, as `quantize_progressively` returns them.
    path: path of the last model.  For NAME.onnx, the others are NAME.2bit.onnx and NAME.4bit.onnx; existing files are replaced.
    The data file is NAME.planes.bin, or NAME.planes.2.bin if that exists, so that no replaced model loses its data too early.
    check: whether to check the models with onnx.checker.
    Raises ModelError if a model is invalid or above 2 GB; OutputError if a file cannot be written.
    """
    path = Path(os.path.realpath(path))
    check_data_name(path)
    models = [model for _, model, _ in stages]
    if any(is_large(model) for model in models):
        raise ModelError(f"the model for '{path}' is larger than 2 GB, more than progressive files can hold")
    paths = stage_paths(path, [bits for bits, _, _ in stages])
    own = re.compile(re.escape(path.stem) + r"\.planes(\.\d+)?\.bin")
    former = {file for each in paths for file in data_files(each) if file.parent == path.parent and own.fullmatch(file.name)}
    data = next(file for file in _data_paths(path) if not file.exists())
    planes = _Planes(models)
    skeletons = [planes.skeleton(model, data.name) for model in models]
    try:
        with reporting_errors(data), replacing(data) as file:
            file.write(planes.data)
        _write_graphs(skeletons, paths, check)
    except BaseException:
        if not any(data in data_files(each) for each in paths):
            data.unlink(missing_ok=True)
        raise
    for file_before in unshared(former, path):
        file_before.unlink(missing_ok=True)
    ends = zip(stages, paths, planes.ends, strict=True)
    return [SavedStage(stage[0], graph, data, graph.stat().st_size, end) for stage, graph, end in ends]


def _write_graphs(skeletons: Sequence[onnx.ModelProto], paths: Sequence[Path], check: bool) -> None:
    """Write and check all graphs before any of them replaces a file."""
    with contextlib.ExitStack() as stack:
        for skeleton, path in zip(skeletons, paths, strict=True):
            stack.enter_context(reporting_errors(path))
            file = stack.enter_context(replacing(path))
            file.write(skeleton.SerializeToString(deterministic=True))
            file.flush()
            if check:
                check_valid(file.name)


def _data_paths(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.stem}.planes.bin")
    yield from (path.with_name(f"{path.stem}.planes.{k}.bin") for k in count(2))


class _Planes:
    """The common data file of several models.  ends: length of the prefix that each model reads, in bytes."""

    def __init__(self, models: Sequence[onnx.ModelProto]) -> None:
        self.ends: list[int] = []
        self._offsets: dict[bytes, int] = {}
        self._parts: list[bytes] = []
        tensors = [{_digest(item): item.raw_data for item in model.graph.initializer if item.raw_data} for model in models]
        readers = Counter(key for each in tensors for key in each)
        end = 0
        for each in tensors:
            for key, values in each.items():
                if key not in self._offsets and _is_outside(len(values), readers[key]):
                    self._offsets[key], padding = end, -len(values) % ALIGNMENT
                    self._parts.append(values + bytes(padding))
                    end += len(values) + padding
            self.ends.append(end)

    @property
    def data(self) -> bytes:
        """The whole data file."""
        return b"".join(self._parts)

    def skeleton(self, model: onnx.ModelProto, location: str) -> onnx.ModelProto:
        """A copy of a model whose larger initializers refer to `location`."""
        skeleton = onnx.ModelProto()
        copy_fields(model, skeleton, but="graph")
        copy_fields(model.graph, skeleton.graph, but="initializer")
        for tensor in model.graph.initializer:
            stub = skeleton.graph.initializer.add()
            copy_fields(tensor, stub, but="raw_data")
            offset = self._offsets.get(_digest(tensor)) if tensor.raw_data else None
            if offset is None:
                stub.CopyFrom(tensor)
                continue
            stub.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset), ("length", len(tensor.raw_data))):
                stub.external_data.add(key=key, value=str(value))
        return skeleton


def _is_outside(size: int, readers: int) -> bool:
    """Whether a tensor goes to the data file: it is large, or takes less space there than in every graph that has it.

    size: its bytes.  readers: number of models that have it.
    """
    return size >= EXTERNAL_BYTES or size + readers * REFERENCE < readers * size


def _digest(tensor: onnx.TensorProto) -> bytes:
    return hashlib.sha256(tensor.raw_data).digest()
