"""The step of each weight for compressed files: one bit buys the same reduction of the output error in every weight.

Uniform rounding by a step s makes an output error of kappa * n * s**2 / 12 with the n weights of a tensor.  Its bits fall by n for
each doubling of s, so a bit is worth kappa * s**2 / 6 * ln 2 of output error, whatever n is: the same for all weights where

    s = s_0 / sqrt(kappa)

with one s_0 for the whole model.  kappa is measured: what the outputs lose where the weight alone is rounded by a known step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant_onnx.choices import Refinement
from requant_onnx.convert.allocate import sensitivities
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.prepare import Prepared
from requant_onnx.graph.layers import find_layers
from requant_onnx.numerics.arrays import Float32Array, Float64Array
from requant_onnx.numerics.price import REACH, ZERO, entropy
from requant_onnx.numerics.quantize import Grid
from requant_onnx.progress import Progress
from requant_onnx.runtime.stream import Chunk

PROBE = 0.5  # step at which kappa is measured, in root mean squares of the weight
LADDER = 2.0 ** (np.arange(-14, 17) / 2)  # steps at which bits are counted, in the same
SAMPLE = 1 << 13  # weights of a tensor that are counted
LEAST_KAPPA = 1e-6  # relative to the mean of all: a weight that no output notices gets a step all the same


@dataclass(frozen=True)
class Rated:
    """A weight whose step is free.

    axis: of its scales.  rms: root mean square.  kappa: output error for a squared error of one weight.
    bits: that a weight takes on average, for the steps of LADDER.
    """

    item: PlannedWeight
    axis: int | None
    rms: float
    kappa: float
    bits: Float64Array

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.item.weight.shape)

    def bits_at(self, unit: float) -> float:
        """The approximate bits of all its codes.  unit: s_0."""
        step = max(self._step(unit), 1e-30) / self.rms
        return self.count * float(np.interp(math.log(step), np.log(LADDER), self.bits))

    def planned(self, unit: float) -> PlannedWeight:
        """The weight with its step."""
        grid = Grid.by_step(self._step(unit), self.axis, half_scales=self.item.grid.half_scales)
        return PlannedWeight(self.item.weight, grid, self.item.form)

    def _step(self, unit: float) -> float:
        return unit / math.sqrt(self.kappa)


def rate_weights(
    prepared: Prepared, planned: Sequence[PlannedWeight], chunks: Sequence[Chunk], progress: Progress | None
) -> tuple[Rated, ...]:
    """Measure what errors of the weights do, and what bits they take.  chunks: of calibration inputs; none: go by the weights."""
    axes = _axes(prepared, planned)
    loaded = []
    for item in planned:
        w = item.weight.load()
        rms = float(np.sqrt(np.square(w, dtype=np.float64).mean())) or 1.0
        blind = 1 / (rms**2 * math.sqrt(w.size))  # none gets far above the others, as with bits (allocate.py)
        loaded.append(Rated(item, axes[item.weight.name], rms, blind, _bits_by_step(w, rms)))
    if not chunks:
        return tuple(loaded)
    grids = {
        each.item.weight.name: (Grid.by_step(PROBE * each.rms, each.axis, half_scales=each.item.grid.half_scales),)
        for each in loaded
    }
    refinement = min(prepared.config.refinement, Refinement.FEEDBACK, key=list(Refinement).index)
    errors = sensitivities(prepared.model, tuple(planned), grids, {}, chunks, refinement, progress)[1]
    kappas = [12 * errors[each.item.weight.name][0] / (each.count * (PROBE * each.rms) ** 2) for each in loaded]
    least = LEAST_KAPPA * float(np.mean([kappa for kappa in kappas if math.isfinite(kappa)] or [0.0])) or 1.0
    return tuple(replace(each, kappa=kappa if kappa > least else least) for each, kappa in zip(loaded, kappas, strict=True))


def _axes(prepared: Prepared, planned: Sequence[PlannedWeight]) -> Mapping[str, int | None]:
    """One scale for all weights that are multiplied with the same inputs: for each channel only where groups read their own."""
    axes: dict[str, int | None] = {item.weight.name: None for item in planned}
    by_name = {item.weight.name: item for item in planned}
    for layer in find_layers(prepared.graph, by_name.keys()):
        if layer.product.group > 1 and not layer.product.scale_is_shared:
            axes[layer.weight] = by_name[layer.weight].weight.channel_axis
    return axes


def _bits_by_step(w: Float32Array, rms: float) -> Float64Array:
    """The bits of nearest levels, which are nearly those of feedback."""
    sample = w.ravel()[:: -(-w.size // SAMPLE)] / np.float32(rms)
    levels = (np.clip(np.rint(sample / step), -REACH, REACH) + ZERO for step in LADDER)
    return np.array([entropy(each.astype(np.uint8)) / sample.size for each in levels])


def unit_for(weights: Sequence[Rated], bits: float) -> float:
    """The s_0 with which all codes together take about this number of bits."""
    low, high = -60.0, 60.0  # of its logarithm to the base 2
    for _ in range(60):
        middle = (low + high) / 2
        if sum(each.bits_at(2.0**middle) for each in weights) > bits:
            low = middle
        else:
            high = middle
    return float(2.0**high)
