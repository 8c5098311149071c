"""Images that need no data, for calibration: noise with the statistics of natural images.

Natural images show objects of every size that hide each other.  The dead leaves model (Lee, Mumford and Huang 2001, Int. J.
Computer Vision 41) does the same: opaque shapes dropped at random, their radii r distributed as r**-3, which makes the image
look the same at every scale.  A texture with the amplitude spectrum 1/f (Field 1987, J. Opt. Soc. Am. A 4) is added.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.arrays import Float64Array, UInt8Array
from requant_onnx.numerics.compiled import compiled

MEAN, STD = 0.47, 0.25  # brightness of shapes, in 0..1: about that of the train splits of CIFAR and ImageNet
COLOR = 0.1  # standard deviation of a channel about the brightness of its shape
SHADING = 0.2  # standard deviation of the change of brightness along the longer side, within a shape
TEXTURE = 0.04  # standard deviation of the 1/f texture
COMMON = 0.95  # correlation of two channels of the texture
SMALLEST, LARGEST = 2.0, 0.7  # radius of a shape: in pixels, and as a fraction of the longer side
SHAPES = 400  # largest number of shapes in a 32x32 image; proportional to the number of pixels


def noise_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> UInt8Array:
    """Synthetic images, pixels 0..255, (count, channels, height, width); the same for the same seed."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    amplitude = np.divide(1.0, frequency, out=np.zeros_like(frequency), where=frequency > 0.0)
    images = np.empty((count, channels, height, width), np.uint8)
    for k in range(count):
        fields = _fields(generator, 1 + channels, amplitude, (height, width))
        texture = np.sqrt(COMMON) * fields[:1] + np.sqrt(1 - COMMON) * fields[1:]
        pixels = _leaves(generator, channels, height, width) + TEXTURE * texture
        images[k] = np.rint(np.clip(pixels, 0.0, 1.0) * 255)
    return images


def _leaves(generator: np.random.Generator, channels: int, height: int, width: int) -> Float64Array:
    """Draw the shapes of an image, (channels, height, width), in 0..1 except for the tails of the distributions."""
    side, shapes = max(height, width), max(1, SHAPES * height * width // 32**2)
    smallest, largest = min(SMALLEST, LARGEST * side), LARGEST * side
    radius = (smallest**-2 + generator.random(shapes) * (largest**-2 - smallest**-2)) ** -0.5
    center = (generator.random((shapes, 2)) * 1.2 - 0.1) * (height, width)
    angle, stretch = np.pi * generator.random(shapes), np.exp(generator.normal(0.0, 0.4, shapes))
    color = generator.normal(MEAN, STD, (shapes, 1)) + generator.normal(0.0, COLOR, (shapes, channels))
    slope = generator.normal(0.0, SHADING / side, (shapes, 2))
    image = np.empty((channels, height, width))
    _paint(image, radius, center, angle, stretch, generator.random(shapes) < 0.5, color, slope)
    return image


@compiled
def _paint(
    image: Float64Array,
    radius: Float64Array,
    center: Float64Array,
    angle: Float64Array,
    stretch: Float64Array,
    is_round: npt.NDArray[np.bool_],
    color: Float64Array,
    slope: Float64Array,
) -> None:
    """Fill the image from front to back: ellipses and rectangles; the last shape is the background."""
    channels, height, width = image.shape
    free = np.ones((height, width), np.bool_)
    left = height * width
    last = radius.size - 1
    for s in range(radius.size):
        if left == 0:
            break
        cosine, sine = np.cos(angle[s]), np.sin(angle[s])
        reach = 2.0**0.5 * radius[s] * max(stretch[s], 1 / stretch[s])
        top, bottom = max(0, int(center[s, 0] - reach)), min(height, int(center[s, 0] + reach) + 2)
        start, end = max(0, int(center[s, 1] - reach)), min(width, int(center[s, 1] + reach) + 2)
        if s == last:
            top, bottom, start, end = 0, height, 0, width
        for i in range(top, bottom):
            for j in range(start, end):
                if free[i, j]:
                    y, x = i - center[s, 0], j - center[s, 1]
                    p, q = abs(x * cosine + y * sine) / stretch[s], abs(y * cosine - x * sine) * stretch[s]
                    inside = p * p + q * q < radius[s] * radius[s] if is_round[s] else max(p, q) < radius[s]
                    if inside or s == last:
                        free[i, j] = False
                        left -= 1
                        for c in range(channels):
                            image[c, i, j] = color[s, c] + slope[s, 0] * y + slope[s, 1] * x


def _fields(generator: np.random.Generator, count: int, amplitude: Float64Array, shape: tuple[int, int]) -> Float64Array:
    """Gaussian fields, (count, h, w), with the amplitude spectrum `amplitude`, mean 0 and standard deviation 1."""
    white = np.fft.rfft2(generator.normal(size=(count, *shape)))
    fields = np.fft.irfft2(white * amplitude, s=shape)
    deviation = fields.std(axis=(1, 2), keepdims=True)
    return np.asarray(fields / np.where(deviation > 0.0, deviation, 1.0))
