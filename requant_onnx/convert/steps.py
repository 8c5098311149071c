"""The steps of one conversion: quantize the prepared weights (prepare.py), write them (write.py), and check the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx

from requant_onnx.choices import BiasType
from requant_onnx.convert.layerwise import ExpectedOutputs, quantize_layers
from requant_onnx.convert.nearest import Result, quantize_all
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.prepare import Prepared
from requant_onnx.convert.widths import narrowed
from requant_onnx.convert.write import Biases, Built, drain, write
from requant_onnx.errors import ModelError
from requant_onnx.files.load import is_large
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.layers import find_layers
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.progress import Progress
from requant_onnx.runtime.sensitivity import numbers_in, relative_error
from requant_onnx.runtime.sessions import load_session, run_session
from requant_onnx.text import decibels

Steps: TypeAlias = Callable[[Prepared, Sequence[PlannedWeight], Progress | None, int | None], Built]
DOUBT, ROUNDING = 0.25, 1e-6  # tolerances of the output error, relative to it and to output power, for float32 sums in other orders


@dataclass(frozen=True)
class Quantized:
    """The quantized weights of a model.  results: result for each planned weight, in order.  biases: new biases, (oc,), by name.

    expected: outputs that the refinement expects; None unless it refined every weight.  notes: sentences on what was left out.
    """

    results: list[Result]
    biases: Biases
    expected: ExpectedOutputs | None
    notes: tuple[str, ...] = ()


def convert(prepared: Prepared, planned: Sequence[PlannedWeight], progress: Progress | None, threads: int | None) -> Built:
    """Quantize the planned weights and write them.  Changes `prepared.model`.

    Raises ModelError if the outputs of the finished model are worse than the refinement expected.
    """
    quantized, aim = quantize(prepared, planned, progress, threads), prepared.config.optimize_for
    if aim.compresses:
        quantized.results[:] = [narrowed(result, aim) for result in quantized.results]
    return write_checked(prepared, planned, quantized)


def write_checked(prepared: Prepared, planned: Sequence[PlannedWeight], quantized: Quantized) -> Built:
    """Write the quantized weights, and check the outputs.  Changes `prepared.model`, and may empty the list of results.

    Raises ModelError if the outputs of the finished model are worse than the refinement expected.
    """
    expected = quantized.expected
    if expected is None or is_large(prepared.model):
        model, report = write(prepared, drain(quantized.results), quantized.biases)
        return model, replace(report, notes=(*report.notes, *quantized.notes))
    untouched = onnx.ModelProto()
    untouched.CopyFrom(prepared.model)
    model, report = write(prepared, quantized.results, quantized.biases)
    complete = not report.activations and len(report.converted) == len(planned)
    notes = quantized.notes
    try:
        if complete:
            check_expected(model, expected)
    except ModelError:
        if not report.vectors.count:
            raise
        exact = replace(prepared, graph=ModelGraph.of(untouched), config=replace(prepared.config, biases=BiasType.FLOAT))
        with_floats, float_report = write(exact, quantized.results, quantized.biases)
        check_expected(with_floats, expected)
        if prepared.config.biases is BiasType.AUTO:
            model, report = with_floats, replace(float_report, config=report.config)
            notes = (*notes, "biases stay float32, because float16 would increase the output error by more than a quarter")
    return model, replace(report, notes=(*report.notes, *notes))


def check_expected(model: onnx.ModelProto, expected: ExpectedOutputs) -> None:
    """Raise ModelError if the outputs of a finished model have a larger error than the refinement expected."""
    finished = run_session(load_session(model), "the converted model", expected.names, expected.feed)
    rows = [row for row in zip(expected.exact, expected.refined, finished, strict=True) if _same_shapes(row)]
    if not rows:
        return
    exact, refined, found = (numbers_in(outputs) for outputs in zip(*rows, strict=True))
    believed, actual = (relative_error([exact], [outputs]) for outputs in (refined, found))
    if not actual <= believed * (1 + DOUBT) + ROUNDING and math.isfinite(believed):  # NaN too
        raise ModelError(
            f"the converted model has an output SQNR of {decibels(-10 * math.log10(actual))}, but the refinement expected "
            f"{decibels(-10 * math.log10(max(believed, ROUNDING)))}; please report this, and convert with --refinement none"
        )


def _same_shapes(outputs: Sequence[Any]) -> bool:
    """Whether one output of several models is a tensor of the same shape in each; its shape may depend on its values."""
    return all(isinstance(each, np.ndarray) for each in outputs) and len({each.shape for each in outputs}) == 1


def quantize(prepared: Prepared, planned: Sequence[PlannedWeight], progress: Progress | None, threads: int | None) -> Quantized:
    """Quantize every planned weight: refine it on calibration inputs if possible, and round it to nearest levels otherwise."""
    expected, why, note = None, {}, ""
    refined: dict[str, Result] = {}
    biases: dict[str, GenericArray] = {}
    min_scales = prepared.integers.min_scales
    if prepared.refining is not None and planned:
        refinement = prepared.config.refinement
        found = quantize_layers(prepared.model, tuple(planned), prepared.refining, refinement, min_scales, prepared.clock, progress)
        expected, why, note = found.expected, found.why_nearest, found.note
        for done in found.layers:
            refined[done.layer.weight] = done.result
            if done.choice.bias is not None:
                biases[done.layer.bias] = done.layer.stored_bias(done.choice.bias)
    rest = tuple(item for item in planned if item.weight.name not in refined)
    nearest = {
        result.planned.weight.name: replace(result, why_nearest=why.get(result.planned.weight.name, ""))
        for result in quantize_all(rest, min_scales, progress, threads)
    }
    if prepared.means:
        _correct(prepared, nearest, biases)
    results = [refined.get(item.weight.name) or nearest[item.weight.name] for item in planned]
    return Quantized(results, biases, None if rest else expected, (note,) if note else ())


def _correct(prepared: Prepared, results: dict[str, Result], biases: dict[str, GenericArray]) -> None:
    """Correct each bias for the shift of the output mean that the weight error causes, if the means of the inputs are known.

    Nagel et al. 2019 (arXiv 1906.04721), equation 16.  Changes `results` and `biases`.
    """
    for layer in find_layers(prepared.graph, results.keys()):
        if layer.x in prepared.means and layer.can_correct:
            result = results[layer.weight]
            w = result.planned.weight.load()
            bias = layer.corrected_bias(result.planned.decoded(result.quantized) - w, prepared.means[layer.x])
            if bias is not None and result.finite:
                biases[layer.bias] = layer.stored_bias(bias)
                results[layer.weight] = replace(result, method="nearest, bias from BatchNormalization")
