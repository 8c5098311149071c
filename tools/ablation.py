"""Measure the gain of each step of the method, from the full range to refinement, as a Markdown table and a plot.

    python tools/ablation.py models/resnet20_cifar10.onnx --data DIR --plot tools/ablation.png
    python tools/ablation.py googlenet_cifar10.onnx=imagenet --data DIR --bits 4,3

Scales are per tensor and per channel, the first and last layers have 8 bits, activations are float, and steps that need calibration
use 256 images of the train split.  Each cell gives the change in top-1 accuracy on the test images compared to float, in points,
and the output SQNR.  The paper is arXiv 2510.04044.  With --cache, an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import onnx
from accuracy_table import NORMALIZATIONS, measured, scores
from cifar import find_or_fetch

from requant_onnx import Calibration, Form, Granularity, QuantConfig, RangeMode, Refinement, Space, Transform
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
}
WITH_IMAGES = {name for name, config in LADDER.items() if config.refinement is not Refinement.NONE}
Cell = tuple[float, float]
"""(change of top-1 in points, output SQNR in dB)"""


def cases(widths: list[int]) -> Iterator[tuple[str, Granularity, int, QuantConfig]]:
    """All of them, the cheapest of each rung first."""
    for name, config in LADDER.items():
        for granularity in Granularity:
            for bits in widths:
                yield name, granularity, bits, replace(config, granularity=granularity, bits=bits)


def table(results: dict[tuple[str, Granularity, int], Cell], widths: list[int]) -> Iterator[str]:
    """The lines of the Markdown table."""
    for granularity in Granularity:
        yield f"| {granularity.value} | " + " | ".join(f"{bits} bits" for bits in widths) + " |"
        yield "|---" * (len(widths) + 1) + "|"
        for name in LADDER:
            cells = [results[name, granularity, bits] for bits in widths]
            yield f"| {name} | " + " | ".join(f"{change:+.2f} ({sqnr:.1f} dB)" for change, sqnr in cells) + " |"
        yield ""


def plot(results: dict[tuple[str, Granularity, int], Cell], widths: list[int], title: str, path: Path) -> None:
    """Output SQNR over bits, a line a rung, one panel a granularity."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colors = pyplot.colormaps["viridis"].resampled(len(LADDER) + 1).colors
    for axis, granularity in zip(axes, Granularity, strict=True):
        for (k, name), marker in zip(enumerate(LADDER), "os^Dv<>", strict=True):
            sqnr = [results[name, granularity, bits][1] for bits in widths]
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
    path, pixels = Path(name), NORMALIZATIONS[normalization or "cifar"]
    widths = [int(bits) for bits in args.bits.split(",")]
    folder = find_or_fetch("cifar10", args.data)
    test = load_cifar("cifar10", folder, "test").first(args.limit)
    calibration = Calibration(load_cifar("cifar10", folder, "train"), pixels)
    model, x = onnx.load(path), pixels.apply(test.pixels)
    kept = json.loads(args.cache.read_text()) if args.cache and args.cache.exists() else {}
    results = {}
    reference = scores(model, x)
    for rung, granularity, bits, config in cases(widths):
        settings = json.dumps([config.to_dict(), len(test), hashlib.sha256(path.read_bytes()).hexdigest()], sort_keys=True)
        if settings not in kept:
            found = measured(model, config, calibration if rung in WITH_IMAGES else None, x, test.y, reference)
            kept[settings] = found.change, found.sqnr_db
            if args.cache:
                args.cache.write_text(json.dumps(kept))
        results[rung, granularity, bits] = tuple(kept[settings])
        print(f"{rung}, {granularity.value}, {bits} bits: {kept[settings][0]:+.2f} points, {kept[settings][1]:.1f} dB", flush=True)
    print()
    print("\n".join(table(results, widths)))
    if args.plot:
        plot(results, widths, f"{path.stem}: {len(test):,} test images", args.plot)


if __name__ == "__main__":
    main()
