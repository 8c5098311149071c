"""A cache of results on disk, with keys made from the inputs, so that a second run can reuse them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

OWN_NAME = re.compile(r"[0-9a-f]{64}|tmp-\w{8}")  # of files that `put` writes; a user may give a directory with other files
MAX_BYTES = 2 << 30  # total size of all results; the least recently used are deleted first


def default_folder() -> Path:
    """The user's cache directory: $XDG_CACHE_HOME, or the equivalent on this system."""
    return Path(user_cache_path("requant_onnx"))


def key_of(*parts: bytes | str) -> str:
    """A key for a result, made from its inputs."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class Cache:
    """Results as files in a directory; with None, nothing is stored.  A file that cannot be read or written counts as missing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> bytes | None:
        """The stored result, None if there is none."""
        if self.folder is None:
            return None
        with contextlib.suppress(OSError):
            path = self.folder / key
            data = path.read_bytes()
            os.utime(path)  # mark it as just used
            return data
        return None

    def put(self, key: str, data: bytes) -> None:
        """Store a result atomically."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix="tmp-")
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(name, self.folder / key)
            except BaseException:
                os.unlink(name)
                raise

    def trim(self, limit: int = MAX_BYTES) -> None:
        """Delete the least recently used results until their total size is below the limit, in bytes; other files stay."""
        if self.folder is None or not self.folder.is_dir():
            return
        with contextlib.suppress(OSError):
            own = [path for path in self.folder.iterdir() if OWN_NAME.fullmatch(path.name)]
            found = sorted(((path.stat().st_mtime, path.stat().st_size, path) for path in own), reverse=True)
            total = 0
            for _, size, path in found:
                total += size
                if total > limit:
                    path.unlink()
