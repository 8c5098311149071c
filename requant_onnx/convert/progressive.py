"""Progressive conversions: a model of 2 bits, and two more models that add codes to its weights.

    2 bits    W2 = s * level              a conversion at 2 bits
    4 bits    W4 = W2 + s' * level'       2 more bits for the residual W - W2
    8 bits    W8 = W4 + s'' * level''     4 more bits for the residual W - W4

Each stage is refined for the outputs of its own model, with the codes of the stages before it fixed, and has its own biases.
First and last layers, layers with few elements per scale (such as depthwise layers), and layers whose bits are set by --layer have
the same codes in all stages.  files/planes.py stores tensors that several of the models contain only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx

from requant_onnx.choices import MAX_BITS, Form
from requant_onnx.config import QuantConfig
from requant_onnx.convert.pipeline import convert_model
from requant_onnx.convert.plan import Plan, PlannedWeight
from requant_onnx.convert.prepare import Prepared
from requant_onnx.convert.report import QuantReport
from requant_onnx.convert.steps import quantize, write_checked
from requant_onnx.convert.write import Built
from requant_onnx.errors import ConfigError
from requant_onnx.files.load import ModelLike, materialize, source_of
from requant_onnx.graph.weights import SkippedWeight
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.kinds import SQUARE_ROOT, UNIFORM
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, quantize_weight
from requant_onnx.progress import Progress

STAGES = (2, 4, 8)  # bits per weight in each stage
SHORT_ROW = 32  # elements per scale, up to which two more scales take at least an eighth of the size of 8-bit codes
NOT_SMALLER = "would not get smaller in the 2-bit model"


class Stage(NamedTuple):
    """One model of a progressive conversion.  bits: bits per weight.  report: report of its conversion, as by quantize_model."""

    bits: int
    model: onnx.ModelProto
    report: QuantReport


def quantize_progressively(
    model: ModelLike,
    config: QuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    check: bool = True,
) -> list[Stage]:
    """Quantize the weights of a model to 2 bits, and refine them to 4 and 8 bits.  Returns the three stages, the smallest first.

    Each model is complete and has the folded form: ONNX Runtime adds its decoded stages when it loads the model.
    `save_progressive` stores tensors that several models contain only once.  Arguments and errors are those of quantize_model.
    config: settings (default: QuantConfig(form="folded")); bits must be 8, the form folded, and optimize_for file.
    Raises ConfigError if they are not.
    """
    config = config or QuantConfig(form=Form.FOLDED)
    _check(config)
    source, refinement = source_of(model), _Refinement()
    stages = []
    for number, bits in enumerate(STAGES):
        own, part = replace(config, bits=bits), _part(progress, number)
        made, report = convert_model(source, own, calibration, part, threads, check=check, steps=refinement.convert)
        stages.append(Stage(bits, materialize(made), report))
    return stages


def _part(progress: Progress | None, number: int) -> Progress | None:
    """A callback that reports the progress of one stage as a part of the whole."""
    if progress is None:
        return None
    return lambda name, done, total: progress(name, number * total + done, len(STAGES) * total)


def _check(config: QuantConfig) -> None:
    """Raise ConfigError if the settings are not those of progressive files."""
    if config.form is not Form.FOLDED:
        raise ConfigError(f"progressive files have the folded form, not {config.form}; choose form folded")
    if config.bits != MAX_BITS:
        raise ConfigError(f"progressive files have 2, 4 and 8 bits, so the bits must be {MAX_BITS}, those of the last stage")
    if config.optimize_for.compresses:
        raise ConfigError(f"progressive files cannot be optimized for downloads; drop --optimize-for {config.optimize_for}")


@dataclass(frozen=True)
class _WeightSoFar:
    """A weight after some stages.  grid: grid of the first one.  fixed: whether its codes are final.  stages: codes, in order."""

    grid: Grid
    fixed: bool
    stages: tuple[QuantizedWeight, ...]


@dataclass
class _Refinement:
    """Successive conversions of one model, each of which refines the weights of the conversion before it.

    coarse: weights so far, by name; None before the first conversion.
    """

    coarse: dict[str, _WeightSoFar] | None = field(default=None)

    def convert(
        self, prepared: Prepared, planned: Sequence[PlannedWeight], progress: Progress | None, threads: int | None
    ) -> Built:
        """Quantize and write the next stage.  Changes `prepared.model`.  Raises ModelError as `write_checked`."""
        if self.coarse is None:
            planned = [_first(item) for item in planned]
        else:
            coarse = self.coarse
            left = tuple(item.weight for item in planned if item.weight.name not in coarse)
            planned = [_next(item, coarse[item.weight.name]) for item in planned if item.weight.name in coarse]
            skipped = (SkippedWeight(w.name, w.op, w.shape, NOT_SMALLER, w.stored_bytes) for w in left)
            prepared = replace(prepared, plan=Plan(tuple(planned), (*prepared.plan.skipped, *skipped)))
        first = self.coarse or {}
        quantized = quantize(prepared, planned, progress, threads)
        found = {}
        for result in quantized.results:
            item, name = result.planned, result.planned.weight.name
            known = first.get(name, _WeightSoFar(item.grid, item.given is not None, ()))
            found[name] = replace(known, stages=(*item.base, result.quantized))
        model, report = write_checked(prepared, planned, quantized)
        self.coarse = {weight.name: found[weight.name] for weight in report.converted}
        return model, report


def _first(item: PlannedWeight) -> PlannedWeight:
    """The weight as the first stage quantizes it.

    Weights with the same codes in all stages get nearest levels: refined levels would compensate for errors that later stages do
    not have.  Among them are layers with short rows, such as depthwise layers, where the scales of three stages would take more
    space than 8-bit codes in the first stage.  Short rows are symmetric, because zero points would take much space too.
    """
    grid = item.grid
    if grid.bits == STAGES[0] and item.form is Form.FOLDED:
        rows = 1 if grid.axis is None else item.weight.shape[grid.axis]
        if math.prod(item.weight.shape) > SHORT_ROW * rows:
            return item
        grid = replace(grid, bits=MAX_BITS, kind=UNIFORM, symmetric=True)
    return replace(item, grid=grid, others=(), given=quantize_weight(item.weight.load(), grid))


def _next(item: PlannedWeight, coarse: _WeightSoFar) -> PlannedWeight:
    """The weight as the next stage quantizes it: its residual, or, if its bits do not change, its existing codes.

    Most residuals are below half a step, but weights beyond the range of the earlier stages leave larger ones, which square-root
    levels reach: nearest levels of a ResNet-20 in three stages have 4.4 dB less error than with uniform levels.  All weights use
    this kind, so that the same weights are decoded together in all stages.
    item: weight planned with the total bits of all stages up to this one.
    """
    more = item.grid.bits - sum(stage.table.bits for stage in coarse.stages)
    if coarse.fixed or more <= 0:
        return replace(item, grid=coarse.grid, others=(), given=coarse.stages[0])
    grid = replace(item.grid, bits=more, kind=SQUARE_ROOT, tiny_scales=True)
    return replace(item, grid=grid, others=(), base=coarse.stages)
