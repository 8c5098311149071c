"""Show on one layer why range and transform together do, or do not, beat either alone: a plot and a Markdown table.

    python tools/paper_claim.py models/mobilenet_cifar10.onnx --data DIR --plot tools/claim.png

Each weight is quantized alone, per tensor, with the searched range (no transform), with the square root (full range) and with
both, which is the method of the paper (arXiv 2510.04044): rounding in transformed space.  The weight for which both are furthest
behind the better one of either alone, in output SQNR on 256 train images, is examined over alpha: the squared error of the weight,
the squared error of the layer's output, and how much of that is a shift of the means of its channels, which a bias could correct.
Needs: pip install '.[plot]'.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import onnx
from accuracy_table import NORMALIZATIONS
from cifar import find_or_fetch
from onnx import numpy_helper

from requant_onnx.convert.report import sqnr_db
from requant_onnx.inputs.images import load_cifar
from requant_onnx.runtime.sessions import load_session

Array = npt.NDArray[np.float32]
IMAGES = 256
ALPHAS = np.linspace(0.3, 1.0, 36)
METHODS = {"range": (1.0, True), "square root": (0.5, False), "both": (0.5, True)}
"""name -> (exponent, whether the range is searched)"""


def rounded(w: Array, bits: int, exponent: float, alpha: float) -> Array:
    """The weight on uniform levels of sign(w) * |w|**exponent over alpha times its range, rounded there."""
    v, most = np.sign(w) * np.abs(w, dtype=np.float64) ** exponent, 2**bits - 1
    low, high = min(0.0, float(v.min())), max(0.0, float(v.max()))
    step = (high - low) / most
    zero = round(-low / step)
    found = (np.clip(np.rint(v / (alpha * step)) + zero, 0, most) - zero) * alpha * step
    return np.asarray(np.sign(found) * np.abs(found) ** (1 / exponent), np.float32)


def best_alpha(w: Array, bits: int, exponent: float, *, search: bool) -> float:
    """The alpha of least squared error of the weight, or 1."""
    if not search:
        return 1.0
    return float(min(ALPHAS, key=lambda alpha: float(np.square(rounded(w, bits, exponent, alpha) - w).sum())))


@dataclass(frozen=True)
class Effect:
    """The effect of one rounded weight.

    weight: squared error relative to its power.  layer: squared error of the layer's output, relative to its power.
    shift: the part of that which is a shift of the channel means.  output: SQNR of the model's output, in dB.
    """

    weight: float
    layer: float
    shift: float
    output: float


class Bench:
    """A model with the output of every weighted layer exposed, on calibration images."""

    def __init__(self, path: Path, x: Array) -> None:
        self.model, self.x = onnx.load(path), x
        stored = {item.name: item for item in self.model.graph.initializer}
        self.weights = {
            node.input[1]: (numpy_helper.to_array(stored[node.input[1]]), node.output[0])
            for node in self.model.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in stored
        }
        self.output = self.model.graph.output[0].name
        self.exact = {tensor: self._run(tensor) for _, tensor in self.weights.values()}
        self.answers = self._run(self.output)

    def _run(self, tensor: str, name: str = "", w: Array | None = None) -> Array:
        """A tensor, and with `w` in place of the weight `name`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for item in model.graph.initializer:
            if item.name == name and w is not None:
                item.CopyFrom(numpy_helper.from_array(w, name))
        if tensor != self.output:
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
        session = load_session(model)
        parts = [session.run([tensor], {session.get_inputs()[0].name: self.x[k : k + 64]})[0] for k in range(0, len(self.x), 64)]
        return np.concatenate(parts)

    def effect(self, name: str, w: Array) -> Effect:
        """What happens when the weight `name` becomes `w`."""
        before, tensor = self.weights[name]
        exact, error = self.exact[tensor], self._run(tensor, name, w) - self.exact[tensor]
        others = tuple(k for k in range(error.ndim) if k != 1)
        power = float(np.square(exact).mean())
        shift = float(np.square(error.mean(others, dtype=np.float64)).mean())
        answers = self._run(self.output, name, w)
        sqnr = sqnr_db(float(np.square(self.answers).sum()), float(np.square(answers - self.answers).sum()))
        return Effect(
            float(np.square(w - before).sum() / np.square(before).sum()),
            float(np.square(error).mean()) / power,
            shift / power,
            sqnr,
        )


