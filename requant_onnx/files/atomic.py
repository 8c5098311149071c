"""Write a file completely or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from requant_onnx.errors import OutputError
from requant_onnx.files.leftovers import claim, remove_unclaimed

LONGEST_PREFIX = 200  # bytes of a name, of which most file systems allow 255


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync and rename a temporary file, which is removed if this fails or is interrupted.  Raises OutputError."""
    with reporting_errors(path), replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def reporting_errors(path: Path) -> Iterator[None]:
    """Turn every OSError into an OutputError that names the path."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}' ({error.strerror or error}); check the directory, its permissions and the free space"
        ) from None


def require_file(path: Path) -> None:
    """Raise OutputError if a path exists and is not a regular file: replacing a device or a pipe would harm the system."""
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "a device, a pipe or a socket"
        raise OutputError(f"'{path}' is {what}; give the path of the file to write")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing; it replaces `path` at the end of the block, or is removed if the block fails.

    If the path is a symbolic link, its target is replaced.  Raises OutputError for a device, a pipe or a directory; OSError if the
    file cannot be written.
    """
    path = Path(os.path.realpath(path))
    require_file(path)
    encoding, suffix = sys.getfilesystemencoding(), ".partial"
    prefix = os.fsencode(f".{path.name}.")[:LONGEST_PREFIX].decode(encoding, "ignore")  # without half a character at the end
    remove_unclaimed(file for file in path.parent.iterdir() if file.name.startswith(prefix) and file.name.endswith(suffix))
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
    try:
        os.close(descriptor)
        with open(partial, "wb") as file:  # unlike a file from os.fdopen, it has the path as its name
            claim(file)
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
