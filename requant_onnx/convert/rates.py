"""The step of each weight for compressed files: one more bit reduces the output error equally in every weight.

Uniform rounding of the n elements of a weight with step s causes an output error of kappa * n * s**2 / 12.  Each doubling of s
saves n bits, so a bit is worth kappa * s**2 / 6 * ln 2 of output error, whatever n is.  It is worth the same in all weights if

    s = s_0 / sqrt(kappa)

with one s_0 for the whole model.  kappa is measured: the output error with only this weight rounded, with a known step.
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

PROBE = 0.5  # step at which kappa is measured, relative to the root mean square of the weight
LADDER = 2.0 ** (np.arange(-14, 17) / 2)  # steps at which bits are counted, in the same unit
SAMPLE = 1 << 13  # largest number of elements of a weight whose bits are counted
LEAST_KAPPA = 1e-6  # least kappa relative to the mean of all, so that a weight without effect on the outputs has a finite step


@dataclass(frozen=True)
class Rated:
    """A weight whose step is free.

    axis: axis of its scales, None for one scale.  rms: root mean square of its elements.
    kappa: relative output error per unit of squared error of the weight.
    bits: average bits per element at each step of LADDER, (steps,).
    """

    item: PlannedWeight
    axis: int | None
    rms: float
    kappa: float
    bits: Float64Array

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.item.weight.shape)

    def bits_at(self, unit: float) -> float:
        """The approximate bits of all its codes.  unit: s_0."""
        step = max(self._step(unit), 1e-30) / self.rms
        return self.count * float(np.interp(math.log(step), np.log(LADDER), self.bits))

    def planned(self, unit: float) -> PlannedWeight:
        """The weight planned with its step.  unit: s_0."""
        grid = Grid.by_step(self._step(unit), self.axis, half_scales=self.item.grid.half_scales)
        return PlannedWeight(self.item.weight, grid, self.item.form)

    def _step(self, unit: float) -> float:
        return unit / math.sqrt(self.kappa)


def rate_weights(
    prepared: Prepared, planned: Sequence[PlannedWeight], chunks: Sequence[Chunk], progress: Progress | None
) -> tuple[Rated, ...]:
    """Measure kappa and the bits of each weight.

    chunks: calibration inputs; without any, kappa is estimated from the weights.
    """
    axes = _axes(prepared, planned)
    loaded = []
    for item in planned:
        w = item.weight.load()
        rms = float(np.sqrt(np.square(w, dtype=np.float64).mean())) or 1.0
        blind = 1 / (rms**2 * math.sqrt(w.size))  # no error is far above the others, as in allocate.py
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
    """The axis of each weight's scales: elements multiplied by the same inputs share one, so it is per-channel only for groups."""
    axes: dict[str, int | None] = {item.weight.name: None for item in planned}
    by_name = {item.weight.name: item for item in planned}
    for layer in find_layers(prepared.graph, by_name.keys()):
        if layer.product.group > 1 and not layer.product.scale_is_shared:
            axes[layer.weight] = by_name[layer.weight].weight.channel_axis
    return axes


def _bits_by_step(w: Float32Array, rms: float) -> Float64Array:
    """The average bits per element with nearest levels at each step of LADDER; with feedback, they are nearly the same."""
    sample = w.ravel()[:: -(-w.size // SAMPLE)] / np.float32(rms)
    levels = (np.clip(np.rint(sample / step), -REACH, REACH) + ZERO for step in LADDER)
    return np.array([entropy(each.astype(np.uint8)) / sample.size for each in levels])


def unit_for(weights: Sequence[Rated], bits: float) -> float:
    """The s_0 at which all codes together take about `bits` bits."""
    low, high = -60.0, 60.0  # bounds of log2(s_0)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(each.bits_at(2.0**middle) for each in weights) > bits:
            low = middle
        else:
            high = middle
    return float(2.0**high)
