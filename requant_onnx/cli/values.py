"""Values of options, parsed from their text."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from requant_onnx.choices import (
    AUTO_TRANSFORM,
    MAX_BITS,
    Form,
    OptimizeFor,
    Refinement,
    Space,
    Transform,
    width_of,
    widths_in_words,
)
from requant_onnx.config import ENUMS, OPTIONS_OF_FORM, Budget, QuantConfig
from requant_onnx.errors import ConfigError
from requant_onnx.evaluate.target import Evaluate, Target
from requant_onnx.files.load import input_shapes, noise_size
from requant_onnx.inputs.calibration import DEFAULT_COUNT, DEFAULT_MEMORY, NATURAL, Calibration
from requant_onnx.inputs.feeds import holds_images, load_feeds
from requant_onnx.inputs.image_folder import FolderImages, Pipeline
from requant_onnx.inputs.images import CHANNELS, CIFAR_MEAN_STD, ImageSet, Normalization, load_images, unknown_data
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.rules import LayerRule
from requant_onnx.runtimes import RUNTIMES
from requant_onnx.text import first_line

SIZES = ("resize", "crop", "fit", "letterbox", "stretch")
FINE_BITS, FEW_IMAGES, SOME_IMAGES = 7, 16, 64  # --calibrate auto: from this width on, few images suffice
LARGEST_MEAN, LARGEST_STD = 2.0, 10.0  # larger values are in units of 0..255
CHECKED, SHARE_CHECKED = 32, 8  # images held out for the self-check, but at most one in 8 of all
RESIZE = 8 / 7  # size before cropping, relative to the cropped size: the usual 256 and 224


def config_of(args: argparse.Namespace) -> QuantConfig:
    """The configuration: the recipe, overridden by the options given.  Raises ConfigError."""
    if args.recipe not in (None, "paper"):
        raise ConfigError(f"--recipe '{args.recipe}' is unknown; the only recipe is 'paper'")
    bits = _bits(args)
    given: dict[str, Any] = {}
    if args.transform is not None:
        given["transform"] = Transform.parse(args.transform, "--transform")
    given.update((name, getattr(args, name)) for name in ENUMS if getattr(args, name) is not None)
    _check_download(args, given)
    base = QuantConfig.paper() if args.recipe == "paper" else QuantConfig()
    given.setdefault("form", RUNTIMES[given.get("runtime", base.runtime)].forms[0])
    if args.int8_min_sqnr is not None:
        none = args.int8_min_sqnr == "none"
        given["int8_min_sqnr"] = -math.inf if none else _number(args.int8_min_sqnr, "--int8-min-sqnr")
    for name, form in OPTIONS_OF_FORM.items():
        if name not in given or given["form"] is form:
            continue
        if name in args.from_file:  # an option from a file, for another form than this
            del given[name]
        else:
            option = _flag(name)
            raise ConfigError(f"{option} needs --form {form.value}; give --form {form.value}, or drop {option}")
    if bits is not None:
        given["bits"] = bits
    given["overrides"] = [*map(LayerRule.parse, _listed(args.layer)), *(LayerRule(text, keep=True) for text in _listed(args.keep))]
    given.update((name, True) for name in ("keep_inputs", "symmetric") if getattr(args, name))
    return dataclasses.replace(base, **given)


def _check_download(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse settings of levels for downloads, whose levels are all one step apart, and remove those that come from a file.

    given: settings by name, which this changes, as it does the recipe in `args`.
    """
    aim = given.get("optimize_for", OptimizeFor.FILE)
    if not aim.compresses:
        return
    why = f"has no effect with --optimize-for {aim}, which chooses a step for each weight;"
    unused = ["granularity", "range_mode", "objective", "rounding"]
    if given.get("transform", AUTO_TRANSFORM).exponent not in (None, 1.0):
        unused.append("transform")
    refuse(args, unused, why)
    for name in unused:
        given.pop(name, None)
    refuse(args, ("recipe",), why)
    args.recipe = None


def _listed(given: str | list[str] | None) -> list[str]:
    """The texts of an option that may be repeated."""
    return [given] if isinstance(given, str) else given or []


