"""tools/cifar.py against an HTTP server on this machine."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cifar
import pytest

from requant_onnx import DataError

NAME = cifar.ARCHIVES["cifar10"][0]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_address[1]}/"
        http.shutdown()
        thread.join()


def archive(path: Path, members: dict[str, bytes], link: str | None = None) -> str:
    """Write a .tar.gz and return its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def expect_checksum(monkeypatch: pytest.MonkeyPatch, md5: str) -> None:
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", (NAME, md5))


def test_download_verify_unpack_then_found_in_the_cache(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    members = {"cifar-10-batches-bin/test_batch.bin": b"abc", "cifar-10-batches-bin/readme.html": b"x", "../evil.bin": b"x"}
    expect_checksum(monkeypatch, archive(folder / NAME, members))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR_DIR", raising=False)
    assert cifar.find_cifar("cifar10") is None
    found = cifar.find_or_fetch("cifar10", base_url=address)
    assert [path.name for path in found.iterdir()] == ["test_batch.bin"]
    assert [path.name for path in found.parent.iterdir()] == ["cifar-10-batches-bin"]  # no archive, no partial directory
    (folder / NAME).unlink()
    assert cifar.find_or_fetch("cifar10", base_url=address) == found


def test_a_wrong_checksum_leaves_nothing(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = server
    archive(folder / NAME, {"cifar-10-batches-bin/test_batch.bin": b"tampered"})
    with pytest.raises(DataError, match="not the published c32a1d4ab5d03f1284b67883e8d87530"):
        cifar.fetch("cifar10", tmp_path / "into", address)
    assert not list((tmp_path / "into").iterdir())


def test_a_link_in_the_archive_is_refused(server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = server
    expect_checksum(monkeypatch, archive(folder / NAME, {}, link="cifar-10-batches-bin/test_batch.bin"))
    with pytest.raises(DataError, match="not a regular file"):
        cifar.fetch("cifar10", tmp_path / "into", address)
    assert not list((tmp_path / "into").iterdir())


def test_an_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot download"):
        cifar.fetch("cifar10", tmp_path, "http://127.0.0.1:9/")


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test_batch\.bin is missing"):
        cifar.find_or_fetch("cifar10", tmp_path)
