"""The command line's options: their definition, and text turned into values."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from requant_onnx.calibrate import DEFAULT_COUNT, Calibration
from requant_onnx.config import (
    ActivationRange,
    Budget,
    EdgeLayers,
    Form,
    Granularity,
    Int8Levels,
    QuantConfig,
    RangeMode,
    Refinement,
    Space,
    Transform,
    Version,
    parse_choice,
)
from requant_onnx.data import CIFAR_MEAN_STD, ImageSet, Normalisation, load_images
from requant_onnx.errors import ConfigError

DEFAULT = QuantConfig()
Command = Callable[[argparse.Namespace], None]
EPILOGS = {
    None: """examples:
  requant convert net.onnx net8.onnx
  requant validate net.onnx net8.onnx --data cifar10:DIR
  requant inspect net.onnx""",
    "convert": """examples:
  requant convert net.onnx net8.onnx
  requant convert net.onnx net4.onnx --bits 4 --json report.json
  requant convert net.onnx small.onnx --bits 4 --form folded --calibrate images.npz
  requant convert net.onnx small.onnx --bits auto --size 180kB --form folded --calibrate noise
  requant convert net.onnx paper.onnx --bits 4 --recipe paper
  requant convert net.onnx fast.onnx --bits 4 --form int8 --calibrate images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
  requant convert net.onnx max.onnx --bits 6 --granularity per-tensor --transform none --range max""",
    "validate": """examples:
  requant validate net.onnx net8.onnx --data cifar10:cifar-10-batches-bin
  requant validate net.onnx net8.onnx --data images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
pixels become (pixel / 255 - mean) / std; for a model that takes raw 0..255: --mean 0 --std 0.00392156862745098""",
    "inspect": """example:
  requant inspect net.onnx --json net.json""",
    "explain": """example:
  requant explain net4.onnx
