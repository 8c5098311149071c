"""Temporary files of killed runs: each run locks its files, and a later run removes those without a lock."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where nothing is removed
    fcntl = None  # type: ignore[assignment]

PREFIX, CLAIM = "requant_onnx-", ".claim"
TRIES = 5  # attempts to make a directory that no other run mistakes for a leftover


def claim(file: IO[Any]) -> bool:
    """Lock an open file until it is closed or the process ends.  Returns False if it is locked already, or cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_unclaimed(files: Iterable[Path]) -> None:
    """Delete the files that no running process has locked."""
    for file in files:
        with contextlib.suppress(OSError), open(file, "r+b") as opened:
            if claim(opened):
                file.unlink()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary directory, which is removed after the block; directories left by killed runs are removed first."""
    base = Path(tempfile.gettempdir())
    for claimed in base.glob(f"{PREFIX}*/{CLAIM}"):
        with contextlib.suppress(OSError), open(claimed, "r+b") as opened:
            if claim(opened):
                shutil.rmtree(claimed.parent, ignore_errors=True)
    for attempt in range(TRIES):
        directory = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        with directory as name, open(os.path.join(name, CLAIM), "wb") as opened:
            ours = claim(opened) and os.fstat(opened.fileno()).st_nlink > 0  # another run may have removed it before it was locked
            if ours or attempt == TRIES - 1:  # without support for locks, no claim succeeds
                yield Path(name)
                return
