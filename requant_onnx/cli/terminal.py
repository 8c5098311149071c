"""Output of a command on the terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from requant_onnx import progress
from requant_onnx.cli.paths import STDOUT

UNWRAPPED = 10_000  # columns
WHOLE_RUN = 1e9  # seconds of the past from which the time left is extrapolated: steps are shares of the time of the whole run
PLAIN_SECONDS = 30.0  # between two lines of progress, where there is no terminal


class _Console(Console):
    """A console that lets a BrokenPipeError pass, where rich would exit with code 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise it, as rich calls it."""
        raise BrokenPipeError


@contextlib.contextmanager
def until_pipe_is_closed() -> Iterator[None]:
    """Print in this block; if the reader of a pipe closes it, as head does, the rest is skipped without an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console_for(args: argparse.Namespace) -> Console:
    """The console for tables; text in a file or a pipe is not wrapped, and rich obeys NO_COLOR.

    It is silent with --quiet, and if the report goes to standard output.
    """
    quiet = args.quiet or getattr(args, "json", None) == STDOUT
    return _Console(emoji=False, highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else UNWRAPPED)


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, what: str) -> Iterator[progress.Progress | None]:
    """Show a progress bar on standard error, or a line now and then if that is not a terminal; None with --quiet."""
    console = Console(stderr=True)
    if args.quiet:
        yield None
        return
    if not console.is_terminal:
        yield _plain_progress(what)
        return
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, speed_estimate_period=WHOLE_RUN) as bar:
        task, last = bar.add_task("", total=None), (0, 0)

        def show(item: str, done: int, total: int) -> None:
            nonlocal last
            if total != last[1] or done < last[0]:  # the next phase, which has its own speed
                bar.reset(task)
            last = (done, total)
            bar.update(task, description=escape(item), completed=done, total=total)

        yield show


def _plain_progress(what: str) -> progress.Progress:
    """Print a line of progress every PLAIN_SECONDS, for logs and pipes."""
    shown = time.monotonic()

    def show(item: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            print(f"{what}: {done / max(1, total):.0%} ({item})", file=sys.stderr, flush=True)

    return show


def status_line(args: argparse.Namespace, what: str) -> contextlib.AbstractContextManager[object]:
    """Show a spinner on standard error, for work that has no countable steps."""
    console = Console(stderr=True)
    return contextlib.nullcontext() if args.quiet or not console.is_terminal else console.status(what)
