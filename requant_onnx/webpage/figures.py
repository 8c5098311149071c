"""Charts as SVG for a page (matplotlib).  Colors are variables of the page, so they follow its theme; text stays text.

Each chart has a text description for readers who cannot see it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from requant_onnx.evaluate.recipes import Trial
from requant_onnx.evaluate.weight_comparison import ComparedWeight, Curve, Density, shown_transform

INK, MUTED, GRID, FIRST, SECOND, THIRD, FILL = (f"#0000{n:02x}" for n in range(1, 8))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--c1", SECOND: "--c2", THIRD: "--c3", FILL: "--fill"}
MARKERS, LINES = "os^Dvx", ("-", "--")
EXACT = 120.0  # SQNR in dB at which outputs without error are plotted
SMALL, WIDE = (3.6, 2.4), (9.0, 2.7)  # inches, with 72 units per inch
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "requant",
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """A chart.  title: short title.  text: description for readers.  svg: element to insert into a page."""

    title: str
    text: str
    svg: str


def charts_of(weight: ComparedWeight, number: int) -> list[Chart]:
    """The charts of a weight; none if it is not on a grid.  number: number that makes the ids unique."""
    if weight.grid is None or weight.curve is None or weight.densities is None or weight.scales is None or weight.alpha is None:
        return []
    space = shown_transform(weight.grid)
    plain, transformed = weight.densities
    charts = [
        _curve_chart(weight.curve, weight.alpha, f"w{number}a"),
        _density_chart(plain, "weights and levels", "weight / first level", f"w{number}b"),
        _density_chart(
            transformed,
            f"weights and levels after {space.formula('w')}",
            f"sign(w) {space.formula('w / first level')}",
            f"w{number}c",
        ),
    ]
    return charts + ([_scales_chart(weight, f"w{number}d")] if weight.scales.size > 1 else [])


def growth_chart(weights: Sequence[ComparedWeight]) -> Chart | None:
    """The chart of the output SQNR after each layer, in graph order; None if nothing was compared."""
    values = [min(weight.output_sqnr_db, EXACT) for weight in weights]
    known = [(k, value) for k, value in enumerate(values) if not math.isnan(value)]
    if not known:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _figure(WIDE)
        axes.plot([k + 1 for k, _ in known], [value for _, value in known], "o-", color=FIRST, ms=3.5, lw=1.2)
        axes.set(xlabel="layer, in the order of the graph", ylabel="output SQNR, dB")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        worst = min(known, key=lambda item: item[1])
        shown = {k: "no error" if value == EXACT else f"{value:.1f} dB" for k, value in known}
        ends = [f"{shown[k]} after {weights[k].name}" for k, _ in (known[0], known[-1], worst)]
        text = f"Output SQNR after each of {len(known)} layers: first {ends[0]}, last {ends[1]}, lowest {ends[2]}."
        return Chart("Where the error enters, and how it grows", text, _svg(figure, "growth"))


MEASURES = {"sqnr_db": ("output SQNR, dB", 1.0), "top1": ("top-1 accuracy, %", 100.0), "agreement": ("top-1 agreement, %", 100.0)}


def trials_chart(trials: Sequence[Trial], measure: str) -> Chart:
    """The chart of a measure over the file size, one line per recipe.  measure: a key of MEASURES."""
    label, factor = MEASURES[measure]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(WIDE)
        for k, recipe in enumerate(dict.fromkeys(trial.recipe for trial in trials)):
            points = sorted(
                (trial.bytes / 1000, min(getattr(trial, measure), 1e3) * factor) for trial in trials if trial.recipe == recipe
            )
            axes.plot(
                *zip(*points, strict=True),
                MARKERS[k % 6],
                ls=LINES[k // 3 % 2],
                color=(FIRST, SECOND, THIRD)[k % 3],
                label=recipe,
                lw=1.2,
            )
        axes.set(xlabel="file, kB", ylabel=label)
        axes.grid(axis="y")
        axes.legend(loc="lower right", ncols=3)
        best = max(trials, key=lambda trial: float(getattr(trial, measure)))
        text = f"{label[:1].upper()}{label[1:]} over the size of the file; the highest is {best.recipe} at {best.bits} bits."
        return Chart(label, text, _svg(figure, measure))


def _curve_chart(curve: Curve, alpha: tuple[float, float, float], key: str) -> Chart:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        axes.plot(curve.alphas, curve.sqnr_db, color=FIRST, lw=1.4, label="one alpha for all channels")
        axes.plot(*curve.best, "o", color=FIRST, ms=5, label=f"optimum, {curve.best[0]:.2f}")
        axes.plot(1.0, curve.full, "s", color=SECOND, ms=5, label="full range")
        axes.axhline(curve.per_channel, color=THIRD, lw=1, ls="--", label="one alpha per channel")
        axes.axvspan(max(alpha[0], 0.3), min(alpha[2], 1.02), color=FILL, lw=0, label=f"chosen, mean {alpha[1]:.2f}")
        axes.set(xlabel="alpha", ylabel="weight SQNR, dB", xlim=(0.28, 1.03))
        axes.legend(loc="lower right", fontsize=7)
        text = (
            f"Weight SQNR over alpha: best {curve.best[1]:.1f} dB at {curve.best[0]:.2f}; {curve.full:.1f} dB with the full range; "
            f"{curve.per_channel:.1f} dB with one alpha per channel; the chosen values are {alpha[0]:.3f} to {alpha[2]:.3f}."
        )
        return Chart("error over alpha", text, _svg(figure, key))


def _density_chart(density: Density, title: str, label: str, key: str) -> Chart:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        heights = density.counts / max(1, density.counts.max())
        axes.stairs(heights, density.edges, fill=True, color=FILL)
        axes.stairs(heights, density.edges, color=MUTED, lw=0.6)
        x = np.repeat(density.levels, 3)
        y = np.tile([-0.09, -0.02, np.nan], density.levels.size)
        axes.plot(x, y, color=FIRST, lw=0.8)
        axes.set(xlabel=label, ylabel="density", ylim=(-0.12, 1.05))
        axes.set_yticks([])
        ends = f"from {density.edges[0]:.3g} to {density.edges[-1]:.3g}"
        text = f"Histogram of the weights, {ends}, with its {density.levels.size} levels marked below."
        return Chart(title, text, _svg(figure, key))


def _scales_chart(weight: ComparedWeight, key: str) -> Chart:
    scales = weight.scales
    assert scales is not None
    used = scales[scales > 0]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        axes.plot(np.arange(scales.size), np.where(scales > 0, scales, np.nan), ".", color=FIRST, ms=3)
        axes.set(xlabel="output channel", ylabel="scale", yscale="log" if used.max() > 5 * used.min() else "linear")
        axes.grid(axis="y")
        text = f"Scales of {scales.size} channels, from {used.min():.3g} to {used.max():.3g}."
        return Chart("scales of the channels", text, _svg(figure, key))


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, key: str) -> str:
    """The svg element alone, with ids made unique by `key`, and page variables as colors."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>| transform="rotate\(-0 [^"]*"', "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'\b(id="|href="#)|(url\(#)', rf"\g<0>{key}-", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    text = text.replace("xlink:href", "href").replace("'DejaVu Sans'", "system-ui")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
