"""Synthetic images for calibration without data: noise with the statistics of natural images.

Natural images show objects of every size that hide each other.  The dead leaves model (Lee, Mumford and Huang 2001, Int. J.
Computer Vision 41) does the same: opaque shapes dropped at random, their radii r distributed as r**-3, which makes the image
look the same at every scale.  A texture with the amplitude spectrum 1/f (Field 1987, J. Opt. Soc. Am. A 4) is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.arrays import Float64Array, Int64Array, UInt8Array

MEAN, STD = 0.47, 0.25  # brightness of shapes, in 0..1: about that of the train splits of CIFAR and ImageNet
COLOR = 0.1  # standard deviation of a channel about the brightness of its shape
SHADING = 0.2  # standard deviation of the change of brightness along the longer side, within a shape
TEXTURE = 0.04  # standard deviation of the 1/f texture
COMMON = 0.95  # correlation between two channels of the texture
SMALLEST, LARGEST = 2.0, 0.7  # radius of a shape: in pixels, and as a fraction of the longer side
SHAPES = 400  # largest number of shapes in a 32x32 image; proportional to the number of pixels
WINDOW = 16  # side of a square, in pixels; shapes inside it are small
SMALLEST_BATCH = 64  # shapes whose boxes are looked up at once; each batch is twice as large as the last


def noise_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> UInt8Array:
    """Synthetic images, pixels 0..255, (count, channels, height, width); the same for the same seed."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    amplitude = np.divide(1.0, frequency, out=np.zeros_like(frequency), where=frequency > 0.0)
    images = np.empty((count, channels, height, width), np.uint8)
    for k in range(count):
        fields = _fields(generator.normal(size=(1 + channels, height, width)), amplitude)
        texture = np.sqrt(COMMON) * fields[:1] + np.sqrt(1 - COMMON) * fields[1:]
        pixels = _painted(_drawn(generator, channels, height, width), height, width) + TEXTURE * texture
        images[k] = np.rint(np.clip(pixels, 0.0, 1.0) * 255)
    return images


