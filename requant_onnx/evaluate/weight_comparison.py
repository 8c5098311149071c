"""A comparison of two models, weight by weight: the change of each weight, and the layers in which the error enters.

The candidate may come from any tool, because grids are inferred from the decoded values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from requant_onnx.convert.report import sqnr_db
from requant_onnx.evaluate.pairing import Pair, find_pairs
from requant_onnx.files.load import LoadedModel, ModelLike, is_large
from requant_onnx.graph.readers import WeightReader
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.arrays import Float32Array, Float64Array, Int64Array
from requant_onnx.numerics.curve import error_curve
from requant_onnx.numerics.infer import InferredGrid, infer_grid
from requant_onnx.numerics.kinds import SQUARE_ROOT, GridKind
from requant_onnx.numerics.ranges import RowRanges, row_ranges, symmetric_ranges
from requant_onnx.numerics.search import search_alpha
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import output_errors
from requant_onnx.runtime.sessions import load_runnable, open_session, run_session
from requant_onnx.runtime.stream import Chunk

ALPHAS = np.linspace(0.3, 1.0, 71)
BINS = 96
MAX_ROWS, MAX_VALUES = 512, 1 << 20  # limits for the curve and histograms of a weight; its rows are sampled regularly
ALONE = 16  # number of inputs on which weights are replaced one at a time
TENSOR_BYTES = 1 << 27  # limit on layer outputs compared at a time


@dataclass(frozen=True)
class Curve:
    """The signal-to-noise ratio of a weight on its grid, in dB, as a function of one alpha for all channels.

    best: (alpha, dB) of the least error.  full: dB at alpha = 1.  per_channel: dB with the best alpha of each channel.
    """

    alphas: Float64Array
    sqnr_db: Float64Array
    best: tuple[float, float]
    full: float
    per_channel: float


@dataclass(frozen=True)
class Density:
    """A histogram of weights, in units of the smallest nonzero level, so that all channels have the same levels.

    edges: (bins+1,).  counts: (bins,).  levels: levels of the weights.
    """

    edges: Float64Array
    counts: Int64Array
    levels: Float64Array


@dataclass(frozen=True)
class ComparedWeight:
    """The comparison of a weight.  name: name in the candidate.  outcome: "same" values, on a "grid", "changed" in another way, or
    "unknown": without a counterpart in the reference, or in an integer kernel that does not reveal how it is decoded.

    sqnr_db: SQNR of the decoded weight.  output_sqnr_db: SQNR of its node's output, nan if not compared.
    alone_sqnr_db: SQNR of the reference's outputs with only this weight taken from the candidate, nan if not compared.
    alpha: (least, mean, largest) range factor of the channels.  scales: (channels,) or (1,).
    grid: kind of the grid.  densities: in weight space, and in the space of its transform (the square root for a uniform grid).
    """

    name: str
    op: str
    shape: tuple[int, ...]
    outcome: str
    sqnr_db: float
    output_sqnr_db: float
    bits: float = 32
    grid: GridKind | None = None
    scales: Float64Array | None = None
    alpha: tuple[float, float, float] | None = None
    curve: Curve | None = None
    densities: tuple[Density, Density] | None = None
    alone_sqnr_db: float = math.nan


def dissect(
    reference: ModelLike | LoadedModel,
    candidate: ModelLike | LoadedModel,
    calibration: Calibration | None,
    progress: Progress | None = None,
) -> tuple[ComparedWeight, ...]:
    """Compare every weight of the candidate, in the order of its graph.

    calibration: inputs on which layer outputs are compared; None to skip that.
    Raises ModelError, DataError as quantize_model.
    """
    float_model, quantized = load_runnable(reference).proto, load_runnable(candidate).proto
    pairs, folded = find_pairs(float_model, quantized)
    names = {pair.output.reference: pair.output.candidate for _, pair in pairs if pair is not None and pair.output is not None}
    chunks = [] if calibration is None else calibration_chunks(float_model, calibration)
    outputs = output_sqnr(float_model, quantized, names, chunks) if chunks else {}
    alone = {} if calibration is None else _alone(folded, [pair for _, pair in pairs if pair is not None], calibration)
    weights = []
    for done, (reader, pair) in enumerate(pairs, 1):
        if pair is None:
            shape = tuple(n if isinstance(n, int) else -1 for n in reader.node.inputs[reader.operand].shape or ())
            weights.append(ComparedWeight(reader.weight, reader.op, shape, "unknown", math.nan, math.nan))
        else:
            made = _anatomy(reader, pair, math.nan if pair.output is None else outputs.get(pair.output.reference, math.nan))
            weights.append(replace(made, alone_sqnr_db=alone.get(pair.replaces[0], math.nan) if pair.replaces else math.nan))
        if progress is not None:
            progress(reader.weight, done, len(pairs))
    return tuple(weights)


def _alone(reference: onnx.ModelProto, pairs: Sequence[Pair], calibration: Calibration) -> dict[str, float]:
    """The output SQNR in dB of the reference with one weight of the candidate, by the name of that weight."""
    replaced = dict(pair.replaces for pair in pairs if pair.replaces is not None)
    if not replaced or is_large(reference):
        return {}
    chunks = calibration_chunks(reference, replace(calibration, count=min(calibration.count, ALONE)))
    errors = output_errors(reference, ({name: values} for name, values in replaced.items()), replaced.keys(), chunks)
    return {name: sqnr_db(1.0, error) for name, error in zip(replaced, errors, strict=True)}


def output_sqnr(
    reference: onnx.ModelProto, candidate: onnx.ModelProto, names: Mapping[str, str], chunks: Sequence[Chunk]
) -> dict[str, float]:
    """The output SQNR in dB of tensors on the same inputs.  names: name in the reference -> name in the candidate."""
    left = list(names)
    sqnr: dict[str, float] = {}
    while left:
        some = _fitting(reference, left, chunks[0])
        left = left[len(some) :]
        both = ((reference, some), (candidate, [names[name] for name in some]))
        sessions = [open_session(_with_outputs(model, tensors), "the model") for model, tensors in both]
        sums = np.zeros((len(some), 2))
        for chunk in chunks:
            outputs = (run_session(session, "the model", None, chunk) for session in sessions)
            for k, (y, y_hat) in enumerate(zip(*outputs, strict=True)):
                exact = np.asarray(y, np.float64)
                if exact.shape == np.shape(y_hat):
                    sums[k] += (np.square(exact).sum(), np.square(exact - np.asarray(y_hat, np.float64)).sum())
                else:
                    sums[k] = np.nan
        known = [(name, energies) for name, energies in zip(some, sums, strict=True) if np.isfinite(energies).all()]
        sqnr.update((name, sqnr_db(*map(float, energies))) for name, energies in known)
    return sqnr


def _fitting(model: onnx.ModelProto, names: Sequence[str], chunk: Chunk) -> list[str]:
    """The first tensors that fit into TENSOR_BYTES, at least one."""
    values = run_session(open_session(_with_outputs(model, names), "the model"), "the model", None, chunk)
    sizes = np.cumsum([np.asarray(value).nbytes for value in values])
    return list(names[: max(1, int((sizes <= TENSOR_BYTES).sum()))])


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return changed


def _anatomy(reader: WeightReader, pair: Pair, output: float) -> ComparedWeight:
    w, w_hat = pair.w.astype(np.float64), pair.w_hat.astype(np.float64)
    if w.shape != w_hat.shape:
        return ComparedWeight(reader.weight, reader.op, pair.shape, "changed", math.nan, output)
    sqnr = sqnr_db(float(np.square(w).sum()), float(np.square(w_hat - w).sum()))
    outcome = "same" if sqnr == math.inf else "changed"
    per_tensor = None if outcome == "same" else infer_grid(pair.w_hat.reshape(1, -1), half=pair.half)
    grid = None if outcome == "same" else per_tensor or infer_grid(pair.w_hat, half=pair.half)
    plain = ComparedWeight(reader.weight, reader.op, pair.shape, outcome, sqnr, output)
    if grid is None:
        return plain
    whole = (pair.w.reshape(1, -1), pair.w_hat.reshape(1, -1)) if per_tensor else (pair.w, pair.w_hat)
    return _on_grid(plain, *whole, grid)


def _on_grid(plain: ComparedWeight, w: Float32Array, w_hat: Float32Array, grid: InferredGrid) -> ComparedWeight:
    chosen = _sample(w, grid.scale)
    rows, scale, table = np.sort(w[chosen], axis=1), grid.scale[chosen], grid.table
    ranges = _ranges(rows, grid)
    step = np.where(ranges.step > 0.0, ranges.step, 1.0)
    alpha = table.kind.transformed_scale(scale * table.unit) / step
    return ComparedWeight(
        plain.name, plain.op, plain.shape, "grid", plain.sqnr_db, plain.output_sqnr_db,
        bits=table.bits,
        grid=table.kind,
        scales=grid.scale,
        alpha=(float(alpha.min()), float(alpha.mean()), float(alpha.max())),
        curve=_curve(rows, ranges, grid),
        densities=_densities(rows, w_hat[chosen], scale, grid),
    )  # fmt: skip


def _sample(w: Float32Array, scale: Float64Array) -> Int64Array:
    """The indices of a sample of rows with nonzero scale, at most MAX_ROWS, with about MAX_VALUES values."""
    used = np.flatnonzero(scale > 0.0)
    most = max(1, min(MAX_ROWS, MAX_VALUES // max(1, w.shape[1])))
    return used[:: math.ceil(used.size / most)]


def _ranges(rows: Float32Array, grid: InferredGrid) -> RowRanges:
    low, high = rows[:, 0].astype(np.float64), rows[:, -1].astype(np.float64)
    make = row_ranges if grid.table.limit is None else symmetric_ranges
    return make(low, high, grid.table.bits, grid.table.kind)


def _curve(rows: Float32Array, ranges: RowRanges, grid: InferredGrid) -> Curve:
    signal = float(np.square(rows, dtype=np.float64).sum())

    def decibels(errors: Float64Array) -> Float64Array:
        return np.array([sqnr_db(signal, float(error)) for error in errors])

    errors = error_curve(rows, ranges, grid.table, ALPHAS).sum(0) * rows.shape[1]
    alphas = search_alpha(rows, ranges, grid.table)
    least = np.array([error_curve(rows[k : k + 1], _row(ranges, k), grid.table, alphas[k : k + 1])[0, 0] for k in range(len(rows))])
    shown = decibels(errors)
    best = int(errors.argmin())
    return Curve(
        ALPHAS,
        shown,
        (float(ALPHAS[best]), float(shown[best])),
        float(shown[-1]),
        decibels(least.sum(keepdims=True) * rows.shape[1])[0],
    )


def _row(ranges: RowRanges, k: int) -> RowRanges:
    return RowRanges(ranges.step[k : k + 1], ranges.zero_point[k : k + 1])


def shown_transform(kind: GridKind) -> GridKind:
    """The transform in whose space a weight is shown, in addition to weight space."""
    return SQUARE_ROOT if kind.is_uniform else kind


def _densities(rows: Float32Array, w_hat: Float32Array, scale: Float64Array, grid: InferredGrid) -> tuple[Density, Density]:
    """The densities of the weights and of the transformed weights; for a uniform grid, the transform is the square root."""
    kind = shown_transform(grid.table.kind)
    ratios = (rows / scale[:, None]).ravel().astype(np.float64) / grid.table.unit
    known = np.unique(grid.table.integers)
    places = np.searchsorted((known[1:] + known[:-1]) / 2, np.unique(w_hat / scale[:, None]))
    reached = known[np.unique(places)] / grid.table.unit
    spaces = [(ratios, reached), (kind.transform(ratios), kind.transform(reached))]
    densities = []
    for values, levels in spaces:
        counts, edges = np.histogram(values, BINS)
        densities.append(Density(edges, counts, levels))
    return densities[0], densities[1]
