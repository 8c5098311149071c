"""Output of a command on the terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from requant_onnx import progress
from requant_onnx.cli.paths import STDOUT

UNWRAPPED = 10_000  # columns
WHOLE_RUN = 1e9  # seconds of the past from which the time left is extrapolated: steps are shares of the time of the whole run


def console_for(args: argparse.Namespace) -> Console:
    """The console for tables; text in a file or a pipe is not wrapped, and rich obeys NO_COLOR.

    It is silent with --quiet, and if the report goes to standard output.
    """
    quiet = args.quiet or getattr(args, "json", None) == STDOUT
    return Console(emoji=False, highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else UNWRAPPED)


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, what: str) -> Iterator[progress.Progress | None]:
    """Show a progress bar on standard error; None if that is not a terminal, or with --quiet."""
    console = Console(stderr=True)
    if args.quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, speed_estimate_period=WHOLE_RUN) as bar:
        task = bar.add_task("", total=None)
        yield lambda item, done, total: bar.update(task, description=escape(item), completed=done, total=total)


def status_line(args: argparse.Namespace, what: str) -> contextlib.AbstractContextManager[object]:
    """Show a spinner on standard error, for work that has no countable steps."""
    console = Console(stderr=True)
    return contextlib.nullcontext() if args.quiet or not console.is_terminal else console.status(what)
