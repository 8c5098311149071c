"""The definition of the command line's options; values.py turns their text into values."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import shtab

from requant_onnx.choices import TRANSFORMS, Choice, parse_choice
from requant_onnx.cli.goals import GOALS
from requant_onnx.cli.toml_options import options_of, read_options
from requant_onnx.config import ENUMS, QuantConfig
from requant_onnx.errors import ConfigError
from requant_onnx.inputs.calibration import DEFAULT_COUNT

DEFAULT = QuantConfig()
INT8_LEVELS = "for --form int8, the largest int8 weight; 64 is exact on every CPU, 127 finer on CPUs with VNNI: "
INT8_SPEED = "for --form int8, the layers on integers: those that are faster so, by a table of costs, or all that can be: "
Command = Callable[[argparse.Namespace], None]
EPILOGS = {
    None: """examples:
  requant convert net.onnx net8.onnx
  requant validate net.onnx net8.onnx --data cifar10:DIR
  requant inspect net.onnx""",
    "convert": """examples:
  requant convert net.onnx net8.onnx
  requant convert net.onnx small.onnx --for web
  requant convert net.onnx net4.onnx --bits 4 --json report.json
  requant convert net.onnx small.onnx --bits 4 --form folded --calibrate images.npz
  requant convert net.onnx small.onnx --bits auto --size 180kB --form folded --calibrate noise
  requant convert net.onnx small.onnx --max-drop 0.5 --data images:val --fit --calibrate images:photos --form folded
  requant convert net.onnx paper.onnx --bits 4 --recipe paper
  requant convert net.onnx fast.onnx --bits 4 --form int8 --calibrate images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
  requant convert net.onnx small.onnx --bits 4 --calibrate images:photos --resize 256 --crop 224
  requant convert net.onnx small.onnx --config requant.toml
  requant convert net.onnx max.onnx --bits 6 --granularity per-tensor --transform none --range max
goals, for --for:
"""
    + "\n".join(
        f"  {name:<9}{goal.title}\n           {' '.join(f'--{option} {value}' for option, value in goal.options.items())}"
        for name, goal in GOALS.items()
    ),
    "convert-many": """examples:
  requant convert-many zoo small --bits 4 --form folded --calibrate noise
  requant convert-many 'zoo/*/fp32/*.onnx' small --bits 4 --jobs 4
  requant convert-many zoo small --bits 4 --dask tcp://scheduler:8786
one line of JSON a model is in OUT_DIR/requant.jsonl; the same command again goes on where it stopped""",
    "validate": """examples:
  requant validate net.onnx net8.onnx --data cifar10:cifar-10-batches-bin
  requant validate net.onnx net8.onnx --data images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
  requant validate net.onnx net8.onnx --data images:imagenet/val --resize 256 --crop 224
  requant validate net.onnx net8.onnx --data inputs.npz --fail-below agreement=99,sqnr=20,latency=1.1
pixels become (pixel / 255 - mean) / std; for a model that takes raw 0..255: --mean 0 --std 0.00392156862745098""",
    "restore": """example:
  requant restore net4.onnx float.onnx""",
    "inspect": """examples:
  requant inspect net.onnx --json net.json
  requant inspect net.onnx --sensitivity --data images:val --fit""",
    "report": """examples:
  requant report net.onnx net4.onnx net4.html
  requant report net.onnx net4.onnx net4.html --data cifar10:cifar-10-batches-bin
  requant report net.onnx by_another_tool.onnx page.html --data images:val --resize 256 --crop 224""",
    "compare": """examples:
  requant compare net.onnx --data cifar10:cifar-10-batches-bin
  requant compare net.onnx --bits 4,3 --recipes max,paper,best --data images:val --resize 256 --crop 224 --calibrate images:photos
  requant compare net.onnx --html net.html --csv net.csv --dask tcp://scheduler:8786
recipes: max (one scale a weight, full range), range (searched), transform (square root, full range), paper (both: REQuant), channel
(one searched scale a channel), best (the same, refined on calibration inputs)""",
    "explain": """example:
  requant explain net4.onnx
