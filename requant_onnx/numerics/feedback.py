"""Rounding by the second moments of a layer's inputs: error feedback, then coordinate descent, on any level table.

The output error of one channel with the weights w, decoded to w_hat, is (w_hat - w) H (w_hat - w)' with H = E[x x'].

    feedback    (GPTQ, arXiv 2210.17323)  with H = R R', R upper triangular, the error is the sum over k of the squares of
                sum_(j <= k) e_j R_jk,  e = w - w_hat:  input by input, w_k is rounded after correcting for those before it,
                w_k + sum_(j < k) e_j R_jk / R_kk
    descent     change one code at a time while that lowers the error, until none does
    scale       with the levels l fixed, the best scale is (l H w) / (l H l)
    price       if bits of codes also count, feedback and descent reduce the sum of both (price.py)

All arrays begin with the groups of channels, (G, ...).  Rows are independent, and divided into the same strips for every number of
threads; the effect of earlier columns on a block of later ones is one matrix product in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array, UInt8Array
from requant_onnx.numerics.factor import Factor
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.parallel import run_all, slices
from requant_onnx.numerics.price import Price
from requant_onnx.numerics.quantize import half_scale

BLOCK = 128  # columns rounded before their errors are propagated to later columns by one matrix product
FEW = 16  # columns of a block whose errors are propagated one by one
ROWS = 256  # rows per strip
PASSES = 5  # largest number of passes of the descent
SMALLEST_GAIN = 1e-12  # least gain of a change, in units of scale**2 * h[j, j], so that rounding errors cannot change codes forever
REFITS = 3  # largest number of alternations of scale and descent


@dataclass(frozen=True)
class RowGrid:
    """The grids of rows of weights: w_hat = scale * integers[code + offset], code 0 .. K.

    scale: value of one integer level, (G, rows) float64, at least min_scale, representable in float16 if half is set.
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


def feedback(w: Float64Array, factor: Factor, grid: RowGrid, price: Price | None = None) -> UInt8Array:
    """Round with error feedback, the inputs of most power first.  w: weights, (G, rows, n).  price: price of codes, if any."""
    order = np.broadcast_to(factor.order[:, None, :], w.shape)
    left = np.take_along_axis(w, order, -1)
    codes = np.empty(w.shape, np.uint8)

    def round_strip(groups: slice, rows: slice) -> None:
        r, wanted = factor.r[groups], left[groups, rows]
        part, errors = _part(grid, groups, rows), np.zeros(wanted.shape, np.float32)
        for block in slices(w.shape[-1], BLOCK):
            pushed = (errors[..., : block.start] @ r[:, : block.start, block]).astype(np.float64)
            triangle = r[:, block, block].astype(np.float64)
            made, errors[..., block] = _round_block(wanted[..., block], pushed, triangle, part, price)
            codes[groups, rows, block] = made

    _in_strips(round_strip, w.shape)
    in_order = np.empty_like(codes)
    np.put_along_axis(in_order, order, codes, -1)
    return in_order


def refine(
    w: Float64Array, h: Float32Array, grid: RowGrid, codes: UInt8Array, *, refit: bool, price: Price | None = None
) -> tuple[UInt8Array, RowGrid]:
    """Lower the output error by coordinate descent from `codes`; with refit, alternate it with the best scale.

    h: second moments of the inputs, (G, n, n), symmetric.  price: price of codes, which is minimized together with the error.
    """
    found = np.ascontiguousarray(codes).copy()
    scale = grid.scale.copy()

    def refine_strip(groups: slice, rows: slice) -> None:
        part = _part(replace(grid, scale=scale), groups, rows)
        best, after = _refine(w[groups, rows], h[groups], part, found[groups, rows].copy(), refit, price)
        found[groups, rows], scale[groups, rows] = best, after.scale

    _in_strips(refine_strip, w.shape)
    return found, replace(grid, scale=scale)


def _refine(
    w: Float64Array, h: Float32Array, grid: RowGrid, codes: UInt8Array, refit: bool, price: Price | None
) -> tuple[UInt8Array, RowGrid]:
    for _ in range(REFITS if refit else 1):
        if refit:
            grid = refit_scale(w, h, grid, codes)
        changed = codes.copy()
        _descend(changed, (grid.decode(codes) - w).astype(np.float32) @ h, h, grid, price)
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
    """Run `work` on strips of the groups and rows of an array."""
    groups, rows, n = shape
    if groups == 1 or n > BLOCK:
        run_all([partial(work, slice(g, g + 1), part) for g in range(groups) for part in slices(rows, ROWS)])
    else:
        run_all([partial(work, part, slice(0, rows)) for part in slices(groups, ROWS)])


def _part(grid: RowGrid, groups: slice, rows: slice) -> RowGrid:
    """The grids of some of the groups and rows."""
    arrays = {name: getattr(grid, name)[groups, rows] for name in ("scale", "offset", "min_scale")}
    return replace(grid, **arrays)


