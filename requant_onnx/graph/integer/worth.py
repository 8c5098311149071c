"""The nodes that would be slower with integer kernels according to a table of costs; these stay in float.

A node on integers saves time in products, but loses time at its edges, where activations are quantized and decoded, and in
operators that ONNX Runtime fuses only into float convolutions.  Integer nodes that pass codes to each other form a region.  A
region that is slower as a whole stays in float, as do nodes at its edge that make it slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from requant_onnx.choices import Runtime
from requant_onnx.graph.constants import ModelGraph, find_root
from requant_onnx.graph.integer.plan import GENERIC, IntegerPlan
from requant_onnx.graph.operators import OPERATORS

FUSED_IN_FLOAT = ("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Gelu")
"""Operators that cost almost nothing after a float convolution."""


@dataclass(frozen=True)
class Costs:
    """Costs in nanoseconds on one thread.  VNNI: measured by tools/bench_kernels.py.  WASM: measured on chains of four layers in
    onnxruntime-web 1.30; the edges are set so that a whole MobileNet is not slower than in float.

    node: per node.  product: per product in a dense layer, (float, integer).  depthwise: the same in a depthwise convolution.
    copy: per output pixel and kernel element, for copying the input of integer kernels larger than 1x1, (few channels, more).
    result: per element of a result, (float, integer).  quantize, dequantize: per element, including the change of layout.
    activation: per element in an operator that is fused on floats only.  pool: per element in an AveragePool on integers.
    """

    node: float
    product: tuple[float, float]
    depthwise: tuple[float, float]
    copy: tuple[float, float]
    result: tuple[float, float]
    quantize: float
    dequantize: float
    activation: float
    pool: float


VNNI = Costs(2000, (0.0105, 0.0026), (0.025, 0.042), (2.5, 1.3), (0.05, 0.10), 0.24, 0.16, 0.35, 5.0)
WASM = Costs(1500, (0.062, 0.028), (0.300, 0.850), (10.0, 5.0), (0.50, 1.50), 4.0, 4.0, 1.5, 20.0)
FEW = 8  # channels
COSTS = {Runtime.WEB: WASM}
"""Costs by runtime; those of VNNI apply to all others."""
FAST = tuple(op for op in GENERIC if op != "AveragePool")
"""Operators without a weight whose integer kernels are no slower; AveragePool takes 5 ns per element, 0.26 on floats."""
SLOWER = "would be slower on integers; --int8-speed all converts it anyway"


def watched_tensors(plan: IntegerPlan) -> set[str]:
    """The tensors whose sizes `slower_on_integers` needs."""
    return {*plan.source, *(node.output for node in plan.weighted)}


def slower_on_integers(model: ModelGraph, plan: IntegerPlan, sizes: Mapping[str, int], costs: Costs) -> frozenset[str]:
    """The weights to keep in float according to this plan; the plan without them may reveal more.

    sizes: number of elements of each of `watched_tensors`, for one input of the model.
    """
    layers = list(_layers(model, plan, sizes, costs))
    best = max(layers, key=lambda layer: layer.gain_as_float, default=None)
    if best is not None and best.gain_as_float > 0.0:
        return frozenset((best.weight,))
    regions: dict[int, list[_Layer]] = defaultdict(list)
    for layer in layers:
        regions[layer.region].append(layer)
    return frozenset(layer.weight for region in regions.values() if _gain(region, sizes, costs) <= 0.0 for layer in region)


@dataclass
class _Layer:
    """A weighted node.  Times in ns.

    saved: time that the kernel saves.  entry, exit: tensors quantized for it, and decoded after it, in its region.
    lost: time lost in operators after it that are fused on floats only.  gain_as_float: time saved by keeping it in float.
    """

    weight: str
    region: int
    saved: float
    entry: str
    exit: str
    lost: float
    gain_as_float: float


def _gain(region: list[_Layer], sizes: Mapping[str, int], costs: Costs) -> float:
    """The time that a region saves, in ns."""
    entries, exits = ({getattr(layer, name) for layer in region} - {""} for name in ("entry", "exit"))
    edges = sum(costs.node + costs.quantize * sizes[name] for name in entries)
    edges += sum(costs.node + costs.dequantize * sizes[name] for name in exits)
    return sum(layer.saved - layer.lost for layer in region) - edges


def _layers(model: ModelGraph, plan: IntegerPlan, sizes: Mapping[str, int], costs: Costs) -> Iterator[_Layer]:
    nodes = {node.outputs[0].name: node for node in model.graph.nodes if node.outputs}
    regions = _Regions(model, plan)
    outputs = {tensor.name for tensor in model.graph.outputs}

    def quantized(name: str) -> float:
        return costs.node + costs.quantize * sizes[name]

    def decoded(name: str) -> float:
        return costs.node + costs.dequantize * sizes[name]

    for weighted in plan.weighted:
        node = nodes[weighted.output]
        result, x = regions.result_of(node), node.inputs[0]
        inside, beside = regions.readers_of(result)
        enters = x.name in plan.floats
        leaves = result.name in plan.source and (bool(beside) or result.name in outputs)
        lost = 0.0
        if any(reader.op in FUSED_IN_FLOAT for reader in beside):
            lost += costs.node + costs.activation * sizes[result.name]
        if enters and x.inputs and x.inputs[0].op == "AveragePool":  # ONNX Runtime runs it on integers between two such nodes
            lost += costs.pool * sizes[x.name]
        saved = _saved(node, sizes, result.name, costs)

        alone, read_as_float = (len(each) for each in regions.readers_of(x))
        gain = lost - saved
        gain += quantized(x.name) if enters and alone == 1 else 0.0
        gain -= decoded(x.name) if not enters and not read_as_float else 0.0
        gain += decoded(result.name) if leaves and not inside else 0.0
        joined = [reader for reader in inside if reader.op in GENERIC]  # these need all their inputs as integers
        gain -= quantized(result.name) if len(joined) < len(inside) else 0.0
        for reader in joined:
            behind = regions.result_of(reader)
            more, _ = regions.readers_of(behind)
            gain -= quantized(behind.name) if more else 0.0
            gain -= sum(decoded(tensor.name) for tensor in reader.inputs if tensor is not result)
            gain -= math.inf if any(each.op in GENERIC for each in more) else 0.0
        entry, end = x.name if enters else "", result.name if leaves else ""
        yield _Layer(weighted.weight, regions.region_of(node), saved, entry, end, lost, gain)


def _saved(node: gs.Node, sizes: Mapping[str, int], result: str, costs: Costs) -> float:
    """The time that the integer kernel saves, in ns."""
    root = find_root(node.inputs[1])
    shape = () if root is None else root.shape
    axis = OPERATORS[node.op].channel_axis(node.attrs, 1, len(shape))
    channels = shape[axis]
    out = sizes[result]
    products = out * math.prod(shape) / channels
    is_depthwise = shape[1] == 1 and node.attrs.get("group", 1) > 1
    a_product = costs.depthwise if is_depthwise else costs.product
    window = math.prod(shape[2:]) if axis == 0 else 1
    copies = 0.0 if is_depthwise or window == 1 else costs.copy[shape[1] >= FEW] * window * out / channels
    on_floats = products * a_product[0] + out * costs.result[0]
    return on_floats - products * a_product[1] - out * costs.result[1] - copies


class _Regions:
    """The integer nodes, in regions whose nodes pass codes to each other."""

    def __init__(self, model: ModelGraph, plan: IntegerPlan) -> None:
        self._plan = plan
        weighted, moves = {node.output for node in plan.weighted}, set(plan.moves)
        self.root: dict[int, int] = {}
        producers: dict[str, gs.Node] = {}
        for node in model.graph.nodes:
            if not node.outputs:
                continue
            name, result = node.outputs[0].name, self.result_of(node).name
            generic = node.op in GENERIC and result in plan.source and result not in plan.floats
            if name in weighted or name in moves or generic:
                self.root[id(node)] = id(node)
                producers[result] = node
                for tensor in node.inputs:
                    if tensor.name in producers:
                        self.root[self.region_of(node)] = self.region_of(producers[tensor.name])

    def result_of(self, node: gs.Node) -> gs.Tensor:
        """The tensor with a node's result, after a Relu or Clip that codes make unnecessary."""
        own = node.outputs[0]
        if own.name not in self._plan.source and len(own.outputs) == 1 and own.outputs[0].op in ("Relu", "Clip"):
            behind = own.outputs[0].outputs[0]
            return behind if behind.name in self._plan.source else own
        return own

    def readers_of(self, tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Node]]:
        """The readers of a tensor, (on integers, on floats)."""
        inside = [reader for reader in tensor.outputs if id(reader) in self.root]
        return inside, [reader for reader in tensor.outputs if id(reader) not in self.root]

    def region_of(self, node: gs.Node) -> int:
        """The id of a node's region."""
        here = id(node)
        while self.root[here] != here:
            here = self.root[here]
        return here
