"""Images that need no data: noise with the statistics of natural ones, for calibration.

The power spectrum of natural images falls as 1/f**2, that is their amplitude as 1/f (Field 1987, J. Opt. Soc. Am. A 4); their
channels vary together; brightness and contrast differ from image to image.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MEAN, STD = 0.46, 0.25  # of all pixels, in 0..1: about those of the train splits of CIFAR and ImageNet
COMMON = 0.95  # correlation of two channels
SPREAD = 0.5  # share of the variance that lies between the means of images


def noise_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(count, channels, height, width) pixels 0..255; the same for the same seed."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    amplitude = np.divide(1.0, frequency, out=np.zeros_like(frequency), where=frequency > 0.0)
    images = np.empty((count, channels, height, width), np.uint8)
    for k in range(count):
        fields = _fields(generator, 1 + channels, amplitude, (height, width))
        mixed = np.sqrt(COMMON) * fields[:1] + np.sqrt(1 - COMMON) * fields[1:]
        offset = generator.normal() * np.sqrt(COMMON) + generator.normal(size=(channels, 1, 1)) * np.sqrt(1 - COMMON)
        contrast = generator.uniform(0.5, 1.5)
        pixels = MEAN + STD * (np.sqrt(SPREAD) * offset + np.sqrt(1 - SPREAD) * contrast * mixed)
        images[k] = np.rint(np.clip(pixels, 0.0, 1.0) * 255)
    return images


def _fields(
    generator: np.random.Generator, count: int, amplitude: npt.NDArray[np.float64], shape: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """(count, h, w) Gaussian fields with that amplitude spectrum, of mean 0 and standard deviation 1."""
    white = np.fft.rfft2(generator.normal(size=(count, *shape)))
    fields = np.fft.irfft2(white * amplitude, s=shape)
    deviation = fields.std(axis=(1, 2), keepdims=True)
    return np.asarray(fields / np.where(deviation > 0.0, deviation, 1.0))
