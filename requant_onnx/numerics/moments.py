"""Second moments of what a layer reads and of what it should give, streamed: all that its output error depends on.

A Conv is a matrix product for each place of its kernel: y[r] = sum_c w[r, c] x[c] + b[r] with c over (ic/group, kh, kw).
With the means taken out (the bias takes them in), the squared error of a row w_hat against the target y is

    E (w_hat x - y)**2  =  w_hat C_xx w_hat'  -  2 w_hat C_xy  +  C_yy,      best bias  b = E y - w_hat E x
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array

PATCH_BYTES = 1 << 26  # of the patches cut out at a time


@dataclass(frozen=True)
class Window:
    """How a Conv moves over its input, one entry a spatial axis; pads: before and after each axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    group: int


@dataclass
class Moments:
    """Sums over all places seen, for one group of channels.  xx: (n, n), xy: (rows, n), yy, y: (rows,), x: (n,)."""

    xx: Float64Array
    xy: Float64Array
    yy: Float64Array
    x: Float64Array
    y: Float64Array
    count: int = field(default=0)

    @classmethod
    def empty(cls, columns: int, rows: int) -> Moments:
        """No place seen yet."""
        return cls(np.zeros((columns, columns)), np.zeros((rows, columns)), np.zeros(rows), np.zeros(columns), np.zeros(rows))

    def add(self, x: Float32Array, y: Float32Array) -> None:
        """x: (places, n), y: (places, rows)."""
        with np.errstate(over="ignore", invalid="ignore"):
            self.xx += x.T @ x
            self.xy += y.T @ x
        self.yy += np.einsum("pr,pr->r", y, y, dtype=np.float64)
        self.x += x.sum(0, dtype=np.float64)
        self.y += y.sum(0, dtype=np.float64)
        self.count += len(x)

    @property
    def is_finite(self) -> bool:
        """Whether no input and no output was NaN, infinite, or beyond what float32 can sum."""
        return bool(np.isfinite(self.xx).all() and np.isfinite(self.xy).all() and np.isfinite(self.yy).all())

    def centered(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """C_xx (n, n), C_xy (rows, n) and C_yy (rows,)."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - np.outer(x, x)
        xx += np.eye(len(x)) * (
            1e-6 * float(np.mean(np.diag(self.xx))) / self.count
        )  # what rounding errors leave of constant inputs
        return (xx + xx.T) / 2, self.xy / self.count - np.outer(y, x), np.maximum(self.yy / self.count - y * y, 0.0)

    def uncentered(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """The same about zero, for a layer that has no bias."""
        return self.xx / self.count, self.xy / self.count, self.yy / self.count

    def bias(self, w_hat: Float64Array) -> Float64Array:
        """(rows,) the bias of least error."""
        return np.asarray((self.y - w_hat @ self.x) / self.count)


def error_of(w_hat: Float64Array, moments: tuple[Float64Array, Float64Array, Float64Array]) -> Float64Array:
    """(rows,) mean squared output error.  w_hat: (rows, n)."""
    xx, xy, yy = moments
    return np.asarray(np.einsum("rn,rn->r", w_hat @ xx - 2 * xy, w_hat) + yy)


def patches(x: Float32Array, window: Window) -> Iterator[tuple[slice, list[Float32Array]]]:
    """(images, [(places, ic/group * kernel) for each group]) of an input (n, ic, ...), PATCH_BYTES at a time.

    Places in the order (image, *spatial), as an output (n, oc, ...) has them when its channels are moved last.
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
        yield images, [np.ascontiguousarray(own).reshape(places, -1) for own in cut]
