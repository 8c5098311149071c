"""Plot the figure of the method: a layer's weights with their levels, and the exact error curve.  Needs: pip install '.[plot]'

python tools/plot_method.py models/resnet20_cifar10.onnx tools/method.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from requant_onnx.files.load import load_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.weights import find_weights
from requant_onnx.numerics.curve import error_curve
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import Grid, quantize_weight
from requant_onnx.numerics.ranges import row_ranges

BITS = 4
GRIDS = {"plain": 1.0, "square root": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    weight = max(find_weights(ModelGraph.of(load_model(args.model))).weights, key=lambda item: item.stored_bytes)
    w = weight.load().reshape(1, -1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    _draw_levels(axes[0], w)
    _draw_curves(axes[1], w)
    figure.suptitle(f"{weight.name}: {w.size:,} weights, {BITS} bits, one scale")
    figure.savefig(args.out, dpi=110)


def _draw_levels(axis: plt.Axes, w: npt.NDArray[np.float32]) -> None:
    axis.hist(w.ravel(), bins=200, color="0.8")
    top = axis.get_ylim()[1]
    cases = [("plain, full range", 1.0, False), ("plain, searched", 1.0, True), ("square root, searched", 0.5, True)]
    for row, (name, exponent, search) in enumerate(cases):
        q = quantize_weight(w, Grid(BITS, PowerGrid(exponent), None, search))
        k = np.arange(q.table.max_code + 1) - int(q.zero_point) + q.table.max_code
        levels = q.table.integers[k] * float(q.scale)
        height = top * (0.95 - 0.09 * row)
        axis.plot(levels, np.full(len(levels), height), "|", ms=9, color=f"C{row}", label=name)
    axis.set(xlabel="weight", ylabel="count", title="weights and the 16 levels")
    axis.legend(fontsize=8, loc="center right")


def _draw_curves(axis: plt.Axes, w: npt.NDArray[np.float32]) -> None:
    rows, alphas = np.sort(w, axis=1), np.linspace(0.3, 1, 400)
    for color, (name, exponent) in zip(("C1", "C2"), GRIDS.items(), strict=True):
        ranges = row_ranges(rows[:, 0].astype(np.float64), rows[:, -1].astype(np.float64), BITS, PowerGrid(exponent))
        curve = error_curve(rows, ranges, level_table(BITS, PowerGrid(exponent)), alphas)[0]
        best = quantize_weight(w, Grid(BITS, PowerGrid(exponent), None))
        lowest = error_curve(rows, ranges, level_table(BITS, PowerGrid(exponent)), best.alpha.reshape(1))[0, 0]
        axis.plot(alphas, curve, color=color, label=name)
        axis.plot(float(best.alpha), lowest, "o", color=color)
    axis.set(xlabel="alpha", ylabel="mean squared error", title="exact error curve and the minimum found", yscale="log")
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
