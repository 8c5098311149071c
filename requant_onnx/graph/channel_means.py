"""What BatchNormalization says of the activations behind it: the mean of each channel, without any data.

Its output has the mean beta and the standard deviation |gamma| in each channel; taken as normal, they go through activation
functions, sums and average pools (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import find_root, import_graph, is_standard

FloatArray = npt.NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]
POINTS = np.linspace(-6.0, 6.0, 1201)  # standard deviations
DENSITY = np.exp(-(POINTS**2) / 2) / np.exp(-(POINTS**2) / 2).sum()
KEPT = ("Identity", "Dropout", "Cast")
AVERAGED = ("GlobalAveragePool", "AveragePool", "Flatten", "Reshape", "Squeeze")  # of which the mean stays, but not the variance


@dataclass(frozen=True)
class _Normal:
    """mean: (channels,); var: (channels,), None where it is not known."""

    mean: FloatArray
    var: FloatArray | None


def channel_means(model: onnx.ModelProto) -> dict[str, FloatArray]:
    """(channels,) of each tensor of which it is known.  The model has its BatchNormalization nodes still."""
    known: dict[str, _Normal] = {}
    for node in import_graph(model).nodes:
        found = _of(node, known) if is_standard(node) and node.outputs else None
        if found is not None:
            known[node.outputs[0].name] = found
    return {name: item.mean for name, item in known.items()}


def _of(node: gs.Node, known: dict[str, _Normal]) -> _Normal | None:
    if node.op == "BatchNormalization":
        roots = [find_root(tensor) for tensor in node.inputs[1:3]]
        gamma, beta = (None if root is None else root.load().astype(np.float64) for root in roots)
        usable = None if gamma is None or beta is None or beta.ndim != 1 or gamma.shape != beta.shape else (beta, gamma**2)
        return None if usable is None else _Normal(*usable)
    operands = [known.get(tensor.name) for tensor in node.inputs]
    if node.op in ("Add", "Concat"):
        own = [item for item in operands if item is not None]
        return _joined(node, own) if len(own) == len(operands) else None
    first = operands[0] if operands else None
    if first is None or node.op in KEPT:
        return first
    if node.op in AVERAGED:
        return _Normal(first.mean, None)
    function = _function(node)
    if function is None or first.var is None:
        return None
    values = function(first.mean[:, None] + np.sqrt(first.var)[:, None] * POINTS)
    mean = values @ DENSITY
    return _Normal(mean, np.maximum(values**2 @ DENSITY - mean**2, 0.0))


def _joined(node: gs.Node, own: list[_Normal]) -> _Normal | None:
    """Of a sum, as if its terms were independent, or side by side."""
    variances = [item.var for item in own if item.var is not None]
    complete = len(variances) == len(own)
    if node.op == "Concat":
        both = np.concatenate([item.mean for item in own])
        return _Normal(both, np.concatenate(variances) if complete else None) if node.attrs.get("axis") == 1 else None
    if len({item.mean.shape for item in own}) != 1:
        return None
    return _Normal(np.sum([item.mean for item in own], axis=0), np.sum(variances, axis=0) if complete else None)


def _function(node: gs.Node) -> Function | None:
    if node.op == "Relu":
        return lambda x: np.maximum(x, 0.0)
    if node.op == "LeakyRelu":
        slope = float(node.attrs.get("alpha", 0.01))
        return lambda x: np.where(x < 0.0, slope * x, x)
    if node.op == "Sigmoid":
        return lambda x: 1 / (1 + np.exp(-x))
    if node.op == "HardSwish":
        return lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0)
    if node.op == "Clip":
        bounds = _bounds(node)
        return None if bounds is None else lambda x: np.clip(x, *bounds)
    return None


def _bounds(node: gs.Node) -> tuple[float, float] | None:
    """Of a Clip: attributes up to opset 10, then inputs; None when they are not constant."""
    found = [float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))]
    for k, tensor in enumerate(node.inputs[1:3]):
        root = find_root(tensor) if tensor.name else None
        if tensor.name and root is None:
            return None
        found[k] = found[k] if root is None else float(root.load().astype(np.float64).ravel()[0])
    return found[0], found[1]
