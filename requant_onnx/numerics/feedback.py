"""Rounding by the second moments of a layer's inputs: error feedback, then coordinate descent, on any level table.

The output error of one channel with the weights w, decoded to w_hat, is (w_hat - w) H (w_hat - w)' with H = E[x x'].

    feedback    (GPTQ, arXiv 2210.17323)  column by column: round w_j, then push the error into the columns not yet rounded:
                w_k -= (w_j - w_hat_j) / U_jj * U_jk,  k > j,   U upper triangular with U' U = inv(H)
    descent     change one code at a time while that lowers the error, until none does
    scale       with the levels l fixed, the best scale is (l H w) / (l H l)
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from requant_onnx.numerics.arrays import Float64Array, Int64Array, UInt8Array
from requant_onnx.numerics.compiled import compiled
from requant_onnx.numerics.levels import LevelTable
from requant_onnx.numerics.quantize import half_scale

BLOCK = 128  # columns rounded before their errors are pushed into the later ones by one matrix product
DAMPING = 0.01  # fraction of the mean diagonal that is added to the diagonal before the inverse
PASSES = 5  # largest number of passes of the descent
SMALLEST_GAIN = 1e-12  # of a change, in units of scale**2 * h[j, j]: below it rounding errors could change codes forever
REFITS = 3  # largest number of alternations of scale and descent


@dataclass(frozen=True)
class RowGrid:
    """The grids of rows of weights: w_hat = scale * integers[code + offset], code 0 .. K.

    scale: value of one integer level, (rows,) float64, at least min_scale, representable in float16 where half is set.
    offset: K - zero_point, (rows,) int64.
    """

    scale: Float64Array
    offset: Int64Array
    table: LevelTable
    min_scale: Float64Array
    half: bool

    def decode(self, codes: UInt8Array) -> Float64Array:
        """The weights of codes, (rows, n)."""
        return np.asarray(self.table.integers[codes.astype(np.int64) + self.offset[:, None]] * self.scale[:, None])


def feedback(w: Float64Array, h: Float64Array, grid: RowGrid) -> UInt8Array:
    """Round with error feedback, the columns with the largest inputs first.

    w: weights, (rows, n).  h: second moments of the inputs, (n, n), positive semidefinite.
    """
    order = np.argsort(-np.diag(h), kind="stable")
    u = _upper_of_inverse(h[np.ix_(order, order)])
    left = np.ascontiguousarray(w[:, order])
    codes = np.empty(w.shape, np.uint8)
    thresholds = grid.table.thresholds(True) * grid.table.unit
    integers = grid.table.integers.astype(np.float64)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        errors = np.zeros((len(w), end - start))
        block = np.ascontiguousarray(u[start:end, start:end])
        _round_block(left[:, start:end], block, grid.scale, grid.offset, thresholds, integers, codes[:, start:end], errors)
        left[:, end:] -= errors @ u[start:end, end:]
    codes_in_order = np.empty_like(codes)
    codes_in_order[:, order] = codes
    return codes_in_order


def conditional_variances(h: Float64Array) -> Float64Array:
    """The conditional variance of each input, given all inputs that come later in `feedback`, (n,): 1 / U_jj**2.

    The output error after feedback is the sum over j of (error of w_j)**2 times this variance.
    """
    order = np.argsort(-np.diag(h), kind="stable")
    variances = np.empty(len(h))
    variances[order] = np.diag(_upper_of_inverse(h[np.ix_(order, order)])) ** -2.0
    return variances


def refine(w: Float64Array, h: Float64Array, grid: RowGrid, codes: UInt8Array, *, refit: bool) -> tuple[UInt8Array, RowGrid]:
    """Lower the output error by coordinate descent from `codes`; with refit, alternate it with the best scale."""
    codes = np.ascontiguousarray(codes)
    for _ in range(REFITS if refit else 1):
        if refit:
            grid = refit_scale(w, h, grid, codes)
        changed = codes.copy()
        _descend_in_parallel(changed, (grid.decode(codes) - w) @ h, np.ascontiguousarray(h), grid)
        if (changed == codes).all():
            break
        codes = changed
    return codes, grid


def refit_scale(w: Float64Array, h: Float64Array, grid: RowGrid, codes: UInt8Array) -> RowGrid:
    """Fit the scale of least error to the levels of `codes`; keep the scale where it would not be positive."""
    levels = grid.decode(codes) / grid.scale[:, None]
    hl = levels @ h
    numerator, denominator = np.einsum("rn,rn->r", hl, w), np.einsum("rn,rn->r", hl, levels)
    best = np.divide(numerator, denominator, out=grid.scale.copy(), where=(denominator > 0.0) & (numerator > 0.0))
    best = np.maximum(best, grid.min_scale)
    return replace(grid, scale=half_scale(best.astype(np.float32)).astype(np.float64) if grid.half else best)


def output_error(difference: Float64Array, h: Float64Array) -> Float64Array:
    """The output error d H d' of each row, (rows,).  difference: d, (rows, n)."""
    return np.asarray(np.einsum("rn,rn->r", difference @ h, difference))


