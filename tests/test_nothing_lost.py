"""A conversion that is killed, or fails on a full disk or a directory without write permission, preserves existing files.

The next one removes temporary files.  The same input and options produce the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn

from requant_onnx import save_model
from requant_onnx.cli.main import main
from requant_onnx.files.leftovers import scratch_folder
from requant_onnx.files.load import load_model

MOMENTS = 8  # number of moments in a run, one in each eighth of it


def contents(folder: Path) -> dict[str, str]:
    return {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in folder.iterdir() if item.is_file()}


def large_model(folder: Path) -> Path:
    """Write a model of 8 MB, so that writing the output takes some time."""
    text = "net (float[n, 512] x) => (float[n, 512] y) { a = MatMul(x, u) b = MatMul(a, v) c = MatMul(b, w) y = MatMul(c, z) }"
    save_model(parse(text, **{name: laplace(512, 1024 // 2, seed=k) for k, name in enumerate("uvwz")}), folder / "in.onnx")
    return folder / "in.onnx"


CHILD = """
import sys
from requant_onnx.cli.main import main
main(["convert", sys.argv[1], sys.argv[1], "--bits", "8"])  # all is imported; the input is refused
print("ready", flush=True)
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--form", "folded"], ["--external-data"]], ids=["one file", "external data"])
def test_killed_at_any_moment(tmp_path: Path, options: list[str]) -> None:
    """The output is the complete old or new file; after one more run there are no other files."""
    home = tmp_path / "home"
    home.mkdir()
    source, output = large_model(home), home / "out.onnx"
    assert main(["convert", str(source), str(output), *options]) == 0
    settled = len(contents(home))
    kept = [item.name for item in scratch()]
    command = [sys.executable, "-c", CHILD, str(source), str(output), "--force", *options]
    generator = random.Random(0)
    duration = run_until(command, None)
    for k in range(MOMENTS):
        run_until(command, duration * generator.uniform(k, k + 1) / MOMENTS)
        load_model(output)  # complete, with its data
        assert contents(home)["in.onnx"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert main(["convert", str(source), str(output), "--force", *options]) == 0
    assert len(contents(home)) == settled
    assert [item.name for item in scratch()] == kept


def scratch() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("requant_onnx-*"))


def run_until(command: list[str], seconds: float | None) -> float:
    """Kill the process some seconds after it is ready, or wait for it if None.  Returns how long it ran after it was ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        ready = time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            child.send_signal(signal.SIGKILL)
        child.stdout.read()
    return time.monotonic() - ready


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A directory on a file system of 100 kB; if none can be mounted, any directory."""
    folder = Path(tempfile.mkdtemp())
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True, check=False)
    try:
        yield folder
    finally:
        if mounting.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--external-data"], ["--json"]], ids=["one file", "external data", "report"])
def test_a_full_disk(full_disk: Path, options: list[str]) -> None:
    """The disk is full, or, if no file system could be mounted, the file size is limited."""
    save_model(small_cnn(), full_disk / "out.onnx")
    mounted = full_disk.is_mount()
    if mounted:
        used = sum(-(-item.stat().st_size // 4096) * 4096 for item in full_disk.iterdir())
        (full_disk / "filler").write_bytes(bytes(100 * 1024 - used))
    before = contents(full_disk)
    if options == ["--json"]:
        options = ["--json", str(full_disk / "report.json")]
    command = [sys.executable, "-m", "requant_onnx", "convert", str(OWN_MODEL), str(full_disk / "out.onnx"), "--force", *options]
    made = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=None if mounted else limited)
    assert made.returncode == 2
    assert ("No space left on device" if mounted else "File too large") in made.stderr
    assert contents(full_disk) == before


def limited() -> None:
    """Limit file sizes to 1 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    """Run without administrator rights, which allow writing everywhere."""
    shutil.copy(OWN_MODEL, tmp_path / "in.onnx")
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    command = [sys.executable, "-m", "requant_onnx", "convert", str(tmp_path / "in.onnx"), str(home / "out.onnx")]
    made = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=without_rights)
    assert made.returncode == 2
    assert made.stderr.startswith("error: cannot write")
    assert "Permission denied" in made.stderr or "Read-only" in made.stderr
    assert not list(home.iterdir())


def without_rights() -> None:
    """Drop the capability of writing everywhere (PR_CAPBSET_DROP alone takes effect only at exec)."""
    if os.geteuid() == 0:
        import ctypes  # noqa: PLC0415

        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.prctl(24, capability, 0, 0, 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--bits", "4", "--form", "folded"], ["--bits", "3", "--calibrate", "noise"]])
def test_the_same_bytes_every_time(tmp_path: Path, options: list[str]) -> None:
    """Also in another process, with another hash seed and number of threads."""
    save_model(small_cnn(), tmp_path / "in.onnx")
    found = set()
    for k, threads in enumerate(("1", "2", "3")):
        command = [
            sys.executable,
            "-m",
            "requant_onnx",
            "convert",
            str(tmp_path / "in.onnx"),
            str(tmp_path / f"{k}.onnx"),
            *options,
        ]
        limits = {"PYTHONHASHSEED": str(k), **{f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS")}}
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **limits})
        found.add((tmp_path / f"{k}.onnx").read_bytes())
    assert len(found) == 1
    onnx.checker.check_model(onnx.load_from_string(found.pop()))


def test_a_directory_that_another_run_removed_before_it_was_claimed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    claims = iter([False, True])
    monkeypatch.setattr("requant_onnx.files.leftovers.claim", lambda _: next(claims))
    with scratch_folder() as folder:
        (folder / "file").write_bytes(b"kept")
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert not list(tmp_path.iterdir())
