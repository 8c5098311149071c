"""The definition of the command line's options; values.py turns their text into values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shtab

from requant_onnx.choices import TRANSFORMS, Choice, widths_in_words
from requant_onnx.cli.examples import EXAMPLES
from requant_onnx.cli.goals import GOALS
from requant_onnx.cli.parser import (
    AIM,
    DATA,
    INPUTS,
    INTEGERS,
    LAYERS,
    METHOD,
    OUTPUT,
    QUALITY,
    REFINING,
    RUNNING,
    SIZE,
    FullHelp,
    Parser,
)
from requant_onnx.config import ENUMS, QuantConfig
from requant_onnx.errors import ConfigError
from requant_onnx.inputs.calibration import DEFAULT_COUNT

DEFAULT = QuantConfig()
INT8_LEVELS = (
    "the largest int8 weight; 64 is exact on every CPU, 127 is finer on CPUs with VNNI, auto is what is exact on this CPU: "
)
INT8_SPEED = "which layers run on integers: those that a table of costs predicts to be faster, or all that can: "
USUAL_DATA = "inputs, as in validate (default: noise, which shows no accuracy; noise:HxW where the model leaves the size free)"
Command = Callable[[argparse.Namespace], None]
Container = Parser | argparse._ArgumentGroup  # has options


def parser_of(
    convert: Command,
    convert_many: Command,
    validate: Command,
    report: Command,
    compare: Command,
    inspect: Command,
    explain: Command,
    restore: Command,
    show_topic: Command,
) -> argparse.ArgumentParser:
    """Make the parser; `args.run` is the function of the chosen command, `args.parser` the parser of that command."""
    parser = _command(Parser, None, prog="requant", description="Low-bit weights for exported ONNX CNNs, without retraining.")
    parser.add_argument("--version", action="version", version=f"requant {version('requant_onnx')}")
    shtab.add_argument_to(parser, ["--print-completion"], help="print the completion script of a shell, to be read at its start")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(convert, _command(commands.add_parser, "convert", help="write a model with quantized weights"))
    _add_convert_many(convert_many, _command(commands.add_parser, "convert-many", help="convert all models of a directory"))
    _add_validate(validate, _command(commands.add_parser, "validate", help="compare two models on the same inputs"))
    _add_report(report, _command(commands.add_parser, "report", help="write a web page that shows what became of each weight"))
    _add_compare(
        compare, _command(commands.add_parser, "compare", help="try recipes and widths on a model, and list what each costs")
    )
    _add_inspect(
        inspect, _command(commands.add_parser, "inspect", help="list the weights of a model, and what convert would do with them")
    )
    _add_model(explain, _command(commands.add_parser, "explain", help="show what ONNX Runtime does with each weight of a model"))
    _add_restore(restore, _command(commands.add_parser, "restore", help="write the plain float model of a quantized one"))
    _add_help(show_topic, _command(commands.add_parser, "help", help="list the topics of the documentation, or show one"))
    return parser


def _command(make: Any, name: str | None, **options: Any) -> Parser:
    names = () if name is None else (name,)
    made = make(*names, epilog=EXAMPLES[name], formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    assert isinstance(made, Parser)
    return made


def _add_convert(run: Command, parser: Parser) -> None:
    _add_file(parser, "input", "IN.onnx", "model to convert")
    _add_file(parser, "output", "OUT.onnx", "converted model; an existing file is replaced only with --force")
    _add_conversion(parser)
    parser.titled(SIZE).add_argument(
        "--progressive",
        action="store_true",
        help="write OUT.2bit.onnx, OUT.4bit.onnx, OUT.onnx and OUT.planes.bin; the 2-bit model reads "
        "only the start of OUT.planes.bin; only for --form folded, which it implies",
    )
    output = parser.titled(OUTPUT)
    output.add_argument("--force", action="store_true", help="replace OUT.onnx if it exists")
    page = output.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a web page that shows what became of each weight"
    )
    page.complete = shtab.FILE  # type: ignore[attr-defined]
    _add_common(run, parser)


def _add_convert_many(run: Command, parser: Parser) -> None:
    what = "directory whose .onnx files are all converted, or a pattern in quotes, such as 'zoo/*/fp32/*.onnx'"
    parser.add_argument("source", metavar="DIR_OR_GLOB", help=what)
    folder = parser.add_argument("output", metavar="OUT_DIR", type=Path, help="directory of the results, created if it is missing")
    folder.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    _add_conversion(parser)
    _add_jobs(parser)
    output = parser.titled(OUTPUT)
    output.add_argument("--force", action="store_true", help="also convert models whose output exists, and replace it")
    _add_common(run, parser, json=False)


def _add_conversion(parser: Parser) -> None:
    """Add the options that say how a model is converted."""
    _add_aims(parser)
    _add_quality(parser)
    _add_calibration(parser)
    _add_layers(parser)
    _add_method(parser)
    _add_integers(parser)
    parser.titled(OUTPUT).add_argument(
        "--external-data",
        action="store_true",
        help="write the weights to OUT.onnx.data next to OUT.onnx, which models above 2 GB need",
    )
    _add_provider(parser)


def _add_aims(parser: Parser) -> None:
    """Add the options that say what a file is for, and how small it has to be."""
    aim, size = parser.titled(AIM), parser.titled(SIZE)
    aim.add_argument(
        "--for",
        dest="goal",
        metavar="GOAL",
        choices=tuple(GOALS),
        help=f"set of options for one purpose, listed below ({', '.join(GOALS)}); other options override it",
    )
    _add_choice(aim, "runtime", "RT", "runtime that reads the file: ")
    _add_choice(aim, "form", "F", "how the weights are stored and decoded: ")
    size.add_argument(
        "--bits",
        metavar="N",
        help=f"bits per weight: {widths_in_words()} (default: {DEFAULT.bits}), or auto, which chooses them for each weight",
    )
    size.add_argument("--size", metavar="SIZE", help="for --bits auto: make the best file of at most this size, for example 180kB")
    _add_choice(size, "optimize_for", "AIM", "which bytes count: those of the file, or those of a compressed download: ")
    size.add_argument(
        "--target-sqnr",
        metavar="DB",
        help="for --bits auto: write the smallest file that the search finds whose outputs "
        "keep this SQNR on calibration inputs, for example 20",
    )


def _add_quality(parser: Parser) -> None:
    """Add the options that say what a file has to keep."""
    quality = parser.titled(QUALITY)
    quality.add_argument(
        "--max-drop", metavar="POINTS", help="largest loss of top-1 accuracy on the labeled --data, or of the score of --evaluate"
    )
    quality.add_argument(
        "--min-agreement",
        metavar="PERCENT",
        help="smallest share of answers that agree with the float model, on --data (default: inputs that --calibrate does not use)",
    )
    quality.add_argument(
        "--data", metavar="SPEC", help="inputs on which --max-drop and --min-agreement are measured, as in validate"
    )
    quality.add_argument("--limit", metavar="N", help="use only the first N images of --data")
    quality.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="for --max-drop: function that turns a ModelProto into a score; a higher score is better",
    )
    quality.add_argument(
        "--best-effort", action="store_true", help="if no file keeps the target, write the best file that was tried"
    )
    quality.add_argument("--force-quality", action="store_true", help="write the file even if the self-check finds it broken")


def _add_layers(parser: Parser) -> None:
    layers = parser.titled(LAYERS)
    layers.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        help="keep weights in float if their name, or the name of a node that reads them, matches a glob, re:REGEX or op:TYPE; "
        "may be repeated",
    )
    layers.add_argument(
        "--layer",
        metavar="PATTERN=SETTINGS",
        action="append",
        help="settings of the weights that match, for example 'head.*=bits:8,form:folded'; also transform:T and granularity:G; "
        "may be repeated, and the last option that sets a value wins",
    )
    _add_choice(layers, "edge_layers", "E", "treatment of the first and last layers: ")


def _add_method(parser: Parser) -> None:
    method = parser.titled(METHOD)
    _add_choice(method, "granularity", "G", "which weights share a scale: ")
    method.add_argument("--transform", metavar="T", help=f"transform of the weights: {TRANSFORMS} (default: {DEFAULT.transform})")
    _add_choice(method, "range_mode", "R", "range of the levels, searched or full: ", option="--range")
    _add_choice(method, "objective", "S", "space in which alpha minimizes the error: ")
    _add_choice(method, "rounding", "S", "space in which the nearest level is chosen: ")
    _add_choice(method, "biases", "B", "type of biases and other vectors: ")
    method.add_argument("--symmetric", action="store_true", help="put the zero points of all weights in the middle of the codes")
    method.add_argument(
        "--keep-inputs",
        action="store_true",
        help="keep weights in float that are also inputs of the graph, which a caller may replace",
    )
    method.add_argument("--recipe", metavar="NAME", help="paper, which is REQuant exactly as published; other options override it")


def _add_integers(parser: Parser) -> None:
    integers = parser.titled(INTEGERS)
    _add_choice(integers, "activation_range", "R", "how the range of an activation is chosen: ")
    _add_choice(integers, "int8_levels", "L", INT8_LEVELS)
    _add_choice(integers, "int8_speed", "S", INT8_SPEED)
    integers.add_argument(
        "--int8-min-sqnr",
        metavar="DB",
        help="output SQNR that 8-bit activations must keep; nodes that reduce it below stay in float (default: 15; none: no limit)",
    )


def _add_restore(run: Command, parser: Parser) -> None:
    _add_file(parser, "input", "SMALL.onnx", "quantized model")
    _add_file(parser, "output", "FLOAT.onnx", "float model")
    parser.titled(OUTPUT).add_argument("--force", action="store_true", help="replace FLOAT.onnx if it exists")
    _add_common(run, parser)


def _add_calibration(parser: Parser) -> None:
    inputs, refining = parser.titled(INPUTS), parser.titled(REFINING)
    inputs.add_argument(
        "--calibrate",
        metavar="SPEC",
        help="unlabeled inputs for better rounding, for --bits auto and for --form int8: cifar10:DIR or cifar100:DIR (train "
        "split), DIR or images:DIR, FILE.npz (x, or each input of the model by its name), noise (noise:HxW where the model "
        "leaves the size free), none, or auto, which is noise if the model takes images (default: auto)",
    )
    inputs.add_argument(
        "--calibrate-limit", metavar="N", help=f"number of calibration inputs, which are drawn at random (default: {DEFAULT_COUNT})"
    )
    _add_images(inputs, "of the calibration images")
    inputs.add_argument(
        "--time-limit",
        metavar="TIME",
        help="approximate time of the conversion, without the check at its end, for example 90s, 5min or 1h; the layers that gain "
        "least for their time are not refined (default: no limit)",
    )
    _add_choice(refining, "refinement", "R", "how rounding uses the calibration inputs: ")
    refining.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for activations during refinement; with too little, layers see fewer inputs (default: 256MiB)",
    )
    refining.add_argument("--seed", metavar="N", help="seed of the random choice of inputs and of the noise (default: 0)")


def _add_validate(run: Command, parser: Parser) -> None:
    _add_file(parser, "reference", "REF.onnx", "float model")
    _add_file(parser, "candidate", "CANDIDATE.onnx", "model to compare with it, made by any tool")
    what = (
        "cifar10:DIR or cifar100:DIR (test split), images:DIR (accuracy needs a subdirectory per class), FILE.npz (x, y) or noise"
    )
    _add_data(parser, what)
    _add_detection(parser.titled(DATA))
    parser.titled("what has to hold, for exit code 0").add_argument(
        "--fail-below",
        metavar="FIGURE=NUMBER,...",
        help="exit with code 4 unless the candidate keeps these bounds: agreement=99,top1=90,top1-drop=0.5,sqnr=20,worst-sqnr=20,"
        "found=95,map-drop=0.5,latency=1.1 (relative to the reference),ratio=7,bytes=150000",
    )
    timing = parser.titled("timing")
    timing.add_argument("--latency-batch", metavar="N", help="images in a timed run (default: 1)")
    timing.add_argument("--threads", metavar="N", help="threads of ONNX Runtime in timed runs (default: its own choice)")
    timing.add_argument("--no-latency", action="store_true", help="do not measure latency")
    _add_provider(parser)
    _add_common(run, parser)


def _add_detection(data: Container) -> None:
    labels = data.add_argument(
        "--labels",
        metavar="FILE.json",
        type=Path,
        help="for detectors on images:DIR: boxes in COCO format, for mAP and AP50; class k of the models is the k-th category id",
    )
    labels.complete = shtab.FILE  # type: ignore[attr-defined]
    data.add_argument(
        "--task",
        metavar="TASK",
        help="detect:HEAD, if the head of the detectors is not recognized (requant validate --help lists the heads), or values, if "
        "the outputs are no classes, such as embeddings of faces",
    )


def _add_report(run: Command, parser: Parser) -> None:
    _add_file(parser, "reference", "REF.onnx", "float model")
    _add_file(parser, "candidate", "CANDIDATE.onnx", "model to compare with it, made by any tool")
    _add_file(parser, "output", "OUT.html", "web page; an existing file is replaced only with --force")
    _add_data(parser)
    _add_detection(parser.titled(DATA))
    parser.titled(OUTPUT).add_argument("--force", action="store_true", help="replace OUT.html if it exists")
    _add_provider(parser)
    _add_common(run, parser, json=False)


def _add_data(parser: Parser, what: str = USUAL_DATA) -> None:
    data = parser.titled(DATA)
    data.add_argument("--data", metavar="SPEC", help=what)
    _add_images(data, "of the images")
    data.add_argument("--limit", metavar="N", help="use only the first N images")


def _add_compare(run: Command, parser: Parser) -> None:
    _add_file(parser, "model", "IN.onnx", "model to convert")
    tried = parser.titled("what is tried")
    tried.add_argument(
        "--bits",
        metavar="N,N",
        help="widths to try, in bits per weight, as in convert (default: those of 8,6,4,3 that the runtime reads)",
    )
    tried.add_argument("--recipes", metavar="NAME,NAME", help="recipes to try, listed below (default: max,paper,best)")
    _add_choice(tried, "runtime", "RT", "runtime that reads the file: ")
    _add_choice(tried, "form", "F", "how the weights are stored and decoded: ")
    _add_data(parser)
    inputs = parser.titled(INPUTS)
    inputs.add_argument(
        "--calibrate",
        metavar="SPEC",
        help="calibration inputs for the recipe best and for --form int8, as in convert (default: auto, which is noise)",
    )
    inputs.add_argument(
        "--calibrate-limit", metavar="N", help=f"number of calibration inputs, which are drawn at random (default: {DEFAULT_COUNT})"
    )
    inputs.add_argument("--seed", metavar="N", help="seed of the random choice of inputs and of the noise (default: 0)")
    _add_jobs(parser)
    running, output = parser.titled(RUNNING), parser.titled(OUTPUT)
    running.add_argument(
        "--cache", metavar="DIR", type=Path, help="directory of cached results, at most 2 GB (default: in the user's cache)"
    )
    running.add_argument("--no-cache", action="store_true", help="do not cache results, and do not use cached ones")
    output.add_argument("--force", action="store_true", help="replace the files of --csv and --html if they exist")
    for name in ("csv", "html"):
        output.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"also write the table as {name.upper()}")
    _add_provider(parser)
    _add_common(run, parser)


def _add_provider(parser: Parser) -> None:
    parser.titled(RUNNING).add_argument(
        "--provider",
        metavar="NAME",
        help="execution provider of ONNX Runtime on which models run, for example cuda or openvino (default: cpu)",
    )


def _add_jobs(parser: Parser) -> None:
    running = parser.titled(RUNNING)
    running.add_argument("--jobs", metavar="N", help="number of processes on this machine (default: one per core)")
    running.add_argument(
        "--dask", metavar="ADDRESS", help="run on a Dask cluster instead; address of its scheduler, tcp://HOST:PORT"
    )


def _add_help(run: Command, parser: Parser) -> None:
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="topic to show (default: list the topics)")
    parser.set_defaults(run=run, parser=parser, config=None, custom_ops=None)


def _add_model(run: Command, parser: Parser) -> None:
    _add_file(parser, "model", "MODEL.onnx", "model to read")
    _add_common(run, parser)


def _add_inspect(run: Command, parser: Parser) -> None:
    _add_file(parser, "model", "MODEL.onnx", "model to read")
    sensitivity = parser.titled("sensitivity")
    sensitivity.add_argument(
        "--sensitivity",
        action="store_true",
        help="also list the output SQNR with only one weight quantized, for each weight, at 8, 6, 4, 3 and 2 bits",
    )
    sensitivity.add_argument("--data", metavar="SPEC", help="inputs for --sensitivity, as in validate (default: noise)")
    sensitivity.add_argument("--limit", metavar="N", help="use only the first N images")
    _add_images(sensitivity, "of the images")
    _add_provider(parser)
    _add_common(run, parser)


def _add_images(group: Container, whose: str) -> None:
    """Add the options that turn images into inputs.  whose: the images, as a phrase that begins with 'of'."""
    usual = "default: that of the CIFAR train split; for images:DIR, that of ImageNet"
    group.add_argument("--mean", metavar="R,G,B", help=f"mean {whose} ({usual}; for FILE.npz, 0)")
    group.add_argument("--std", metavar="R,G,B", help=f"standard deviation {whose} ({usual}; for FILE.npz, 1)")
    group.add_argument("--resize", metavar="N", help="for images:DIR: resize the shorter side to N pixels (default: no resizing)")
    group.add_argument("--crop", metavar="N", help="for images:DIR: crop the center to N pixels or to HxW (default: no cropping)")
    group.add_argument(
        "--fit",
        action="store_true",
        help="for images:DIR: resize the shorter side to 8/7 of the size that the model takes, then crop the center to that size; "
        "images that have this size already stay unchanged",
    )
    group.add_argument(
        "--letterbox",
        metavar="N",
        help="for images:DIR: resize the whole image, with its proportions, to fit into N pixels or HxW, and fill the rest with "
        "gray, as YOLO does (default: no resizing)",
    )
    group.add_argument(
        "--stretch",
        metavar="N",
        help="for images:DIR: resize the whole image to N pixels or to HxW, whatever its proportions, as SSD and RT-DETR do "
        "(default: no resizing)",
    )


def _add_file(parser: Parser, name: str, metavar: str, what: str) -> None:
    parser.add_argument(name, metavar=metavar, type=Path, help=what).complete = shtab.FILE  # type: ignore[attr-defined]


def _add_common(run: Command, parser: Parser, *, json: bool = True) -> None:
    """Add the options that every command has.  parser.get_default("parser") is the parser of the command."""
    output = parser.titled(OUTPUT)
    if json:
        output.add_argument(
            "--json",
            metavar="FILE",
            type=Path,
            help="also write the report as JSON to this file; with -, write only the report, to standard output",
        ).complete = shtab.FILE  # type: ignore[attr-defined]
    amount = output.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="print errors and warnings only")
    amount.add_argument("-v", "--verbose", action="store_true", help="also print what was tried and what was chosen")
    config = parser.add_argument(
        "--config", metavar="FILE.toml", type=Path, help="read options from this file; the command line overrides them"
    )
    config.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--help-all", action=FullHelp, nargs=0, help="show all options and exit")
    library = parser.titled(RUNNING).add_argument(
        "--custom-ops", metavar="FILE", action="append", help="library of custom operators that the model needs; may be repeated"
    )
    library.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.set_defaults(run=run, parser=parser)


def _add_choice(group: Container, name: str, metavar: str, prefix: str = "", option: str = "") -> None:
    """Add an option for one of the enums of config.py, by the name of the setting."""
    kind, default, option = ENUMS[name], getattr(DEFAULT, name), option or "--" + name.replace("_", "-")

    def choice(text: str) -> Choice:
        try:
            return kind.parse(text, option)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    choices = f"{', '.join(map(str, kind))} (default: {default})"
    group.add_argument(option, dest=name, metavar=metavar, type=choice, choices=tuple(kind), help=prefix + choices)
