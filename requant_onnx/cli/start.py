"""The entry point of `requant`: Ctrl-C prints one line from the start, even while the rest is still being imported."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType

from requant_onnx.errors import INTERRUPTED, INTERRUPTED_MESSAGE


def run() -> int:
    """Run the command line of this process; returns its exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # otherwise ignored, as in background jobs of a shell
    if ours:
        signal.signal(signal.SIGINT, _leave)
    from requant_onnx.cli.main import run as run_main  # noqa: PLC0415  # this import takes most of a second

    warnings.simplefilter("ignore", RuntimeWarning)  # from NumPy, about values that our own errors describe better
    if not ours:
        return run_main()
    came: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, interrupt)
        code = run_main()
        if came and code == 0:  # native code that called Python has cleared the exception: seen once in thousands of runs
            raise KeyboardInterrupt
        return code
    except KeyboardInterrupt:
        print(INTERRUPTED_MESSAGE, file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, _leave)  # all files are written


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End the process immediately: an exception in the middle of an import would be printed, or lost."""
    os.write(2, f"{INTERRUPTED_MESSAGE}\n".encode())
    os._exit(INTERRUPTED)
