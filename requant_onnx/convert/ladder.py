"""Quantize weights one after another, each seeing what those before it did to its input.

For each layer, second moments of its input (with all weights before it quantized) and of its float output are collected, and the
candidates of a ladder are compared on calibration inputs held out from them: nearest, + bias correction, + error feedback,
+ descent.  The one of least output error is taken, so that no step makes a layer worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant_onnx.config import Refinement
from requant_onnx.graph.layers import Layer
from requant_onnx.numerics.arrays import Float32Array, Float64Array, UInt8Array
from requant_onnx.numerics.feedback import RowGrid, feedback, refine
from requant_onnx.numerics.moments import Moments, error_of
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight

Triple = tuple[Float64Array, Float64Array, Float64Array]
HELD_OUT = 4  # every fourth chunk is for the choice between candidates, not for making them
SHRINKAGE = 0.02  # of the mean diagonal: how far the target weights may leave the float ones


@dataclass(frozen=True)
class RefinedLayer:
    """The outcome of the ladder for one layer.

    grid: of the weight.  errors: candidate -> mean squared output error on inputs held out, over that of no layer at all.
    bias: (oc,) the new bias, None where it stays.
    """

    grid: Grid
    quantized: QuantizedWeight
    bias: Float32Array | None
    method: str
    errors: dict[str, float]


@dataclass(frozen=True)
class _Candidate:
    """Codes (rows, n) and row grid of each group of channels.  start: what they began from.  corrected: with the best bias."""

    grid: Grid
    start: QuantizedWeight
    codes: list[UInt8Array]
    grids: list[RowGrid]
    corrected: bool

    @property
    def has_row_scales(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.start.axis is not None

    def decoded(self) -> list[Float64Array]:
        return [grid.decode(codes) for grid, codes in zip(self.grids, self.codes, strict=True)]


def choose(
    layer: Layer,
    w: Float32Array,
    grids: Sequence[Grid],
    fitted: Sequence[Moments],
    held: Sequence[Moments],
    refinement: Refinement,
    min_scale: Float64Array | None,
) -> RefinedLayer:
    """The best of the ladder, up to the rung asked for, for one layer.

    grids: the first for nearest levels; feedback takes that of least weight error, weighted by the power of the inputs.
    fitted, held: moments by group, of the inputs to fit on and of those held out.  min_scale: as for quantize_weight.
    """
    nearest = _candidate(layer, grids[0], quantize_weight(w, grids[0], min_scale), min_scale)
    ladder = {"nearest": nearest}
    if layer.can_correct:
        ladder["bias correction"] = replace(nearest, corrected=True)
    if refinement.sees_outputs:
        triples = [m.centered() if layer.can_correct else m.uncentered() for m in fitted]
        start = _weighted(layer, w, grids, triples, min_scale)
        ladder.update(_feedback(layer, w, start, triples, fitted, held, refinement))
    errors = {name: _error(layer, candidate, fitted, held) for name, candidate in ladder.items()}
    method = min(errors, key=lambda name: errors[name])
    return _finish(layer, ladder[method], fitted, held, method, errors)


def _candidate(layer: Layer, grid: Grid, q: QuantizedWeight, min_scale: Float64Array | None) -> _Candidate:
    return _Candidate(grid, q, layer.product.matrices(q.codes), _grids(layer, q, min_scale), False)


def _weighted(
    layer: Layer, w: Float32Array, grids: Sequence[Grid], triples: Sequence[Triple], min_scale: Float64Array | None
) -> _Candidate:
    """Ranges and grid by what each weight's error does to the output: the diagonal of the second moments weighs it."""
    importance = layer.importance([np.diag(xx) for xx, _, _ in triples])
    made = [quantize_weight(w, grid, min_scale, importance) for grid in grids]
    errors = [float(((q.dequantize().astype(np.float64) - w) ** 2 * importance).sum()) for q in made]
    best = int(np.argmin(errors))
    return _candidate(layer, grids[best], made[best], min_scale)


