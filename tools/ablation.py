"""Measure the gain of each step of the method, from the full range to refinement, as a Markdown table and a plot.

    python tools/ablation.py models/resnet20_cifar10.onnx --data DIR --plot tools/ablation.png
    python tools/ablation.py googlenet_cifar10.onnx=imagenet --data DIR --bits 4,3

Scales are per tensor and per channel, the first and last layers have 8 bits, activations are float, and steps that need calibration
use 256 images of the train split.  Each cell gives the change in top-1 accuracy on the test images compared to float, in points,
and the output SQNR.  The paper is arXiv 2510.04044.  A second table compares steps that are no rung of the ladder with what they
replace: at the same size of the file, of the download (brotli), or with activations on integers.  With --cache, an interrupted
run continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import onnx
from accuracy_table import NORMALIZATIONS, scores
from cifar import find_or_fetch

from requant_onnx import (
    ActivationRange,
    Budget,
    Calibration,
    Form,
    Granularity,
    Int8Speed,
    QuantConfig,
    RangeMode,
    Refinement,
    Space,
    Transform,
    quantize_model,
)
from requant_onnx.choices import OptimizeFor
from requant_onnx.convert import budget, ladder
from requant_onnx.convert.report import sqnr_db
from requant_onnx.files.compressed import compress
from requant_onnx.inputs.images import load_cifar

mpl.use("Agg")
from matplotlib import pyplot

PLAIN = QuantConfig(form=Form.FOLDED, transform=Transform(1.0), range_mode=RangeMode.MAX, refinement=Refinement.NONE)
PAPER = replace(PLAIN, transform=Transform(0.5), range_mode=RangeMode.SEARCH, rounding=Space.TRANSFORMED)
BEST = replace(PAPER, transform=Transform(None), rounding=Space.WEIGHT)
LADDER = {
    "max (full range)": PLAIN,
    "+ range search": replace(PLAIN, range_mode=RangeMode.SEARCH),
    "square root alone": replace(PAPER, range_mode=RangeMode.MAX),
    "both (the paper)": PAPER,
    "+ bias correction": replace(PAPER, rounding=Space.WEIGHT, refinement=Refinement.BIAS),
    "+ feedback, chosen exponent": replace(BEST, refinement=Refinement.FEEDBACK),
    "+ descent, scales": replace(BEST, refinement=Refinement.DESCENT),
    "+ shrinkage of moments": replace(BEST, refinement=Refinement.DESCENT),
}
WITH_IMAGES = {name for name, config in LADDER.items() if config.refinement is not Refinement.NONE}
Patch = tuple[object, str, object]
"""(module, name, value): how a step that has no setting is switched off"""
NO_SHRINKAGE: tuple[Patch, ...] = ((ladder, "FILE_SHRINKAGES", ladder.FILE_SHRINKAGES[:1]),)
OFF = dict.fromkeys(("+ feedback, chosen exponent", "+ descent, scales"), NO_SHRINKAGE)
INTEGERS = replace(BEST, form=Form.INT8, int8_speed=Int8Speed.ALL, int8_min_sqnr=-math.inf)
LOW = 2  # bits: at the size of this width, and the first one that downloads are compared at


class Cell(NamedTuple):
    """change: of top-1 in points.  sqnr_db: of the output.  packed, brotli: bytes."""

    change: float
    sqnr_db: float
    packed: int
    brotli: int


@dataclass
class Bench:
    """One model on the test images.  known: results of earlier runs, by settings."""

    path: Path
    calibration: Calibration
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    cache: Path | None

    def __post_init__(self) -> None:
        self.model = onnx.load(self.path)
        self.reference = scores(self.model, self.x)
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.known = json.loads(self.cache.read_text()) if self.cache and self.cache.exists() else {}

    def measure(self, name: str, config: QuantConfig, patches: tuple[Patch, ...] = (), *, images: bool = True) -> Cell:
        """Convert, with some steps switched off, and compare with float."""
        values = [value for _, _, value in patches]
        key = json.dumps([config.to_dict(), values, images, len(self.x), self.digest], sort_keys=True)
        if key not in self.known:
            with ExitStack() as stack:
                for target, attribute, value in patches:
                    stack.enter_context(mock.patch.object(target, attribute, value))
                made, _ = quantize_model(self.model, config, calibration=self.calibration if images else None, check=False)
            found, tops, data = scores(made, self.x), self.reference.argmax(1), made.SerializeToString()
            change = 100 * float((found.argmax(1) == self.y).mean() - (tops == self.y).mean())
            sqnr = sqnr_db(float(np.square(self.reference).sum()), float(np.square(self.reference - found).sum()))
            self.known[key] = Cell(change, sqnr, len(data), len(compress(data, OptimizeFor.BROTLI)))
            if self.cache:
                self.cache.write_text(json.dumps(self.known))
        cell = Cell(*self.known[key])
        print(
            f"{name}: {cell.change:+.2f} points, {cell.sqnr_db:.1f} dB, {cell.packed:,} bytes, {cell.brotli:,} as brotli",
            flush=True,
        )
        return cell


def rungs(bench: Bench, widths: list[int]) -> Iterator[tuple[tuple[str, Granularity, int], Cell]]:
    """All cells of the ladder, the cheapest of each rung first."""
    for name, config in LADDER.items():
        for granularity in Granularity:
            for bits in widths:
                label = f"{name}, {granularity.value}, {bits} bits"
                setting = replace(config, granularity=granularity, bits=bits)
                yield (name, granularity, bits), bench.measure(label, setting, OFF.get(name, ()), images=name in WITH_IMAGES)


def others(bench: Bench) -> Iterator[str]:
    """The lines of the second table: steps that are no rung of the ladder, each with what it replaces."""

    def line(step: str, old: str, before: Cell, after: Cell) -> str:
        cells = (
            f"{c.change:+.2f} ({c.sqnr_db:.1f} dB), {c.packed / 1000:.1f} kB, {c.brotli / 1000:.1f} kB" for c in (before, after)
        )
        return f"| {step} | {old} | {' | '.join(cells)} |"

    yield "| step | instead of | before: change (SQNR), file, download | after |\n|---|---|---|---|"
    full = replace(BEST, refinement=Refinement.DESCENT)
    uniform = bench.measure("one width", replace(full, bits=LOW))
    size = Budget(size=uniform.packed)
    whole = bench.measure("whole widths", replace(full, bits=size), ((budget, "FINE", 0),))
    mixed = bench.measure("all widths", replace(full, bits=size))
    yield line("widths by weight, a budget of the same size", f"{LOW} bits everywhere", uniform, whole)
    yield line("fractional widths in the budget", "whole widths", whole, mixed)
    for bits in (LOW, LOW + 1):
        plain = bench.measure("rounding, then brotli", replace(full, bits=bits))
        config = replace(full, bits=Budget(size=plain.brotli), optimize_for=OptimizeFor.BROTLI)
        yield line(
            "rate-aware rounding, a download of the same size",
            f"{bits} bits, then brotli",
            plain,
            bench.measure("rate-aware", config),
        )
    kinds = (ActivationRange.MIN_MAX, ActivationRange.MSE, ActivationRange.OUTPUT)
    ranges = [bench.measure(f"integers, {kind}", replace(INTEGERS, bits=8, activation_range=kind)) for kind in kinds]
    for kind, before in zip(kinds[:-1], ranges, strict=False):
        yield line("int8: activation ranges by output error", f"`{kind}`", before, ranges[-1])


def table(results: dict[tuple[str, Granularity, int], Cell], widths: list[int]) -> Iterator[str]:
    """The lines of the Markdown table."""
    for granularity in Granularity:
        yield f"| {granularity.value} | " + " | ".join(f"{bits} bits" for bits in widths) + " |"
        yield "|---" * (len(widths) + 1) + "|"
        for name in LADDER:
            cells = [results[name, granularity, bits] for bits in widths]
            yield f"| {name} | " + " | ".join(f"{cell.change:+.2f} ({cell.sqnr_db:.1f} dB)" for cell in cells) + " |"
        yield ""


def plot(results: dict[tuple[str, Granularity, int], Cell], widths: list[int], title: str, path: Path) -> None:
    """Output SQNR over bits, a line a rung, one panel a granularity."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colors = pyplot.colormaps["viridis"].resampled(len(LADDER) + 1).colors
    for axis, granularity in zip(axes, Granularity, strict=True):
        for (k, name), marker in zip(enumerate(LADDER), "os^Dv<>*", strict=True):
            sqnr = [results[name, granularity, bits].sqnr_db for bits in widths]
            axis.plot(widths, sqnr, marker=marker, color=colors[k], label=name)
        axis.set(title=granularity.value, xlabel="bits", xticks=widths)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("output SQNR in dB (test images)")
    axes[1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL[=NORMALIZATION]")
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 (default: the cache, or a download)")
    parser.add_argument("--bits", default="8,6,4,3,2")
    parser.add_argument("--limit", type=int, help="use only the first N test images")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--cache", type=Path, help="JSON file that stores results, from which an interrupted run continues")
    args = parser.parse_args()
    name, _, normalization = args.model.partition("=")
    pixels, widths = NORMALIZATIONS[normalization or "cifar"], [int(bits) for bits in args.bits.split(",")]
    folder = find_or_fetch("cifar10", args.data)
    test = load_cifar("cifar10", folder, "test").first(args.limit)
    assert test.y is not None
    calibration = Calibration(load_cifar("cifar10", folder, "train"), pixels)
    bench = Bench(Path(name), calibration, pixels.apply(test.pixels), test.y, args.cache)
    results, more = dict(rungs(bench, widths)), list(others(bench))
    print()
    print("\n".join((*table(results, widths), *more)))
    if args.plot:
        plot(results, widths, f"{bench.path.stem}: {len(test):,} test images", args.plot)


if __name__ == "__main__":
    main()
