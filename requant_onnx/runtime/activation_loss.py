"""The error that 8-bit activations add to the outputs of a model, simulated in float on a few calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.activation import ActivationGrid
from requant_onnx.runtime.sensitivity import output_error_against
from requant_onnx.runtime.stream import Chunk


def activation_loss(
    model: onnx.ModelProto, grids: Mapping[str, ActivationGrid], chunks: Sequence[Chunk]
) -> Callable[[Collection[str]], float]:
    """A function that returns the output error, relative to output power, with the given tensors of the main graph at 8 bits."""
    error = output_error_against(model, chunks)
    return lambda tensors: error(_rounded(model, {name: grids[name] for name in tensors}))


def _rounded(model: onnx.ModelProto, grids: Mapping[str, ActivationGrid]) -> onnx.ModelProto:
    work = onnx.ModelProto()
    work.CopyFrom(model)
    names = FreshNames(work)
    made = {item.name for item in work.graph.input} | {name for node in work.graph.node for name in node.output}
    new: dict[str, str] = {}
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for tensor, grid in grids.items():
        if tensor not in made:
            continue
        scale, zero, codes, new[tensor] = (names.take(f"{tensor}_{part}") for part in ("scale", "zero", "codes", "rounded"))
        work.graph.initializer.extend(
            [numpy_helper.from_array(np.asarray(grid.scale), scale), numpy_helper.from_array(np.asarray(grid.zero_point), zero)]
        )
        nodes[tensor] = [
            helper.make_node("QuantizeLinear", [tensor, scale, zero], [codes]),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [new[tensor]]),
        ]
    ordered = [node for item in work.graph.input for node in nodes.get(item.name, [])]
    for node in work.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [new.get(name, name) for name in node.input]
        ordered.append(copy)
        ordered += [each for name in node.output for each in nodes.get(name, [])]
    del work.graph.node[:]
    work.graph.node.extend(ordered)
    return work
