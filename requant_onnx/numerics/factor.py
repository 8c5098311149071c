"""The triangular factor of second moments, from which target weights, error feedback and conditional variances follow.

    H + damping = R R',   R upper triangular, with inputs in descending order of power

It is computed in blocks, with products in float32 and factors of the diagonal blocks in float64.  Products are divided
into strips, which are the same for every number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.parallel import run_all, slices

BLOCK = 256  # columns factored at a time
STRIP = 512  # columns per product
DAMPING = 0.01  # fraction of the mean diagonal that is added to the diagonal


@dataclass(frozen=True)
class Factor:
    """The factors of G matrices.

    r: factors, (G, n, n); only the upper triangle counts.  order: inputs in descending order of power, (G, n).
    inverses: inverses of the blocks on the diagonal, (G, b, b), by `blocks`.
    """

    r: Float32Array
    order: Int64Array
    inverses: tuple[Float64Array, ...]

    @property
    def blocks(self) -> list[slice]:
        """Blocks of columns, in ascending order; the first may be smaller."""
        return _blocks(self.r.shape[-1])

    def solve(self, b: Float64Array) -> Float64Array:
        """The solution X of X (H + damping) = B, in the original order.  b: (G, rows, n)."""
        order = self.order[:, None, :]
        solution = np.take_along_axis(b, np.broadcast_to(order, b.shape), -1).astype(np.float32)
        run_all([partial(self._solve, solution[:, rows]) for rows in slices(b.shape[1], STRIP)])
        x = np.empty(b.shape)
        np.put_along_axis(x, np.broadcast_to(order, b.shape), solution.astype(np.float64), -1)
        return x

    def _solve(self, b: Float32Array) -> None:
        """Solve in place, in the order of the factor."""
        pairs = list(zip(self.blocks, self.inverses, strict=True))
        for block, inverse in reversed(pairs):
            later = slice(block.stop, None)
            part = b[..., block] - b[..., later] @ self.r[:, block, later].swapaxes(1, 2)
            b[..., block] = part @ inverse.swapaxes(1, 2).astype(np.float32)
        for block, inverse in pairs:
            part = b[..., block] - b[..., : block.start] @ self.r[:, : block.start, block]
            b[..., block] = part @ inverse.astype(np.float32)

    def variances(self) -> Float64Array:
        """The variance of each input, given all inputs after it in the order, (G, n)."""
        found = np.empty(self.order.shape)
        np.put_along_axis(found, self.order, np.diagonal(self.r, axis1=1, axis2=2).astype(np.float64) ** 2, -1)
        return found


def factor(h: Float32Array) -> Factor:
    """Factor second moments, (G, n, n), with more damping if rounding errors dominate."""
    diagonals = np.diagonal(h, axis1=1, axis2=2)
    order = np.argsort(-diagonals, axis=1, kind="stable")
    damping = np.maximum(DAMPING * diagonals.mean(1, dtype=np.float64), 1e-30)
    while True:
        damped = np.stack([each[np.ix_(places, places)] for each, places in zip(h, order, strict=True)])
        index = np.arange(h.shape[-1])
        damped[:, index, index] += damping[:, None].astype(np.float32)
        inverses = _factor(damped)
        if inverses is not None:
            return Factor(damped, order, inverses)
        damping = damping * 10


def shrunk(h: Float32Array, share: float) -> Float32Array:
    """Shrink second moments, (G, n, n), toward the diagonal by `share`: a few places overstate how inputs covary.

    With 98 places for the 1,280 inputs of MobileNetV2's last layer, a share of 1/2 lowers the error on other images by 1.8 dB.
    """
    result = np.asarray(h * np.float32(1 - share))
    index = np.arange(h.shape[-1])
    result[:, index, index] = h[:, index, index]
    return result


def _factor(a: Float32Array) -> tuple[Float64Array, ...] | None:
    """Replace the upper triangle by its factor; return the inverses of the diagonal blocks, or None if it has no factor."""
    inverses = []
    for block in reversed(_blocks(a.shape[-1])):
        upper = np.triu(a[:, block, block].astype(np.float64))
        whole = upper + np.triu(upper, 1).swapaxes(1, 2)
        try:
            r = np.linalg.cholesky(whole[:, ::-1, ::-1])[:, ::-1, ::-1]
            inverse = np.linalg.inv(r)
        except np.linalg.LinAlgError:
            return None
        a[:, block, block] = r
        inverses.append(inverse)
        if block.start:
            before = np.ascontiguousarray(a[:, : block.start, block])
            turned = inverse.swapaxes(1, 2).astype(np.float32)
            run_all([partial(_multiply, before[:, rows], turned) for rows in slices(block.start, STRIP)])
            a[:, : block.start, block] = before
            run_all([partial(_subtract, a, before, columns) for columns in slices(block.start, STRIP)])
    return tuple(reversed(inverses)) if np.isfinite(a[:, 0]).all() else None


def _multiply(rows: Float32Array, by: Float32Array) -> None:
    rows[...] = rows @ by


def _subtract(a: Float32Array, panel: Float32Array, columns: slice) -> None:
    a[:, : columns.stop, columns] -= panel[:, : columns.stop] @ panel[:, columns].swapaxes(1, 2)


def _blocks(n: int) -> list[slice]:
    return [slice(max(0, end - BLOCK), end) for end in range(n, 0, -BLOCK)][::-1]
