"""ResNet-18 and ResNet-50 for 32x32 images with random Laplace weights, as ONNX: subjects for benchmarks, not for accuracy.

The layout is that of arXiv 1512.03385 with a 3x3 stem of stride 1 and no pooling behind it, BatchNormalization folded away.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)


class _Net:
    """A graph under construction; each method appends nodes and returns the name of the result."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))  # type: ignore[arg-type]
        return name

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        """Variance gain / fan-in, so that activations keep their size through the layers."""
        values = self.generator.laplace(scale=(gain / 2 / np.prod(shape[1:])) ** 0.5, size=shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, ic: int, oc: int, kernel: int, stride: int = 1, gain: float = 2.0) -> str:
        pad = kernel // 2
        weight = self.weight(oc, ic, kernel, kernel, gain=gain)
        self.weights.append(numpy_helper.from_array(np.zeros(oc, np.float32), f"b{len(self.weights)}"))
        return self.node("Conv", x, weight, self.weights[-1].name, pads=[pad] * 4, strides=[stride] * 2)

    def block(self, x: str, ic: int, width: int, stride: int, bottleneck: bool) -> tuple[str, int]:
        """One residual block; returns its output and the channels of that."""
        if bottleneck:
            oc = 4 * width
            y = self.node("Relu", self.conv(x, ic, width, 1))
            y = self.node("Relu", self.conv(y, width, width, 3, stride))
            y = self.conv(y, width, oc, 1, gain=0.2)
        else:
            oc = width
            y = self.node("Relu", self.conv(x, ic, width, 3, stride))
            y = self.conv(y, width, oc, 3, gain=0.2)
        shortcut = self.conv(x, ic, oc, 1, stride) if stride > 1 or ic != oc else x
        return self.node("Relu", self.node("Add", y, shortcut)), oc


def resnet(depth: int, classes: int = 10, seed: int = 0) -> onnx.ModelProto:
    """depth: 18 (11.2 M weights) or 50 (23.5 M).  Input x (n, 3, 32, 32), output y (n, classes)."""
    net = _Net(seed)
    x = net.node("Relu", net.conv("x", 3, 64, 3))
    channels = 64
    for width, blocks in zip(WIDTHS, STAGES[depth], strict=True):
        for block in range(blocks):
            stride = 2 if width > 64 and block == 0 else 1
            x, channels = net.block(x, channels, width, stride, bottleneck=depth == 50)
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    net.nodes.append(helper.make_node("Gemm", [x, net.weight(classes, channels)], ["y"], name="y", transB=1))
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 32, 32])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", classes])]
    graph = helper.make_graph(net.nodes, f"resnet{depth}", inputs, outputs, net.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
