"""The commands.  Each reads its options, calls the library, and writes and prints the results."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
from rich.markup import escape

from requant_onnx.choices import Form, Runtime
from requant_onnx.cli import tables
from requant_onnx.cli.goals import GOALS, dtype_of, lines_of, place_for_transformers_js
from requant_onnx.cli.paths import check_apart, check_cache, check_json, check_new, check_output, check_page, read_by, write_json
from requant_onnx.cli.progressive import run_progressive
from requant_onnx.cli.terminal import console_for, progress_bar, status_line, until_pipe_is_closed
from requant_onnx.cli.toml_options import write_options
from requant_onnx.cli.values import (
    SIZES,
    automatic,
    bits_of,
    calibration_of,
    check_free,
    config_of,
    feeds_of,
    function_of,
    images_of,
    is_noise,
    labels_of,
    limit_of,
    list_of,
    noise_of,
    normalization_of,
    refuse,
    seconds_of,
    target_of,
    whole_of,
)
from requant_onnx.config import QuantConfig
from requant_onnx.convert import pipeline
from requant_onnx.convert.report import QuantReport, as_json
from requant_onnx.convert.restore import restore_model
from requant_onnx.errors import ConfigError, DataError, ModelError, OutputError, QualityError
from requant_onnx.evaluate.cache import Cache, default_folder
from requant_onnx.evaluate.gate import check_gate, parse_gate
from requant_onnx.evaluate.jobs import open_executor
from requant_onnx.evaluate.recipes import Comparison, compare
from requant_onnx.evaluate.sensitivity import WeightCost, sensitivity
from requant_onnx.evaluate.target import Target, find_smallest
from requant_onnx.evaluate.validate import validate
from requant_onnx.files.atomic import write_atomically
from requant_onnx.files.compressed import download_sizes
from requant_onnx.files.load import data_files, file_bytes, is_large, materialize
from requant_onnx.files.save import save_model
from requant_onnx.inputs.calibration import DEFAULT_COUNT, OTHER_SEED, Calibration
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.image_folder import FolderImages
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.progress import Progress
from requant_onnx.runtime.explain import explain
from requant_onnx.runtime.feeds import calibration_images
from requant_onnx.runtime.sessions import load_runnable
from requant_onnx.runtimes import RUNTIMES
from requant_onnx.webpage.pages import html_comparison, html_report

PAGE_IMAGES, PAGE_VALUES = 1000, 1 << 24  # most images on the page of a conversion, and most values in them
USUAL_BITS = (8, 6, 4, 3)  # that compare tries
PAGE_INPUTS = 64  # fewest inputs on a page; also most, for noise and inputs by name
MORE_BITS_OR_DATA = ["use more --bits", "give your own inputs to --calibrate"]
TARGET_BITS, TARGET_IMAGES = 4, 1000  # with a target: bits that --calibrate auto assumes; most images to measure it on


def run_convert(args: argparse.Namespace) -> None:
    """requant convert: write a model with quantized weights, its report and its page."""
    if args.progressive:
        run_progressive(args)
        return
    if args.goal == "transformers.js" and args.output.suffix != ".onnx":
        args.output = _transformers_js_output(args)
    read = read_by(args)
    check_output(args.input, args.output, args.force, read)
    used = [*read, args.output, *data_files(args.output), Path(f"{args.output}.data")]
    check_json(args.json, *used)
    check_page(args.html, args.force, *used)
    check_apart(args.json, args.html)
    if args.goal is not None:
        console_for(args).print(escape(f"--for {args.goal}, {GOALS[args.goal].title}:\n{lines_of(args.goal, args.from_file)}"))
    with progress_bar(args, "quantizing") as progress:
        report, sizes, calibration = convert_file(args, progress)
    if not report.converted:
        print(f"warning: nothing to convert in '{args.input}', so '{args.output}' is a copy of it", file=sys.stderr)
    downloads = _downloads(args.output)
    paths = {"input": str(args.input), "output": str(args.output), "file_bytes": list(sizes), "toml": write_options(args)}
    write_json(args.json, {**report.to_dict(), **paths, "downloads": downloads})
    if args.html is not None:
        with progress_bar(args, "writing the page") as progress:
            settings = [("requant.toml, for requant convert --config", write_options(args))]
            page = html_report(
                args.input, args.output, **_page_inputs(args, calibration), conversion=report, settings=settings, progress=progress
            )
        write_atomically(args.html, page.encode(errors="replace"))
    tables.print_conversion(console_for(args), report, sizes, downloads, whole=args.verbose)
    if args.verbose:
        tables.print_tried(console_for(args), report)


def _transformers_js_output(args: argparse.Namespace) -> Path:
    """The path of the file in the directory of a model; prints a sentence that says how to load it."""
    output = place_for_transformers_js(args.bits, args.input, args.output)
    if not args.output.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise OutputError(f"'{output.parent}' cannot be a directory; give the directory of a model, or a path that ends in .onnx")
    output.parent.mkdir(exist_ok=True)
    console_for(args).print(escape(f'writing {output}; in transformers.js, its dtype is "{dtype_of(args.bits)}"'), soft_wrap=True)
    return output


def _downloads(path: Path) -> dict[str, int]:
    """The compressed sizes of a model in bytes; empty if some of its data are in other files."""
    return {} if data_files(path) else download_sizes(path.read_bytes())


def _page_inputs(args: argparse.Namespace, calibration: Calibration | None) -> dict[str, Any]:
    """The inputs that the page of a conversion compares on: unlabeled, and if possible not used by the conversion.

    The model may have been trained on these images, so an accuracy on them would be meaningless.
    """
    if calibration is None:
        return {}
    count = PAGE_INPUTS
    if calibration.images is not None:
        count = min(PAGE_IMAGES, max(PAGE_INPUTS, PAGE_VALUES // math.prod(calibration.images.x.shape[1:])))
    unseen, is_new = calibration.unseen(count)
    if unseen.images is not None:
        unseen = replace(unseen, images=replace(unseen.images, y=None))
    return {"calibration": unseen, "data": "" if unseen.is_noise else args.calibrate, "used": not is_new}


def convert_file(
    args: argparse.Namespace, progress: Progress | None, threads: int | None = None
) -> tuple[QuantReport, tuple[int, int], Calibration | None]:
    """Convert args.input to args.output as the options say.  Returns the report, bytes before and after, and the calibration.

    Raises QualityError, and writes nothing, if the self-check finds the result broken.
    """
    model, report, calibration = _converted(args, progress, threads)
    if report.check is not None and report.check.is_broken and not args.force_quality:
        advice = ["raise --time-limit"] if args.time_limit is not None else []
        advice += ["use more --bits"] if calibration is not None and not calibration.is_noise else MORE_BITS_OR_DATA
        raise QualityError(
            f"{report.check.sentence()}: this is too low to be useful, so nothing was written; {', '.join(advice)}, or add "
            "--force-quality"
        )
    before, stored = file_bytes(args.input), args.input.stat().st_size
    if report.converted or before != stored or args.external_data:  # a copy would refer to external data that it does not have
        after = save_model(model, args.output, external_data=args.external_data or is_large(model), check=not report.complaint)
    else:
        after = stored
        write_atomically(args.output, args.input.read_bytes())
    return report, (before, after), calibration


def _converted(
    args: argparse.Namespace, progress: Progress | None, threads: int | None
) -> tuple[onnx.ModelProto, QuantReport, Calibration | None]:
    config, time_limit, target = config_of(args), seconds_of(args.time_limit), target_of(args)
    if target is not None:
        return _targeted(args, config, target, progress, threads)
    if args.calibrate not in (None, "auto"):
        calibration = calibration_of(args)
        model, report = pipeline.convert_model(args.input, config, calibration, progress, threads, time_limit)
        notes = () if calibration is None else (_calibrated_on(args.calibrate, calibration),)
        return model, replace(report, notes=(*notes, *report.notes)), calibration
    chosen, calibration = automatic(args, config)
    if calibration is not None:
        try:
            model, report = pipeline.convert_model(args.input, chosen, calibration, progress, threads, time_limit)
        except (DataError, ModelError) as error:  # a model that noise does not fit, or one that is rejected in any case
            why = f"; calibration on noise was tried, but {error}"
        else:
            text = f"calibrated on {calibration.count} images of noise (no --calibrate given); your own inputs give better results"
            return model, replace(report, notes=(*report.notes, text)), calibration
    else:
        why = ""
    model, report = pipeline.convert_model(args.input, config, None, progress, threads, time_limit)
    return model, replace(report, notes=(*report.notes, f"not calibrated{why}")) if why else report, None


def _calibrated_on(spec: str, calibration: Calibration) -> str:
    """The inputs of a calibration, in words."""
    images = calibration.images
    if images is None:
        count = min(calibration.count, len(calibration.feeds)) if calibration.feeds else calibration.count
        return f"calibrated on {count} {f'inputs of {spec}' if calibration.feeds else 'images of noise'}"
    text = f"calibrated on {min(calibration.count, len(images)):,} of {len(images):,} images of {spec}"
    if isinstance(images.x, FolderImages):
        text += f", which are {'x'.join(map(str, images.x.size))} pixels"
    how = calibration.normalization
    return text if how is None else f"{text}, normalized with mean {_listed(how.mean)} and std {_listed(how.std)}"


def _targeted(
    args: argparse.Namespace, config: QuantConfig, target: Target, progress: Progress | None, threads: int | None
) -> tuple[onnx.ModelProto, QuantReport, Calibration | None]:
    """The smallest file that meets a target.  Raises QualityError if none does, unless --best-effort is given."""
    check_free(config)
    if args.calibrate in (None, "auto"):
        config, calibration = automatic(args, replace(config, bits=TARGET_BITS))
    else:
        calibration = calibration_of(args)
    function = None if args.evaluate is None else function_of(args.evaluate)
    data, normalization = (None, None) if function is not None else _judged_on(args, calibration)
    found = find_smallest(
        args.input,
        config,
        target,
        calibration=calibration,
        data=data,
        normalization=normalization,
        evaluate=function,
        progress=progress,
        threads=threads,
    )
    if not found.holds and not args.best_effort:
        raise QualityError(f"{found.sentence}; relax the target, or add --best-effort to write that file")
    report = replace(found.report, notes=(*found.report.notes, f"target: {found.sentence}"))
    return found.model, report, calibration


def _judged_on(args: argparse.Namespace, calibration: Calibration | None) -> tuple[ImageSet | FeedSet | None, Normalization | None]:
    """The data on which a target is measured, and their normalization: --data, or inputs that the calibration does not use.

    The latter have no labels, because the model may have been trained on them.  Raises ConfigError if none is left.
    """
    if args.data is not None:
        return _images_to_compare(args, args.input, args.data)
    if calibration is None or calibration.feeds:
        return None, None
    if calibration.images is not None:
        left = calibration.images.not_drawn(calibration.count, calibration.seed).first(TARGET_IMAGES)
        if len(left) == 0:
            raise ConfigError(
                "the calibration uses all images, so a target cannot be measured; give --data, or more to --calibrate"
            )
        return replace(left, y=None), calibration.normalization
    return calibration_images(args.input, replace(calibration, count=DEFAULT_COUNT, seed=calibration.seed + 1))


def run_restore(args: argparse.Namespace) -> None:
    """requant restore: write the plain float version of a quantized model."""
    read = read_by(args)
    check_output(args.input, args.output, args.force, read)
    check_json(args.json, *read, args.output, *data_files(args.output), Path(f"{args.output}.data"))
    with status_line(args, "decoding weights"):
        model, report = restore_model(args.input)
    before = file_bytes(args.input)
    after = save_model(model, args.output)
    paths = {"input": str(args.input), "output": str(args.output), "file_bytes": [before, after]}
    write_json(args.json, {**report.to_dict(), **paths})
    tables.print_restored(console_for(args), report, (before, after))


def run_validate(args: argparse.Namespace) -> None:
    """requant validate: compare two models on the same inputs."""
    check_json(args.json, *read_by(args))
    if args.data is None:
        raise ConfigError("validate needs images; give --data, for example cifar10:DIR, images:DIR or FILE.npz")
    bounds = {} if args.fail_below is None else parse_gate(args.fail_below)
    batch = 1 if args.latency_batch is None else whole_of(args.latency_batch, "--latency-batch")
    threads = None if args.threads is None else whole_of(args.threads, "--threads")
    if batch < 1 or (threads is not None and threads < 1):
        raise ConfigError("--latency-batch and --threads must be 1 or more")
    labels_of(args)
    images, normalization = _images_to_compare(args, args.reference, args.data)
    with progress_bar(args, "validating") as progress:
        report = validate(
            args.reference,
            args.candidate,
            images,
            normalization,
            latency_batch=None if args.no_latency else batch,
            threads=threads,
            task=args.task,
            progress=progress,
        )
    names = {"reference": str(args.reference), "candidate": str(args.candidate), "data": args.data}
    both = [_downloads(path) for path in (args.reference, args.candidate)]
    downloads = {name: (both[0].get(name), size) for name, size in both[1].items()} if both[0] else {}
    with until_pipe_is_closed():  # the gate counts even if nobody reads the table
        write_json(args.json, {**report.to_dict(), **names, "downloads": {name: list(sizes) for name, sizes in downloads.items()}})
        console = console_for(args)
        if normalization is not None:
            console.print(f"pixels normalized with mean {_listed(normalization.mean)} and std {_listed(normalization.std)}")
        tables.print_validation(console, report, downloads)
    check_gate(report, bounds)


def run_report(args: argparse.Namespace) -> None:
    """requant report: write a web page that shows every weight."""
    check_page(args.output, args.force, *read_by(args))
    labels_of(args)
    calibration = _data_to_compare(args, "noise" if args.data is None else args.data)
    if args.data is None and args.limit is None:
        calibration = replace(calibration, count=PAGE_INPUTS)
    asked = args.data is not None or replace(calibration, count=DEFAULT_COUNT) != Calibration(seed=OTHER_SEED)
    if not asked:
        refuse(args, ("limit",), "needs --data; give --data, for example noise, or")
    with progress_bar(args, "comparing") as progress:  # without options for inputs, weights are compared even if noise does not fit
        page = html_report(
            args.reference,
            args.candidate,
            calibration=calibration if asked else None,
            data=args.data or "",
            task=args.task,
            progress=progress,
        )
    write_atomically(args.output, page.encode(errors="replace"))
    console_for(args).print(f"wrote {args.output}", markup=False, highlight=False)


def run_inspect(args: argparse.Namespace) -> None:
    """requant inspect: list the weights of a model and, with --sensitivity, what each of them costs."""
    check_json(args.json, *read_by(args))
    if not args.sensitivity:
        refuse(args, ("data", "limit", "mean", "std", *SIZES), "needs --sensitivity; give --sensitivity, or")
    with status_line(args, "reading the model"):
        report = pipeline.inspect_model(args.model)
    costs: tuple[WeightCost, ...] = ()
    if args.sensitivity:
        calibration = _data_to_compare(args, "noise" if args.data is None else args.data)
        with progress_bar(args, "measuring") as progress:
            costs = sensitivity(args.model, calibration, progress=progress)
    found = {"sensitivity": [asdict(cost) for cost in costs]} if args.sensitivity else {}
    write_json(args.json, as_json({**report.to_dict(), "model": str(args.model), **found}))
    tables.print_inspection(console_for(args), report)
    if costs:
        tables.print_sensitivity(console_for(args), costs, "images of noise" if args.data is None else args.data)


def run_explain(args: argparse.Namespace) -> None:
    """requant explain: show what ONNX Runtime does with the weights of a model."""
    check_json(args.json, *read_by(args))
    with status_line(args, "loading the model in ONNX Runtime"):
        explanation = explain(args.model)
    write_json(args.json, {**explanation.to_dict(), "model": str(args.model)})
    tables.print_explanation(console_for(args), explanation)


def run_compare(args: argparse.Namespace) -> None:
    """requant compare: convert with every recipe at every width, and list the results."""
    read = read_by(args)
    check_json(args.json, *read)
    check_page(args.html, args.force, *read)
    check_new(args.csv, args.force, *read)
    check_apart(args.json, args.html, args.csv)
    if args.cache is not None:
        check_cache(args.cache)
    runtime = Runtime.ORT if args.runtime is None else args.runtime
    form = RUNTIMES[runtime].forms[0] if args.form is None else args.form
    widths = _usual_bits(form, runtime) if args.bits is None else [*map(bits_of, list_of(args.bits))]
    args.calibrate = "noise" if args.calibrate in (None, "auto") else args.calibrate
    calibration = calibration_of(args)
    model = _whole_file(args.model)
    images: ImageSet | FeedSet
    if args.data is None:  # noise as in the calibration, from another seed
        like = calibration or Calibration()
        other = Calibration(None, like.normalization, limit_of(args.limit) or DEFAULT_COUNT, like.seed + 1, like.size)
        images, normalization = calibration_images(args.model, other)
    else:
        images, normalization = _images_to_compare(args, args.model, args.data)
    cache = Cache(None if args.no_cache else args.cache or default_folder())
    jobs = None if args.jobs is None else whole_of(args.jobs, "--jobs")
    with open_executor(jobs, args.dask) as executor, progress_bar(args, "comparing") as progress:
        recipes = list_of("max,paper,best" if args.recipes is None else args.recipes)
        comparison = compare(
            model,
            widths,
            recipes,
            images,
            normalization,
            calibration,
            executor,
            form=form,
            runtime=runtime,
            cache=cache,
            progress=progress,
        )
    cache.trim()
    write_json(args.json, {**comparison.to_dict(), "model": str(args.model), "toml": write_options(args)})
    if args.csv is not None:
        write_atomically(args.csv, _as_csv(comparison).encode())
    if args.html is not None:
        settings = [("requant.toml, for requant compare --config", write_options(args))]
        write_atomically(args.html, html_comparison(comparison, args.model.name, settings).encode())
    tables.print_comparison(console_for(args), comparison)


def _data_to_compare(args: argparse.Namespace, spec: str) -> Calibration:
    """The inputs of a spec, at most --limit: images, inputs by name, or noise.  Raises ConfigError, DataError."""
    limit = limit_of(args.limit)
    feeds = feeds_of(args, spec)
    if feeds is not None:
        return Calibration.from_feeds(feeds, limit or len(feeds))
    if is_noise(spec):
        return noise_of(args, spec, limit or DEFAULT_COUNT, OTHER_SEED)  # not the noise of a calibration
    images = images_of(args, spec, "test").first(limit)
    return Calibration(images, normalization_of(args, spec, images), len(images))


def _images_to_compare(args: argparse.Namespace, model: Path, spec: str) -> tuple[ImageSet | FeedSet, Normalization | None]:
    given = _data_to_compare(args, spec)
    if given.feeds:
        return FeedSet(given.feeds), None
    return calibration_images(model, given) if given.images is None else (given.images, given.normalization)


def _whole_file(path: Path) -> bytes:
    """The serialized model, including external data.  Raises ModelError if it is above 2 GB."""
    model = materialize(load_runnable(path).copy())
    if is_large(model):
        raise ModelError(f"'{path}' is larger than 2 GB, more than one work item can hold; use requant convert for it")
    data: bytes = model.SerializeToString() if data_files(path) else path.read_bytes()
    return data


def _usual_bits(form: Form, runtime: Runtime) -> list[float]:
    """The USUAL_BITS that the runtime reads in this form."""
    found: list[float] = []
    for bits in USUAL_BITS:
        with contextlib.suppress(ConfigError):
            QuantConfig(bits, form=form, runtime=runtime)
            found.append(bits)
    return found


def _as_csv(comparison: Comparison) -> str:
    rows = [_flat(asdict(trial)) for trial in comparison.trials]
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # a large file has fewer compressed sizes than others
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    downloads = row.pop("downloads")
    return {**row, **{f"bytes_{name}": size for name, size in downloads.items()}}


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
