"""Measure how often the error is convex in alpha, and the loss of a search that assumes convexity, as a Markdown table.

    python tools/convexity.py models/*.onnx

The curve of each weight (one scale), and of each of its output channels (one scale each), is computed exactly at POINTS points of
[FROM, 1].  It counts as convex if no second difference is negative.  A deep minimum is below both sides by at least 1 % of the
least error.  The last columns describe a golden-section search on (0, 1] with the exact curve: the share of its results whose error
is more than 1 % above that of search_alpha, and the largest excess.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from requant_onnx.files.load import load_model
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.weights import find_weights
from requant_onnx.numerics.curve import Curves, curves_of
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import to_rows
from requant_onnx.numerics.ranges import row_ranges
from requant_onnx.numerics.search import search_alpha

POINTS = 1024
FROM = 0.1  # the smallest alpha examined; every best alpha of these models is above it
ROUNDING = 1e-12  # relative to the energy of a row; smaller differences of its error are float64 rounding
GOLDEN, TOLERANCE = (5**0.5 - 1) / 2, 1e-5
DEPTH = 0.01  # relative to the least error; shallower minima do not matter
KINDS = {"none": 1.0, "square root": 0.5}
BITS = (8, 6, 4, 3, 2)
Rows = npt.NDArray[np.float32]
Errors = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
HEAD = (
    "one scale per",
    "transform",
    "bits",
    "curves",
    "convex",
    "one minimum",
    "one deep minimum",
    "golden section > 1 % worse",
    "at most",
)


def matrices(path: str) -> Iterator[Rows]:
    """The weights of a model, with one row per output channel."""
    for weight in find_weights(ModelGraph.of(load_model(path))).weights:
        yield to_rows(weight.load(), weight.channel_axis)


def shares(rows: Rows, bits: int, kind: PowerGrid) -> tuple[Flags, Flags, Flags, Errors]:
    """For each row: whether its curve is convex, has one minimum, has one deep minimum; and the excess of golden section."""
    rows = np.sort(rows, axis=1)
    rows = rows[rows[:, 0] < rows[:, -1]]
    ranges = row_ranges(rows[:, 0].astype(np.float64), rows[:, -1].astype(np.float64), bits, kind)
    table = level_table(bits, kind)
    curves = curves_of(rows, ranges, table, objective_in_weights=True, round_in_weights=True)
    alphas = np.linspace(FROM, 1, POINTS)
    errors = curves.totals[0] + curves.errors(np.broadcast_to(alphas, (len(rows), POINTS)))
    slack = ROUNDING * curves.totals[0]
    slopes = np.diff(errors, axis=1)
    convex = np.asarray((np.diff(slopes, axis=1) >= -slack).all(1))
    one, one_deep = (np.asarray(_minima(errors, depth) == 1) for depth in (slack[:, 0], DEPTH * errors.min(1)))
    best = _at(curves, search_alpha(rows, ranges, table))
    golden = _at(curves, _golden(curves))
    return convex, one, one_deep, golden / np.maximum(best, 1e-30) - 1


def _minima(errors: Errors, depth: Errors) -> npt.NDArray[np.int64]:
    """The number of local minima of each row, (rows,), at least depth, (rows,), below both sides; beyond its ends a row is high."""
    count, is_rising = np.zeros(len(errors), np.int64), np.zeros(len(errors), bool)
    extreme = errors[:, 0]  # the least error so far while falling, the largest while rising
    for error in errors[:, 1:].T:
        turns = np.where(is_rising, extreme - error, error - extreme) > depth
        count += turns & ~is_rising
        extreme = np.where(turns | (is_rising == (error > extreme)), error, extreme)
        is_rising = is_rising ^ turns
    return count + ~is_rising


def _at(curves: Curves, alphas: Errors) -> Errors:
    return np.asarray((curves.totals[0] + curves.errors(alphas[:, None]))[:, 0])


def _golden(curves: Curves) -> Errors:
    """The alphas of a golden-section search, (rows,)."""
    low, high = np.zeros(len(curves.w)), np.ones(len(curves.w))
    while (high - low).max() > TOLERANCE:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        is_left = _at(curves, left) <= _at(curves, right)
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    weights = [rows for path in args.models for rows in matrices(path)]
    print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|")
    for name, all_rows in (("tensor", [rows.reshape(1, -1) for rows in weights]), ("channel", weights)):
        for transform, exponent in KINDS.items():
            for bits in BITS:
                parts = [shares(rows, bits, PowerGrid(exponent)) for rows in all_rows]
                convex, one, one_deep, excess = (np.concatenate(part) for part in zip(*parts, strict=True))
                cells = [
                    f"{convex.mean():.1%}",
                    f"{one.mean():.1%}",
                    f"{one_deep.mean():.1%}",
                    f"{(excess > 0.01).mean():.1%}",
                    f"{excess.max():.1%}",
                ]
                print("|", " | ".join([name, transform, str(bits), f"{len(convex):,}", *cells]).replace("%", " %"), "|", flush=True)


if __name__ == "__main__":
    main()