@dataclass(frozen=True)
class _Leaves:
    """Ellipses and rectangles from front to back; the last one is the background.  Each array is (shapes, ...).

    radius: radius, in pixels.  center: row and column.  angle: in radians.  stretch: factor on one axis, divisor of the other.
    color: color of each channel at the center.  slope: change of color per row and per column.
    """

    radius: Float64Array
    center: Float64Array
    angle: Float64Array
    stretch: Float64Array
    color: Float64Array
    slope: Float64Array
    is_round: npt.NDArray[np.bool_]

    def boxes(self, height: int, width: int) -> Int64Array:
        """The bounds of each shape within the image, (shapes, 4): top, bottom, left, right; empty boxes for shapes outside."""
        long, short = self.radius * self.stretch, self.radius / self.stretch
        cosine, sine = np.abs(np.cos(self.angle)), np.abs(np.sin(self.angle))
        reach = [
            np.where(self.is_round, np.hypot(long * a, short * b), long * a + short * b)
            for a, b in ((sine, cosine), (cosine, sine))
        ]
        starts = [np.maximum(0, (self.center[:, k] - reach[k]).astype(np.int64)) for k in (0, 1)]
        ends = [np.minimum(n, (self.center[:, k] + reach[k]).astype(np.int64) + 2) for k, n in ((0, height), (1, width))]
        return np.stack([starts[0], ends[0], starts[1], ends[1]], 1)

    def cover(self, chosen: Int64Array, top: Int64Array, left: Int64Array, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Whether each pixel of a window of each chosen shape is inside the shape, (chosen, height, width)."""
        radius, angle, stretch, is_round = (
            array[chosen, None, None] for array in (self.radius, self.angle, self.stretch, self.is_round)
        )
        y = (top[:, None] + np.arange(height) - self.center[chosen, :1])[:, :, None]
        x = (left[:, None] + np.arange(width) - self.center[chosen, 1:])[:, None, :]
        cosine, sine = np.cos(angle), np.sin(angle)
        p, q = np.abs(x * cosine + y * sine) / stretch, np.abs(y * cosine - x * sine) * stretch
        return np.where(is_round, p * p + q * q < radius * radius, np.maximum(p, q) < radius)


def _drawn(generator: np.random.Generator, channels: int, height: int, width: int) -> _Leaves:
    """Draw the shapes of an image; colors are in 0..1 except in the tails of the distributions."""
    side, count = max(height, width), max(1, SHAPES * height * width // 32**2)
    smallest, largest = min(SMALLEST, LARGEST * side), LARGEST * side
    return _Leaves(
        radius=(smallest**-2 + generator.random(count) * (largest**-2 - smallest**-2)) ** -0.5,
        center=(generator.random((count, 2)) * 1.2 - 0.1) * (height, width),
        angle=np.pi * generator.random(count),
        stretch=np.exp(generator.normal(0.0, 0.4, count)),
        color=generator.normal(MEAN, STD, (count, 1)) + generator.normal(0.0, COLOR, (count, channels)),
        slope=generator.normal(0.0, SHADING / side, (count, 2)),
        is_round=generator.random(count) < 0.5,
    )


def _painted(leaves: _Leaves, height: int, width: int) -> Float64Array:
    """The image of the shapes, (channels, height, width)."""
    front = _front(leaves, height, width)
    y, x = np.arange(height)[:, None] - leaves.center[front, 0], np.arange(width) - leaves.center[front, 1]
    return np.asarray(np.moveaxis(leaves.color[front], 2, 0) + leaves.slope[front, 0] * y + leaves.slope[front, 1] * x)


def _front(leaves: _Leaves, height: int, width: int) -> Int64Array:
    """The first shape that covers each pixel, (height, width); the last shape is the background."""
    last = leaves.radius.size - 1
    front = np.full((height + WINDOW, width + WINDOW), last)  # windows of small shapes may extend beyond the edge
    free = np.zeros(front.shape, np.bool_)
    free[:height, :width] = True
    boxes = leaves.boxes(height, width)
    sides = boxes[:, 1::2] - boxes[:, ::2]
    first, count = 0, SMALLEST_BATCH
    while first < last:
        batch = np.arange(first, min(first + count, last))
        batch = batch[(sides[batch] > 0).all(1)]
        batch = batch[_sums(free, boxes[batch]) > 0]  # most of the later shapes are hidden
        small = np.asarray((sides[batch] <= WINDOW).all(1))
        covers = iter(leaves.cover(batch[small], boxes[batch[small], 0], boxes[batch[small], 2], WINDOW, WINDOW))
        for s, is_small in zip(batch.tolist(), small.tolist(), strict=True):
            top, bottom, left, right = boxes[s].tolist()
            if is_small:
                cover, bottom, right = next(covers), top + WINDOW, left + WINDOW
            else:
                one = np.array([s])
                cover = leaves.cover(one, boxes[one, 0], boxes[one, 2], bottom - top, right - left)[0]
            here = free[top:bottom, left:right]
            cover &= here
            front[top:bottom, left:right][cover] = s
            here ^= cover
        first, count = first + count, 2 * count
    return front[:height, :width]


def _sums(mask: npt.NDArray[np.bool_], boxes: Int64Array) -> Int64Array:
    """The number of pixels of a mask in each box, (boxes,)."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(mask, 0), 1, out=sums[1:, 1:])
    top, bottom, left, right = boxes.T
    return np.asarray(sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left])


def _fields(white: Float64Array, amplitude: Float64Array) -> Float64Array:
    """Gaussian fields with amplitude spectrum `amplitude`, mean 0 and standard deviation 1.  white: white noise, (n, h, w)."""
    fields = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=white.shape[1:])
    deviation = fields.std(axis=(1, 2), keepdims=True)
    return np.asarray(fields / np.where(deviation > 0.0, deviation, 1.0))