def target_of(args: argparse.Namespace) -> Target | None:
    """The quality target of the file; None if there is none.  Raises ConfigError."""
    given = {"max_drop": "--max-drop", "min_agreement": "--min-agreement"}
    values = {name: _number(getattr(args, name), option) for name, option in given.items() if getattr(args, name) is not None}
    if not values:
        for name in ("data", "limit", "evaluate", "best_effort"):
            if getattr(args, name) and name not in args.from_file:
                raise ConfigError(f"{_flag(name)} needs --max-drop or --min-agreement; give one of them, or drop {_flag(name)}")
        return None
    for name in ("bits", "target_sqnr", "time_limit"):
        if getattr(args, name) is not None and name not in args.from_file:
            raise ConfigError(f"a target chooses the bits, and has no time limit; drop {_flag(name)}")
    if args.evaluate is not None:
        refuse(args, ("data", "limit"), "has no effect with --evaluate, which measures the score itself;")
    elif args.data is None:
        refuse(args, ("limit",), "needs --data; give --data, or")
    return Target(**values, size=None if args.size is None else Budget.parse_size(args.size))


def check_free(config: QuantConfig) -> None:
    """Raise ConfigError if the runtime does not read all its widths in the form, so that a target could not choose among them."""
    row = RUNTIMES[config.runtime]
    try:
        for bits in row.bits:
            dataclasses.replace(config, bits=bits, overrides=())
    except ConfigError:
        other = " or ".join(str(form) for form in row.forms if form is not config.form)
        raise ConfigError(
            f"the {config.form} form for {row.title} has a single width, so a target has no choice; choose --form {other}, or give "
            f"--bits {MAX_BITS} without a target"
        ) from None


def function_of(text: str) -> Evaluate:
    """The function MODULE:FUNCTION, which may also be in the current directory.  Raises ConfigError."""
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the import runs the code of the module
        raise ConfigError(f"--evaluate '{text}' cannot be imported ({first_line(error)}); write it as MODULE:FUNCTION") from None
    if not callable(function):
        raise ConfigError(f"--evaluate '{text}' is not a function; write it as MODULE:FUNCTION")
    return cast("Evaluate", function)


def _bits(args: argparse.Namespace) -> float | Budget | None:
    if args.max_drop is not None or args.min_agreement is not None:
        return None
    if args.bits != "auto":
        for name in ("size", "target_sqnr"):
            if getattr(args, name) is not None and name not in args.from_file:
                raise ConfigError(f"{_flag(name)} needs --bits auto; give --bits auto, or drop {_flag(name)}")
        return None if args.bits is None else bits_of(args.bits)
    if (args.size is None) == (args.target_sqnr is None):
        raise ConfigError("--bits auto needs one target: either --size, for example 180kB, or --target-sqnr, for example 20")
    if args.size is None:
        return Budget(sqnr_db=_number(args.target_sqnr, "--target-sqnr"))
    if args.external_data:
        raise ConfigError("--size is the size of a single file; drop --external-data")
    return Budget(size=Budget.parse_size(args.size))


def automatic(args: argparse.Namespace, config: QuantConfig) -> tuple[QuantConfig, Calibration | None]:
    """The settings and the calibration used by default: noise if it helps and the model takes images, else None.

    With many bits, the refinement becomes a bias correction on few images, which suffices, unless --refinement is given.
    Raises ConfigError.
    """
    refined = config.refinement is not Refinement.NONE and not (
        config.refinement.sees_outputs and config.rounding is Space.TRANSFORMED
    )
    size = noise_size(model_of(args))
    if not (refined or config.form is Form.INT8) or size is None:
        return config, calibration_of(argparse.Namespace(**{**vars(args), "calibrate": None}))
    fine = not isinstance(config.bits, Budget) and config.bits >= FINE_BITS and config.form is not Form.INT8
    if fine and args.refinement is None:
        config = dataclasses.replace(config, refinement=Refinement.BIAS)
    seed = 0 if args.seed is None else whole_of(args.seed, "--seed")
    count = FEW_IMAGES if fine else SOME_IMAGES
    count = count if args.calibrate_limit is None else whole_of(args.calibrate_limit, "--calibrate-limit")
    return config, noise_of(args, f"noise:{size[0]}x{size[1]}", count, seed)


