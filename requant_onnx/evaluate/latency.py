"""The latency of two models, measured on a machine that may also do other work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import Float64Array

BLOCK_SECONDS = 0.04  # length of a block, after which the other model runs
BLOCKS = 16
LONGEST = 8.0  # time limit of all blocks, in seconds, if that leaves FEWEST of them
FEWEST = 5
RESAMPLES = 100  # of the blocks, for the standard error


@dataclass(frozen=True)
class Latency:
    """The time of one run of the reference and of the candidate, in ms: lower quartiles over all runs.

    spread: interquartile range divided by lower quartile, of each.  ratio: candidate / reference, of these milliseconds.
    ratio_error: standard error of the ratio, by resampling the pairs of blocks (bootstrap).
    """

    milliseconds: tuple[float, float]
    spread: tuple[float, float]
    ratio: float
    ratio_error: float


def compare_latency(reference: Callable[[], float], candidate: Callable[[], float]) -> Latency:
    """Time two models in turn, in blocks of several runs, the first of which is a warm-up.

    reference, candidate: function that runs the model once and returns the time, in s.
    """
    runs = [max(1, min(200, int(BLOCK_SECONDS / max(1e-6, min(run(), run()))))) for run in (reference, candidate)]
    blocks: tuple[list[Float64Array], list[Float64Array]] = ([], [])
    started = time.perf_counter()
    while len(blocks[0]) < BLOCKS and (len(blocks[0]) < FEWEST or time.perf_counter() - started < LONGEST):
        for run, count, times in zip((reference, candidate), runs, blocks, strict=True):
            run()
            times.append(np.array([run() for _ in range(count)]))
    quartiles = [np.quantile(np.concatenate(times), (0.25, 0.75)) for times in blocks]
    low, high = (tuple(float(q[k]) for q in quartiles) for k in (0, 1))
    spread = tuple((b - a) / a for a, b in zip(low, high, strict=True))
    return Latency((1e3 * low[0], 1e3 * low[1]), (spread[0], spread[1]), low[1] / low[0], _ratio_error(*blocks))


def _ratio_error(reference: list[Float64Array], candidate: list[Float64Array]) -> float:
    """The standard error of the ratio of lower quartiles.  Runs of one block are not independent: whole blocks are resampled."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(len(reference), size=len(reference))
        low = [np.quantile(np.concatenate([blocks[k] for k in chosen]), 0.25) for blocks in (reference, candidate)]
        ratios.append(low[1] / low[0])
    return float(np.std(ratios, ddof=1))
