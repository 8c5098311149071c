"""A sentence where native code crashes: on hostile values ONNX Runtime has ended the process without a word."""

from __future__ import annotations

import ctypes
import os
import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGBUS") if hasattr(signal, name))
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _report(number: int) -> None:
    """Say what happened, and end the process; files are written under other names first, so none is half-written."""
    name = signal.Signals(number).name
    sentence = (
        f"error: native code crashed ({name}), most likely ONNX Runtime on these inputs; try others, or another version of it\n"
    )
    os.write(2, sentence.encode())
    os._exit(2)


_handler = _Handler(_report)  # has to outlive every signal


def report_crashes() -> None:
    """End with a sentence and exit code 2 at a crash.  Python's own handlers never run there: the instruction is tried again.

    Nothing happens where the C library has no `signal`.
    """
    library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
    for number in SIGNALS if hasattr(library, "signal") else ():
        library.signal(number, _handler)