each weight is one of: float (stored so), folded at load (decoded once, float speed), decoded every run (slow), fused (an
integer kernel reads its codes)""",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Print and exit with code 2.  Raises ConfigError for a bad value of an option, whose message is a sentence already."""
        sentence = re.sub(r"^argument [^:]+: (?=--)", "", message)
        if sentence != message:
            raise ConfigError(sentence)
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, on top of --config and a goal; `from_file` names their options that it does not override.

    Raises ConfigError when that file is not valid.
    """
    args = _parse(parser, arguments)
    commands = _commands(parser)
    name = next(name for name, command in commands.items() if command is args.parser)
    from_file = {} if args.config is None else read_options(args.config, name, commands)
    goal = getattr(args, "goal", None) or from_file.get("goal")
    if goal is not None:
        from_file = {**options_of(GOALS[goal].options, name, commands), **from_file}
    if from_file:
        overridden = {name for name in from_file if getattr(args, name) not in (None, False)}
        args.parser.set_defaults(**from_file)
        args = _parse(parser, arguments)
        from_file = {name: value for name, value in from_file.items() if name not in overridden}
    args.from_file = frozenset(from_file)
    return args


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args, strange = parser.parse_known_args(arguments)
    if strange:
        near = difflib.get_close_matches(strange[0].partition("=")[0], args.parser._option_string_actions, 1)
        args.parser.error(f"'{strange[0]}' is no option here" + (f"; is it '{near[0]}'?" if near else ""))
    return args


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices)


def parser_of(
    convert: Command,
    convert_many: Command,
    validate: Command,
    report: Command,
    compare: Command,
    inspect: Command,
    explain: Command,
    restore: Command,
) -> argparse.ArgumentParser:
    """Make the parser; `args.run` is the function of the chosen command, `args.parser` the parser of that command."""
    parser = _command(Parser, None, prog="requant", description="Low-bit weights for exported ONNX CNNs, without retraining.")
    parser.add_argument("--version", action="version", version=f"requant {version('requant_onnx')}")
    shtab.add_argument_to(parser, ["--print-completion"], help="print the completion script of a shell, for its start-up files")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(convert, _command(commands.add_parser, "convert", help="write a model with quantized weights"))
    _add_convert_many(convert_many, _command(commands.add_parser, "convert-many", help="convert all models of a folder"))
    _add_validate(validate, _command(commands.add_parser, "validate", help="compare two models on images"))
    _add_report(report, _command(commands.add_parser, "report", help="write a web page on what became of each weight"))
    _add_compare(
        compare, _command(commands.add_parser, "compare", help="try recipes and bits on a model, and list what each costs")
    )
    _add_inspect(inspect, _command(commands.add_parser, "inspect", help="list the weights of a model and what convert would do"))
    _add_model(explain, _command(commands.add_parser, "explain", help="say what ONNX Runtime does with each weight of a model"))
    _add_restore(restore, _command(commands.add_parser, "restore", help="write the plain float model of a quantized one"))
    return parser


def _command(make: Any, name: str | None, **options: Any) -> argparse.ArgumentParser:
    names = () if name is None else (name,)
    made = make(*names, epilog=EPILOGS[name], formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    assert isinstance(made, argparse.ArgumentParser)
    return made


def _add_convert(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "input", "IN.onnx")
    _add_file(parser, "output", "OUT.onnx")
    _add_conversion(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT.onnx if it exists")
    parser.add_argument("--force-quality", action="store_true", help="write the file even where the self-check finds it broken")
    page = parser.add_argument("--html", metavar="FILE", type=Path, help="also write a web page on what became of each weight")
    page.complete = shtab.FILE  # type: ignore[attr-defined]
    _add_common(run, parser)


def _add_convert_many(run: Command, parser: argparse.ArgumentParser) -> None:
    what = "folder, of which all .onnx files are converted, or a pattern in quotes, such as 'zoo/*/fp32/*.onnx'"
    parser.add_argument("source", metavar="DIR_OR_GLOB", help=what)
    folder = parser.add_argument("output", metavar="OUT_DIR", type=Path, help="folder of the results, made if it is missing")
    folder.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    _add_jobs(parser)
    _add_conversion(parser)
    parser.add_argument("--force", action="store_true", help="convert again what is there already, and replace it")
    parser.add_argument("--force-quality", action="store_true", help="write files even where the self-check finds them broken")
    _add_common(run, parser, json=False)


def _add_aims(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a file is for, and what it has to keep."""
    parser.add_argument(
        "--for",
        dest="goal",
        metavar="GOAL",
        choices=tuple(GOALS),
        help=f"{', '.join(GOALS)}: options that go together, see below; other options override them",
    )
    parser.add_argument(
        "--bits", metavar="N", help=f"bits per weight, 2 to 8 (default: {DEFAULT.bits}), or auto: chosen for each weight"
    )
    parser.add_argument("--size", metavar="SIZE", help="for --bits auto: the best file of at most this size, for instance 180kB")
    _add_choice(parser, "optimize_for", "AIM", "which bytes count, those of the file or of a download of it: ")
    parser.add_argument(
        "--target-sqnr",
        metavar="DB",
        help="for --bits auto: the smallest file found whose outputs keep this SQNR on the calibration inputs, for instance 20",
    )
    parser.add_argument(
        "--max-drop",
        metavar="POINTS",
        help="the smallest file found that loses at most so many points of top-1 accuracy on labelled --data, or so much of the "
        "score of --evaluate",
    )
    parser.add_argument(
        "--min-agreement",
        metavar="PERCENT",
        help="the smallest file found whose answers are in so many cases those of the float model, on --data (default: inputs that "
        "--calibrate does not use)",
    )
    parser.add_argument("--data", metavar="SPEC", help="for --max-drop and --min-agreement: what is judged on, as in validate")
    parser.add_argument("--limit", metavar="N", help="use only the first N images of --data")
    parser.add_argument(
        "--evaluate", metavar="MODULE:FUNCTION", help="for --max-drop: a function from a ModelProto to a score, higher is better"
    )
    parser.add_argument("--best-effort", action="store_true", help="write the best file that was tried where none keeps the target")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is converted."""
    _add_aims(parser)
    _add_choice(parser, "granularity", "G")
    parser.add_argument("--transform", metavar="T", help=f"{TRANSFORMS} (default: {DEFAULT.transform})")
    _add_choice(parser, "range_mode", "R", option="--range")
    _add_choice(parser, "edge_layers", "E", "first and last layers: ")
    _add_choice(parser, "objective", "S", "space of the error that alpha minimizes: ")
    _add_choice(parser, "rounding", "S", "space in which the nearest level is chosen: ")
    _add_choice(parser, "runtime", "RT", "what the file is for: ")
    _add_choice(parser, "form", "F")
    _add_choice(parser, "biases", "B", "biases and other vectors: ")
    parser.add_argument(
        "--keep-inputs",
        action="store_true",
        help="leave weights in float that are inputs of the graph too, which a caller may replace",
    )
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        help="leave the weights in float whose name, or that of a node which reads them, matches: a glob, re:REGEX, or op:TYPE; "
        "may be given again",
    )
    parser.add_argument(
        "--layer",
        metavar="PATTERN=SETTINGS",
        action="append",
        help="settings of the weights that match, for instance 'head.*=bits:8,form:folded'; also transform:T and granularity:G; "
        "may be given again, and the last one that sets something wins",
    )
    parser.add_argument("--symmetric", action="store_true", help="put every zero point of weights in the middle of the codes")
    _add_calibration(parser)
    parser.add_argument("--recipe", metavar="NAME", help="paper: REQuant exactly as published; other options override it")
    parser.add_argument(
        "--external-data", action="store_true", help="write weights to OUT.onnx.data next to OUT.onnx, as models above 2 GB need"
    )
    _add_provider(parser)


def _add_restore(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "input", "SMALL.onnx")
    _add_file(parser, "output", "FLOAT.onnx")
    parser.add_argument("--force", action="store_true", help="replace FLOAT.onnx if it exists")
    _add_common(run, parser)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        metavar="SPEC",
        help="inputs, without labels, for better rounding, for --bits auto, and for --form int8: cifar10:DIR, cifar100:DIR (train "
        "split), DIR or images:DIR, FILE.npz (x, or each input of the model by its name), noise, which needs no data (noise:HxW "
        "where the model leaves the size free), none, or auto (default): noise where the model takes images of one size",
    )
    _add_choice(parser, "refinement", "R", "use of the inputs of --calibrate: ")
    parser.add_argument(
        "--calibrate-limit", metavar="N", help=f"number of calibration inputs, drawn at random (default: {DEFAULT_COUNT})"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for activations while weights are refined (default: 256MiB); where they take more, layers see fewer inputs",
    )
    parser.add_argument(
        "--time-limit",
        metavar="TIME",
        help="about how long the conversion may take, for instance 90s, 5min or 1h: layers whose refinement gains least for its "
        "time go without it (default: no limit)",
    )
    parser.add_argument("--seed", metavar="N", help="seed for drawing images and for noise (default: 0)")
    _add_images(parser, "of the calibration images")
    _add_choice(parser, "activation_range", "R", "for --form int8: ")
    _add_choice(parser, "int8_levels", "L", INT8_LEVELS)
    _add_choice(parser, "int8_speed", "S", INT8_SPEED)
    parser.add_argument(
        "--int8-min-sqnr",
        metavar="DB",
        help="for --form int8: nodes whose 8-bit activations cost the outputs more stay float (default: 15; none: no limit)",
    )


def _add_validate(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "reference", "REF.onnx")
    _add_file(parser, "candidate", "CANDIDATE.onnx")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="cifar10:DIR, cifar100:DIR (test split), images:DIR (for accuracy, one subfolder per class), FILE.npz (x, y) or noise",
    )
    _add_images(parser, "of the images")
    parser.add_argument("--limit", metavar="N", help="use only the first N images")
    parser.add_argument("--latency-batch", metavar="N", help="images of a run that is timed (default: 1)")
    parser.add_argument("--threads", metavar="N", help="threads of ONNX Runtime in runs that are timed (default: as it likes)")
    parser.add_argument("--no-latency", action="store_true", help="time nothing")
    parser.add_argument(
        "--fail-below",
        metavar="FIGURE=NUMBER,...",
        help="exit with code 4 unless the candidate is as good: agreement=99,top1=90,top1-drop=0.5,sqnr=20,worst-sqnr=20,found=95, "
        "latency=1.1 (at most, relative to the reference), ratio=7,bytes=150000",
    )
    _add_provider(parser)
    _add_common(run, parser)


def _add_report(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "reference", "REF.onnx")
    _add_file(parser, "candidate", "CANDIDATE.onnx")
    _add_file(parser, "output", "OUT.html")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="as in validate; default: noise, which shows no accuracy (noise:HxW where the model leaves the size free)",
    )
    _add_images(parser, "of the images")
    parser.add_argument("--limit", metavar="N", help="use only the first N images")
    parser.add_argument("--force", action="store_true", help="replace OUT.html if it exists")
    _add_provider(parser)
    _add_common(run, parser, json=False)


def _add_compare(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "model", "IN.onnx")
    parser.add_argument("--bits", metavar="N,N", help="bits per weight to try, 2 to 8 (default: 8,6,4,3)")
    parser.add_argument("--recipes", metavar="NAME,NAME", help="recipes to try, see below (default: max,paper,best)")
    _add_choice(parser, "runtime", "RT", "what the file is for: ")
    _add_choice(parser, "form", "F")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="as in validate; default: noise, which shows no accuracy (noise:HxW where the model leaves the size free)",
    )
    parser.add_argument("--limit", metavar="N", help="use only the first N images")
    parser.add_argument("--calibrate", metavar="SPEC", help="inputs for best and for --form int8, as in convert (default: noise)")
    parser.add_argument(
        "--calibrate-limit", metavar="N", help=f"number of calibration inputs, drawn at random (default: {DEFAULT_COUNT})"
    )
    parser.add_argument("--seed", metavar="N", help="seed for drawing images and for noise (default: 0)")
    _add_images(parser, "of the images")
    _add_jobs(parser)
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="folder of the results, 2 GB at most (default: in the user's cache)"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither store results nor use those of earlier runs")
    parser.add_argument("--force", action="store_true", help="replace the files of --csv and --html if they exist")
    for name in ("csv", "html"):
        parser.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"also write the table as {name.upper()}")
    _add_provider(parser)
    _add_common(run, parser)


def _add_provider(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider",
        metavar="NAME",
        help="execution provider of ONNX Runtime that models run on, for instance cuda or openvino (default: cpu)",
    )


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", metavar="N", help="number of processes on this machine (default: one per core)")
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="address of the scheduler of a Dask cluster to run on instead, tcp://HOST:PORT"
    )


def _add_model(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "model", "MODEL.onnx")
    _add_common(run, parser)


def _add_inspect(run: Command, parser: argparse.ArgumentParser) -> None:
    _add_file(parser, "model", "MODEL.onnx")
    parser.add_argument(
        "--sensitivity", action="store_true", help="also list what each weight alone costs the output at 8, 6, 4, 3 and 2 bits"
    )
    parser.add_argument("--data", metavar="SPEC", help="inputs for --sensitivity, as in validate (default: noise)")
    parser.add_argument("--limit", metavar="N", help="use only the first N images")
    _add_images(parser, "of the images")
    _add_provider(parser)
    _add_common(run, parser)


def _add_images(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add the options that turn images into inputs.  whose: the images, as a phrase that begins with 'of'."""
    usual = "default: that of the CIFAR train split, that of ImageNet for images:DIR"
    parser.add_argument("--mean", metavar="R,G,B", help=f"mean {whose} ({usual}, 0 for FILE.npz)")
    parser.add_argument("--std", metavar="R,G,B", help=f"standard deviation {whose} ({usual}, 1 for FILE.npz)")
    parser.add_argument("--resize", metavar="N", help="for images:DIR: resize the shorter side to N pixels (default: no resizing)")
    parser.add_argument(
        "--crop", metavar="N", help="for images:DIR: crop the center to N pixels, 224 or HxW (default: no cropping)"
    )
    parser.add_argument(
        "--fit", action="store_true", help="for images:DIR: crop to the size that the model takes, and resize to 8/7 of it before"
    )