def _feedback(
    layer: Layer,
    w: Float32Array,
    nearest: _Candidate,
    triples: Sequence[Triple],
    fitted: Sequence[Moments],
    held: Sequence[Moments],
    refinement: Refinement,
) -> Iterator[tuple[str, _Candidate]]:
    matrices = [m.astype(np.float64) for m in layer.product.matrices(w)]
    refit = nearest.has_row_scales and not layer.product.scale_is_shared
    targets = [_target(w_g, triple) for w_g, triple in zip(matrices, triples, strict=True)]
    made: dict[str, tuple[_Candidate, list[Float64Array]]] = {}
    for name, wanted in (("feedback", matrices), ("feedback to the float output", targets)):
        codes = [feedback(t, triple[0], grid) for t, triple, grid in zip(wanted, triples, nearest.grids, strict=True)]
        made[name] = replace(nearest, codes=codes, corrected=layer.can_correct), wanted
        yield name, made[name][0]
    if refinement is Refinement.DESCENT:
        name = min(made, key=lambda name: _error(layer, made[name][0], fitted, held))
        start, wanted = made[name]
        refined = [
            refine(t, _damped(triple[0]), grid, c, refit=refit)
            for t, triple, grid, c in zip(wanted, triples, start.grids, start.codes, strict=True)
        ]
        yield f"{name}, descent", replace(start, codes=[c for c, _ in refined], grids=[g for _, g in refined])


def _grids(layer: Layer, q: QuantizedWeight, min_scale: Float64Array | None) -> list[RowGrid]:
    scale = layer.product.by_row(np.asarray(q.scale, np.float64))
    offset = layer.product.by_row(q.table.max_code - q.zero_point.astype(np.int64))
    least = layer.product.by_row(np.zeros(1) if min_scale is None else min_scale)
    half = q.has_half_scale
    return [RowGrid(s, o, q.table, f, half) for s, o, f in zip(scale, offset, least, strict=True)]


def _target(w: Float64Array, moments: Triple) -> Float64Array:
    """The weights that bring the quantized input nearest to the float output, held to w where inputs say little.

    W* = W + (C_yx - W C_xx) inv(C_xx + lambda)
    """
    xx, xy, _ = moments
    ridge = SHRINKAGE * max(float(np.mean(np.diag(xx))), 1e-30)
    return np.asarray(w + np.linalg.solve(xx + ridge * np.eye(len(xx)), (xy - w @ xx).T).T)


def _damped(xx: Float64Array) -> Float64Array:
    return np.asarray(xx + np.eye(len(xx)) * max(0.01 * float(np.mean(np.diag(xx))), 1e-30))


def _error(layer: Layer, candidate: _Candidate, fitted: Sequence[Moments], held: Sequence[Moments]) -> float:
    """Mean squared error of the output on the inputs held out, with the bias fitted on the others, relative to its power."""
    error, power = 0.0, 0.0
    for g, (w_hat, moments) in enumerate(zip(candidate.decoded(), held, strict=True)):
        bias = fitted[g].bias(w_hat) if candidate.corrected else layer.bias_of(g)
        mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
        error += float((error_of(w_hat, moments.uncentered()) + bias * (bias + 2 * (w_hat @ mean_x) - 2 * mean_y)).sum())
        power += float((moments.yy / moments.count).sum())
    return error / power if power > 0.0 else 0.0


def _finish(
    layer: Layer,
    candidate: _Candidate,
    fitted: Sequence[Moments],
    held: Sequence[Moments],
    method: str,
    errors: dict[str, float],
) -> RefinedLayer:
    start = candidate.start
    quantized = replace(start, codes=layer.product.tensor(candidate.codes))
    if candidate.has_row_scales and not layer.product.scale_is_shared:
        scale = np.concatenate([grid.scale for grid in candidate.grids]).astype(np.float32)
        quantized = replace(quantized, scale=scale.reshape(start.scale.shape))
    bias = None
    if candidate.corrected:
        both = [_joined(a, b) for a, b in zip(fitted, held, strict=True)]
        decoded = [m.astype(np.float64) for m in layer.product.matrices(quantized.dequantize())]
        bias = np.concatenate([m.bias(w_hat) for m, w_hat in zip(both, decoded, strict=True)]).astype(np.float32)
    return RefinedLayer(candidate.grid, quantized, bias, method, errors)


def _joined(a: Moments, b: Moments) -> Moments:
    return Moments(a.xx + b.xx, a.xy + b.xy, a.yy + b.yy, a.x + b.x, a.y + b.y, a.count + b.count)
