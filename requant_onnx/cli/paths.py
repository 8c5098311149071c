"""Checks of output paths before any work is done: each raises OutputError for a path that cannot or must not be written."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from requant_onnx.errors import OutputError
from requant_onnx.files.atomic import require_file, write_atomically
from requant_onnx.files.load import data_files
from requant_onnx.webpage.pages import require

STDOUT = Path("-")  # the value of --json for standard output


MODELS, FILES = ("input", "model", "reference", "candidate"), ("labels", "config", "custom_ops", "data", "calibrate")
"""Options, and arguments, whose values may be paths of files to read."""


def read_by(args: argparse.Namespace) -> list[Path]:
    """The files that a command reads: its models, their data files, and the files that its options name."""
    models = [Path(getattr(args, name)) for name in MODELS if hasattr(args, name)]
    given = [getattr(args, name, None) for name in FILES]
    named = [Path(each) for value in given if value for each in (value if isinstance(value, list) else [value])]
    return [*models, *(file for model in models for file in data_files(model)), *named]


def check_output(source: Path, output: Path, force: bool, read: Sequence[Path] = ()) -> None:
    """Refuse an output model path that cannot be written, or would replace the input or, without --force, any other file.

    read: all files that the command reads, which are not replaced either.
    """
    require_file(output)
    if not output.parent.is_dir():
        raise OutputError(f"the directory '{output.parent}' does not exist; create it first")
    if output.exists() and source.exists() and output.samefile(source):
        raise OutputError(f"the output '{output}' is the input, which is never changed; give another path")
    used = [file.absolute() for file in data_files(source)]
    if output.absolute() in used:
        raise OutputError(f"the output '{output}' holds the weights of the input, which is never changed; give another path")
    if set(used) & {file.absolute() for file in data_files(output)}:
        raise OutputError(f"the data file of '{output}' holds the weights of the input too; give another path")
    if any(_is_same(output, file) for file in read):
        raise OutputError(f"the output '{output}' would replace a file that this command reads; give another path")
    if output.exists() and not force:
        raise OutputError(f"'{output}' exists; give another path, or --force to replace it")


def _is_same(path: Path, other: Path) -> bool:
    return path.absolute() == other.absolute() or (path.exists() and other.exists() and path.samefile(other))


def check_json(path: Path | None, *used: Path) -> None:
    """Refuse the path of a report that cannot be written, or would replace a file that is not a .json file."""
    if path is not None and path != STDOUT:
        _check_place(path, *used)
        if path.exists() and path.suffix != ".json":
            raise OutputError(f"'{path}' exists and is not a .json file; give the report another path")


def _check_place(path: Path, *used: Path) -> None:
    """Refuse the path of a report that cannot be written, or would replace a file that the command reads or writes."""
    require_file(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write the report to '{path}'; give a file in an existing directory")
    if any(_is_same(path, file) for file in used):
        raise OutputError(f"the report '{path}' would replace a file that this command uses; give another path")


def check_page(path: Path | None, force: bool, *used: Path) -> None:
    """Refuse the path of a web page as `check_new`.  Raises ConfigError if the libraries for web pages are missing."""
    if path is not None:
        require()
        check_new(path, force, *used)


def check_new(path: Path | None, force: bool, *used: Path) -> None:
    """Refuse the path of a report that cannot be written, or would replace a file in use or, without --force, any other file."""
    if path is not None:
        _check_place(path, *used)
        if path.exists() and not force:
            raise OutputError(f"'{path}' exists; give another path, or --force to replace it")


def check_apart(*paths: Path | None) -> None:
    """Refuse the same path for two reports."""
    given = [path.absolute() for path in paths if path is not None]
    twice = next((path for path in given if given.count(path) > 1), None)
    if twice is not None:
        raise OutputError(f"two reports would be written to '{twice}'; give each its own path")


def check_cache(folder: Path) -> None:
    """Create the directory of cached results, or refuse it if it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot cache results in '{folder}' ({error.strerror or error}); give another directory") from None
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot cache results in '{folder}' (it is not writable); give another directory")


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report completely or not at all, or to standard output; without a path, write nothing."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    elif path is not None:
        write_atomically(path, text.encode())
