"""Quantize the weights of a plan to their nearest levels, in parallel, and measure the error of each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
import onnx

from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.report import Bounds, WeightReport, sqnr_db
from requant_onnx.graph.decode.forms import FORMS, Coded
from requant_onnx.numerics.arrays import Float32Array, Float64Array, GenericArray, UInt8Array
from requant_onnx.numerics.quantize import QuantizedWeight, quantize_weight
from requant_onnx.progress import Progress

PIECE = 1 << 20  # number of values converted to float64 at a time
ONE_AT_A_TIME, LARGE_LOCK = 1 << 25, Lock()  # larger weights, in bytes, are quantized one at a time, to save memory


@dataclass(frozen=True)
class Result:
    """A quantized weight.  power, error: sums of squares of w and of w_hat - w.

    finite: whether w_hat is finite; if not, the error is infinite.
    method, why_nearest, output_errors: see report.WeightReport.
    """

    planned: PlannedWeight
    quantized: QuantizedWeight
    power: float
    error: float
    finite: bool
    method: str = "nearest"
    why_nearest: str = ""
    output_errors: dict[str, float] = field(default_factory=dict)

    @property
    def is_integer(self) -> bool:
        """Whether it is stored for an integer kernel."""
        return FORMS[self.planned.form].on_integers

    def coded(self) -> Coded:
        """The weight as the decode in the graph needs it."""
        weight = self.planned.weight
        looked_up = weight.lookup_axis is not None and self.quantized.axis in (None, weight.lookup_axis)
        return Coded(weight.name, self.quantized, weight.emit, self.planned.form, looked_up, self.planned.base)

    def report(self, bytes_after: int, why_not_int8: str = "") -> WeightReport:
        """The report for users.  bytes_after, why_not_int8: see WeightReport."""
        weight, grid, q = self.planned.weight, self.planned.grid, self.quantized
        return WeightReport(
            name=weight.name,
            op=weight.op,
            shape=weight.shape,
            form=self.planned.form.value,
            bits=grid.bits + sum(stage.table.bits for stage in self.planned.base),
            transform=grid.kind.describe(),
            axis=grid.axis,
            alpha=Bounds(float(q.alpha.min()), float(q.alpha.max())),
            scale=Bounds(float(q.scale.min()), float(q.scale.max())),
            mse=self.error / q.codes.size,
            sqnr_db=sqnr_db(self.power, self.error),
            bytes_before=weight.stored_bytes,
            bytes_after=bytes_after,
            method=self.method,
            why_nearest=self.why_nearest,
            output_errors=self.output_errors,
            why_not_int8=why_not_int8,
        )


def quantize_all(
    planned: tuple[PlannedWeight, ...],
    min_scales: Mapping[str, Float64Array],
    progress: Progress | None,
    threads: int | None,
) -> Iterator[Result]:
    """Quantize in parallel threads (the search releases the GIL), and yield the results in order.

    min_scales: least scales by weight, (oc,) or (1,).  threads: number of threads; None: one per core.
    """

    def one(item: PlannedWeight) -> Result:
        return _quantize(item, min_scales.get(item.weight.name))

    with ThreadPoolExecutor(workers(threads)) as executor:
        try:
            for done, result in enumerate(executor.map(one, planned), 1):
                if progress is not None:
                    progress(planned[done - 1].weight.name, done, len(planned))
                yield result
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def workers(threads: int | None) -> int:
    """The number of threads to run; one per core if `threads` is None."""
    return threads or os.cpu_count() or 1


def _quantize(planned: PlannedWeight, min_scale: Float64Array | None) -> Result:
    if planned.weight.stored_bytes > ONE_AT_A_TIME:
        with LARGE_LOCK:
            result = _quantize_loaded(planned, min_scale)
            return replace(result, quantized=replace(result.quantized, codes=_on_disk(result.quantized.codes)))
    return _quantize_loaded(planned, min_scale)


def _quantize_loaded(planned: PlannedWeight, min_scale: Float64Array | None) -> Result:
    w, offset = planned.weight.load(), planned.offset()
    if planned.given is not None:
        return measure(planned, w, planned.given)
    return measure(planned, w, quantize_weight(w if offset is None else w - offset, planned.grid, min_scale))


def _on_disk(codes: UInt8Array) -> UInt8Array:
    """The codes in a memory-mapped temporary file without a name, which is deleted with them, or with the process."""
    with tempfile.TemporaryFile() as file:
        codes.tofile(file)
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=codes.shape)


def measure(planned: PlannedWeight, w: Float32Array, quantized: QuantizedWeight) -> Result:
    """Measure the error of a quantized weight in the type that its readers expect."""
    with np.errstate(over="ignore"):  # an overflow is detected below
        w_hat = planned.decoded(quantized).astype(onnx.helper.tensor_dtype_to_np_dtype(planned.weight.emit), copy=False)
    finite = bool(np.isfinite(w_hat.min()) and np.isfinite(w_hat.max()))
    error = _energy(w_hat.ravel(), w.ravel()) if finite else float("inf")
    return Result(planned, quantized, _energy(w.ravel()), error, finite)


def _energy(values: GenericArray, less: Float32Array | None = None) -> float:
    """The sum of squares of values - less, both (n,), in pieces: a float64 copy of the whole would take too much memory."""
    total = 0.0
    for start in range(0, values.size, PIECE):
        piece = values[start : start + PIECE].astype(np.float64)
        if less is not None:
            piece -= less[start : start + PIECE]
        total += float(np.vdot(piece, piece))
    return total
