"""The ladder: increasingly thorough ways to quantize the weight of a layer, of which held-out inputs choose one.

The second moments of the layer's input (with all weights before it quantized) and of its float output are collected.  Candidates
are compared on calibration inputs held out from these: nearest levels, + bias correction, + error feedback, + descent.  The
candidate with the least output error is chosen, so no step makes the layer worse on these inputs.  If bits of codes also count
(price.py), the choice weighs them, and feedback is tried on second moments shrunk toward their diagonal by different amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from requant_onnx.choices import Refinement
from requant_onnx.graph.layers import Layer
from requant_onnx.numerics.arrays import Float32Array, Float64Array, UInt8Array
from requant_onnx.numerics.factor import DAMPING, STRIP, Factor, factor, shrunk
from requant_onnx.numerics.feedback import RowGrid, feedback, refine
from requant_onnx.numerics.moments import Moments, Sample, fitted_bias
from requant_onnx.numerics.parallel import run_all, slices
from requant_onnx.numerics.price import RATE, Price, entropy
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight

Pair = tuple[Float32Array, Float64Array]  # second moments of inputs, and of outputs with inputs: see Evidence.pair
DOWNLOAD_SHRINKAGES = (0.02, 0.15, 0.5)  # shrinkages of second moments if bits count; held-out inputs choose one
FILE_SHRINKAGES = (0.0, 0.15, 0.5)  # the same if bits do not count, for layers with too few places
ENOUGH_PLACES = 20  # places per input from which second moments need no shrinkage
ESTIMATES = 2  # number of times that the price of codes is estimated during the descent
HELD_OUT = 4  # every fourth chunk is held out, to choose between candidates


@dataclass(frozen=True)
class RefinedLayer:
    """The outcome of the ladder for one layer.

    grid: grid of the weight.  bias: new bias, (oc,); None if it does not change.  method: name of the chosen candidate.
    errors: candidate -> squared output error on held-out inputs, relative to output power.
    """

    grid: Grid
    quantized: QuantizedWeight
    bias: Float32Array | None
    method: str
    errors: dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """The calibration data of a layer.  fitted: moments of the inputs to fit on.  held_out: places of the held-out inputs."""

    fitted: Moments
    held_out: Sample

    def pair(self, corrected: bool) -> Pair:
        """The second moments of the inputs, (G, n, n), and of the outputs with the inputs, (G, rows, n).

        corrected: whether they are about the means, because a bias corrects these.  Callable only once: it overwrites the sums.
        """
        return self.fitted.centered() if corrected else self.fitted.uncentered()

    @property
    def sums(self) -> tuple[Float64Array, Float64Array, int]:
        """The sums of the inputs to fit on, (G, n), and of their outputs, (G, rows), and the number of places."""
        return self.fitted.x, self.fitted.y, self.fitted.count


@dataclass(frozen=True)
class _Candidate:
    """A candidate.  start: quantized weight from which it was made.  codes: (G, rows, n).  rows: grids of the rows.

    corrected: whether its bias is fitted.
    offset: decoded earlier stages, to which the decoded codes are added, (G, rows, n); () if there are none.
    """

    grid: Grid
    start: QuantizedWeight
    codes: UInt8Array
    rows: RowGrid
    corrected: bool
    offset: Float64Array

    @property
    def has_row_scales(self) -> bool:
        """Whether each row has its own scale."""
        return self.start.axis is not None

    def decoded(self) -> Float64Array:
        """The decoded weights, with the offset, (G, rows, n)."""
        return np.asarray(self.offset + self.rows.decode(self.codes))


def choose(
    layer: Layer,
    w: Float32Array,
    grids: Sequence[Grid],
    evidence: Evidence,
    refinement: Refinement,
    min_scale: Float64Array | None,
    moments: Pair | None = None,
    offset: Float32Array | None = None,
    given: QuantizedWeight | None = None,
) -> RefinedLayer:
    """Choose the best candidate for one layer, up to the given refinement.

    grids: candidate grids.  Nearest levels use the first one; feedback uses the one with the least weight error, weighted by the
    power of the inputs.
    min_scale: as for quantize_weight.  moments: result of `evidence.pair`, if it has been called already.
    offset: decoded earlier stages, in the shape of w.  given: fixed codes, for which only the bias is chosen.
    """
    rest = w if offset is None else w - offset
    first = quantize_weight(rest, grids[0], min_scale) if given is None else given
    nearest = _candidate(layer, grids[0], first, min_scale, offset)
    ladder, worth = {"nearest": nearest}, 0.0
    if layer.can_correct:
        ladder["bias correction"] = replace(nearest, corrected=True)
    if refinement.sees_outputs and given is None:
        pair = evidence.pair(layer.can_correct) if moments is None else moments
        start = _weighted(layer, rest, grids, pair[0], min_scale, offset)
        if start.grid.step is None:
            ladder.update(_feedback(layer, w, start, pair, evidence, refinement))
        else:
            priced, worth = _by_price(layer, w, start, pair, evidence, refinement)
            ladder.update(priced)
    errors = {name: _error(layer, candidate, evidence) for name, candidate in ladder.items()}
    costs = {name: errors[name] + (worth * entropy(each.codes) if worth else 0.0) for name, each in ladder.items()}
    method = min(costs, key=lambda name: costs[name])
    return _finish(layer, ladder[method], evidence, method, errors)


def _candidate(
    layer: Layer, grid: Grid, q: QuantizedWeight, min_scale: Float64Array | None, offset: Float32Array | None
) -> _Candidate:
    added = np.zeros(()) if offset is None else layer.product.matrices(offset).astype(np.float64)
    return _Candidate(grid, q, layer.product.matrices(q.codes), _rows(layer, q, min_scale), False, added)


def _weighted(
    layer: Layer,
    w: Float32Array,
    grids: Sequence[Grid],
    xx: Float32Array,
    min_scale: Float64Array | None,
    offset: Float32Array | None,
) -> _Candidate:
    """The candidate whose ranges and grid minimize the weight error, weighted by the diagonal of the inputs' second moments."""
    importance = layer.importance(np.diagonal(xx, axis1=1, axis2=2).astype(np.float64))
    made = [quantize_weight(w, grid, min_scale, importance) for grid in grids]
    errors = [float(((q.dequantize().astype(np.float64) - w) ** 2 * importance).sum()) for q in made]
    best = int(np.argmin(errors))
    return _candidate(layer, grids[best], made[best], min_scale, offset)


