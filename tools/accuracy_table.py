"""Measure the accuracy of models at several bit widths and with several recipes, as a Markdown table.

    python tools/accuracy_table.py --data DIR models/resnet20_cifar10.onnx other.onnx=imagenet       # 10,000 test images
    python tools/accuracy_table.py --data DIR --split train --limit 2000 --grid MODEL ...             # how defaults were chosen
    python tools/accuracy_table.py --data DIR --split train --limit -2000 --int8 MODEL ...            # activation ranges
    python tools/accuracy_table.py --data DIR --refined MODEL ...                                     # three seeds, low bits

Calibration uses images of the train split: the first 256 with --int8, and the number in the row, chosen by seed, with --refined.

A suffix gives the normalization used to train a model, `=cifar` (default) or `=imagenet`.  Everything runs in ONNX Runtime
with default options.  The table gives top-1 in percent, top-1 agreement with float, output SQNR and the size of the file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from cifar import find_or_fetch

from requant_onnx import (
    ActivationRange,
    Calibration,
    EdgeLayers,
    Form,
    Granularity,
    ImageSet,
    Int8Levels,
    Normalization,
    QuantConfig,
    RangeMode,
    Refinement,
    Space,
    Transform,
    quantize_model,
)
from requant_onnx.convert.report import sqnr_db
from requant_onnx.inputs.images import CIFAR_MEAN_STD, load_cifar
from requant_onnx.runtime.classifier import open_classifier

NORMALIZATIONS = {
    "cifar": Normalization(*CIFAR_MEAN_STD["cifar10"]),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
MAX_PER_TENSOR = QuantConfig(
    granularity=Granularity.PER_TENSOR, transform=Transform(1.0), range_mode=RangeMode.MAX, edge_layers=EdgeLayers.PLAIN
)


Case = tuple[str, QuantConfig, Calibration | None]


def acceptance() -> Iterator[tuple[str, QuantConfig]]:
    """Recipes max per tensor, paper and default at 8, 6 and 4 bits."""
    for bits in (8, 6, 4):
        yield f"{bits} bits, max per tensor", replace(MAX_PER_TENSOR, bits=bits)
        yield f"{bits} bits, --recipe paper", QuantConfig.paper(bits)
        yield f"{bits} bits, default", QuantConfig(bits=bits)


def grid() -> Iterator[tuple[str, QuantConfig]]:
    """All combinations of granularity, transform and range at 8, 6 and 4 bits, then edges and rounding at 4 bits."""
    for bits in (8, 6, 4):
        for granularity in Granularity:
            for transform in ("none", "power:0.75", "sqrt"):
                for mode in RangeMode:
                    name = f"{bits} bits, {granularity.value}, {transform}, {mode.value}"
                    yield name, QuantConfig(bits, granularity, Transform.parse(transform), mode, EdgeLayers.EIGHT_BIT)
    for edges in EdgeLayers:
        yield f"4 bits, default, edges {edges.value}", QuantConfig(4, edge_layers=edges)
    for rounding in Space:
        for objective in Space:
            config = QuantConfig(4, transform=Transform(0.5), rounding=rounding, objective=objective)
            yield f"4 bits, per-channel, sqrt, rounding {rounding.value}, objective {objective.value}", config


def int8(train: ImageSet, normalization: Normalization) -> Iterator[Case]:
    """The int8 form by activation range, on images and on noise, compared with the same weights and float activations."""
    images, noise = Calibration(train, normalization), Calibration(None, normalization)
    base = QuantConfig(form=Form.INT8, refinement=Refinement.NONE)
    for bits in (8, 4):
        yield f"{bits} bits, float activations", QuantConfig(min(bits, 7), form=Form.FOLDED), None
        for method in ActivationRange:
            yield f"{bits} bits, int8, {method.value}", replace(base, bits=bits, activation_range=method), images
        yield f"{bits} bits, int8, noise", replace(base, bits=bits), noise
    yield "8 bits, int8, levels to 127", replace(base, int8_levels=Int8Levels.FULL), images


def refined(train: ImageSet, normalization: Normalization) -> Iterator[Case]:
    """Refinement at 4 and 3 bits on noise and on 256 images, and at 2 bits on 1,024 images, each with three seeds."""
    for bits, count in ((4, None), (4, 256), (3, None), (3, 256), (2, 1024)):
        config = QuantConfig(bits, form=Form.FOLDED)
        for seed in range(3):
            images = None if count is None else train
            made = Calibration(images, normalization, count or 256, seed)
            yield f"{bits} bits, {f'{count} images' if count else 'noise'}, seed {seed}", config, made


@dataclass(frozen=True)
class Measured:
    """A conversion compared with float.  change: of top-1, in points.  agreement: of top-1.  bytes: file size.  seconds: time."""

    top1: float
    change: float
    agreement: float
    sqnr_db: float
    bytes: int
    seconds: float


def measured(
    model: onnx.ModelProto,
    config: QuantConfig,
    calibration: Calibration | None,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64] | None,
    reference: npt.NDArray[np.float32],
) -> Measured:
    """Convert and compare.  x: normalized images, (n, c, h, w).  y: labels, (n,).  reference: scores of the float model."""
    assert y is not None
    started = time.perf_counter()
    converted, _ = quantize_model(model, config, calibration=calibration)
    seconds = time.perf_counter() - started
    candidate, tops = scores(converted, x), reference.argmax(1)
    sqnr = sqnr_db(float(np.square(reference).sum()), float(np.square(reference - candidate).sum()))
    top1 = float((candidate.argmax(1) == y).mean())
    change = (top1 - float((tops == y).mean())) * 100
    return Measured(top1, change, float((candidate.argmax(1) == tops).mean()), sqnr, converted.ByteSize(), seconds)


def scores(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scores of the images, (n, classes)."""
    classifier = open_classifier(model, "the model")
    return np.concatenate([classifier.scores(x[k : k + 100]) for k in range(0, len(x), 100)])


