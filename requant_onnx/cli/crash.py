"""A message for crashes of native code: on hostile values, ONNX Runtime can end the process without one."""

from __future__ import annotations

import ctypes
import os
import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGBUS") if hasattr(signal, name))
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _report(number: int) -> None:
    """Print what happened, and end the process; files are first written under temporary names, so none is incomplete."""
    name = signal.Signals(number).name
    sentence = (
        f"error: native code crashed ({name}), most likely ONNX Runtime on these inputs; try other inputs, or another version\n"
    )
    os.write(2, sentence.encode())
    os._exit(2)


_handler = _Handler(_report)  # must not be garbage-collected before the last signal


def report_crashes() -> None:
    """Handle crashes from now on: end the process with a message and exit code 2.

    Handlers of Python's signal module would never run, because the CPU repeats the faulting instruction.  Does nothing if the C
    library has no `signal`.
    """
    library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
    for number in SIGNALS if hasattr(library, "signal") else ():
        library.signal(number, _handler)
