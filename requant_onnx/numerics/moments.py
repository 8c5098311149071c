"""Second moments of a layer's inputs and of its target outputs, summed batch by batch; its output error depends on nothing else.

A Conv is a matrix product for each place of its kernel: y[r] = sum_c w[r, c] x[c] + b[r] with c over (ic/group, kh, kw).
With the means removed (the bias absorbs them), the squared error of a row w_hat against the target y is

    E (w_hat x - y)**2  =  w_hat C_xx w_hat'  -  2 w_hat C_xy  +  C_yy,      best bias  b = E y - w_hat E x
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array

PATCH_BYTES = 1 << 26  # bytes of the patches that are cut out at a time


@dataclass(frozen=True)
class Window:
    """The window that a Conv slides over its input, one entry per spatial axis.  pads: elements before and after each axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    group: int


@dataclass
class Moments:
    """Sums over all places added so far, for one group of channels.

    xx: sum of x x', (n, n).  xy: sum of y x', (rows, n).  yy: sum of y**2, (rows,).  x, y: sums of x, (n,), and of y, (rows,).
    count: number of places.
    """

    xx: Float64Array
    xy: Float64Array
    yy: Float64Array
    x: Float64Array
    y: Float64Array
    count: int = field(default=0)

    @classmethod
    def empty(cls, columns: int, rows: int) -> Moments:
        """The moments of no place."""
        return cls(np.zeros((columns, columns)), np.zeros((rows, columns)), np.zeros(rows), np.zeros(columns), np.zeros(rows))

    def add(self, x: Float32Array, y: Float32Array) -> None:
        """Add places.  x: inputs, (places, n).  y: target outputs, (places, rows)."""
        with np.errstate(over="ignore", invalid="ignore"):
            self.xx += x.T @ x
            self.xy += y.T @ x
        self.yy += np.einsum("pr,pr->r", y, y, dtype=np.float64)
        self.x += x.sum(0, dtype=np.float64)
        self.y += y.sum(0, dtype=np.float64)
        self.count += len(x)

    @property
    def is_finite(self) -> bool:
        """Whether no input and no output was NaN, infinite, or too large to be summed in float32."""
        return bool(np.isfinite(self.xx).all() and np.isfinite(self.xy).all() and np.isfinite(self.yy).all())

    def centered(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """The central moments C_xx (n, n), C_xy (rows, n) and C_yy (rows,)."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - np.outer(x, x)
        # covers the rounding errors that constant inputs leave
        xx += np.eye(len(x)) * (1e-6 * float(np.mean(np.diag(self.xx))) / self.count)
        return (xx + xx.T) / 2, self.xy / self.count - np.outer(y, x), np.maximum(self.yy / self.count - y * y, 0.0)

    def uncentered(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """The same moments about zero, for a layer without a bias."""
        return self.xx / self.count, self.xy / self.count, self.yy / self.count

    def bias(self, w_hat: Float64Array) -> Float64Array:
        """The bias of least error, (rows,).  w_hat: decoded weights, (rows, n)."""
        return np.asarray((self.y - w_hat @ self.x) / self.count)


def error_of(w_hat: Float64Array, moments: tuple[Float64Array, Float64Array, Float64Array]) -> Float64Array:
    """The mean squared output error, (rows,).  w_hat: decoded weights, (rows, n)."""
    xx, xy, yy = moments
    return np.asarray(np.einsum("rn,rn->r", w_hat @ xx - 2 * xy, w_hat) + yy)


def patches(x: Float32Array, window: Window) -> Iterator[tuple[slice, list[Float32Array]]]:
    """Cut an input (n, ic, ...) into patches, PATCH_BYTES at a time: (images, [(places, ic/group * kernel) for each group]).

    Places are in the order (image, *spatial), as in an output (n, oc, ...) with its channels moved last.
    """
    rank = len(window.kernel)
    spatial = tuple(range(2, 2 + rank))
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *window.pads])
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, spatial)
    steps: Sequence[slice] = [slice(None), slice(None), *(slice(None, None, s) for s in window.strides)]
    steps = [*steps, *(slice(None, None, d) for d in window.dilations)]
    view = view[tuple(steps)]
    each = int(np.prod(view.shape[1:])) * 4
    size = max(1, PATCH_BYTES // max(1, each))
    for start in range(0, len(x), size):
        images = slice(start, min(start + size, len(x)))
        part = np.moveaxis(view[images], 1, 1 + rank)  # (n, *places, ic, *kernel)
        places = int(np.prod(part.shape[: 1 + rank]))
        cut = [part] if window.group == 1 else np.split(part, window.group, 1 + rank)
        yield images, [np.ascontiguousarray(group).reshape(places, -1) for group in cut]