def _feedback(
    layer: Layer, w: Float32Array, nearest: _Candidate, pair: Pair, evidence: Evidence, refinement: Refinement
) -> Iterator[tuple[str, _Candidate]]:
    """The candidates with error feedback, and descent from the best of them, by name."""
    matrices = layer.product.matrices(w).astype(np.float64)
    refit = nearest.has_row_scales and not layer.product.scale_is_shared
    xx, xy = pair
    tried: dict[str, tuple[float, _Candidate, Float64Array, float]] = {}
    for share in FILE_SHRINKAGES if evidence.fitted.count < ENOUGH_PLACES * xx.shape[-1] else FILE_SHRINKAGES[:1]:
        triangle = factor(shrunk(xx, share) if share else xx)
        wanted = {"feedback": matrices, "feedback to the float output": _target(matrices, xx, xy, triangle)}
        for kind, whole in wanted.items():
            target = whole - nearest.offset
            name = f"{kind}, shrinkage {share:g}" if share else kind
            made = replace(nearest, codes=feedback(target, triangle, nearest.rows), corrected=layer.can_correct)
            tried[name] = _error(layer, made, evidence), made, target, share
            yield name, made
    if refinement is Refinement.DESCENT:
        name = min(tried, key=lambda name: tried[name][0])
        _, made, target, share = tried[name]
        h = _damped(shrunk(xx, share) if share else xx)
        codes, rows = refine(target, h, made.rows, made.codes, refit=refit)
        yield f"{name}, descent", replace(made, codes=codes, rows=rows)


