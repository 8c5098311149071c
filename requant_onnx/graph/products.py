"""Weights as matrices (G, rows, n), one for each of G groups of channels, and the inputs that a layer multiplies them by.

Conv           (oc, ic/group, kh, kw)  -> group x (oc/group, ic/group * kh * kw)
ConvTranspose  (ic, oc/group, kh, kw)  -> as the Conv over the input with zeros inserted: channels swapped, kernel reversed
Gemm, MatMul   (oc, ic) or (ic, oc)    -> (oc, ic)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.moments import Window, patches

T = TypeVar("T", bound=np.generic)
Attributes = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product(ABC):
    """The matrix product that a node computes with a weight of a given shape.

    The output channels, in their order, are the rows of the first group, then those of the second, ...
    """

    shape: Shape
    attributes: Attributes = field(repr=False, default_factory=dict)

    @property
    def group(self) -> int:
        """The number of groups of channels that are multiplied separately."""
        return int(self.attributes.get("group", 1))

    @property
    @abstractmethod
    def rows(self) -> int:
        """The number of output channels of a group."""

    @property
    def channels(self) -> int:
        """The number of output channels of all groups."""
        return self.group * self.rows

    @property
    def scale_is_shared(self) -> bool:
        """Whether a scale belongs to rows of several groups."""
        return False

    @abstractmethod
    def matrices(self, w: npt.NDArray[T]) -> npt.NDArray[T]:
        """The weight, or any tensor of its shape, as (G, rows, n)."""

    @abstractmethod
    def tensor(self, matrices: npt.NDArray[T]) -> npt.NDArray[T]:
        """The inverse of `matrices`."""

    @abstractmethod
    def inputs(self, x: Float32Array, places: Int64Array) -> Float32Array:
        """The vectors that the rows are multiplied by at these places, (G, places, n).  x: the input, (images, ...)."""

    @abstractmethod
    def results(self, y: Float32Array, places: Int64Array) -> Float32Array:
        """The output at these places, (G, places, rows)."""

    @abstractmethod
    def count(self, y: Float32Array) -> int:
        """The number of places in an output."""

    @abstractmethod
    def mean_inputs(self, means: Float64Array) -> Float64Array | None:
        """The mean of the vectors that the rows are multiplied by, (G, n).  means: channel means of the input, (ic,).

        None where the means do not fit, or where the result depends on the place.
        """

    def by_row(self, parameter: npt.NDArray[T]) -> npt.NDArray[T]:
        """A scale or zero point, () or (channels of the weight,), repeated for each row of each group, (G, rows)."""
        if parameter.size == 1 or self.scale_is_shared:
            return np.array(np.broadcast_to(parameter, (self.group, self.rows)))
        return np.array(parameter.reshape(self.group, self.rows))


@dataclass(frozen=True)
class DenseProduct(Product):
    """The product y = x @ w, w: (..., ic, oc) with only one matrix; with rows_first y = x @ w.T, w: (oc, ic)."""

    rows_first: bool = False

    @property
    def group(self) -> int:
        return 1

    @property
    def rows(self) -> int:
        return self.shape[-2 if self.rows_first else -1]

    def matrices(self, w: npt.NDArray[T]) -> npt.NDArray[T]:
        matrix = w.reshape(w.shape[-2:])
        return np.ascontiguousarray(matrix if self.rows_first else matrix.T)[None]

    def tensor(self, matrices: npt.NDArray[T]) -> npt.NDArray[T]:
        matrix = matrices[0] if self.rows_first else matrices[0].T
        return np.ascontiguousarray(matrix).reshape(self.shape)

    def inputs(self, x: Float32Array, places: Int64Array) -> Float32Array:
        return x.reshape(-1, x.shape[-1])[places][None]

    def results(self, y: Float32Array, places: Int64Array) -> Float32Array:
        return y.reshape(-1, y.shape[-1])[places][None]

    def count(self, y: Float32Array) -> int:
        return int(y.size // y.shape[-1])

    def mean_inputs(self, means: Float64Array) -> Float64Array | None:
        return means[None] if means.size == self.shape[-1 if self.rows_first else -2] else None


@dataclass(frozen=True)
class _ChannelsSecond(Product):
    """A product whose input and output are (images, channels, *spatial)."""

    def results(self, y: Float32Array, places: Int64Array) -> Float32Array:
        last = np.moveaxis(y, 1, -1)
        taken = last[np.unravel_index(places, last.shape[:-1])].reshape(len(places), self.group, -1)
        return np.ascontiguousarray(taken.swapaxes(0, 1))

    def count(self, y: Float32Array) -> int:
        return int(y.size // y.shape[1])

    def _spatial(self, name: str, default: int) -> tuple[int, ...]:
        """An attribute with one value per spatial axis."""
        return tuple(self.attributes.get(name, (default,) * len(self.shape[2:])))

    def _pads(self) -> tuple[tuple[int, int], ...]:
        rank = len(self.shape[2:])
        pads = self.attributes.get("pads", (0,) * 2 * rank)
        return tuple(zip(pads[:rank], pads[rank:], strict=True))


@dataclass(frozen=True)
class ConvProduct(_ChannelsSecond):
    """The product of a Conv.  https://onnx.ai/onnx/operators/onnx__Conv.html."""

    @property
    def rows(self) -> int:
        return self.shape[0] // self.group

    def matrices(self, w: npt.NDArray[T]) -> npt.NDArray[T]:
        return w.reshape(self.group, w.shape[0] // self.group, -1)

    def tensor(self, matrices: npt.NDArray[T]) -> npt.NDArray[T]:
        return np.ascontiguousarray(matrices.reshape(self.shape))

    def inputs(self, x: Float32Array, places: Int64Array) -> Float32Array:
        strides, dilations = self._spatial("strides", 1), self._spatial("dilations", 1)
        pads = self._window_pads(x.shape[2:], strides, dilations)
        return patches(x, Window(self.shape[2:], strides, pads, dilations, self.group), places)

    def mean_inputs(self, means: Float64Array) -> Float64Array | None:
        kernel = int(np.prod(self.shape[2:]))
        fits = means.size == self.group * self.shape[1]
        return np.repeat(means, kernel).reshape(self.group, -1) if fits else None

    def _window_pads(self, size: Shape, strides: Shape, dilations: Shape) -> tuple[tuple[int, int], ...]:
        """The padding, from auto_pad and pads."""
        auto = self.attributes.get("auto_pad", "NOTSET")
        if auto not in ("SAME_UPPER", "SAME_LOWER"):
            return self._pads() if auto == "NOTSET" else ((0, 0),) * len(size)
        totals = [
            max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
            for n, k, s, d in zip(size, self.shape[2:], strides, dilations, strict=True)
        ]
        halves = [(t // 2, t - t // 2) for t in totals]
        return tuple(halves if auto == "SAME_UPPER" else [(b, a) for a, b in halves])


@dataclass(frozen=True)
class ConvTransposeProduct(_ChannelsSecond):
    """The product of a ConvTranspose without auto_pad and output_shape: https://onnx.ai/onnx/operators/onnx__ConvTranspose.html"""

    @property
    def rows(self) -> int:
        return self.shape[1]

    @property
    def scale_is_shared(self) -> bool:
        return self.group > 1

    def matrices(self, w: npt.NDArray[T]) -> npt.NDArray[T]:
        parts = w.reshape(self.group, -1, *w.shape[1:]).swapaxes(1, 2)
        turned = np.flip(parts, tuple(range(3, parts.ndim)))
        return np.ascontiguousarray(turned).reshape(self.group, w.shape[1], -1)

    def tensor(self, matrices: npt.NDArray[T]) -> npt.NDArray[T]:
        parts = matrices.reshape(self.group, self.shape[1], -1, *self.shape[2:])
        turned = np.flip(parts, tuple(range(3, parts.ndim))).swapaxes(1, 2)
        return np.ascontiguousarray(turned).reshape(self.shape)

    def inputs(self, x: Float32Array, places: Int64Array) -> Float32Array:
        """The inputs of the equivalent Conv of stride 1, with zeros between them, and padded by the reach of the kernel."""
        kernel, strides, dilations = self.shape[2:], self._spatial("strides", 1), self._spatial("dilations", 1)
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
        spread = np.zeros((*x.shape[:2], *size), x.dtype)
        spread[_cut(slice(None, None, s) for s in strides)] = x
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        extra = self._spatial("output_padding", 0)
        around = [(r - a, r - b + e) for r, (a, b), e in zip(reach, self._pads(), extra, strict=True)]
        trimmed = spread[_cut(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(around, size, strict=True))]
        pads = tuple((max(a, 0), max(b, 0)) for a, b in around)
        return patches(trimmed, Window(kernel, (1,) * len(kernel), pads, dilations, self.group), places)

    def mean_inputs(self, means: Float64Array) -> None:
        """None: at a stride above 1, a place uses only part of the kernel, and which part depends on the place."""


def _cut(spatial: Iterable[slice]) -> tuple[slice, ...]:
    """An index into the spatial axes of (n, c, ...)."""
    return (slice(None), slice(None), *spatial)