each weight is one of: float (stored so), folded at load (decoded once, float speed), decoded every run (slow), fused (an
integer kernel reads its codes)""",
}


def parser_of(convert: Command, validate: Command, inspect: Command, explain: Command) -> argparse.ArgumentParser:
    """The parser; `args.run` is the function of the command given."""
    parser = _command(
        argparse.ArgumentParser, None, prog="requant", description="Low-bit weights for exported ONNX CNNs, without retraining."
    )
    parser.add_argument("--version", action="version", version=f"requant {version('requant_onnx')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(convert, _command(commands.add_parser, "convert", help="write a model with quantized weights"))
    _add_validate(validate, _command(commands.add_parser, "validate", help="compare two models on images"))
    _add_model(inspect, _command(commands.add_parser, "inspect", help="list the weights of a model and what convert would do"))
    _add_model(explain, _command(commands.add_parser, "explain", help="say what ONNX Runtime does with each weight of a model"))
    return parser


def _command(make: Any, name: str | None, **options: Any) -> argparse.ArgumentParser:
    names = () if name is None else (name,)
    made = make(*names, epilog=EPILOGS[name], formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    assert isinstance(made, argparse.ArgumentParser)
    return made


def _add_convert(run: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.onnx", type=Path)
    parser.add_argument("output", metavar="OUT.onnx", type=Path)
    parser.add_argument("--bits", metavar="N", help=f"2 to 8 (default: {DEFAULT.bits}), or auto: chosen for each weight")
    parser.add_argument("--size", metavar="SIZE", help="for --bits auto: the best file of at most this size, for instance 180kB")
    parser.add_argument(
        "--target-sqnr",
        metavar="DB",
        help="for --bits auto: the smallest file found whose outputs keep this SQNR on the calibration inputs, for instance 20",
    )
    parser.add_argument("--granularity", metavar="G", help=_choices(Granularity, DEFAULT.granularity))
    parser.add_argument(
        "--transform", metavar="T", help=f"auto, sqrt, none or power:A, A in 1/3 .. 1 (default: {DEFAULT.transform})"
    )
    parser.add_argument("--range", metavar="R", dest="range_mode", help=_choices(RangeMode, DEFAULT.range_mode))
    parser.add_argument("--edge-layers", metavar="E", help="first and last layers: " + _choices(EdgeLayers, DEFAULT.edge_layers))
    parser.add_argument("--objective", metavar="S", help="space whose error alpha minimises: " + _choices(Space, DEFAULT.objective))
    parser.add_argument(
        "--rounding", metavar="S", help="space in which the nearest level is taken: " + _choices(Space, DEFAULT.rounding)
    )
    parser.add_argument("--form", metavar="F", help=_choices(Form, DEFAULT.form))
    parser.add_argument(
        "--min-ort", metavar="V", help=f"oldest ONNX Runtime that has to load the file (default: {DEFAULT.min_ort})"
    )
    _add_calibration(parser)
    parser.add_argument("--recipe", metavar="NAME", help="paper: REQuant exactly as published; other options override it")
    parser.add_argument(
        "--external-data", action="store_true", help="write weights to OUT.onnx.data beside OUT.onnx, as models above 2 GB need"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.add_argument("--force", action="store_true", help="replace OUT.onnx if it exists")
    parser.set_defaults(run=run)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        metavar="SPEC",
        help="images, without labels, for better rounding, for --bits auto, and for --form int8: cifar10:DIR, cifar100:DIR (train "
        "split), FILE.npz (x), noise, which needs no data (noise:HxW where the model leaves the size free), or none (default)",
    )
    parser.add_argument(
        "--refinement", metavar="R", help="what --calibrate is used for: " + _choices(Refinement, DEFAULT.refinement)
    )
    parser.add_argument("--calibrate-limit", metavar="N", help=f"how many of them, drawn at random (default: {DEFAULT_COUNT})")
    parser.add_argument("--seed", metavar="N", help="of the drawing, and of the noise (default: 0)")
    parser.add_argument(
        "--mean", metavar="R,G,B", help="of the calibration images; default: that of the CIFAR train split, 0 for FILE.npz"
    )
    parser.add_argument(
        "--std", metavar="R,G,B", help="of the calibration images; default: that of the CIFAR train split, 1 for FILE.npz"
    )
    parser.add_argument(
        "--activation-range", metavar="R", help="for --form int8: " + _choices(ActivationRange, DEFAULT.activation_range)
    )
    parser.add_argument(
        "--int8-levels",
        metavar="L",
        help="for --form int8, the largest int8 weight: 64 (default), exact on every CPU; 127, finer on CPUs with VNNI",
    )


def _add_validate(run: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF.onnx", type=Path)
    parser.add_argument("candidate", metavar="CANDIDATE.onnx", type=Path)
    parser.add_argument(
        "--data", metavar="SPEC", required=True, help="cifar10:DIR, cifar100:DIR (test split) or FILE.npz (x, and y for accuracy)"
    )
    parser.add_argument("--mean", metavar="R,G,B", help="default: that of the CIFAR train split, 0 for FILE.npz")
    parser.add_argument("--std", metavar="R,G,B", help="default: that of the CIFAR train split, 1 for FILE.npz")
    parser.add_argument("--limit", metavar="N", help="only the first N images")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.set_defaults(run=run)


def _add_model(run: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.set_defaults(run=run)


def _choices(kind: Any, default: Any) -> str:
    return f"{', '.join(member.value for member in kind)} (default: {default.value})"


def config_of(args: argparse.Namespace) -> QuantConfig:
    """The recipe with the options given on top.  Raises ConfigError."""
    if args.recipe not in (None, "paper"):
        raise ConfigError(f"--recipe '{args.recipe}' is not known; the one recipe is 'paper'")
    bits = _bits(args)
    base = QuantConfig.paper() if args.recipe == "paper" else QuantConfig()
    given: dict[str, Any] = {}
    if args.transform is not None:
        given["transform"] = Transform.parse(args.transform)
    if args.min_ort is not None:
        given["min_ort"] = Version.parse(args.min_ort)
    enums = {
        "granularity": Granularity,
        "range_mode": RangeMode,
        "edge_layers": EdgeLayers,
        "objective": Space,
        "rounding": Space,
        "form": Form,
        "refinement": Refinement,
        "activation_range": ActivationRange,
        "int8_levels": Int8Levels,
    }
    for name, kind in enums.items():
        text = getattr(args, name)
        if text is not None:
            option = "--range" if name == "range_mode" else "--" + name.replace("_", "-")
            given[name] = parse_choice(kind, text, option)
    for name in ("activation_range", "int8_levels"):
        if name in given and given.get("form", base.form) is not Form.INT8:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --form int8; give that too, or drop it")
    if bits is not None:
        given["bits"] = bits
    return dataclasses.replace(base, **given)


def _bits(args: argparse.Namespace) -> int | Budget | None:
    if args.bits != "auto":
        for option in ("size", "target_sqnr"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} belongs to --bits auto; give that, or drop it")
        return None if args.bits is None else _whole(args.bits, "--bits")
    if (args.size is None) == (args.target_sqnr is None):
        raise ConfigError("--bits auto needs what to aim at: either --size, for instance 180kB, or --target-sqnr, for instance 20")
    if args.size is None:
        return Budget(sqnr_db=_numbers(args.target_sqnr, "--target-sqnr")[0])
    if args.external_data:
        raise ConfigError("--size counts one file; drop --external-data")
    return Budget(size=Budget.parse_size(args.size))


def calibration_of(args: argparse.Namespace) -> Calibration | None:
    """What --calibrate asks for.  Raises ConfigError, DataError."""
    if args.calibrate in (None, "none"):
        for option in ("calibrate_limit", "seed", "mean", "std"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} belongs to --calibrate; give that too, or drop it")
        return None
    seed = 0 if args.seed is None else _whole(args.seed, "--seed")
    count = DEFAULT_COUNT if args.calibrate_limit is None else _whole(args.calibrate_limit, "--calibrate-limit")
    if args.calibrate == "noise" or args.calibrate.startswith("noise:"):
        return Calibration(None, normalisation_of(args, "noise", None), count, seed, size=_size(args.calibrate[6:]))
    if not args.calibrate.startswith(("cifar10:", "cifar100:")) and not args.calibrate.endswith(".npz"):
        raise ConfigError(f"--calibrate '{args.calibrate}' is not understood; give cifar10:DIR, cifar100:DIR, FILE.npz or noise")
    images = load_images(args.calibrate, split="train")
    return Calibration(images, normalisation_of(args, args.calibrate, images), count, seed)


def normalisation_of(args: argparse.Namespace, spec: str, images: ImageSet | None) -> Normalisation | None:
    """What the options ask for; None for float images, and for noise (images is None), when they ask for nothing."""
    pixels = images is not None and images.x.dtype == "uint8"
    if not pixels and args.mean is None and args.std is None:
        return None
    if images is None and (args.mean is None or args.std is None):
        raise ConfigError("give noise both --mean and --std, or neither for those of ImageNet")
    mean, std = CIFAR_MEAN_STD.get(spec.partition(":")[0], ((0.0,), (1.0,)))
    return Normalisation(
        mean if args.mean is None else _numbers(args.mean, "--mean"), std if args.std is None else _numbers(args.std, "--std")
    )


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a list of numbers; write it as R,G,B, for instance 0.5,0.5,0.5") from None


def _size(text: str) -> tuple[int, int] | None:
    height, _, width = text.partition("x")
    if not text:
        return None
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--calibrate 'noise:{text}' is not a size; write it as noise:224x224, height first")
    return int(height), int(width)


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a whole number") from None


def limit_of(text: str | None) -> int | None:
    """How many images, None for all.  Raises ConfigError."""
    limit = None if text is None else _whole(text, "--limit")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no image; give 1 or more")
    return limit
