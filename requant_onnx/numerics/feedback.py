"""Rounding by the second moments of a layer's inputs: error feedback, then coordinate descent, on any level table.

The output error of one channel with the weights w, decoded to w_hat, is (w_hat - w) H (w_hat - w)' with H = E[x x'].

    feedback    (GPTQ, arXiv 2210.17323)  with H = R R', R upper triangular, the error is the sum over k of the squares of
                sum_(j <= k) e_j R_jk,  e = w - w_hat:  input by input, w_k is rounded after what makes up for those before it,
                w_k + sum_(j < k) e_j R_jk / R_kk
    descent     change one code at a time while that lowers the error, until none does
    scale       with the levels l fixed, the best scale is (l H w) / (l H l)

All arrays begin with the groups of channels, (G, ...).  Rows are independent, and divided into the same strips for every number of
threads; what earlier columns do to a block of later ones is one matrix product in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array, UInt8Array
from requant_onnx.numerics.compiled import compiled
from requant_onnx.numerics.factor import Factor
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.parallel import run_all, slices
from requant_onnx.numerics.quantize import half_scale

BLOCK = 128  # columns rounded before their errors are pushed into the later ones by one matrix product
ROWS = 128  # of a strip
PASSES = 5  # largest number of passes of the descent
SMALLEST_GAIN = 1e-12  # of a change, in units of scale**2 * h[j, j]: below it rounding errors could change codes forever
REFITS = 3  # largest number of alternations of scale and descent


@dataclass(frozen=True)
class RowGrid:
    """The grids of rows of weights: w_hat = scale * integers[code + offset], code 0 .. K.

    scale: value of one integer level, (G, rows) float64, at least min_scale, representable in float16 where half is set.
    offset: K - zero_point, (G, rows) int64.
    """

    scale: Float64Array
    offset: Int64Array
    table: LevelTable
    min_scale: Float64Array
    half: bool

    def levels(self, codes: UInt8Array) -> Int64Array:
        """The integer levels of codes, (G, rows, n)."""
        return np.asarray(self.table.integers[codes.astype(np.int64) + self.offset[..., None]])

    def decode(self, codes: UInt8Array) -> Float64Array:
        """The weights of codes, (G, rows, n)."""
        return np.asarray(self.levels(codes) * self.scale[..., None])


def feedback(w: Float64Array, factor: Factor, grid: RowGrid) -> UInt8Array:
    """Round with error feedback, the inputs of most power first.  w: weights, (G, rows, n)."""
    order = np.broadcast_to(factor.order[:, None, :], w.shape)
    left = np.take_along_axis(w, order, -1)
    codes = np.empty(w.shape, np.uint8)

    def round_strip(groups: slice, rows: slice) -> None:
        r, scale, offset = factor.r[groups], grid.scale[groups, rows], grid.offset[groups, rows]
        wanted, made = left[groups, rows], np.empty(left[groups, rows].shape, np.uint8)
        errors = np.zeros(wanted.shape, np.float32)
        for block in slices(w.shape[-1], BLOCK):
            pushed = (errors[..., : block.start] @ r[:, : block.start, block]).astype(np.float64)
            triangle = np.ascontiguousarray(r[:, block, block], np.float64)
            part, chosen = np.ascontiguousarray(wanted[..., block]), np.empty(wanted[..., block].shape, np.uint8)
            _round_block(part, pushed, triangle, scale, offset, thresholds, integers, chosen)
            errors[..., block], made[..., block] = part, chosen
        codes[groups, rows] = made

    thresholds = grid.table.thresholds(True) * grid.table.unit
    integers = grid.table.integers.astype(np.float64)
    _in_strips(round_strip, w.shape)
    in_order = np.empty_like(codes)
    np.put_along_axis(in_order, order, codes, -1)
    return in_order


def refine(w: Float64Array, h: Float32Array, grid: RowGrid, codes: UInt8Array, *, refit: bool) -> tuple[UInt8Array, RowGrid]:
    """Lower the output error by coordinate descent from `codes`; with refit, alternate it with the best scale.

    h: second moments of the inputs, (G, n, n), symmetric.
    """
    found = np.ascontiguousarray(codes).copy()
    scale = grid.scale.copy()

    def refine_strip(groups: slice, rows: slice) -> None:
        part = replace(grid, scale=scale[groups, rows], offset=grid.offset[groups, rows], min_scale=grid.min_scale[groups, rows])
        best, after = _refine(w[groups, rows], h[groups], part, found[groups, rows].copy(), refit)
        found[groups, rows], scale[groups, rows] = best, after.scale

    _in_strips(refine_strip, w.shape)
    return found, replace(grid, scale=scale)


def _refine(w: Float64Array, h: Float32Array, grid: RowGrid, codes: UInt8Array, refit: bool) -> tuple[UInt8Array, RowGrid]:
    for _ in range(REFITS if refit else 1):
        if refit:
            grid = refit_scale(w, h, grid, codes)
        changed = codes.copy()
        _descend(changed, (grid.decode(codes) - w).astype(np.float32) @ h, h, grid)
        if (changed == codes).all():
            break
        codes = changed
    return codes, grid


def refit_scale(w: Float64Array, h: Float32Array, grid: RowGrid, codes: UInt8Array) -> RowGrid:
    """Fit the scale of least error to the levels of `codes`; keep the scale where it would not be positive."""
    levels = grid.levels(codes).astype(np.float32)
    hl = (levels @ h).astype(np.float64)
    numerator, denominator = np.einsum("grn,grn->gr", hl, w), np.einsum("grn,grn->gr", hl, levels)
    best = np.divide(numerator, denominator, out=grid.scale.copy(), where=(denominator > 0.0) & (numerator > 0.0))
    best = np.maximum(best, grid.min_scale)
    return replace(grid, scale=half_scale(best.astype(np.float32)).astype(np.float64) if grid.half else best)


def output_error(difference: Float64Array, h: Float32Array | Float64Array) -> Float64Array:
    """The output error d H d' of each row, (G, rows).  difference: d, (G, rows, n)."""
    return np.asarray(np.einsum("grn,grn->gr", difference @ h, difference))