def _round_block(
    w: Float64Array, pushed: Float64Array, triangle: Float64Array, grid: RowGrid, price: Price | None
) -> tuple[UInt8Array, Float64Array]:
    """Round the columns of a block in order, (G, rows, columns).  Returns codes and errors; changes `pushed`.

    pushed: sum of e_j R_jk over the columns before the block.  triangle: R of the block, (G, columns, columns).
    """
    columns, max_code = w.shape[-1], grid.table.max_code
    thresholds, integers = grid.table.thresholds(True) * grid.table.unit, grid.table.integers.astype(np.float64)
    codes, errors = np.empty((columns, *w.shape[:2]), np.uint8), np.empty((columns, *w.shape[:2]))
    w, pushed = (np.ascontiguousarray(np.moveaxis(array, -1, 0)) for array in (w, pushed))
    for few in slices(columns, FEW):
        for j in range(few.start, few.stop):
            wanted = w[j] + pushed[j] / triangle[:, j, j, None]
            code = thresholds.searchsorted(wanted / grid.scale, side="right") - grid.offset
            np.clip(code, 0, max_code, out=code)
            if price is not None:
                code = price.cheapest(wanted, code, grid.scale, triangle[:, j, j, None] ** 2)
            codes[j] = code
            errors[j] = w[j] - grid.scale * integers.take(code + grid.offset)
            rest = slice(j + 1, few.stop)
            pushed[rest] += errors[j] * triangle[:, j, rest].T[:, :, None]
        done = np.moveaxis(errors[few], 0, -1)
        pushed[few.stop :] += np.moveaxis(done @ triangle[:, few, few.stop :], -1, 0)
    return np.moveaxis(codes, 0, -1), np.moveaxis(errors, 0, -1)


def _descend(codes: UInt8Array, gradients: Float32Array, h: Float32Array, grid: RowGrid, price: Price | None) -> None:
    """Change single codes to the adjacent level as long as that lowers the error (plus the price, if there is one).

    gradients: (w_hat - w) H, (G, rows, n).  Changes codes and gradients.
    """
    steps = _steps_of(grid, price)
    for _ in range(PASSES):
        moved = False
        for block in slices(codes.shape[-1], BLOCK):
            slope = gradients[..., block].astype(np.float64)
            changes = _descend_block(codes[..., block], slope, h[:, block, block].astype(np.float64), steps)
            if changes is not None:
                moved = True
                gradients += changes.astype(np.float32) @ h[:, block]
        if not moved:
            break


@dataclass(frozen=True)
class _Steps:
    """The steps between the levels of each row, and the slope of the error at which a step lowers it by SMALLEST_GAIN.

    sizes: step to code q from the one below, (G * rows, K+2), infinite for q = 0 and K+1.
    slopes: half the slope in units of H_jj, the same shape:  s * (s H_jj - 2 slope) < -gain  where  slope > H_jj * slopes.
    prices: half the price of the step's bits, divided by its size, the same shape; None if bits have no price.
    """

    sizes: Float64Array
    slopes: Float64Array
    prices: Float64Array | None

    def limits(self, power: Float64Array, rows: Int64Array, code: Int64Array | UInt8Array) -> tuple[Float64Array, Float64Array]:
        """The slopes below which a step up, and above which a step down from a code lowers the error plus the price."""
        with np.errstate(invalid="ignore"):  # inf * 0: neither up nor down
            rise, fall = -power * self.slopes[rows, code + 1], power * self.slopes[rows, code]
        if self.prices is not None:
            rise, fall = rise - self.prices[rows, code + 1], fall - self.prices[rows, code]
        return rise, fall


def _steps_of(grid: RowGrid, price: Price | None) -> _Steps:
    levels = grid.levels(
        np.broadcast_to(np.arange(grid.table.max_code + 1, dtype=np.uint8), (*grid.scale.shape, grid.table.max_code + 1))
    )
    scale = grid.scale.reshape(-1, 1)
    sizes = np.full((scale.size, grid.table.max_code + 2), np.inf)
    sizes[:, 1:-1] = scale * np.diff(levels.reshape(scale.size, -1))
    with np.errstate(divide="ignore"):  # levels rounded to the same value: the step gains nothing
        slopes = (sizes + SMALLEST_GAIN * scale**2 / sizes) / 2
    prices = None if price is None else price.slope * np.diff(price.bits, prepend=0.0, append=0.0) / (2 * sizes)
    return _Steps(sizes, slopes, prices)


def _descend_block(codes: UInt8Array, slope: Float64Array, h: Float64Array, steps: _Steps) -> Float64Array | None:
    """Make one pass over the columns of a block.  Changes codes; returns the changes of the weights, (G, rows, columns), or None.

    All rows find their next column where a step lowers the error, and make that step simultaneously.
    """
    groups, count, columns = codes.shape
    diagonal = np.einsum("gjj->gj", h)
    diagonal = np.where(diagonal > 0.0, diagonal, np.inf)  # an input of zero power (or, by rounding, less) changes no code
    power = np.repeat(diagonal, count, 0)
    rows, at = np.arange(groups * count), np.arange(columns)
    here, slope = codes.reshape(rows.size, columns), slope.reshape(rows.size, columns)
    rise, fall = steps.limits(power, rows[:, None], here)
    changes = None
    ready = (slope < rise) | (slope > fall)
    while True:
        column = ready.argmax(1)
        (left,) = np.nonzero(ready[np.arange(rows.size), column])
        if not left.size:
            break
        rows, column, slope, rise, fall = rows[left], column[left], slope[left], rise[left], fall[left]
        one = np.arange(rows.size)
        up = slope[one, column] < rise[one, column]
        code = here[rows, column].astype(np.int64)
        change = np.where(up, steps.sizes[rows, code + 1], -steps.sizes[rows, code])
        code += np.where(up, 1, -1)
        here[rows, column] = code
        changes = np.zeros(codes.shape) if changes is None else changes
        changes.reshape(here.shape)[rows, column] += change
        slope += change[:, None] * h[rows // count, column]
        rise[one, column], fall[one, column] = steps.limits(power[rows, column], rows, code)
        ready = ((slope < rise) | (slope > fall)) & (at > column[:, None])
    if changes is not None:
        codes[:] = here.reshape(codes.shape)
    return changes
