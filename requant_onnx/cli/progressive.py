"""requant convert --progressive: one model in stages that share their data."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rich.markup import escape

from requant_onnx.choices import MAX_BITS, Form, OptimizeFor
from requant_onnx.cli import tables
from requant_onnx.cli.goals import GOALS
from requant_onnx.cli.paths import check_json, check_output, read_by, write_json
from requant_onnx.cli.terminal import console_for, progress_bar
from requant_onnx.cli.toml_options import write_options
from requant_onnx.cli.values import automatic, calibration_of, config_of, target_of
from requant_onnx.config import QuantConfig
from requant_onnx.convert.progressive import STAGES, Stage, quantize_progressively
from requant_onnx.errors import ConfigError, DataError, ModelError, QualityError
from requant_onnx.files.load import data_files, file_bytes
from requant_onnx.files.planes import SavedStage, save_progressive, stage_paths
from requant_onnx.progress import Progress
from requant_onnx.runtimes import RUNTIMES

REFUSED = {
    "bits": "progressive files have 2, 4 and 8 bits",
    "size": "the size of progressive files follows from their bits",
    "target_sqnr": "progressive files have 2, 4 and 8 bits",
    "max_drop": "progressive files have 2, 4 and 8 bits",
    "min_agreement": "progressive files have 2, 4 and 8 bits",
    "time_limit": "the stages of progressive files are always refined",
    "external_data": "progressive files have a data file of their own",
    "html": "the page of a conversion shows one model; make it with requant report",
}
"""Option that makes no sense with --progressive -> why."""


def run_progressive(args: argparse.Namespace) -> None:
    """Convert args.input in stages, as the options say, and print a row for each stage.

    Raises ConfigError for options that cannot be combined with --progressive; ModelError if nothing can be converted; QualityError,
    and writes nothing, if the self-check finds the last stage broken.
    """
    config = _config(args)
    paths, read = stage_paths(args.output, STAGES), read_by(args)
    for path in paths:
        check_output(args.input, path, args.force, read)
    check_json(args.json, *read, *paths, *(file for path in paths for file in data_files(path)))
    with progress_bar(args, "quantizing") as progress:
        stages = _quantized(args, config, progress)
    if not stages[-1].report.converted:
        raise ModelError(f"'{args.input}' has no weight that can be converted, so it has no stages; drop --progressive to copy it")
    check = stages[-1].report.check
    if check is not None and check.is_broken and not args.force_quality:
        raise QualityError(
            f"at {stages[-1].bits} bits, {check.sentence()}: this is too low to be useful, so nothing was written; give your own "
            "inputs to --calibrate, convert without --progressive, or add --force-quality"
        )
    saved = save_progressive(stages, args.output, check=not stages[-1].report.complaint)
    _report(args, stages, saved)


def _config(args: argparse.Namespace) -> QuantConfig:
    """The settings.  Raises ConfigError for an option that cannot be combined with --progressive.

    Options of REFUSED that come from a file are ignored.
    """
    for name, why in REFUSED.items():
        if getattr(args, name) not in (None, False) and name not in args.from_file:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{why}; drop {option}, or --progressive")
        setattr(args, name, None)
    target_of(args)  # raises for options that only a target uses
    if args.goal == "transformers.js":
        raise ConfigError("transformers.js loads one file, not stages; use --for web, or drop --progressive")
    if args.optimize_for not in (None, OptimizeFor.FILE):
        _give_up(args, "optimize_for", "progressive files cannot be optimized for downloads")
    if args.runtime is not None and Form.FOLDED not in RUNTIMES[args.runtime].forms:
        able = ", ".join(str(runtime) for runtime, row in RUNTIMES.items() if Form.FOLDED in row.forms)
        raise ConfigError(f"--progressive needs a runtime that folds constants ({able}); drop --runtime {args.runtime}")
    if args.form not in (None, Form.FOLDED):
        _give_up(args, "form", "--progressive needs --form folded")
    args.form = Form.FOLDED
    return config_of(args)


def _give_up(args: argparse.Namespace, name: str, why: str) -> None:
    """Ignore an option that comes from a file.  Raises ConfigError for one that was given, or that a goal sets."""
    option = name.replace("_", "-")
    if name not in args.from_file:
        raise ConfigError(f"{why}; drop --{option} {getattr(args, name)}, or --progressive")
    if args.goal is not None and option in GOALS[args.goal].options:
        raise ConfigError(f"{why}, but --for {args.goal} sets --{option}; use --for web, or drop --progressive")
    setattr(args, name, None)


def _quantized(args: argparse.Namespace, config: QuantConfig, progress: Progress | None) -> list[Stage]:
    """The stages, calibrated as --calibrate says, or by default on noise if the model takes images."""
    if args.calibrate not in (None, "auto"):
        return quantize_progressively(args.input, config, calibration=calibration_of(args), progress=progress)
    chosen, calibration = automatic(args, replace(config, bits=STAGES[0]))
    note = ""
    if calibration is not None:
        chosen = replace(chosen, bits=MAX_BITS)
        try:
            stages = quantize_progressively(args.input, chosen, calibration=calibration, progress=progress)
        except (DataError, ModelError) as error:  # a model that noise does not fit, or one that is rejected in any case
            note = f"not calibrated; calibration on noise was tried, but {error}"
        else:
            note = f"calibrated on {calibration.count} images of noise (no --calibrate given); your own inputs give better results"
            return _with_note(stages, note)
    return _with_note(quantize_progressively(args.input, config, progress=progress), note)


def _with_note(stages: list[Stage], note: str) -> list[Stage]:
    if not note:
        return stages
    return [stage._replace(report=replace(stage.report, notes=(*stage.report.notes, note))) for stage in stages]


def _report(args: argparse.Namespace, stages: list[Stage], saved: list[SavedStage]) -> None:
    """Write the JSON report, and print the tables."""
    report, checks = stages[-1].report, [stage.report.check for stage in stages]
    sizes = (file_bytes(args.input), sum(stage.graph_bytes for stage in saved) + saved[-1].data_bytes)
    rows: list[dict[str, Any]] = [
        {**stage._asdict(), "graph": str(stage.graph), "data": str(stage.data), "check": check and check.to_dict()}
        for stage, check in zip(saved, checks, strict=True)
    ]
    paths = {"input": str(args.input), "output": str(args.output), "file_bytes": list(sizes), "toml": write_options(args)}
    write_json(args.json, {**report.to_dict(), **paths, "downloads": {}, "stages": rows})
    console = console_for(args)
    tables.print_conversion(console, report, sizes, {}, whole=args.verbose)
    tables.print_stages(console, saved, checks)
    for stage, found in zip(stages[:-1], checks, strict=False):
        if found is not None and found.is_broken:
            console.print(escape(f"warning: at {stage.bits} bits, {found.sentence()}: do not show the answers of this stage"))
    if args.verbose:
        for stage in stages:
            tables.print_tried(console, stage.report)
