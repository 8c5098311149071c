"""requant convert-many: convert all models of a directory, or of a pattern, in processes or on a Dask cluster.

OUT_DIR/requant.jsonl has one line of JSON per model; running the same command again converts only what is missing.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from requant_onnx.cli import tables
from requant_onnx.cli.commands import convert_file
from requant_onnx.cli.paths import check_output
from requant_onnx.cli.record import RECORD, Line, read_record, write_record
from requant_onnx.cli.terminal import console_for, progress_bar, until_pipe_is_closed
from requant_onnx.cli.toml_options import write_options
from requant_onnx.cli.values import config_of, is_noise, seconds_of, whole_of
from requant_onnx.errors import ConfigError, OutputError, RequantError
from requant_onnx.evaluate.jobs import run_each
from requant_onnx.files.atomic import write_atomically
from requant_onnx.files.load import data_files
from requant_onnx.runtime.sessions import use_custom_ops, use_provider

UNSENT = ("run", "parser", "source", "jobs", "dask", "json", "html", "force", "quiet", "verbose")  # no use in a work item
Item = tuple[Callable[..., Any], tuple[Any, ...]]
HOW = ("jobs", "dask", "force")  # options that change no file


def run_convert_many(args: argparse.Namespace) -> None:
    """requant convert-many: convert many models.  Raises RequantError at the end if any model failed."""
    models, jobs = _models(args.source, args.output), _jobs(args)
    config_of(args)
    seconds_of(args.time_limit)
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"'{args.output}' is not a directory; give a directory for the results")
    args.output.mkdir(parents=True, exist_ok=True)
    settings, record = _settings(args), args.output / RECORD
    lines = read_record(record)
    earlier = {
        name: lines[name]
        for name, path in models.items()
        if name in lines and not args.force and _is_there(lines[name], path, settings, args.output)
    }
    rows = dict(earlier)
    items: dict[str, Item] = {}
    for name, path in models.items():
        blocked = "" if name in earlier else _blocked(path, args.output / name, settings, lines.get(name), args.force)
        if blocked:
            rows[name] = _failed(name, path, settings, blocked)
        elif name not in earlier:
            items[name] = _item(args, name, path, settings, alone=jobs == 1 or len(models) == 1)
    with progress_bar(args, "converting") as progress:

        def done(name: str, result: object) -> None:
            rows[name] = lines[name] = _kept(result, args.output / name, partial(_failed, name, models[name], settings))
            write_record(record, lines)
            if progress is not None:
                progress(name, sum(key in rows for key in items), len(items))

        run_each(jobs, args.dask, items, done)
    with until_pipe_is_closed():
        tables.print_many(console_for(args), [rows[name] for name in models], len(earlier))
    failed = sum(not line.is_done for line in rows.values())
    if failed:
        raise RequantError(f"{failed} of {len(rows)} models failed, for the reasons above; the others are in '{args.output}'")


def _jobs(args: argparse.Namespace) -> int | None:
    jobs = None if args.jobs is None else whole_of(args.jobs, "--jobs")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more, not {jobs}")
    return jobs


def _item(args: argparse.Namespace, name: str, model: Path, settings: str, *, alone: bool) -> Item:
    """The work item of a model.  Processes that run in parallel have one thread each."""
    sent = argparse.Namespace(**{key: value for key, value in vars(args).items() if key not in UNSENT})
    if args.dask:
        return _convert_sent, (sent, name, settings, *_packed(model))
    (args.output / name).parent.mkdir(parents=True, exist_ok=True)
    return _convert, (sent, name, model, args.output / name, settings, None if alone else 1)


def _models(source: str, output: Path) -> dict[str, Path]:
    """The models by relative path of their results.  Raises ConfigError if there is none."""
    folder = Path(source)
    if folder.is_dir():
        found = sorted(path for path in folder.rglob("*.onnx") if path.is_file())
    else:
        found = sorted(Path(path) for path in glob.glob(source, recursive=True) if Path(path).is_file())
        folder = Path(os.path.commonpath([path.parent for path in found])) if found else folder
    inside = [path for path in found if output.resolve() not in path.resolve().parents]
    if not inside:
        raise ConfigError(f"there is no model at '{source}'; give a directory with .onnx files, or a pattern in quotes")
    return {path.relative_to(folder).as_posix(): path for path in inside}


def _settings(args: argparse.Namespace) -> str:
    """What determines the results, besides the models: the options, the data that they name, and the version."""
    given = [line for line in write_options(args).splitlines() if line.partition(" ")[0] not in HOW]
    data = [f"# {name} {digest}" for name in ("calibrate", "data") if (digest := _data_digest(getattr(args, name)))]
    return "\n".join([*given, *data, f"# requant {version('requant_onnx')}"])


def _data_digest(spec: str | None) -> str:
    """Text that identifies the inputs of a spec: contents of a file, or names, sizes and times in a directory; "" for others."""
    if spec is None or is_noise(spec):
        return ""
    path = Path(spec if Path(spec).exists() else spec.partition(":")[2])
    if path.is_file():
        return _digest([path])
    if not path.is_dir() or path == Path():
        return ""
    found = [(str(file.relative_to(path)), file.stat()) for file in sorted(path.rglob("*")) if _is_shown(file, path)]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]).encode()).hexdigest()


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(name.startswith(".") for name in file.relative_to(folder).parts)


def _is_there(line: Line, model: Path, settings: str, folder: Path) -> bool:
    """Whether a model was converted with these settings, has not changed since, and the result and its data files exist."""
    output = folder / line.output
    whole = output.is_file() and all(file.is_file() for file in data_files(output))
    return whole and _is_from(line, model, settings)


def _is_from(line: Line, model: Path, settings: str) -> bool:
    """Whether a line is that of a model that was converted with these settings, and has not changed since."""
    return line.is_done and line.settings == settings and line.digest == _digest([model, *data_files(model)])


def _blocked(model: Path, output: Path, settings: str, line: Line | None, force: bool) -> str:
    """Why a result cannot be written, or ""; one that lacks its data file may be replaced."""
    try:
        check_output(model, output, True)
    except RequantError as error:
        if output.parent.is_dir():
            return str(error)
    if output.exists() and not force and not (line is not None and _is_from(line, model, settings)):
        how = "with different settings, data or model" if line is not None and line.is_done else "by something else"
        return f"'{output}' exists and was made {how}; give another directory, or --force to replace it"
    return ""


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    return digest.hexdigest()


def _convert(args: argparse.Namespace, name: str, model: Path, output: Path, settings: str, threads: int | None) -> Line:
    """Run a work item in a process of this machine."""
    use_custom_ops(*([args.custom_ops] if isinstance(args.custom_ops, str) else args.custom_ops or []))
    use_provider(args.provider)
    started = time.perf_counter()
    report, sizes, _ = convert_file(argparse.Namespace(**{**vars(args), "input": model, "output": output}), None, threads)
    return Line(
        model=name,
        output=name,
        status="converted" if report.converted else "copied",
        error="",
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        converted=len(report.converted),
        skipped=len(report.skipped),
        sqnr_db=min((weight.sqnr_db for weight in report.converted if math.isfinite(weight.sqnr_db)), default=None),
        notes=report.notes,
        seconds=round(time.perf_counter() - started, 3),
        digest=_digest([model, *data_files(model)]),
        settings=settings,
    )


def _packed(model: Path) -> tuple[str, dict[str, bytes]]:
    """A model packed for another machine: the name of the model, and the model and its data files by relative path."""
    files = [model, *data_files(model)]
    return model.name, {os.path.relpath(path, model.parent): path.read_bytes() for path in files}


def _convert_sent(
    args: argparse.Namespace, name: str, settings: str, model: str, files: Mapping[str, bytes]
) -> tuple[Line, dict[str, bytes]]:
    """Run a work item on another machine: the line, and the files that it wrote, by their suffix after the name of the result."""
    with tempfile.TemporaryDirectory() as folder:
        for path, data in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(data)
        output = Path(folder) / f"converted-{Path(name).name}"
        try:
            line = _convert(args, name, Path(folder) / model, output, settings, None)
        except RequantError as error:  # paths on this machine mean nothing elsewhere
            raise type(error)(str(error).replace(folder + os.sep, "")) from None
        made = [path for path in (output, Path(f"{output}.data")) if path.is_file()]
        return line, {path.name.removeprefix(output.name): path.read_bytes() for path in made}


def _kept(result: object, output: Path, failed: Callable[[str], Line]) -> Line:
    """The line of a result; writes the files that another machine has made."""
    if isinstance(result, tuple):
        line, files = result
        output.parent.mkdir(parents=True, exist_ok=True)
        for suffix, data in files.items():
            write_atomically(Path(f"{output}{suffix}"), data)
        result = line
    if isinstance(result, Line):
        return result
    return failed(str(result) if isinstance(result, RequantError) else f"{type(result).__name__}: {result}")


def _failed(name: str, model: Path, settings: str, error: str) -> Line:
    return Line(name, name, "failed", error, model.stat().st_size, 0, 0, 0, None, (), 0.0, "", settings)
