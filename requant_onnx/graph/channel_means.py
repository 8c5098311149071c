"""The mean of each channel of activations, derived from BatchNormalization without any data.

The output of BatchNormalization has mean beta and standard deviation |gamma| in each channel.  Means are propagated through
activation functions, sums and average pools, assuming a normal distribution (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph, find_root, is_standard
from requant_onnx.numerics.arrays import Float64Array

Function = Callable[[Float64Array], Float64Array]
POINTS = np.linspace(-6.0, 6.0, 1201)  # standard deviations
DENSITY = np.exp(-(POINTS**2) / 2) / np.exp(-(POINTS**2) / 2).sum()
KEPT = ("Identity", "Dropout", "Cast")
AVERAGED = ("GlobalAveragePool", "AveragePool", "Flatten", "Reshape", "Squeeze")  # these preserve the mean, but not the variance


@dataclass(frozen=True)
class _Normal:
    """The moments of each channel.  mean: (channels,).  var: (channels,), None if unknown."""

    mean: Float64Array
    var: Float64Array | None


def channel_means(model: ModelGraph) -> dict[str, Float64Array]:
    """The channel means, (channels,), of each tensor where they are known.  BatchNormalization must not be folded yet."""
    known: dict[str, _Normal] = {}
    for node in model.nodes:
        fixed = model.overridable.isdisjoint(tensor.name for tensor in node.inputs)  # no caller may replace a parameter
        normal = _of(node, known) if fixed and is_standard(node) and node.outputs else None
        if normal is not None:
            known[node.outputs[0].name] = normal
    return {name: item.mean for name, item in known.items()}


def _of(node: gs.Node, known: dict[str, _Normal]) -> _Normal | None:
    """The moments of a node's output, computed from those of its inputs."""
    if node.op == "BatchNormalization":
        return _normalized(node)
    operands = [known.get(tensor.name) for tensor in node.inputs]
    if node.op in JOINS:
        terms = [item for item in operands if item is not None]
        return JOINS[node.op](node, terms) if len(terms) == len(operands) else None
    first = operands[0] if operands else None
    if first is None or node.op in KEPT:
        return first
    if node.op in AVERAGED:
        return _Normal(first.mean, None)
    function = FUNCTIONS[node.op](node) if node.op in FUNCTIONS else None
    if function is None or first.var is None:
        return None
    values = function(first.mean[:, None] + np.sqrt(first.var)[:, None] * POINTS)
    mean = values @ DENSITY
    return _Normal(mean, np.maximum(values**2 @ DENSITY - mean**2, 0.0))


def _normalized(node: gs.Node) -> _Normal | None:
    """The moments of a BatchNormalization: mean beta, variance gamma**2."""
    roots = [find_root(tensor) for tensor in node.inputs[1:3]]
    gamma, beta = (None if root is None else root.load().astype(np.float64) for root in roots)
    if gamma is None or beta is None or beta.ndim != 1 or gamma.shape != beta.shape:
        return None
    return _Normal(beta, gamma**2)


def _variances(terms: list[_Normal]) -> list[Float64Array] | None:
    """The variances of all terms; None if one is unknown."""
    known = [item.var for item in terms if item.var is not None]
    return known if len(known) == len(terms) else None


def _side_by_side(node: gs.Node, terms: list[_Normal]) -> _Normal | None:
    variances = _variances(terms)
    if node.attrs.get("axis") != 1:
        return None
    return _Normal(np.concatenate([item.mean for item in terms]), None if variances is None else np.concatenate(variances))


def _sum(node: gs.Node, terms: list[_Normal]) -> _Normal | None:  # noqa: ARG001
    """The moments of a sum of terms, which are assumed to be independent."""
    variances = _variances(terms)
    if len({item.mean.shape for item in terms}) != 1:
        return None
    return _Normal(np.sum([item.mean for item in terms], axis=0), None if variances is None else np.sum(variances, axis=0))


JOINS: dict[str, Callable[[gs.Node, list[_Normal]], _Normal | None]] = {"Add": _sum, "Concat": _side_by_side}


def _leaky_relu(node: gs.Node) -> Function:
    slope = float(node.attrs.get("alpha", 0.01))
    return lambda x: np.where(x < 0.0, slope * x, x)


def _clip(node: gs.Node) -> Function | None:
    bounds = _bounds(node)
    return None if bounds is None else lambda x: np.clip(x, *bounds)


FUNCTIONS: dict[str, Callable[[gs.Node], Function | None]] = {
    "Relu": lambda _: lambda x: np.maximum(x, 0.0),
    "LeakyRelu": _leaky_relu,
    "Sigmoid": lambda _: lambda x: 1 / (1 + np.exp(-x)),
    "HardSwish": lambda _: lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "Clip": _clip,
}
"""The elementwise function of each operator; None where its parameters are not constant."""


def _bounds(node: gs.Node) -> tuple[float, float] | None:
    """The bounds of a Clip: attributes up to opset 10, then inputs; None if they are not constant."""
    bounds = [float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))]
    for k, tensor in enumerate(node.inputs[1:3]):
        root = find_root(tensor) if tensor.name else None
        if tensor.name and root is None:
            return None
        bounds[k] = bounds[k] if root is None else float(root.load().astype(np.float64).ravel()[0])
    return bounds[0], bounds[1]
