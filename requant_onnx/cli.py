"""The command line: requant convert | validate | inspect.  Text becomes values here; everything else is in the library."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from requant_onnx import convert, tables
from requant_onnx.config import EdgeLayers, Granularity, QuantConfig, RangeMode, Space, Transform, parse_choice
from requant_onnx.data import CIFAR_MEAN_STD, ImageSet, load_images
from requant_onnx.errors import ConfigError, OutputError, RequantError
from requant_onnx.graph.load import load_model
from requant_onnx.graph.save import save_model, write_atomically
from requant_onnx.validate import Normalisation, validate

DEFAULT = QuantConfig()
EPILOGS = {
    None: """examples:
  requant convert net.onnx net8.onnx
  requant validate net.onnx net8.onnx --data cifar10:DIR
  requant inspect net.onnx""",
    "convert": """examples:
  requant convert net.onnx net8.onnx
  requant convert net.onnx net4.onnx --bits 4 --json report.json
  requant convert net.onnx paper.onnx --bits 4 --recipe paper
  requant convert net.onnx max.onnx --bits 6 --granularity per-tensor --transform none --range max""",
    "validate": """examples:
  requant validate net.onnx net8.onnx --data cifar10:cifar-10-batches-bin
  requant validate net.onnx net8.onnx --data images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
