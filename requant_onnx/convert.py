"""The conversion: load -> normalise -> view -> plan -> quantize -> rewrite."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import onnx

from requant_onnx.config import NARROW_ORT, QuantConfig
from requant_onnx.errors import ConfigError
from requant_onnx.graph.decode import Constants, Decode
from requant_onnx.graph.forms import Target, decode_of, required_opset
from requant_onnx.graph.load import ModelLike, load_model, opset_of
from requant_onnx.graph.names import FreshNames, all_graphs
from requant_onnx.graph.normalise import normalise
from requant_onnx.graph.rewrite import replace_weights, set_metadata
from requant_onnx.graph.weights import LeftAlone, find_weights
from requant_onnx.numerics.quantize import QuantizedWeight, quantize_weight
from requant_onnx.plan import PlannedWeight, plan_conversion
from requant_onnx.report import InspectedWeight, InspectReport, QuantReport, WeightReport, sqnr_db

Progress = Callable[[str, int, int], None]
"""Called with what is under way, how many steps are done, and how many there are."""

METADATA_KEY = "requant_onnx"


def quantize_model(
    model: ModelLike, config: QuantConfig | None = None, *, progress: Progress | None = None, threads: int | None = None
) -> tuple[onnx.ModelProto, QuantReport]:
    """Quantize the weights of a model.  The model given never changes; the same input gives the same output, whatever `threads` is.

    Where nothing can be converted, the model comes back as it was and `report.converted` is empty.
    Raises ModelError when the model cannot be loaded, or holds NaN or infinite weights, ConfigError when threads is below 1.
    """
    config = config or QuantConfig()
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be 1 or more, not {threads}")
    loaded = load_model(model)
    view, before = find_weights(loaded), opset_of(loaded)
    if not view.weights:
        return loaded, QuantReport(config.to_dict(), (before, before), 0, (), view.left_alone)
    narrow = (config.min_ort.major, config.min_ort.minor) > NARROW_ORT
    opset = required_opset(config.form, config.bits, config.transform.exponent, narrow)
    raised, folded = normalise(loaded, opset)
    plan = plan_conversion(find_weights(raised), config)
    target, constants = Target(config.form, opset_of(raised), narrow), Constants(FreshNames(raised))
    decodes: dict[str, Decode] = {}
    converted: list[WeightReport] = []
    left = list(plan.left_alone)
    for planned, result in zip(plan.planned, _quantize_all(plan.planned, progress, threads), strict=True):
        decode = decode_of(planned.weight.name, result.quantized, planned.weight.emit, target, constants)
        reason = _why_not(planned, result, decode)
        if reason is None:
            decodes[planned.weight.name] = decode
            converted.append(_report(planned, result, decode))
        else:
            left.append(LeftAlone(planned.weight.name, planned.weight.op, planned.weight.shape, reason))
    report = QuantReport(config.to_dict(), (before, target.opset), folded, tuple(converted), tuple(left))
    if not decodes:
        return load_model(model), report
    replace_weights(raised, decodes)
    set_metadata(raised, METADATA_KEY, _provenance(config))
    return raised, report


def inspect_model(model: ModelLike) -> InspectReport:
    """What a model holds and what `quantize_model` would do with it.  Raises ModelError when it cannot be loaded."""
    loaded = load_model(model)
    view = find_weights(loaded)
    ops = Counter(node.op_type for graph in all_graphs(loaded.graph) for node in graph.node)
    return InspectReport(
        opset=opset_of(loaded),
        ir_version=loaded.ir_version,
        producer=f"{loaded.producer_name} {loaded.producer_version}".strip(),
        ops=dict(ops.most_common()),
        weights=tuple(InspectedWeight(w.name, w.op, w.shape, w.is_edge, w.stored_bytes) for w in view.weights),
        left_alone=view.left_alone,
    )


@dataclass(frozen=True)
class _Quantized:
    """One weight done.  signal, noise: sums of squares of w and of w_hat - w.  finite: whether w_hat is."""

    quantized: QuantizedWeight
    signal: float
    noise: float
    finite: bool


def _quantize_all(planned: tuple[PlannedWeight, ...], progress: Progress | None, threads: int | None) -> Iterator[_Quantized]:
    """Quantize in parallel (the search holds no GIL), yield in order."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as executor:
        try:
            for done, result in enumerate(executor.map(_quantize_one, planned), 1):
                if progress is not None:
                    progress(planned[done - 1].weight.name, done, len(planned))
                yield result
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _quantize_one(planned: PlannedWeight) -> _Quantized:
    w = planned.weight.load()
    quantized = quantize_weight(w, planned.grid)
    with np.errstate(over="ignore"):  # an overflow is found below and the weight left alone
        w_hat = quantized.dequantize().astype(onnx.helper.tensor_dtype_to_np_dtype(planned.weight.emit))
    finite = bool(np.isfinite(w_hat).all())
    noise = _energy(w_hat.astype(np.float64) - w) if finite else float("inf")
    return _Quantized(quantized, _energy(w.astype(np.float64)), noise, finite)


def _energy(values: npt.NDArray[np.float64]) -> float:
    return float(np.vdot(values, values))


def _why_not(planned: PlannedWeight, result: _Quantized, decode: Decode) -> str | None:
    if not result.finite:
        return "has levels beyond the largest float"
    if decode.bytes >= planned.weight.stored_bytes:
        return f"would not get smaller ({planned.weight.stored_bytes} bytes, {decode.bytes} with its decode)"
    return None


def _report(planned: PlannedWeight, result: _Quantized, decode: Decode) -> WeightReport:
    weight, q = planned.weight, result.quantized
    return WeightReport(
        name=weight.name,
        op=weight.op,
        shape=weight.shape,
        bits=planned.grid.bits,
        exponent=planned.grid.exponent,
        axis=planned.grid.axis,
        alpha=(float(q.alpha.min()), float(q.alpha.max())),
        scale=(float(q.scale.min()), float(q.scale.max())),
        mse=result.noise / q.codes.size,
        sqnr_db=sqnr_db(result.signal, result.noise),
        bytes_before=weight.stored_bytes,
        bytes_after=decode.bytes,
    )


def _provenance(config: QuantConfig) -> str:
    return json.dumps({"version": version("requant_onnx"), **config.to_dict()}, sort_keys=True)