def _in_strips(work: Callable[[slice, slice], None], shape: tuple[int, ...]) -> None:
    """Do it for strips of the groups and rows of an array."""
    groups, rows, n = shape
    if groups == 1 or n > BLOCK:
        run_all([partial(work, slice(g, g + 1), part) for g in range(groups) for part in slices(rows, ROWS)])
    else:
        run_all([partial(work, part, slice(0, rows)) for part in slices(groups, ROWS)])


def _descend(codes: UInt8Array, gradients: Float32Array, h: Float32Array, grid: RowGrid) -> None:
    """Change single codes to the neighboring level as long as that lowers the error.

    gradients: (w_hat - w) H, (G, rows, n).  Changes codes and gradients.
    """
    for _ in range(PASSES):
        moved = False
        for block in slices(codes.shape[-1], BLOCK):
            here = np.ascontiguousarray(codes[..., block])
            slope = np.ascontiguousarray(gradients[..., block], np.float64)
            corner = np.ascontiguousarray(h[:, block, block], np.float64)
            changes = np.zeros(here.shape)
            if _descend_block(here, slope, corner, grid.scale, grid.offset, grid.table.integers, changes):
                moved = True
                codes[..., block] = here
                gradients += changes.astype(np.float32) @ h[:, block]
        if not moved:
            break


@compiled
def _round_block(
    w: Float64Array,
    pushed: Float64Array,
    triangle: Float64Array,
    scale: Float64Array,
    offset: Int64Array,
    thresholds: Float64Array,
    integers: Float64Array,
    codes: UInt8Array,
) -> None:
    """Round the columns of one block in their order.  thresholds: in integer levels.  Fills codes; turns w into its errors.

    pushed: sum of e_j R_jk over the columns before the block; changes.
    """
    last = thresholds.size // 2
    for g in range(w.shape[0]):
        for r in range(w.shape[1]):
            start, step = offset[g, r], scale[g, r]
            row_thresholds, levels = thresholds[start : start + last], integers[start : start + last + 1]
            for j in range(w.shape[2]):
                wanted = w[g, r, j] + pushed[g, r, j] / triangle[g, j, j]
                code = np.searchsorted(row_thresholds, wanted / step, side="right")
                codes[g, r, j] = code
                error = w[g, r, j] - step * levels[code]
                w[g, r, j] = error
                for k in range(j + 1, w.shape[2]):
                    pushed[g, r, k] += error * triangle[g, j, k]


@compiled
def _descend_block(
    codes: UInt8Array,
    gradients: Float64Array,
    h: Float64Array,
    scale: Float64Array,
    offset: Int64Array,
    integers: Int64Array,
    changes: Float64Array,
) -> int:
    """One pass over the columns of a block; returns how many codes moved.  Changes codes and gradients; adds to changes."""
    last = integers.size // 2
    moves = 0
    for g in range(codes.shape[0]):
        for r in range(codes.shape[1]):
            start, step = offset[g, r], scale[g, r]
            for j in range(codes.shape[2]):
                slope = gradients[g, r, j]
                direction = -1 if slope > 0.0 else 1  # where the error falls
                code = codes[g, r, j] + direction
                if 0 <= code <= last:
                    change = step * (integers[code + start] - integers[codes[g, r, j] + start])
                    if change * (2.0 * slope + change * h[g, j, j]) < -SMALLEST_GAIN * h[g, j, j] * step * step:
                        codes[g, r, j] = code
                        changes[g, r, j] += change
                        moves += 1
                        for k in range(codes.shape[2]):
                            gradients[g, r, k] += change * h[g, j, k]
    return moves
