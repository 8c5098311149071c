"""A crash in native code ends with one sentence, whichever thread it occurs in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CRASHES = {
    "in this thread, holding the lock": "import ctypes; ctypes.string_at(0)",
    "in this thread, without the lock": "import ctypes; ctypes.CDLL(None).memset(None, 1, 8)",
    "in another thread": (
        "import ctypes, threading; t = threading.Thread(target=ctypes.CDLL(None).memset, args=(None, 1, 8)); t.start(); t.join()"
    ),
}


@pytest.mark.skipif(os.name == "nt", reason="the C library has another name")
def test_an_abort_is_one_sentence() -> None:
    """As after an uncaught C++ exception."""
    code = "import os; from requant_onnx.cli.crash import report_crashes; report_crashes(); os.abort()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "SIGABRT" in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="the C library has another name")
@pytest.mark.parametrize("code", CRASHES.values(), ids=CRASHES)
def test_a_crash_is_one_sentence(code: str) -> None:
    start = "from requant_onnx.cli.crash import report_crashes; report_crashes(); "
    ended = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == (
        "error: native code crashed (SIGSEGV), most likely ONNX Runtime on these inputs; try other inputs, or another version\n"
    )
