"""Ctrl-C while the program is still importing: one line, exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OWN_MODEL

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
LIGHT = "import sys; from requant_onnx.cli.start import run; assert not {'numpy', 'onnx', 'rich'} & sys.modules.keys()"
START = f"{LIGHT}; print('up', flush=True); sys.exit(run())"  # before that, the entry point itself is imported, in milliseconds


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.1])
def test_an_interrupt_in_the_first_second_prints_one_line(delay: float, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, "convert", str(OWN_MODEL), str(tmp_path / "a.onnx"), "--calibrate", "noise"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.stdout is not None
    assert started.stdout.readline() == b"up\n"
    time.sleep(delay)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert (error.decode(), started.returncode) == ("interrupted; no file was left half-written\n", 130)
    assert not list(tmp_path.iterdir())