pixels become (pixel / 255 - mean) / std; for a model that takes raw 0..255: --mean 0 --std 0.00392156862745098""",
    "inspect": """example:
  requant inspect net.onnx --json net.json""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.  Returns 0, or 2 after an error that it has printed; 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except RequantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _command(
        argparse.ArgumentParser, None, prog="requant", description="Low-bit weights for exported ONNX CNNs, without retraining."
    )
    parser.add_argument("--version", action="version", version=f"requant {version('requant_onnx')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(_command(commands.add_parser, "convert", help="write a model with quantized weights"))
    _add_validate(_command(commands.add_parser, "validate", help="compare two models on images"))
    _add_inspect(_command(commands.add_parser, "inspect", help="list the weights of a model and what convert would do"))
    return parser


def _command(make: Any, name: str | None, **options: Any) -> argparse.ArgumentParser:
    names = () if name is None else (name,)
    made = make(*names, epilog=EPILOGS[name], formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    assert isinstance(made, argparse.ArgumentParser)
    return made


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.onnx", type=Path)
    parser.add_argument("output", metavar="OUT.onnx", type=Path)
    parser.add_argument("--bits", metavar="N", help=f"2 to 8 (default: {DEFAULT.bits})")
    parser.add_argument("--granularity", metavar="G", help=_choices(Granularity, DEFAULT.granularity))
    parser.add_argument("--transform", metavar="T", help=f"sqrt, none or power:A, A in 1/3 .. 1 (default: {DEFAULT.transform})")
    parser.add_argument("--range", metavar="R", dest="range_mode", help=_choices(RangeMode, DEFAULT.range_mode))
    parser.add_argument("--edge-layers", metavar="E", help="first and last layers: " + _choices(EdgeLayers, DEFAULT.edge_layers))
    parser.add_argument("--objective", metavar="S", help="space whose error alpha minimises: " + _choices(Space, DEFAULT.objective))
    parser.add_argument(
        "--rounding", metavar="S", help="space in which the nearest level is taken: " + _choices(Space, DEFAULT.rounding)
    )
    parser.add_argument("--recipe", metavar="NAME", help="paper: REQuant exactly as published; other options override it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.add_argument("--force", action="store_true", help="replace OUT.onnx if it exists")
    parser.set_defaults(run=_convert)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF.onnx", type=Path)
    parser.add_argument("candidate", metavar="CANDIDATE.onnx", type=Path)
    parser.add_argument(
        "--data", metavar="SPEC", required=True, help="cifar10:DIR, cifar100:DIR (test split) or FILE.npz (x, and y for accuracy)"
    )
    parser.add_argument("--mean", metavar="R,G,B", help="default: that of the CIFAR train split, 0 for FILE.npz")
    parser.add_argument("--std", metavar="R,G,B", help="default: that of the CIFAR train split, 1 for FILE.npz")
    parser.add_argument("--limit", metavar="N", help="only the first N images")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.set_defaults(run=_validate)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.set_defaults(run=_inspect)


def _choices(kind: Any, default: Any) -> str:
    return f"{', '.join(member.value for member in kind)} (default: {default.value})"


def _convert(args: argparse.Namespace) -> None:
    config = _config(args)
    _check_output(args.input, args.output, args.force)
    _check_json(args.json, args.input, args.output)
    load_model(args.input)  # a bad path is reported before the progress bar starts
    with _progress("quantizing") as progress:
        model, report = convert.quantize_model(args.input, config, progress=progress)
    before = args.input.stat().st_size
    if report.converted:
        after = save_model(model, args.output)
    else:
        after = before
        write_atomically(args.output, args.input.read_bytes())
        print(f"warning: nothing to convert in '{args.input}', so '{args.output}' is a copy of it", file=sys.stderr)
    tables.print_conversion(_console(), report, (before, after))
    _write_json(
        args.json, {**report.to_dict(), "input": str(args.input), "output": str(args.output), "file_bytes": [before, after]}
    )


def _validate(args: argparse.Namespace) -> None:
    _check_json(args.json, args.reference, args.candidate)
    images = load_images(args.data).first(_limit(args.limit))
    normalisation = _normalisation(args, images)
    with _progress("validating") as progress:
        report = validate(args.reference, args.candidate, images, normalisation, progress=progress)
    console = _console()
    if normalisation is not None:
        console.print(f"pixels normalised with mean {_listed(normalisation.mean)} and std {_listed(normalisation.std)}")
    tables.print_validation(console, report)
    _write_json(
        args.json, {**report.to_dict(), "reference": str(args.reference), "candidate": str(args.candidate), "data": args.data}
    )


def _inspect(args: argparse.Namespace) -> None:
    _check_json(args.json, args.model)
    report = convert.inspect_model(args.model)
    tables.print_inspection(_console(), report)
    _write_json(args.json, {**report.to_dict(), "model": str(args.model)})


def _config(args: argparse.Namespace) -> QuantConfig:
    """The recipe with the options given on top.  Raises ConfigError."""
    if args.recipe not in (None, "paper"):
        raise ConfigError(f"--recipe '{args.recipe}' is not known; the one recipe is 'paper'")
    bits = DEFAULT.bits if args.bits is None else _whole(args.bits, "--bits")
    base = QuantConfig.paper(bits) if args.recipe == "paper" else QuantConfig(bits=bits)
    given: dict[str, Any] = {}
    if args.transform is not None:
        given["transform"] = Transform.parse(args.transform)
    enums = {"granularity": Granularity, "range_mode": RangeMode, "edge_layers": EdgeLayers, "objective": Space, "rounding": Space}
    for name, kind in enums.items():
        text = getattr(args, name)
        if text is not None:
            option = "--range" if name == "range_mode" else "--" + name.replace("_", "-")
            given[name] = parse_choice(kind, text, option)
    return dataclasses.replace(base, **given)


def _normalisation(args: argparse.Namespace, images: ImageSet) -> Normalisation | None:
    """What the options ask for; None for float images when they ask for nothing."""
    if images.x.dtype != "uint8" and args.mean is None and args.std is None:
        return None
    mean, std = CIFAR_MEAN_STD.get(args.data.partition(":")[0], ((0.0,), (1.0,)))
    return Normalisation(
        mean if args.mean is None else _numbers(args.mean, "--mean"), std if args.std is None else _numbers(args.std, "--std")
    )


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a list of numbers; write it as R,G,B, for instance 0.5,0.5,0.5") from None


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a whole number") from None


def _limit(text: str | None) -> int | None:
    limit = None if text is None else _whole(text, "--limit")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no image; give 1 or more")
    return limit


def _check_output(source: Path, output: Path, force: bool) -> None:
    if output.is_dir():
        raise OutputError(f"'{output}' is a folder; give the path of the file to write")
    if not output.parent.is_dir():
        raise OutputError(f"the folder '{output.parent}' does not exist; create it first")
    if output.exists() and source.exists() and output.samefile(source):
        raise OutputError(f"the output '{output}' is the input, which is never changed; give another path")
    if output.exists() and not force:
        raise OutputError(f"'{output}' exists; give another path, or --force to replace it")


def _check_json(path: Path | None, *models: Path) -> None:
    """Refuse a report path that cannot work before the work is done."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"cannot write the report to '{path}'; give a file in a folder that exists")
    if any(path.absolute() == model.absolute() or (path.exists() and model.exists() and path.samefile(model)) for model in models):
        raise OutputError(f"the report '{path}' would replace a model; give another path")


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def _console() -> Console:
    """Full-width tables when the output is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=200)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[convert.Progress]:
    """A progress bar on standard error; nothing when that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda item, done, total: bar.update(task, description=item, completed=done, total=total)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