def _by_price(
    layer: Layer, w: Float32Array, nearest: _Candidate, pair: Pair, evidence: Evidence, refinement: Refinement
) -> tuple[dict[str, _Candidate], float]:
    """The same candidates if bits of codes count, and the error per bit, relative to the power of the output.

    Held-out inputs determine how far second moments are shrunk toward their diagonal.
    """
    matrices, (xx, xy), step = layer.product.matrices(w).astype(np.float64), pair, nearest.grid.step or 0.0
    made: dict[str, _Candidate] = {}
    least, worth, best = math.inf, 0.0, None
    for shrinkage in DOWNLOAD_SHRINKAGES:
        h = shrunk(xx, shrinkage)
        triangle = factor(h)
        worth = worth or RATE * step**2 * float(triangle.variances().mean())
        price, target = Price.of(nearest.codes, worth), _target(matrices, xx, xy, triangle)
        codes = feedback(target, triangle, nearest.rows, price.again(feedback(target, triangle, nearest.rows, price)))
        name, candidate = f"feedback at shrinkage {shrinkage:g}", replace(nearest, codes=codes, corrected=layer.can_correct)
        made[name], cost = candidate, _error(layer, candidate, evidence) + worth / evidence.held_out.power * entropy(codes)
        if cost < least:
            least, best = cost, (name, candidate, h, target)
    if refinement is Refinement.DESCENT and best is not None:
        name, candidate, h, target = best
        codes, rows, h = candidate.codes, candidate.rows, _damped(h)
        for _ in range(ESTIMATES):
            codes, rows = refine(target, h, rows, codes, refit=False, price=Price.of(codes, worth))
        made[f"{name}, descent"] = replace(candidate, codes=codes, rows=rows)
    return made, worth / evidence.held_out.power


def _rows(layer: Layer, q: QuantizedWeight, min_scale: Float64Array | None) -> RowGrid:
    return RowGrid(
        layer.product.by_row(np.asarray(q.scale, np.float64)),
        layer.product.by_row(q.table.max_code - q.zero_point.astype(np.int64)),
        q.table,
        layer.product.by_row(np.zeros(1) if min_scale is None else min_scale),
        q.has_half_scale,
    )


def _target(w: Float64Array, xx: Float32Array, xy: Float64Array, triangle: Factor) -> Float64Array:
    """The weights that best map the quantized input to the float output, damped toward w where inputs have little power.

    W* = W + (C_yx - W C_xx) inv(C_xx + damping)
    """
    short, product = w.astype(np.float32), np.empty(w.shape, np.float32)

    def multiply(rows: slice) -> None:
        product[:, rows] = short[:, rows] @ xx

    run_all([partial(multiply, rows) for rows in slices(w.shape[1], STRIP)])
    return np.asarray(w + triangle.solve(xy - product))


def _damped(xx: Float32Array) -> Float32Array:
    """Add damping to the diagonal, in place.  Returns the matrix."""
    index = np.arange(xx.shape[-1])
    powers = np.diagonal(xx, axis1=1, axis2=2).mean(1, dtype=np.float64)
    xx[:, index, index] += np.maximum(DAMPING * powers, 1e-30)[:, None].astype(np.float32)
    return xx


def _error(layer: Layer, candidate: _Candidate, evidence: Evidence) -> float:
    """The squared output error on held-out inputs, relative to output power; a corrected bias is fitted on the other inputs."""
    w_hat = candidate.decoded()
    bias = fitted_bias(w_hat, [evidence.sums]) if candidate.corrected else layer.biases
    return evidence.held_out.error(w_hat, bias)


def _finish(layer: Layer, candidate: _Candidate, evidence: Evidence, method: str, errors: dict[str, float]) -> RefinedLayer:
    start = candidate.start
    quantized = replace(start, codes=layer.product.tensor(candidate.codes))
    if candidate.has_row_scales and not layer.product.scale_is_shared:
        quantized = replace(quantized, scale=candidate.rows.scale.astype(np.float32).reshape(start.scale.shape))
    bias = None
    if candidate.corrected:
        decoded = candidate.offset + layer.product.matrices(quantized.dequantize()).astype(np.float64)
        bias = fitted_bias(decoded, [evidence.sums, evidence.held_out.sums()]).astype(np.float32).ravel()
    return RefinedLayer(candidate.grid, quantized, bias, method, errors)
