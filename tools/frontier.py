"""Measure the accuracy of models as a function of file size, by method, as a table and a plot.

    python tools/frontier.py --data DIR                        # the models in models/, into tools/frontier.md and frontier.png
    python tools/frontier.py --data DIR models/resnet20_cifar10.onnx --limit 2000

The sizes are those of the file and of its download (brotli, quality 11). Agreement with float and top-1 are on all test images.

    max        full range, one scale per tensor
    paper      REQuant as published: square root, searched range, one scale per tensor
    ort        ONNX Runtime's quantizer, 256 train images; it quantizes activations to 8 bits, too, and weights to 8 or 4
    refined    the default of this tool, folded, 256 train images
    download   the same with --optimize-for download:br

Needs: pip install '.[plot,download]'.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
from accuracy_table import scores
from matplotlib.ticker import LogLocator, NullFormatter
from reproduce import OWN_KINDS, ROOT, Task, by_onnxruntime

from requant_onnx import Calibration, Form, QuantConfig, quantize_model
from requant_onnx.choices import OptimizeFor
from requant_onnx.evaluate.recipes import RECIPES
from requant_onnx.files.compressed import compress

IMAGES = 256  # number of calibration images, from the train split
WIDTHS = (8, 6, 5, 4, 3, 2)
FRACTIONS = (2.33, 1.6)  # fractional bits, for this tool only
DOWNLOADS = (5, 4, 3, 2)  # bits per weight after compression
METHODS = {"max": "C7", "paper": "C1", "ort": "C3", "refined": "C0", "download": "C2"}
LOWEST = 10.0  # lowest point of the plot, in points below float


@dataclass(frozen=True)
class Point:
    """A file.  packed, brotli: sizes in bytes.  agreement, top1: 0..1."""

    model: str
    method: str
    bits: float
    packed: int
    brotli: int
    agreement: float
    top1: float


def candidates(task: Task) -> Iterator[tuple[str, float, onnx.ModelProto]]:
    """The files, as (method, bits, model)."""
    images = Calibration(task.train, task.normalization, IMAGES)
    for bits in WIDTHS:
        for recipe in ("max", "paper"):
            yield recipe, bits, quantize_model(task.path, RECIPES[recipe](bits), check=False)[0]
    for width in (*WIDTHS, *FRACTIONS):
        yield "refined", width, quantize_model(task.path, QuantConfig(width, form=Form.FOLDED), calibration=images, check=False)[0]
    for bits, kind in OWN_KINDS.items():
        yield "ort", bits, by_onnxruntime(task, kind)
    for bits in DOWNLOADS:
        config = QuantConfig(bits, form=Form.FOLDED, optimize_for=OptimizeFor.BROTLI)
        yield "download", bits, quantize_model(task.path, config, calibration=images, check=False)[0]


def points(task: Task) -> Iterator[Point]:
    """The points of the float model and of every file."""
    assert task.test.y is not None
    x, labels = task.normalization.apply(task.test.pixels), task.test.y
    exact = scores(onnx.load(task.path), x).argmax(1)

    def measured(method: str, bits: float, model: onnx.ModelProto, tops: np.ndarray) -> Point:
        data = model.SerializeToString()
        brotli = len(compress(data, OptimizeFor.BROTLI))
        return Point(task.path.stem, method, bits, len(data), brotli, float((tops == exact).mean()), float((tops == labels).mean()))

    yield measured("float", 32, onnx.load(task.path), exact)
    for method, bits, model in candidates(task):
        yield measured(method, bits, model, scores(model, x).argmax(1))


def table(found: list[Point]) -> str:
    """The table as Markdown."""
    lines = ["| model | method | bits | file, kB | brotli, kB | agreement | top-1 |", "|---|---|---|---|---|---|---|"]
    for p in found:
        cells = (p.model, p.method, f"{p.bits:g}", f"{p.packed / 1000:.1f}", f"{p.brotli / 1000:.1f}")
        lines.append(f"| {' | '.join(cells)} | {p.agreement:.2%} | {p.top1:.2%} |")
    return "\n".join(lines)


def draw(found: list[Point], out: Path) -> None:
    """Plot top-1 as a function of download size, with a panel per model."""
    names = list(dict.fromkeys(p.model for p in found))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [p for p in found if p.model == name]
        exact = 100 * next(p.top1 for p in mine if p.method == "float")
        for method, color in METHODS.items():
            line = sorted((p.brotli / 1000, 100 * p.top1) for p in mine if p.method == method)
            axis.plot(*zip(*line, strict=True), "o-", color=color, ms=4, lw=1.3, label=method)
        axis.axhline(exact, color="k", lw=0.8, ls="--", label="float")
        axis.set(title=name, xlabel="download (brotli), kB", ylabel="top-1, %", xscale="log", ylim=(exact - LOWEST, exact + 0.5))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NETWORK_DATASET.onnx[=NORMALIZATION]", help="default: those in models/")
    parser.add_argument("--data", type=Path, help="folder that holds CIFAR-10 and CIFAR-100 (default: the cache, else a download)")
    parser.add_argument("--limit", type=int, help="only the first N test images")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "frontier.md", help="the table; the plot lies next to it")
    args = parser.parse_args()
    found: list[Point] = []
    for text in args.models or sorted(str(path) for path in (ROOT / "models").glob("*.onnx")):
        task = Task(text, args.data)
        task.test = task.test.first(args.limit)
        for point in points(task):
            print(point, flush=True)
            found.append(point)
    draw(found, args.out.with_suffix(".png"))
    today = datetime.datetime.now(datetime.timezone.utc).date()
    version = onnxruntime.__version__
    made = f"Made on {today} by `python tools/frontier.py` with ONNX Runtime {version}; the tool describes the methods."
    plot = f"![Top-1 accuracy over the size of the download, by method]({args.out.with_suffix('.png').name})"
    args.out.write_text(f"# Accuracy over the size of the file\n\n{made}\n\n{plot}\n\n{table(found)}\n", "utf-8")


if __name__ == "__main__":
    main()
