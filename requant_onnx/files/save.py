"""Write a model completely or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path

import onnx

from requant_onnx.errors import ModelError, OutputError
from requant_onnx.files.atomic import replacing, reporting_errors
from requant_onnx.files.external import chunks_of, fetch, stored_bytes
from requant_onnx.files.load import data_files, is_large
from requant_onnx.files.wire import copy_fields, pieces_of
from requant_onnx.text import first_line, is_unicode

EXTERNAL_BYTES = 1024  # smaller initializers stay in the model
MAGIC = b"requant_onnx\0\0\0\0"  # first bytes of our data files, by which those of a killed run are recognized
PAGE, WORD = 4096, 16  # alignment in bytes in the data file: of tensors worth mapping into memory, and of all other tensors
MAPPED_BYTES = 1 << 20  # smallest size of a tensor worth mapping


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool = False, check: bool = True) -> int:
    """Check a model with onnx.checker and write it, completely or not at all.  Returns its size in bytes, including external data.

    model: model to write.  path: path of the file, which is replaced if it exists.
    external_data: whether initializers of 1 KiB and more go to a second file next to it, which a model above 2 GB needs.  Its name
    is `<name>.data`, or `<name>.2.data` if that exists.
    check: whether to check the model.
    Raises ModelError if the model is invalid, or above 2 GB without external data; OutputError if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if external_data:
        return _save_externally(model, path, check)
    if is_large(model):
        raise ModelError(f"the model for '{path}' is larger than 2 GB, more than one ONNX file can hold; use --external-data")
    if check:
        check_valid(_slim(model))
    former = _data_files(path)
    with reporting_errors(path), replacing(path) as file:
        for piece in pieces_of(model):
            file.write(piece)
    _delete(unshared([*former, *_orphans(path, ())], path))
    return path.stat().st_size


def check_valid(model: onnx.ModelProto | str) -> None:
    """Raise ModelError if onnx.checker rejects a model, or the file of this path."""
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"the converted model is not valid ONNX ({first_line(error)}); please report it") from None


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy whose large initializers are inputs, which takes little memory to check."""
    large = {item.name for item in model.graph.initializer if stored_bytes(item) >= MAPPED_BYTES}
    if not large:
        return model
    slim = onnx.ModelProto()
    copy_fields(model, slim, but="graph")
    copy_fields(model.graph, slim.graph, but="initializer")
    listed = {item.name for item in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in large:
            slim.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            slim.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return slim


def check_data_name(path: Path) -> None:
    """Raise OutputError if the name of a model is not Unicode.  Its data file is named like it, and a model holds that as text."""
    if not is_unicode(path.name):
        raise OutputError(f"'{path}' is not Unicode, as the name of a data file must be; give another name")


def _save_externally(model: onnx.ModelProto, path: Path, check: bool) -> int:
    """Write the data under a new name, then the model, so that no model ever refers to wrong data.  Returns the size of both."""
    check_data_name(path)
    former = _data_files(path)
    location = next(name for name in _data_names(path) if not (path.parent / name).exists())
    skeleton, outside = _without_data(model, location)
    data = path.parent / location
    try:
        with reporting_errors(data), replacing(data) as file:
            file.write(MAGIC)
            for offset, tensor in outside:
                file.seek(offset)
                for piece in chunks_of(tensor):
                    file.write(piece)
        with reporting_errors(path), replacing(path) as file:
            file.write(skeleton.SerializeToString(deterministic=True))
            file.flush()
            if check:
                check_valid(file.name)
    except BaseException:
        _delete([data])
        raise
    _delete(unshared([*(name for name in former if name != data), *_orphans(path, [data])], path))
    return path.stat().st_size + data.stat().st_size


def _without_data(model: onnx.ModelProto, location: str) -> tuple[onnx.ModelProto, list[tuple[int, onnx.TensorProto]]]:
    """A copy of the model whose larger initializers refer to `location`, and these initializers with their offsets in it."""
    skeleton, outside, end = onnx.ModelProto(), [], len(MAGIC)
    copy_fields(model, skeleton, but="graph")
    copy_fields(model.graph, skeleton.graph, but="initializer")
    for tensor in model.graph.initializer:
        stub = skeleton.graph.initializer.add()
        size = stored_bytes(tensor)
        if size < EXTERNAL_BYTES:
            stub.CopyFrom(tensor)
            fetch(stub)
            continue
        copy_fields(tensor, stub, but="raw_data")
        alignment = PAGE if size >= MAPPED_BYTES else WORD
        offset = -(-end // alignment) * alignment
        onnx.external_data_helper.set_external_data(_mark(stub), location, offset, size)
        stub.ClearField("raw_data")
        outside.append((offset, tensor))
        end = offset + size
    return skeleton, outside


def _mark(stub: onnx.TensorProto) -> onnx.TensorProto:
    stub.raw_data = b""  # set_external_data requires this field
    return stub


def _data_names(path: Path) -> Iterator[str]:
    yield f"{path.name}.data"
    yield from (f"{path.name}.{k}.data" for k in count(2))


def _data_files(path: Path) -> list[Path]:
    """The external data files of the model at `path` (which is about to be replaced) that have names given by this module."""
    pattern = _data_pattern(path)
    return [file for file in data_files(path) if file.parent == path.parent and pattern.fullmatch(file.name)]


def _orphans(path: Path, used: Collection[Path]) -> list[Path]:
    """The data files of this model that killed runs left behind.  used: data files that the model refers to."""
    orphans = []
    for file in path.parent.iterdir():
        if file not in used and _data_pattern(path).fullmatch(file.name) and file.is_file():
            with contextlib.suppress(OSError), open(file, "rb") as opened:
                orphans += [file] if opened.read(len(MAGIC)) == MAGIC else []
    return orphans


def _data_pattern(path: Path) -> re.Pattern[str]:
    return re.compile(re.escape(path.name) + r"(\.\d+)?\.data")


def unshared(files: Collection[Path], path: Path) -> list[Path]:
    """The data files that no other model in the directory of `path` reads, such as a copy of the model or one that was renamed."""
    names = [os.fsencode(file.name) for file in files]
    others = [other for other in path.parent.glob("*.onnx") if other != path and _has_one_of(other, names)] if files else []
    needed = {os.path.normpath(data) for other in others for data in data_files(other)}
    return [file for file in files if os.path.normpath(file) not in needed]


def _has_one_of(path: Path, names: Collection[bytes]) -> bool:
    """Whether a file has one of these bytes anywhere, which takes much less time and memory than parsing it."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return any(data.find(name) >= 0 for name in names)
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
