"""Find CIFAR-10 or CIFAR-100 (binary layout), or download it from its official address.

    python tools/cifar.py cifar10                 # print the directory; download into the cache if needed
    python tools/cifar.py cifar100 --data DIR     # look in DIR first

It looks in the given directory, $CIFAR_DIR and the cache (~/.cache/requant_onnx), then downloads with the published MD5 checksum
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from requant_onnx.errors import DataError

OFFICIAL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PROBES = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
MEMBER_LIMIT = 200 << 20  # bytes; the largest official member, CIFAR-100 train.bin, has 153,700,000


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "requant_onnx"


def find_cifar(dataset: str, given: Path | None = None) -> Path | None:
    """The first directory that contains the dataset: the given one, $CIFAR_DIR or the cache; None if none does."""
    places = [given, Path(os.environ["CIFAR_DIR"]) if os.environ.get("CIFAR_DIR") else None, cache_folder()]
    for place in places:
        for folder in (place / FOLDERS[dataset], place) if place else ():
            if (folder / PROBES[dataset]).is_file():
                return folder
    return None


def find_or_fetch(dataset: str, given: Path | None = None, base_url: str = OFFICIAL) -> Path:
    """The directory of the dataset's .bin files, which are downloaded into the cache if necessary.

    Raises DataError if `given` does not contain the dataset, or the download fails or has the wrong checksum.
    """
    found = find_cifar(dataset, given)
    if given is not None and (found is None or given not in (found, found.parent)):
        raise DataError(f"'{given}' does not contain {dataset} ({PROBES[dataset]} is missing); give the directory of .bin files")
    return found or fetch(dataset, cache_folder(), base_url)


def fetch(dataset: str, into: Path, base_url: str = OFFICIAL) -> Path:
    """Download, verify and unpack the dataset below `into`; the directory appears complete or not at all."""
    name, md5 = ARCHIVES[dataset]
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".partial-") as partial:
        archive = Path(partial) / name
        _download(base_url + name, archive, md5)
        _unpack(archive, Path(partial), FOLDERS[dataset])
        target = into / FOLDERS[dataset]
        (Path(partial) / FOLDERS[dataset]).rename(target)
    return target


def _download(url: str, path: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)  # the checksum published on the official page
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            done = 0
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                print(f"\r{url}: {done >> 20} of {total >> 20} MB", end="", file=sys.stderr)
    except OSError as error:
        raise DataError(f"cannot download {url} ({error}); download it manually, and give its directory with --data") from None
    print(file=sys.stderr)
    if digest.hexdigest() != md5:
        raise DataError(f"{url} has MD5 {digest.hexdigest()}, not the published {md5}; the download is damaged, so try again")


def _unpack(archive: Path, into: Path, folder: str) -> None:
    """Extract the plain .bin files of one directory of the archive; links, other names and larger files are rejected."""
    (into / folder).mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            parent, _, name = member.name.removeprefix("./").rpartition("/")
            if parent != folder or not name.endswith(".bin"):
                continue
            content = tar.extractfile(member) if member.isreg() and member.size <= MEMBER_LIMIT else None
            if content is None:
                raise DataError(f"'{archive.name}' holds '{member.name}', which is not a regular file of the expected size")
            (into / folder / name).write_bytes(content.read())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(ARCHIVES))
    parser.add_argument("--data", type=Path, help="directory to look in first")
    args = parser.parse_args()
    try:
        print(find_or_fetch(args.dataset, args.data))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
