"""The command line: requant convert | validate | inspect | explain.  Text becomes values; the work is in the library."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from requant_onnx import convert, execute, tables
from requant_onnx.errors import ConfigError, OutputError, RequantError
from requant_onnx.explain import explain
from requant_onnx.graph.load import data_files, file_bytes, is_large
from requant_onnx.graph.save import save_model, write_atomically
from requant_onnx.options import parse, parser_of
from requant_onnx.toml_config import write_options
from requant_onnx.validate import validate
from requant_onnx.values import calibration_of, config_of, images_of, limit_of, normalisation_of
from requant_onnx.webpage import html_report, require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.  Returns 0, or 2 after an error that it has printed; 130 after Ctrl-C."""
    parser = parser_of(convert=_convert, validate=_validate, report=_report, inspect=_inspect, explain=_explain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of weights that the terminal cannot show
    try:
        args = parse(parser, arguments)
        args.run(args)
    except RequantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that cannot even be looked at, or a full disk under standard output
        print(f"error: cannot use '{error.filename}' ({error.strerror}); check the path and its permissions", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: there is not enough memory for this; calibrate with fewer images, or use a larger machine", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _convert(args: argparse.Namespace) -> None:
    config = config_of(args)
    calibration = calibration_of(args)
    _check_output(args.input, args.output, args.force)
    data = [*data_files(args.input), *data_files(args.output), Path(f"{args.output}.data")]
    _check_json(args.json, args.input, args.output, *data)
    _check_page(args.html, args.force, args.input, args.output, *data)
    with _progress(args, "quantizing") as progress:
        model, report = convert.convert_model(args.input, config, calibration, progress)
    before, stored = file_bytes(args.input), args.input.stat().st_size
    if report.converted or before != stored or args.external_data:  # external data moves: a copy would point to where it is not
        after = save_model(model, args.output, external_data=args.external_data or is_large(model))
    else:
        after = stored
        write_atomically(args.output, args.input.read_bytes())
    if not report.converted:
        print(f"warning: nothing to convert in '{args.input}', so '{args.output}' is a copy of it", file=sys.stderr)
    paths = {"input": str(args.input), "output": str(args.output), "file_bytes": [before, after], "toml": write_options(args)}
    _write_json(args.json, {**report.to_dict(), **paths})
    if args.html is not None:
        with _progress(args, "drawing") as progress:
            images = None if calibration is None else calibration.images
            shown = None if images is None or calibration is None else images.drawn(calibration.count, calibration.seed)
            settings = [("requant.toml, for requant convert --config", write_options(args))]
            how = None if calibration is None else calibration.normalisation
            page = html_report(args.input, args.output, shown, how, conversion=report, settings=settings, progress=progress)
        write_atomically(args.html, page.encode())
    tables.print_conversion(_console(args), report, (before, after))
    if args.verbose:
        tables.print_tried(_console(args), report)


def _validate(args: argparse.Namespace) -> None:
    _check_json(args.json, args.reference, args.candidate)
    if args.data is None:
        raise ConfigError("validate needs images; give --data, for instance cifar10:DIR, images:DIR or FILE.npz")
    images = images_of(args, args.data, "test").first(limit_of(args.limit))
    normalisation = normalisation_of(args, args.data, images)
    with _progress(args, "validating") as progress:
        report = validate(args.reference, args.candidate, images, normalisation, progress=progress)
    names = {"reference": str(args.reference), "candidate": str(args.candidate), "data": args.data}
    _write_json(args.json, {**report.to_dict(), **names})
    console = _console(args)
    if normalisation is not None:
        console.print(f"pixels normalised with mean {_listed(normalisation.mean)} and std {_listed(normalisation.std)}")
    tables.print_validation(console, report)


def _report(args: argparse.Namespace) -> None:
    _check_page(args.output, args.force, args.reference, args.candidate)
    images = None if args.data is None else images_of(args, args.data, "test").first(limit_of(args.limit))
    normalisation = normalisation_of(args, args.data or "noise", images)
    with _progress(args, "comparing") as progress:
        page = html_report(args.reference, args.candidate, images, normalisation, progress=progress)
    write_atomically(args.output, page.encode())


def _inspect(args: argparse.Namespace) -> None:
    _check_json(args.json, args.model)
    with _status(args, "reading the model"):
        report = convert.inspect_model(args.model)
    _write_json(args.json, {**report.to_dict(), "model": str(args.model)})
    tables.print_inspection(_console(args), report)


def _explain(args: argparse.Namespace) -> None:
    _check_json(args.json, args.model)
    with _status(args, "loading the model in ONNX Runtime"):
        explanation = explain(args.model)
    _write_json(args.json, {**explanation.to_dict(), "model": str(args.model)})
    tables.print_explanation(_console(args), explanation)


def _check_output(source: Path, output: Path, force: bool) -> None:
    if output.is_dir():
        raise OutputError(f"'{output}' is a folder; give the path of the file to write")
    if not output.parent.is_dir():
        raise OutputError(f"the folder '{output.parent}' does not exist; create it first")
    if output.exists() and source.exists() and output.samefile(source):
        raise OutputError(f"the output '{output}' is the input, which is never changed; give another path")
    used = [file.absolute() for file in data_files(source)]
    if output.absolute() in used:
        raise OutputError(f"the output '{output}' holds the weights of the input, which is never changed; give another path")
    if set(used) & {file.absolute() for file in data_files(output)}:
        raise OutputError(f"the data file of '{output}' holds the weights of the input too; give another path")
    if output.exists() and not force:
        raise OutputError(f"'{output}' exists; give another path, or --force to replace it")


def _check_json(path: Path | None, *models: Path) -> None:
    if path is not None:
        _check_report(path, *models)
        if path.exists() and path.suffix != ".json":
            raise OutputError(f"'{path}' exists and is no .json file; give the report another path")


def _check_report(path: Path, *models: Path) -> None:
    """Refuse a report path that cannot work before the work is done."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write the report to '{path}'; give a file in a folder that exists")
    if any(path.absolute() == model.absolute() or (path.exists() and model.exists() and path.samefile(model)) for model in models):
        raise OutputError(f"the report '{path}' would replace a model; give another path")


def _check_page(path: Path | None, force: bool, *models: Path) -> None:
    if path is not None:
        require()
        _check_report(path, *models)
        if path.exists() and not force:
            raise OutputError(f"'{path}' exists; give another path, or --force to replace it")


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def _console(args: argparse.Namespace) -> Console:
    """Full-width tables when the output is a file or a pipe.  Silent with --quiet; rich heeds NO_COLOR."""
    return Console(emoji=False, quiet=args.quiet, width=None if sys.stdout.isatty() else 200)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, what: str) -> Iterator[execute.Progress | None]:
    """A progress bar on standard error; None when that is no terminal, or with --quiet."""
    console = Console(stderr=True)
    if args.quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda item, done, total: bar.update(task, description=escape(item), completed=done, total=total)


def _status(args: argparse.Namespace, what: str) -> contextlib.AbstractContextManager[object]:
    """A sign of life on standard error, for what has no steps to count."""
    console = Console(stderr=True)
    return contextlib.nullcontext() if args.quiet or not console.is_terminal else console.status(what)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
