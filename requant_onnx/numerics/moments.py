"""Second moments of a layer's inputs and target outputs, summed batch by batch, for rounding.

A Conv is a matrix product at each place of its kernel: y[r] = sum_c w[r, c] x[c] + b[r] with c over (ic/group, kh, kw).
With the means removed (the bias absorbs them), the squared error of a row w_hat relative to the target y is

    E (w_hat x - y)**2  =  w_hat C_xx w_hat'  -  2 w_hat C_xy  +  C_yy,      best bias  b = E y - w_hat E x

All arrays begin with the groups of channels, (G, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.factor import STRIP
from requant_onnx.numerics.parallel import run_all, slices

PLACE_BYTES = 1 << 26  # bytes of the patches that are extracted at a time


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
    """The sums over all places added so far.

    xx: sum of x x', (G, n, n), valid in the upper triangle until `centered` or `uncentered`.  xy: sum of y x', (G, rows, n).
    x, y: sums of x, (G, n), and of y, (G, rows).  count: number of places.
    """

    xx: Float32Array
    xy: Float64Array
    x: Float64Array
    y: Float64Array
    count: int = field(default=0)

    @classmethod
    def empty(cls, groups: int, columns: int, rows: int) -> Moments:
        """The moments of zero places."""
        return cls(
            np.zeros((groups, columns, columns), np.float32),
            np.zeros((groups, rows, columns)),
            np.zeros((groups, columns)),
            np.zeros((groups, rows)),
        )

    def add(self, x: Float32Array, y: Float32Array) -> None:
        """Add places.  x: inputs, (G, places, n).  y: target outputs, (G, places, rows)."""
        with np.errstate(over="ignore", invalid="ignore"):
            turned = x.swapaxes(1, 2)
            run_all([partial(self._add_strip, turned, x, columns) for columns in slices(x.shape[2], STRIP)])
            self.xy += y.swapaxes(1, 2) @ x
        self.add_means(x, y)

    def add_means(self, x: Float32Array, y: Float32Array) -> None:
        """Add places to the first moments only, which suffice to correct a bias."""
        with np.errstate(over="ignore", invalid="ignore"):
            self.x += x.sum(1, dtype=np.float64)
            self.y += y.sum(1, dtype=np.float64)
        self.count += x.shape[1]

    def _add_strip(self, turned: Float32Array, x: Float32Array, columns: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.xx[:, : columns.stop, columns] += turned[:, : columns.stop] @ x[..., columns]

    @property
    def is_finite(self) -> bool:
        """Whether no input and no output was NaN, infinite, or too large to be summed in float32."""
        return all(np.isfinite(sums).all() for sums in (self.xx, self.xy, self.x, self.y))

    def centered(self) -> tuple[Float32Array, Float64Array]:
        """The central moments C_xx, (G, n, n), and C_xy, (G, rows, n).  Overwrites the sums of x x'."""
        x, y = self.x / self.count, self.y / self.count
        powers = np.diagonal(self.xx, axis1=1, axis2=2).mean(1, dtype=np.float64) / self.count
        xx = self._whole()
        for columns in slices(xx.shape[-1], STRIP):
            xx[..., columns] -= (x[:, :, None] * x[:, None, columns]).astype(np.float32)
        index = np.arange(xx.shape[-1])
        xx[:, index, index] += (1e-6 * powers)[:, None].astype(np.float32)  # exceeds the rounding errors of constant inputs
        return xx, self.xy / self.count - y[..., None] * x[:, None]

    def uncentered(self) -> tuple[Float32Array, Float64Array]:
        """The same moments about zero, for a layer without a bias."""
        return self._whole(), self.xy / self.count

    def _whole(self) -> Float32Array:
        """The moments E x x', in both triangles, computed in place of the sums."""
        xx, self.xx = self.xx, np.zeros((0, 0, 0), np.float32)
        xx *= np.float32(1 / self.count)
        for columns in slices(xx.shape[-1], STRIP):
            corner = np.triu(xx[:, columns, columns])
            xx[:, columns, columns] = corner + np.triu(corner, 1).swapaxes(1, 2)
            xx[:, columns.stop :, columns] = xx[:, columns, columns.stop :].swapaxes(1, 2)
        return xx


