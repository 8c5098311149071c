"""Render the sample images of the repository: 200 synthetic scenes of 32x32 pixels, without labels.

    python tools/render_sample.py models/resnet20_cifar10.onnx models/sample_images.npz

Each image has a sky and a ground, 1/f noise (the power spectrum of natural photographs falls as 1/f**2: Field 1987), and one to
four shaded ellipses, boxes and triangles, rendered at four times the size and averaged.  The images are this project's own work.
They show how similar the answers of two models are, not how good, because the scenes belong to no class.  Scenes on which the model
is unsure are dropped, because their answers change with any rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession

FloatArray = npt.NDArray[np.float64]
SIZE, OVERSAMPLING, COUNT, SEED = 32, 4, 200, 2026
SURE = 0.9  # least score of the best class
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    np.savez_compressed(args.out, x=render(args.model, COUNT, SEED))


def render(model: Path, count: int, seed: int) -> npt.NDArray[np.uint8]:
    """The first scenes on which the model is sure, (count, 32, 32, 3) uint8."""
    session = InferenceSession(model, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    kept: list[npt.NDArray[np.uint8]] = []
    while len(kept) < count:
        scene = _scene(generator)
        if _best_score(session, scene) >= SURE:
            kept.append(scene)
    return np.stack(kept)


def _best_score(session: InferenceSession, scene: npt.NDArray[np.uint8]) -> float:
    """The largest class probability of the model."""
    x = ((scene / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
    scores = np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0], np.float64)[0]
    return float(1 / np.exp(scores - scores.max()).sum())


def _scene(generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[0 : SIZE * OVERSAMPLING, 0 : SIZE * OVERSAMPLING] / (SIZE * OVERSAMPLING)
    horizon = generator.uniform(0.2, 0.9)
    sky, ground = generator.uniform(0.1, 1.0, (2, 3))
    slope = generator.uniform(-0.3, 0.3)
    image = np.where((y + slope * x > horizon)[..., None], ground, sky) * (1 - 0.4 * y[..., None])
    for _ in range(generator.integers(1, 5)):
        inside = _shape(generator, x, y)
        shading = 1 + generator.uniform(-0.8, 0.8) * (x - 0.5) + generator.uniform(-0.8, 0.8) * (y - 0.5)
        image = np.where(inside[..., None], generator.uniform(0.0, 1.0, 3) * shading[..., None], image)
    small = image.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING, 3).mean((1, 3))
    small = small + generator.uniform(0.02, 0.15) * _noise(generator) * generator.uniform(0.7, 1.3, 3)
    return np.asarray(np.rint(np.clip(small, 0, 1) * 255), np.uint8)


def _shape(generator: np.random.Generator, x: FloatArray, y: FloatArray) -> npt.NDArray[np.bool_]:
    """The mask of a rotated ellipse, box or triangle near the middle."""
    angle = generator.uniform(0, np.pi)
    dx, dy = x - generator.uniform(0.25, 0.75), y - generator.uniform(0.25, 0.75)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / generator.uniform(0.08, 0.35)
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / generator.uniform(0.08, 0.35)
    masks = (u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 1, (v < 1) & (abs(u) < (v + 1) / 2))
    return np.asarray(masks[generator.integers(0, 3)])


def _noise(generator: np.random.Generator) -> FloatArray:
    """1/f noise of mean 0 and variance 1, (32, 32, 1)."""
    spectrum = np.fft.fft2(generator.normal(size=(SIZE, SIZE)))
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    frequency[0, 0] = np.inf  # no constant part
    noise = np.fft.ifft2(spectrum / frequency).real
    return np.asarray((noise / noise.std())[..., None])


if __name__ == "__main__":
    main()
