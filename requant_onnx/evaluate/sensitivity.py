"""The sensitivity of a model to each weight: the error of its output with one weight quantized, and all others in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant_onnx.choices import MAX_BITS, Refinement
from requant_onnx.config import QuantConfig
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.prepare import prepare
from requant_onnx.convert.report import sqnr_db
from requant_onnx.convert.schedule import Clock
from requant_onnx.errors import ModelError
from requant_onnx.files.load import ModelLike, is_large
from requant_onnx.graph.decode.forms import Coded
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float32Array
from requant_onnx.numerics.quantize import quantize_weight
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import output_errors
from requant_onnx.runtime.sessions import load_runnable

WIDTHS = (8, 6, 4, 3, 2)
INPUTS = 16  # number of calibration inputs on which the outputs are compared


@dataclass(frozen=True)
class WeightCost:
    """The cost of a weight.  sqnr_db: bits -> output SQNR with it at nearest levels.  bytes: bits -> approximate stored bytes."""

    name: str
    op: str
    shape: tuple[int, ...]
    bytes_before: int
    sqnr_db: dict[int, float]
    bytes: dict[int, int]


def sensitivity(
    model: ModelLike,
    calibration: Calibration,
    config: QuantConfig | None = None,
    widths: Sequence[int] = WIDTHS,
    progress: Progress | None = None,
) -> tuple[WeightCost, ...]:
    """The cost of each weight at each width, most sensitive first (by the SQNR at the fewest bits).

    Raises ModelError for a model above 2 GB, and as quantize_model.
    """
    config = replace(config or QuantConfig(), bits=MAX_BITS, refinement=Refinement.NONE, overrides=())
    source = load_runnable(model).proto
    if is_large(source):
        raise ModelError("the model is larger than 2 GB, so it cannot be run from memory for each weight")
    prepared = prepare(source, config, None, (), Clock(), None)
    planned = prepared.plan.planned
    chunks = calibration_chunks(prepared.model, replace(calibration, count=min(calibration.count, INPUTS)))
    sizes: dict[str, dict[int, int]] = {item.weight.name: {} for item in planned}
    trials = [(item, bits) for item in planned for bits in widths]
    errors = output_errors(prepared.model, _weights(trials, sizes), {item.weight.name for item in planned}, chunks)
    found: dict[str, dict[int, float]] = {item.weight.name: {} for item in planned}
    for done, ((item, bits), error) in enumerate(zip(trials, errors, strict=True), 1):
        found[item.weight.name][bits] = sqnr_db(1.0, error)
        if progress is not None:
            progress(item.weight.name, done, len(trials))
    costs = [
        WeightCost(w.name, w.op, w.shape, w.stored_bytes, found[w.name], sizes[w.name]) for w in (item.weight for item in planned)
    ]
    return tuple(sorted(costs, key=lambda cost: cost.sqnr_db[min(widths)]))


def _weights(trials: Sequence[tuple[PlannedWeight, int]], sizes: Mapping[str, dict[int, int]]) -> Iterator[dict[str, Float32Array]]:
    """The decoded weight of each trial; fills in `sizes`."""
    for item, bits in trials:
        quantized = quantize_weight(item.weight.load(), replace(item.grid, bits=bits))
        sizes[item.weight.name][bits] = Coded(item.weight.name, quantized, item.weight.emit, item.form).payload
        yield {item.weight.name: np.asarray(quantized.dequantize(), np.float32)}
