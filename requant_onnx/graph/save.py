"""Write a model so that the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx

from requant_onnx.errors import ModelError, OutputError
from requant_onnx.graph.load import MAX_BYTES, first_line


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> int:
    """Check the model with onnx.checker and write it.  Returns its size in bytes.

    Raises ModelError when the model is invalid or above 2 GB, OutputError when the file cannot be written.
    """
    if model.ByteSize() > MAX_BYTES:
        raise ModelError(f"the model for '{path}' is larger than 2 GB, more than one ONNX file can hold; use fewer bits")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"the converted model is not valid ONNX ({first_line(error)}); please report it") from None
    data = model.SerializeToString(deterministic=True)
    write_atomically(Path(path), data)
    return len(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename.  Raises OutputError; leaves nothing behind when it fails or is interrupted."""
    try:
        with _replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}' ({error.strerror or error}); check the folder, its permissions and space"
        ) from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
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