@dataclass
class Sample:
    """Places and their target outputs for comparing candidates.  x: [(G, places, n)].  y: [(G, places, rows)]."""

    x: list[Float32Array] = field(default_factory=list)
    y: list[Float32Array] = field(default_factory=list)

    def add(self, x: Float32Array, y: Float32Array) -> None:
        """Add places."""
        self.x.append(x)
        self.y.append(y)

    @property
    def is_finite(self) -> bool:
        """Whether all inputs and outputs are finite."""
        return all(np.isfinite(part).all() for part in (*self.x, *self.y))

    def sums(self) -> tuple[Float64Array, Float64Array, int]:
        """The sums of x, (G, n), and of y, (G, rows), and the number of places."""
        x = sum((part.sum(1, dtype=np.float64) for part in self.x), np.zeros(()))
        y = sum((part.sum(1, dtype=np.float64) for part in self.y), np.zeros(()))
        return np.asarray(x), np.asarray(y), sum(part.shape[1] for part in self.x)

    @property
    def power(self) -> float:
        """The total power of a place's outputs, averaged over places; tiny if all are 0."""
        places = sum(part.shape[1] for part in self.y)
        total = sum(float(np.square(part, dtype=np.float64).sum()) for part in self.y)
        return float(max(total / places, 1e-30))

    def error(self, w_hat: Float64Array, bias: Float64Array) -> float:
        """The squared error relative to the power of the outputs.  w_hat: decoded weights, (G, rows, n).  bias: (G, rows)."""
        turned, offsets = w_hat.astype(np.float32).swapaxes(1, 2), bias.astype(np.float32)[:, None]
        errors = np.zeros(len(self.x))
        run_all([partial(self._error, k, turned, offsets, errors) for k in range(len(self.x))])
        power = sum(float(np.square(part, dtype=np.float64).sum()) for part in self.y)
        return float(errors.sum()) / power if power > 0.0 else 0.0

    def _error(self, k: int, turned: Float32Array, offsets: Float32Array, errors: Float64Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            difference = self.x[k] @ turned + offsets - self.y[k]
            errors[k] = np.square(difference, dtype=np.float64).sum()


def fitted_bias(w_hat: Float64Array, sums: Sequence[tuple[Float64Array, Float64Array, int]]) -> Float64Array:
    """The bias of least error, (G, rows).

    w_hat: decoded weights, (G, rows, n).  sums: sums of x, (G, n), and of y, (G, rows), and number of places.
    """
    x, y = (np.asarray(sum(part[k] for part in sums)) for k in (0, 1))
    return np.asarray((y - (w_hat @ x[..., None])[..., 0]) / sum(part[2] for part in sums))


def patches(x: Float32Array, window: Window, places: Int64Array) -> Float32Array:
    """Extract patches from an input, (images, ic, ...), as (G, places, ic/group * kernel).

    places: indices in the order (image, *spatial), as in an output (images, oc, ...) with its channels moved last.
    """
    rank = len(window.kernel)
    spatial = tuple(range(2, 2 + rank))
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *window.pads])
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, spatial)
    steps = [slice(None), slice(None), *(slice(None, None, s) for s in (*window.strides, *window.dilations))]
    view = view[tuple(steps)]
    view = np.moveaxis(view, 1, 1 + rank)  # (images, *spatial, ic, *kernel)
    index = np.unravel_index(places, view.shape[: 1 + rank])
    each = int(np.prod(view.shape[1 + rank :]))
    cut = np.empty((window.group, len(places), each // window.group), np.float32)
    for part in slices(len(places), max(1, PLACE_BYTES // (4 * each))):
        taken = view[tuple(axis[part] for axis in index)].reshape(-1, window.group, cut.shape[-1])
        cut[:, part] = taken.swapaxes(0, 1)
    return cut
