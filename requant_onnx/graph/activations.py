"""The ranges of quantized activations, in models of any tool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph


@dataclass(frozen=True)
class ActivationRange:
    """One quantized activation.  low, high: smallest and largest value its codes represent.  codes: type of the codes."""

    name: str
    low: float
    high: float
    codes: str


def activation_ranges(model: ModelGraph) -> list[ActivationRange]:
    """The ranges of all QuantizeLinear nodes that quantize an activation with one constant scale, in graph order."""
    ranges = []
    for node in model.nodes:
        if node.op == "QuantizeLinear" and model.computes(node) and len(node.inputs) > 1:
            scale, *zero = (_scalar(tensor) for tensor in node.inputs[1:3])
            kind = node.inputs[2].values.dtype if zero and isinstance(node.inputs[2], gs.Constant) else np.dtype(np.uint8)
            if scale is not None and kind.kind in "iu":
                least, largest, at = np.iinfo(kind).min, np.iinfo(kind).max, (zero[0] or 0.0) if zero else 0.0
                low, high = scale * (least - at), scale * (largest - at)
                ranges.append(ActivationRange(node.inputs[0].name, low, high, str(kind)))
    return ranges


def _scalar(tensor: gs.Tensor) -> float | None:
    values = np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else np.zeros(0)
    return float(values.reshape(-1)[0]) if values.size == 1 else None
