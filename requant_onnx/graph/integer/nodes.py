"""Put QuantizeLinear and DequantizeLinear on activations, and int32 biases, so that ONNX Runtime fuses integer kernels.

    result of an integer node   node -> t'  QuantizeLinear -> codes -> DequantizeLinear -> t      every reader keeps the name t
    other input of such a node  t -> QuantizeLinear -> codes -> DequantizeLinear -> t''           only integer readers read t''
    node that moves values      reads and outputs codes -> DequantizeLinear -> its old output; treated as the others where a runtime
                                does not support it on codes
    bias                        int32 -> DequantizeLinear with the scale of x times that of the weight

https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from requant_onnx.files.walk import reads_in
from requant_onnx.graph.constants import ModelGraph, find_root
from requant_onnx.graph.edit import drop_unread, tensor_proto
from requant_onnx.graph.integer.plan import IntegerPlan, WeightedNode
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operands import bias_input
from requant_onnx.numerics.activation import ActivationGrid
from requant_onnx.numerics.arrays import Float32Array, Float64Array
from requant_onnx.numerics.quantize import QuantizedWeight

MAX_BIAS = 2.0**30  # largest bias code, with room in int32 for the sums it is added to
MIN_PRODUCT = 1e-30  # smallest product of two scales, the step of a bias: it must not underflow in float32


@dataclass(frozen=True)
class Bias:
    """The bias of a node.  values: (oc,) float32."""

    node: WeightedNode
    values: Float32Array


def biases_of(model: ModelGraph, plan: IntegerPlan) -> list[Bias]:
    """The bias of each integer node that has one.  Raises ModelError when its values do not fit its shape."""
    nodes = {node.outputs[0].name: node for node in model.nodes if node.outputs}
    biases = []
    for weighted in plan.weighted:
        edge = bias_input(nodes[weighted.output])
        root = None if edge is None else find_root(edge)
        if root is not None:
            biases.append(Bias(weighted, root.load().astype(np.float32)))
    return biases


def min_scales_of(biases: Sequence[Bias], grids: Mapping[str, ActivationGrid], *, per_channel: bool) -> dict[str, Float64Array]:
    """The smallest scale of each weight at which no bias overflows int32: (oc,), or (1,) where the weight has one scale."""
    min_scales: dict[str, Float64Array] = {}
    for bias in biases:
        product = np.maximum(np.abs(bias.values.astype(np.float64)) / MAX_BIAS, MIN_PRODUCT)
        least = product / float(grids[bias.node.x].scale)
        least = least if per_channel else least.max(keepdims=True)
        min_scales[bias.node.weight] = np.maximum(min_scales.get(bias.node.weight, 0.0), least)
    return min_scales


def quantize_activations(
    model: onnx.ModelProto,
    plan: IntegerPlan,
    grids: Mapping[str, ActivationGrid],
    biases: Sequence[Bias],
    weights: Mapping[str, QuantizedWeight],
    *,
    paired: bool,
) -> None:
    """Change `model` as planned.  Its int8 weights are in place already, each read through a DequantizeLinear.

    grids: tensor in plan.source -> its grid.  weights: int8 weights by name.
    paired: whether each reader of a quantized activation gets its own DequantizeLinear, including nodes that move values.
    """
    graph = model.graph
    writer = _Writer(graph, FreshNames(model), {})
    codes = {tensor: writer.names.take(f"int8.{k}") for k, tensor in enumerate(plan.source)}
    node_of = {node.output[0]: node for node in graph.node if node.output}
    before = _write_biases(writer, biases, grids, weights)
    for weighted in plan.weighted:
        if weighted.x in plan.floats:
            node_of[weighted.output].input[0] = writer.dequantized(weighted.x)
    for output in plan.moves:
        if not paired:
            _move(writer, node_of[output], codes, grids)
        elif node_of[output].input[0] in plan.floats:
            node_of[output].input[0] = writer.dequantized(node_of[output].input[0])
    _write_pairs(writer, plan, codes, grids, before)
    if paired:
        _pair_readers(writer, set(codes.values()))
    drop_unread(graph, [bias.node.bias for bias in biases])


@dataclass
class _Writer:
    """The graph that is being changed; initializers that several nodes share are stored once."""

    graph: onnx.GraphProto
    names: FreshNames
    stored: dict[tuple[str, bytes], str]

    def scalar(self, value: np.generic) -> str:
        """A scalar initializer."""
        key = (str(value.dtype), value.tobytes())
        if key not in self.stored:
            self.stored[key] = self.names.take(f"int8.c{len(self.stored)}")
            self.graph.initializer.append(tensor_proto(np.asarray(value), self.stored[key]))
        return self.stored[key]

    def zeros(self, count: int) -> str:
        """The zero points of an int32 bias, which are 0; files in ORT's own format cannot omit them."""
        key = ("zeros", str(count).encode())
        if key not in self.stored:
            self.stored[key] = self.names.take(f"int8.c{len(self.stored)}")
            self.graph.initializer.append(tensor_proto(np.zeros(count, np.int32), self.stored[key]))
        return self.stored[key]

    def dequantized(self, tensor: str) -> str:
        """The name of the decoded tensor, for a tensor whose float is kept too."""
        key = ("dequantized", tensor.encode())
        if key not in self.stored:
            self.stored[key] = self.names.take(f"int8.x{len(self.stored)}")
        return self.stored[key]