def _add_file(parser: argparse.ArgumentParser, name: str, metavar: str) -> None:
    parser.add_argument(name, metavar=metavar, type=Path).complete = shtab.FILE  # type: ignore[attr-defined]


def _add_common(run: Command, parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Add the options that every command has.  parser.get_default("parser") is the parser of the command."""
    if json:
        parser.add_argument(
            "--json",
            metavar="FILE",
            type=Path,
            help="also write the report to this file; - writes it to standard output, and no tables",
        ).complete = shtab.FILE  # type: ignore[attr-defined]
    config = parser.add_argument(
        "--config", metavar="FILE.toml", type=Path, help="read options from a file; the command line overrides them"
    )
    config.complete = shtab.FILE  # type: ignore[attr-defined]
    library = parser.add_argument(
        "--custom-ops", metavar="FILE", action="append", help="library of custom operators that the model needs; may be given again"
    )
    library.complete = shtab.FILE  # type: ignore[attr-defined]
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="print errors and warnings only")
    amount.add_argument("-v", "--verbose", action="store_true", help="print more: what was tried, and what was chosen")
    parser.set_defaults(run=run, parser=parser)


def _add_choice(parser: argparse.ArgumentParser, name: str, metavar: str, prefix: str = "", option: str = "") -> None:
    """Add an option for one of the enums of config.py, by the name of the setting."""
    kind, default, option = ENUMS[name], getattr(DEFAULT, name), option or "--" + name.replace("_", "-")

    def choice(text: str) -> Choice:
        try:
            return parse_choice(kind, text, option)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    choices = f"{', '.join(map(str, kind))} (default: {default})"
    parser.add_argument(option, dest=name, metavar=metavar, type=choice, choices=tuple(kind), help=prefix + choices)
