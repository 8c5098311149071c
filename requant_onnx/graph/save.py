"""Write a model so that the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

import onnx

from requant_onnx.errors import ModelError, OutputError
from requant_onnx.graph.load import data_files, first_line, is_large

EXTERNAL_BYTES = 1024  # smaller initializers stay in the model
PAGE, WORD = 4096, 16  # alignment in the data file of tensors that are worth mapping into memory, and of others
MAPPED_BYTES = 1 << 20


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool = False) -> int:
    """Check the model with onnx.checker and write it.  Returns its size in bytes, that of its external data included.

    external_data: write initializers of 1 kB and more to a second file beside it, `<name>.data`, as a model above 2 GB needs.
    Raises ModelError when the model is invalid, or above 2 GB without external data, OutputError when it cannot be written.
    """
    path = Path(path)
    if external_data:
        return _save_externally(model, path)
    if is_large(model):
        raise ModelError(f"the model for '{path}' is larger than 2 GB, more than one ONNX file can hold; use --external-data")
    _check(model)
    data = model.SerializeToString(deterministic=True)
    former = _data_files(path)
    write_atomically(path, data)
    _delete(former)
    return len(data)


def _check(model: onnx.ModelProto | str) -> None:
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"the converted model is not valid ONNX ({first_line(error)}); please report it") from None


def _save_externally(model: onnx.ModelProto, path: Path) -> int:
    """The data under a name that is new, then the model that refers to it: at no moment does a model refer to other data."""
    former = _data_files(path)
    location = next(name for name in _data_names(path) if not (path.parent / name).exists())
    skeleton, outside = _without_data(model, location)
    data = path.parent / location
    try:
        with _writing(data), _replacing(data) as file:
            for offset, tensor in outside:
                file.seek(offset)
                file.write(tensor.raw_data)
        with _writing(path), _replacing(path) as file:
            file.write(skeleton.SerializeToString(deterministic=True))
            file.flush()
            _check(file.name)
    except BaseException:
        _delete([data])
        raise
    _delete([name for name in former if name != data])
    return path.stat().st_size + data.stat().st_size


def _without_data(model: onnx.ModelProto, location: str) -> tuple[onnx.ModelProto, list[tuple[int, onnx.TensorProto]]]:
    """A copy of the model whose larger initializers refer to `location`, and these with their offsets there."""
    skeleton, outside, end = onnx.ModelProto(), [], 0
    _copy_fields(model, skeleton, but="graph")
    _copy_fields(model.graph, skeleton.graph, but="initializer")
    for tensor in model.graph.initializer:
        stub = skeleton.graph.initializer.add()
        if len(tensor.raw_data) < EXTERNAL_BYTES:
            stub.CopyFrom(tensor)
            continue
        _copy_fields(tensor, stub, but="raw_data")
        alignment = PAGE if len(tensor.raw_data) >= MAPPED_BYTES else WORD
        offset = -(-end // alignment) * alignment
        onnx.external_data_helper.set_external_data(_mark(stub), location, offset, len(tensor.raw_data))
        stub.ClearField("raw_data")
        outside.append((offset, tensor))
        end = offset + len(tensor.raw_data)
    return skeleton, outside


def _mark(stub: onnx.TensorProto) -> onnx.TensorProto:
    stub.raw_data = b""  # set_external_data wants the field to be there
    return stub


def _copy_fields(source: Any, target: Any, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)


def _data_names(path: Path) -> Iterator[str]:
    yield f"{path.name}.data"
    yield from (f"{path.name}.{k}.data" for k in count(2))


def _data_files(path: Path) -> list[Path]:
    """The external data files of a model that was written here before, and will be replaced."""
    ours = re.compile(re.escape(path.name) + r"(\.\d+)?\.data")
    return [file for file in data_files(path) if file.parent == path.parent and ours.fullmatch(file.name)]


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename.  Raises OutputError; leaves nothing behind when it fails or is interrupted."""
    with _writing(path), _replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}' ({error.strerror or error}); check the folder, its permissions and space"
        ) from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        os.close(descriptor)
        with open(partial, "wb") as file:  # its name is the path, which os.fdopen would not give
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