def _move(writer: _Writer, node: onnx.NodeProto, codes: Mapping[str, str], grids: Mapping[str, ActivationGrid]) -> None:
    grid = grids[node.input[0]]
    node.input[0], node.output[0] = codes[node.input[0]], codes[node.output[0]]
    if node.op_type == "Pad":
        axes = list(node.input[3:])
        del node.input[2:]
        node.input.extend([writer.scalar(grid.zero_point), *axes])


def _write_biases(
    writer: _Writer, biases: Sequence[Bias], grids: Mapping[str, ActivationGrid], weights: Mapping[str, QuantizedWeight]
) -> dict[str, list[onnx.NodeProto]]:
    """Connect each node to its int32 bias.  Returns the nodes that decode these, by output of the first node that reads them."""
    nodes: dict[str, list[onnx.NodeProto]] = {}
    made: dict[tuple[str, str, str], str] = {}
    node_of = {node.output[0]: node for node in writer.graph.node if node.output}
    for bias in biases:
        grid, weight = grids[bias.node.x], weights[bias.node.weight]
        key = (bias.node.bias, bias.node.weight, writer.scalar(grid.scale))
        if key not in made:
            made[key] = writer.names.take(f"int8.b{len(made)}")
            stored, scale = (writer.names.take(f"{made[key]}.{part}") for part in ("codes", "scale"))
            steps = np.broadcast_to(weight.scale * grid.scale, bias.values.shape).astype(np.float64)
            writer.graph.initializer.append(tensor_proto(np.rint(bias.values / steps).astype(np.int32), stored))
            nodes[bias.node.output] = [
                helper.make_node("Mul", [node_of[bias.node.weight].input[1], key[2]], [scale]),
                helper.make_node("DequantizeLinear", [stored, scale, writer.zeros(bias.values.size)], [made[key]], axis=0),
            ]
        reader = node_of[bias.node.output]
        reader.input[list(reader.input).index(bias.node.bias)] = made[key]
    return nodes


def _write_pairs(
    writer: _Writer,
    plan: IntegerPlan,
    codes: Mapping[str, str],
    grids: Mapping[str, ActivationGrid],
    before: Mapping[str, list[onnx.NodeProto]],
) -> None:
    """Rename the results of integer nodes, and insert QuantizeLinear and DequantizeLinear directly after their source."""
    graph = writer.graph
    tensor_of = {code: tensor for tensor, code in codes.items()}
    read = set(reads_in(graph))
    nodes: list[onnx.NodeProto] = []
    for item in graph.input:
        if item.name in plan.source:
            nodes += _pair(writer, item.name, codes[item.name], writer.dequantized(item.name), grids[item.name])
    for node in graph.node:
        nodes += before.get(node.output[0], []) if node.output else []
        nodes.append(node)
        for position, output in enumerate(node.output):
            tensor = tensor_of.get(output, output)
            grid = grids.get(tensor)
            if grid is None:
                continue
            if output != tensor:  # a move, which outputs codes
                nodes += [_dequantize(writer, output, tensor, grid)] if tensor in read else []
            elif tensor in plan.floats:
                nodes += _pair(writer, tensor, codes[tensor], writer.dequantized(tensor), grid)
            else:
                node.output[position] = writer.names.take(f"{codes[tensor]}.float")
                nodes += _pair(writer, node.output[position], codes[tensor], tensor, grid, tensor in read)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # deleting the old list frees its nodes
    del graph.node[:]
    graph.node.extend(ordered)


def _pair_readers(writer: _Writer, codes: Set[str]) -> None:
    """Give each reader of decoded activations its own DequantizeLinear; other runtimes expect a pair for each node.

    codes: names of the codes of activations.
    """
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in writer.graph.node:
        for k, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, k))
    outputs = {item.name for item in writer.graph.output}
    nodes = []
    for node in writer.graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            shared = readers.get(node.output[0], [])[0 if node.output[0] in outputs else 1 :]
            for reader, k in shared:
                own = onnx.NodeProto.FromString(node.SerializeToString())
                own.output[0] = reader.input[k] = writer.names.take(f"{node.output[0]}.own")
                nodes.append(own)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del writer.graph.node[:]
    writer.graph.node.extend(copies)


def _pair(
    writer: _Writer, tensor: str, codes: str, output: str, grid: ActivationGrid, dequantized: bool = True
) -> list[onnx.NodeProto]:
    parameters = [writer.scalar(grid.scale), writer.scalar(grid.zero_point)]
    quantize = helper.make_node("QuantizeLinear", [tensor, *parameters], [codes])
    return [quantize, _dequantize(writer, codes, output, grid)] if dequantized else [quantize]


def _dequantize(writer: _Writer, codes: str, output: str, grid: ActivationGrid) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [codes, writer.scalar(grid.scale), writer.scalar(grid.zero_point)], [output])