def _upper_of_inverse(h: Float64Array) -> Float64Array:
    """U, upper triangular, with U' U = inv(H + damping); more damping where inputs hardly vary and rounding errors dominate."""
    damping = max(DAMPING * float(np.mean(np.diag(h))), 1e-30)
    while (u := _upper(h + np.eye(len(h)) * damping)) is None:
        damping *= 10
    return u


def _upper(h: Float64Array) -> Float64Array | None:
    try:
        inverse = np.linalg.inv(h)
        return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)
    except np.linalg.LinAlgError:
        return None


def _descend_in_parallel(codes: UInt8Array, gradients: Float64Array, h: Float64Array, grid: RowGrid) -> None:
    """Descend in threads.  Rows are independent, so the result is the same however they are divided among threads."""
    count = min(len(codes), os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as executor:
        for rows in [slice(k, None, count) for k in range(count)]:
            scale, offset = grid.scale[rows], grid.offset[rows]
            executor.submit(_descend, codes[rows], gradients[rows], h, scale, offset, grid.table.integers, PASSES)


@compiled
def _round_block(
    w: Float64Array,
    u: Float64Array,
    scale: Float64Array,
    offset: Int64Array,
    thresholds: Float64Array,
    integers: Float64Array,
    codes: UInt8Array,
    errors: Float64Array,
) -> None:
    """Round the columns of one block in their order.  thresholds: in integer levels.  Fills codes and errors; changes w."""
    last = thresholds.size // 2
    for r in range(w.shape[0]):
        row_thresholds, levels = thresholds[offset[r] : offset[r] + last], integers[offset[r] : offset[r] + last + 1]
        for j in range(w.shape[1]):
            code = np.searchsorted(row_thresholds, w[r, j] / scale[r], side="right")
            codes[r, j] = code
            error = (w[r, j] - scale[r] * levels[code]) / u[j, j]
            errors[r, j] = error
            for k in range(j + 1, w.shape[1]):
                w[r, k] -= error * u[j, k]


@compiled
def _descend(
    codes: UInt8Array,
    gradients: Float64Array,
    h: Float64Array,
    scale: Float64Array,
    offset: Int64Array,
    integers: Int64Array,
    passes: int,
) -> None:
    """Change single codes to the neighboring level as long as that lowers the error.

    gradients: (w_hat - w) H, (rows, n).  Changes codes and gradients.
    """
    last = integers.size // 2
    n = h.shape[0]
    for r in range(codes.shape[0]):
        gradient = gradients[r]
        for _ in range(passes):
            moves = 0
            for j in range(n):
                here = integers[codes[r, j] + offset[r]]
                direction = -1 if gradient[j] > 0.0 else 1  # where the error falls
                code = codes[r, j] + direction
                if 0 <= code <= last:
                    change = scale[r] * (integers[code + offset[r]] - here)
                    if change * (2.0 * gradient[j] + change * h[j, j]) < -SMALLEST_GAIN * h[j, j] * scale[r] * scale[r]:
                        codes[r, j] = code
                        moves += 1
                        gradient += change * h[j]
            if moves == 0:
                break