def rows(path: Path, normalization: Normalization, images: ImageSet, cases: Iterable[Case]) -> Iterator[str]:
    """The table lines of a model."""
    assert images.y is not None
    x = normalization.apply(images.pixels)
    model = onnx.load(path)
    reference = scores(model, x)
    tops = reference.argmax(1)
    yield f"| {path.stem} | float | {(tops == images.y).mean():.2%} | | | {path.stat().st_size / 1000:,.0f} kB | |"
    for name, config, calibration in cases:
        m = measured(model, config, calibration, x, images.y, reference)
        accuracy = f"{m.top1:.2%} ({m.change:+.2f}) | {m.agreement:.2%} | {m.sqnr_db:.1f} dB"
        figures = f"{accuracy} | {m.bytes / 1000:,.0f} kB | {m.seconds:.0f} s"
        yield f"| {path.stem} | {name} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[=NORMALIZATION]")
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 (default: the cache, or a download)")
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--limit", type=int, help="use the first N images, or with -N the last N")
    parser.add_argument("--grid", action="store_true", help="measure all combinations instead of the three recipes")
    parser.add_argument("--int8", action="store_true", help="measure the int8 form instead")
    parser.add_argument("--refined", action="store_true", help="measure refinement at low bits instead")
    args = parser.parse_args()
    folder = find_or_fetch("cifar10", args.data)
    images, train = load_cifar("cifar10", folder, args.split), load_cifar("cifar10", folder, "train")
    assert images.y is not None
    images = ImageSet(images.pixels[args.limit :], images.y[args.limit :]) if (args.limit or 0) < 0 else images.first(args.limit)
    print("| model | weights | top-1 (change) | agreement | output SQNR | file | time |\n|---|---|---|---|---|---|---|", flush=True)
    for item in args.models:
        path, _, name = item.partition("=")
        normalization = NORMALIZATIONS[name or "cifar"]
        plain = ((label, config, None) for label, config in (grid() if args.grid else acceptance()))
        cases = int8(train.first(256), normalization) if args.int8 else refined(train, normalization) if args.refined else plain
        for line in rows(Path(path), normalization, images, cases):
            print(line, flush=True)


if __name__ == "__main__":
    main()
