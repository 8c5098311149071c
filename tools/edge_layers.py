"""Measure how much of what range and transform together gain comes from the first and last layers, as a Markdown table.

    python tools/edge_layers.py --data DIR models/resnet20_cifar10.onnx models/resnet20_cifar100.onnx

The paper (arXiv 2510.04044) transforms all layers but these two, and searches their range too.  "The square root alone" therefore
has two readings: the full range in all layers, as in tools/reproduce.py, or the searched range in these two only.  Everything else
is as there: one scale per tensor, the same bits in every layer, float activations, all test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from reproduce import Task

from requant_onnx import Form, quantize_model, restore_model
from requant_onnx.evaluate.jobs import open_executor, run_all
from requant_onnx.evaluate.recipes import RECIPES, score_item

BITS = (4, 3)


@dataclass(frozen=True)
class Cell:
    """Shares of right answers: square root, square root with searched first and last layers, both.

    gain: of both over the share before.  error: standard error of the gain.
    """

    root: float
    searched_edges: float
    both: float
    gain: float
    error: float


def measured(path: str, data: Path | None, bits: int) -> Cell:
    """Convert, restore, exchange the two layers, and count right answers."""
    task = Task(path, data)
    (root, edges), (both, _) = (decoded(task.path, recipe, bits) for recipe in ("transform", "paper"))
    right = [_right(model, task) for model in (root, with_weights_of(root, both, edges), both)]
    difference = right[2].astype(float) - right[1]
    error = float(difference.std()) / sqrt(len(difference))
    return Cell(float(right[0].mean()), float(right[1].mean()), float(right[2].mean()), float(difference.mean()), error)


def decoded(path: Path, recipe: str, bits: int) -> tuple[onnx.ModelProto, set[str]]:
    """The model as a float model with the quantized values, and the names of the weights without the transform."""
    made, report = quantize_model(path, replace(RECIPES[recipe](bits), form=Form.FOLDED), threads=1, check=False)
    return restore_model(made)[0], {weight.name for weight in report.converted if weight.transform == "none"}


def with_weights_of(model: onnx.ModelProto, other: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """The model with some weights of another one, which has them under the same names."""
    theirs = {item.name: item for item in other.graph.initializer if item.name in names}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for item in made.graph.initializer:
        if item.name in theirs:
            item.CopyFrom(theirs[item.name])
    assert theirs.keys() == names
    return made


def _right(model: onnx.ModelProto, task: Task) -> npt.NDArray[np.bool_]:
    assert task.test.y is not None
    return np.asarray(score_item(model.SerializeToString(), task.test, task.normalization).argmax(1) == task.test.y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NETWORK_DATASET.onnx[=NORMALIZATION]")
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 and CIFAR-100 (default: the cache, or a download)")
    parser.add_argument("--jobs", type=int, help="number of processes (default: one per core)")
    args = parser.parse_args()
    items: dict[tuple[str, int], tuple[Callable[..., Any], tuple[Any, ...]]] = {
        (text, bits): (measured, (text, args.data, bits)) for text in args.models for bits in BITS
    }
    with open_executor(args.jobs) as executor:
        found = run_all(executor, items, lambda key, cell: print(*key, cell, flush=True))
    print("\n| model | bits | square root | square root, first and last layers searched | both | gain over the column before |")
    print("|---|---|---|---|---|---|")
    for text, bits in items:
        cell = found[text, bits]
        shares = " | ".join(f"{share:.2%}"[:-1] for share in (cell.root, cell.searched_edges, cell.both))
        name = Path(text.partition("=")[0]).stem
        print(f"| {name} | {bits} | {shares} | {cell.gain * 100:+.2f} (standard error {cell.error * 100:.2f}) |")


if __name__ == "__main__":
    main()