def calibration_of(args: argparse.Namespace) -> Calibration | None:
    """The calibration that --calibrate asks for.  Raises ConfigError, DataError."""
    spec = args.calibrate
    if spec in (None, "none"):
        unused = ["calibrate_limit", "memory", "seed", *(() if getattr(args, "data", None) else ("mean", "std", *SIZES))]
        if spec == "none":  # otherwise, an option may apply to other models, of convert-many
            refined = getattr(args, "refinement", None) in (Refinement.FEEDBACK, Refinement.DESCENT)
            unused += ["time_limit", *(["refinement"] if refined else [])]
        refuse(args, unused, "needs --calibrate; give --calibrate, or")
        return None
    spec = whole_spec(spec)
    seed = 0 if args.seed is None else whole_of(args.seed, "--seed")
    count = DEFAULT_COUNT if args.calibrate_limit is None else whole_of(args.calibrate_limit, "--calibrate-limit")
    if is_noise(spec):
        return noise_of(args, spec, count, seed)
    if not spec.startswith(("cifar10:", "cifar100:", "images:")) and not spec.endswith(".npz"):
        raise ConfigError(f"--calibrate: {unknown_data(spec, 'cifar10:DIR, cifar100:DIR, images:DIR, FILE.npz or noise')}")
    feeds = feeds_of(args, spec)
    if feeds is not None:
        refuse(args, ("seed",), f"applies to images, but '{spec}' holds inputs by name;")
        return dataclasses.replace(Calibration.from_feeds(feeds, count), memory=_memory(args))
    images = images_of(args, spec, "train")
    if args.calibrate_limit is None:
        count = min(count, len(images) - min(CHECKED, len(images) // SHARE_CHECKED))
    return Calibration(images, normalization_of(args, spec, images), count, seed, memory=_memory(args))


def feeds_of(args: argparse.Namespace, spec: str) -> list[dict[str, GenericArray]] | None:
    """The inputs by name that a spec holds; None if it holds images, or asks for noise.  Raises ConfigError, DataError."""
    if not spec.endswith(".npz"):
        return None
    shapes = input_shapes(model_of(args))
    if holds_images(Path(spec), shapes):
        return None
    refuse(args, ("mean", "std", *SIZES), f"applies to images, but '{spec}' holds inputs by name;")
    return load_feeds(Path(spec), shapes)


def is_noise(spec: str) -> bool:
    """Whether a spec asks for noise."""
    return spec == "noise" or spec.startswith("noise:")


def noise_of(args: argparse.Namespace, spec: str, count: int, seed: int) -> Calibration:
    """Images of noise, or of noise:HxW.  Raises ConfigError."""
    if not whole_spec(getattr(args, "data", None) or "noise").startswith("images:"):  # these options may apply to it
        refuse(args, SIZES, "applies to images:DIR, but the calibration inputs are noise; give --calibrate images:DIR, or")
    return Calibration(None, normalization_of(args, "noise", None), count, seed, size=_size(spec[6:]), memory=_memory(args))


def _memory(args: argparse.Namespace) -> int:
    return DEFAULT_MEMORY if getattr(args, "memory", None) is None else Budget.parse_size(args.memory)


def images_of(args: argparse.Namespace, spec: str, split: str) -> ImageSet:
    """The images of a spec, resized and cropped as the options say.  Raises ConfigError, DataError."""
    spec = whole_spec(spec)
    if not spec.startswith("images:"):
        refuse(args, SIZES, f"applies to images:DIR, not to '{spec}';")
        return load_images(spec, split)
    images = load_images(spec, split, _pipeline(args), labels_of(args))
    unreadable = images.x.unreadable if isinstance(images.x, FolderImages) else ()
    if unreadable:
        count = len(images) + len(unreadable)
        print(
            f"note: {len(unreadable)} of {count} images are damaged and were skipped; the first is '{unreadable[0]}'",
            file=sys.stderr,
        )
    return images


def labels_of(args: argparse.Namespace) -> Path | None:
    """The file of labeled boxes, for commands that take one.  Raises ConfigError if the data are not a directory of images."""
    labels: Path | None = getattr(args, "labels", None)
    if labels is None or whole_spec(args.data or "noise").startswith("images:"):
        return labels
    refuse(args, ("labels",), f"applies to images:DIR, not to '{args.data or 'noise'}';")
    return None


def whole_spec(spec: str) -> str:
    """The spec of data with its kind; DIR becomes images:DIR."""
    return f"images:{spec}" if Path(spec).is_dir() else spec


def model_of(args: argparse.Namespace) -> Path:
    """The path of the model that takes the inputs."""
    path = next(getattr(args, name) for name in ("input", "model", "reference") if hasattr(args, name))
    return Path(path)


def _pipeline(args: argparse.Namespace) -> Pipeline:
    if args.fit:
        others = " and ".join(f"--{name}" for name in SIZES if name != "fit" and getattr(args, name) is not None)
        if others:
            raise ConfigError(f"--fit chooses the size and the crop; drop --fit, or {others}")
        size = _image_size(model_of(args))
        return Pipeline(round(max(size) * RESIZE), size, only_others=True)
    resize = None if args.resize is None else whole_of(args.resize, "--resize")
    crop, letterbox, stretch = (_image(getattr(args, name), f"--{name}") for name in ("crop", "letterbox", "stretch"))
    return Pipeline(resize, crop, letterbox=letterbox, stretch=stretch)


def _image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the images that a model takes.  Raises ConfigError if their size is free, or it takes no images."""
    shape = next(iter(input_shapes(path).values()), ())
    sizes = (shape[1:3] if shape[3] in CHANNELS and shape[1] not in CHANNELS else shape[2:]) if len(shape) == 4 else ()
    if len(sizes) != 2 or None in sizes:
        raise ConfigError(
            f"'{path}' does not state the size of its images, so --fit cannot be used; give --resize and --crop, or --letterbox"
        )
    return int(sizes[0] or 0), int(sizes[1] or 0)


def normalization_of(args: argparse.Namespace, spec: str, images: ImageSet | None) -> Normalization | None:
    """The normalization from the options; None if they have none and the images are float, or noise (images is None)."""
    pixels = images is not None and images.x.dtype == "uint8"
    asked = {name for name in ("mean", "std") if getattr(args, name) is not None}
    if not pixels and (not asked or (images is not None and asked <= args.from_file)):
        return None
    if images is None and (args.mean is None or args.std is None):
        raise ConfigError("noise needs both --mean and --std, or neither, which selects those of ImageNet")
    usual = {**CIFAR_MEAN_STD, "images": (NATURAL.mean, NATURAL.std)}
    mean, std = usual.get(whole_spec(spec).partition(":")[0], ((0.0,), (1.0,)))
    return Normalization(
        mean if args.mean is None else _in_shares(_numbers(args.mean, "--mean"), "--mean", LARGEST_MEAN),
        std if args.std is None else _in_shares(_numbers(args.std, "--std"), "--std", LARGEST_STD),
    )


def _in_shares(values: tuple[float, ...], option: str, largest: float) -> tuple[float, ...]:
    """The values of an option.  Raises ConfigError if one is above `largest`, and so probably in units of 0..255."""
    if max(values, default=0.0) > largest:
        raise ConfigError(f"{option} {max(values):g} is too large; it is in units of pixel / 255, so divide it by 255")
    return values


def refuse(args: argparse.Namespace, names: Collection[str], reason: str) -> None:
    """Raise ConfigError if an option has no meaning here; an option from a file is ignored.

    reason: the middle of the sentence, between the option and the advice to drop it.
    """
    for name in names:
        if getattr(args, name, None) not in (None, False) and name not in args.from_file:
            raise ConfigError(f"{_flag(name)} {reason} drop {_flag(name)}")


def _flag(name: str) -> str:
    """The option as it is written on the command line."""
    return "--range" if name == "range_mode" else f"--{name.replace('_', '-')}"


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        hint = f"write it as {float(text.replace(',', '.')):g}"
    except ValueError:
        hint = "write it like 0.5"
    raise ConfigError(f"{option} '{text}' is not a number; {hint}")


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a list of numbers; write it as R,G,B, for example 0.5,0.5,0.5") from None


def _size(text: str) -> tuple[int, int] | None:
    height, _, width = text.partition("x")
    if not text:
        return None
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"'noise:{text}' is not a size; write it as noise:224x224, height first")
    return int(height), int(width)


def _image(text: str | None, option: str) -> tuple[int, int] | None:
    if text is None:
        return None
    height, cross, width = text.partition("x")
    if not (height.isdecimal() and (width.isdecimal() or not cross)):
        raise ConfigError(f"{option} '{text}' is not a size; write it as 224 or 224x224, height first")
    return int(height), int(width or height)


def list_of(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",")]


def whole_of(text: str, option: str) -> int:
    """Parse a whole number.  Raises ConfigError."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a whole number") from None


def bits_of(text: str) -> float:
    """Parse a width.  Raises ConfigError.

    >>> bits_of("1.6"), bits_of("4")
    (1.6, 4)
    """
    try:
        width = width_of(float(text))
    except ValueError:
        width = None
    if width is None:
        raise ConfigError(f"--bits '{text}' is not one of {widths_in_words()}")
    return width


def seconds_of(text: str | None) -> float | None:
    """Parse a time limit; None means no limit.  Raises ConfigError.

    >>> seconds_of("90s"), seconds_of("5min"), seconds_of("1.5h"), seconds_of("20")
    (90.0, 300.0, 5400.0, 20.0)
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|sec|m|min|h)?", text.strip().lower())
    seconds = float(found[1]) * {"m": 60.0, "h": 3600.0}.get((found[2] or "s")[0], 1.0) if found else 0.0
    if seconds <= 0.0:
        raise ConfigError(f"--time-limit '{text}' is not a time; write it as 90s, 5min or 1h")
    return seconds


def limit_of(text: str | None) -> int | None:
    """Parse the number of images; None means all.  Raises ConfigError."""
    limit = None if text is None else whole_of(text, "--limit")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no images; give 1 or more")
    return limit
