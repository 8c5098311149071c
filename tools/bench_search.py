"""Compare the speed of the range search with a plain golden-section search that quantizes the whole tensor in each step.

    python tools/bench_search.py                # 4 bits, square root, ResNet-18's 11.2 M weights, per channel and per tensor
    python tools/bench_search.py --convert      # time and peak memory of `requant convert` on ResNet-50's 23.5 M weights

Both searches round in transformed space (the paper's rounding).  The plain search is efficient, for a fair comparison: float32, one
new evaluation per step, reused buffers and NumPy loops.  Our time includes sorting, which is also listed separately, and the scan
that certifies the result.  Runs are interleaved in one process; times are medians.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from architectures import resnet
from onnx import numpy_helper

from requant_onnx.numerics.curve import error_curve
from requant_onnx.numerics.kinds import PowerGrid
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import to_rows
from requant_onnx.numerics.ranges import row_ranges
from requant_onnx.numerics.search import search_alpha

Weights = npt.NDArray[np.float32]
Alphas = npt.NDArray[np.float64]
BITS, GRID = 4, PowerGrid(0.5)
GOLDEN, TOLERANCE = (5**0.5 - 1) / 2, 1e-5  # for the plain search: ratio of the section, and width of the last interval of alpha


def ours(rows: Weights) -> Alphas:
    """The best alphas by our search.  rows: unsorted, (rows, n)."""
    ordered = np.sort(rows, axis=1)
    ranges = row_ranges(ordered[:, 0].astype(np.float64), ordered[:, -1].astype(np.float64), BITS, GRID)
    return search_alpha(ordered, ranges, level_table(BITS, GRID), objective_in_weights=True, round_in_weights=False)


class Plain:
    """A golden-section search on (0, 1] for all rows at once, where every evaluation quantizes all weights."""

    def __init__(self, w: Weights) -> None:
        self.w = w
        self.v = np.sqrt(np.abs(w))
        np.copysign(self.v, w, out=self.v)
        v_min, v_max = (extreme(self.v, axis=1, keepdims=True) for extreme in (np.min, np.max))
        self.step = (np.maximum(v_max, 0) - np.minimum(v_min, 0)) / (2**BITS - 1)
        zero_point = np.rint(-np.minimum(v_min, 0) / self.step)
        self.low, self.high = -zero_point, 2**BITS - 1 - zero_point
        self.buffers = np.empty_like(w), np.empty_like(w)

    def error(self, alpha: Weights) -> Weights:
        """The squared error of each row.  alpha: (rows, 1)."""
        k, magnitude = self.buffers
        scale = alpha * self.step
        np.multiply(self.v, 1 / scale, out=k)
        np.rint(k, out=k)
        np.clip(k, self.low, self.high, out=k)
        np.abs(k, out=magnitude)
        np.multiply(k, magnitude, out=k)
        np.multiply(k, scale * scale, out=k)
        np.subtract(k, self.w, out=k)
        return np.asarray(np.einsum("ij,ij->i", k, k)[:, None])

    def search(self) -> Alphas:
        lo, hi = np.zeros_like(self.step), np.ones_like(self.step)
        x1, x2 = hi - np.float32(GOLDEN) * (hi - lo), lo + np.float32(GOLDEN) * (hi - lo)
        f1, f2 = self.error(x1), self.error(x2)
        while (hi - lo).max() > TOLERANCE:
            left = f1 < f2
            lo, hi = np.where(left, lo, x1), np.where(left, x2, hi)
            new = np.where(left, hi - np.float32(GOLDEN) * (hi - lo), lo + np.float32(GOLDEN) * (hi - lo))
            f_new = self.error(new)
            x1, x2 = np.where(left, new, x2), np.where(left, x1, new)
            f1, f2 = np.where(left, f_new, f2), np.where(left, f1, f_new)
        return np.asarray(((lo + hi) / 2)[:, 0], np.float64)


def errors(rows: Weights, alphas: Alphas) -> Alphas:
    """The exact squared error of each row at its own alpha."""
    ordered = np.sort(rows, axis=1)
    found = np.empty(len(rows))
    for r, row in enumerate(ordered):
        ranges = row_ranges(row[:1].astype(np.float64), row[-1:].astype(np.float64), BITS, GRID)
        curve = error_curve(row[None], ranges, level_table(BITS, GRID), alphas[r : r + 1], round_in_weights=False)
        found[r] = curve[0, 0]
    return found


def compare(weights: list[Weights], name: str, threads: int, repeats: int) -> None:
    """Print a line of the table."""
    largest_first = sorted(weights, key=lambda w: -w.size)

    def run_ours() -> list[Alphas]:
        with ThreadPoolExecutor(threads) as executor:
            return list(executor.map(ours, largest_first))

    def run_plain() -> list[Alphas]:
        return [Plain(w).search() for w in largest_first]

    def run_sort() -> list[Alphas]:
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(lambda w: np.sort(w, axis=1), largest_first))
        return []

    times: list[float] = []
    results: list[list[Alphas]] = []
    for _ in range(repeats + 1):  # the first round is a warm-up
        results = []
        for run in (run_sort, run_ours, run_plain):
            started = time.perf_counter()
            results.append(run())
            times.append(time.perf_counter() - started)
    seconds = np.median(np.array(times).reshape(-1, 3)[1:], axis=0)
    pairs = [(errors(w, a), errors(w, b)) for w, a, b in zip(largest_first, *results[1:], strict=True)]
    a, b = (np.concatenate(column) for column in zip(*pairs, strict=True))
    worse = int((a > b * (1 + 1e-6)).sum())
    tensors = sum(float(one.sum()) > float(two.sum()) for one, two in pairs)
    print(
        f"| {name} | {threads} | {seconds[0]:.3f} s | {seconds[1]:.3f} s | {seconds[2]:.3f} s | {seconds[2] / seconds[1]:.1f} x "
        f"| {tensors} of {len(pairs)} | {worse} of {len(a)} | {a.sum() / b.sum() - 1:+.1e} |"
    )


def convert_resnet50() -> None:
    """Measure wall time and peak memory of whole conversions, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "resnet50.onnx"
        onnx.save(resnet(50), source)
        for bits in (8, 4):
            command = [sys.executable, "-m", "requant_onnx", "convert", str(source), f"{folder}/{bits}.onnx", "--bits", str(bits)]
            command += ["--calibrate", "none", "--force-quality"]  # random weights
            times = []
            for _ in range(4):
                started = time.perf_counter()
                subprocess.run([*command, "--force"], check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - started)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            print(
                f"convert ResNet-50 to {bits} bits: {np.median(times[1:]):.2f} s (first run {times[0]:.2f} s), peak {peak:.2f} GB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--convert", action="store_true", help="measure whole conversions instead")
    args = parser.parse_args()
    if args.convert:
        convert_resnet50()
        return
    tensors = [numpy_helper.to_array(item) for item in resnet(18).graph.initializer]
    weights = [w for w in tensors if w.ndim > 1]
    print("| one scale per | threads | sort alone | ours | plain | faster | tensors with a higher error | rows | total error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads:
        compare([to_rows(w, 0) for w in weights], "per channel", threads, args.repeats)
        compare([to_rows(w, None) for w in weights], "per tensor", threads, args.repeats)


if __name__ == "__main__":
    main()