def effects(bench: Bench, bits: int) -> dict[str, dict[str, Effect]]:
    """weight -> method -> effect, for all weights but the first and the last, which the paper does not transform."""
    found = {}
    for name in list(bench.weights)[1:-1]:
        w = bench.weights[name][0]
        made = {
            method: rounded(w, bits, exponent, best_alpha(w, bits, exponent, search=search))
            for method, (exponent, search) in METHODS.items()
        }
        found[name] = {method: bench.effect(name, value) for method, value in made.items()}
    return found


def behind(found: dict[str, Effect]) -> float:
    """By how many dB both are behind the better one of either alone."""
    return max(found["range"].output, found["square root"].output) - found["both"].output


def table(bench: Bench, name: str, found: dict[str, Effect], bits: int) -> Iterator[str]:
    """The lines of the Markdown table of one weight."""
    yield "| method | alpha | error of the weight | error of the layer's output | of that, shift of the means | output SQNR |"
    yield "|---|---|---|---|---|---|"
    for method, (exponent, search) in METHODS.items():
        e, alpha = found[method], best_alpha(bench.weights[name][0], bits, exponent, search=search)
        figures = f"{decibel(e.weight)} | {decibel(e.layer)} | {e.shift / e.layer:.0%} | {e.output:.1f} dB"
        yield f"| {method} | {alpha:.2f} | {figures} |"


def decibel(share: float) -> str:
    """A squared error relative to the power, in dB."""
    return f"{10 * math.log10(share):.1f} dB"


def draw(bench: Bench, name: str, bits: int, path: Path) -> None:
    """Errors over alpha, with and without the square root."""
    w = bench.weights[name][0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, (label, exponent) in zip(("C1", "C2"), {"no transform": 1.0, "square root": 0.5}.items(), strict=True):
        curve = [bench.effect(name, rounded(w, bits, exponent, float(alpha))) for alpha in ALPHAS]
        axes[0].plot(ALPHAS, [10 * math.log10(e.weight) for e in curve], color=color, label=label)
        axes[1].plot(ALPHAS, [10 * math.log10(e.layer) for e in curve], color=color, label=f"{label}, total")
        axes[1].plot(ALPHAS, [10 * math.log10(e.shift) for e in curve], color=color, ls=":", label=f"{label}, shift of the means")
        alpha = best_alpha(w, bits, exponent, search=True)
        for axis in axes:
            axis.axvline(alpha, color=color, lw=0.8, ls="--")
    axes[0].set(xlabel="alpha", ylabel="dB", title="squared error of the weight, relative to its power")
    axes[1].set(xlabel="alpha", ylabel="dB", title="squared error of the layer's output")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.suptitle(f"{name}, {bits} bits, one scale; dashed: the alpha of least error of the weight")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL[=NORMALIZATION]")
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 (default: the cache, or a download)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    args = parser.parse_args()
    path, _, normalization = args.model.partition("=")
    images = load_cifar("cifar10", find_or_fetch("cifar10", args.data), "train").first(IMAGES)
    bench = Bench(Path(path), NORMALIZATIONS[normalization or "cifar"].apply(images.pixels))
    found = effects(bench, args.bits)
    for name, by_method in sorted(found.items(), key=lambda item: -behind(item[1])):
        cells = ", ".join(f"{method} {effect.output:.1f} dB" for method, effect in by_method.items())
        print(f"{name} {bench.weights[name][0].shape}: {cells}")
    worst = max(found, key=lambda name: behind(found[name]))
    print(f"\n{worst}, {'x'.join(map(str, bench.weights[worst][0].shape))}:\n")
    print("\n".join(table(bench, worst, found[worst], args.bits)))
    if args.plot:
        draw(bench, worst, args.bits, args.plot)


if __name__ == "__main__":
    main()
