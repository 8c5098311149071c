"""ONNX models of ResNet-18, ResNet-50 and a detector with random Laplace weights, for benchmarks of time and memory only.

The ResNets are those of arXiv 1512.03385, for 32x32 images with a 3x3 stem of stride 1 and no pooling after it;
BatchNormalization is folded.
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
        """Add a weight of variance gain / fan-in, so that activations keep their magnitude through the layers."""
        values = self.generator.laplace(scale=(gain / 2 / np.prod(shape[1:])) ** 0.5, size=shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, ic: int, oc: int, kernel: int, stride: int = 1, gain: float = 2.0) -> str:
        pad = kernel // 2
        weight = self.weight(oc, ic, kernel, kernel, gain=gain)
        self.weights.append(numpy_helper.from_array(np.zeros(oc, np.float32), f"b{len(self.weights)}"))
        return self.node("Conv", x, weight, self.weights[-1].name, pads=[pad] * 4, strides=[stride] * 2)

    def silu(self, x: str, ic: int, oc: int, kernel: int, stride: int = 1) -> str:
        """Append Conv and SiLU."""
        y = self.conv(x, ic, oc, kernel, stride)
        return self.node("Mul", y, self.node("Sigmoid", y))

    def split_block(self, x: str, ic: int, oc: int, count: int, shortcut: bool = True) -> str:
        """Append a block: half of the channels go through `count` pairs of 3x3 convolutions, and all stages are concatenated."""
        half = oc // 2
        parts = [self.silu(x, ic, half, 1), self.silu(x, ic, half, 1)]
        for _ in range(count):
            y = self.silu(self.silu(parts[-1], half, half, 3), half, half, 3)
            parts.append(self.node("Add", y, parts[-1]) if shortcut else y)
        return self.silu(self.node("Concat", *parts, axis=1), (2 + count) * half, oc, 1)

    def doubled(self, x: str) -> str:
        """Append nearest-neighbor upsampling by 2."""
        self.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), f"s{len(self.weights)}"))
        return self.node("Resize", x, "", self.weights[-1].name, mode="nearest")

    def model(self, name: str, size: int, outputs: dict[str, int]) -> onnx.ModelProto:
        """Make the model.  size: height and width of the images.  outputs: output -> number of channels."""
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, size, size])
        rank = 4 if self.nodes[-1].op_type == "Concat" else 2
        results = [
            helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, ["n", channels, *[None] * (rank - 2)])
            for y, channels in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, name, [x], results, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def block(self, x: str, ic: int, width: int, stride: int, bottleneck: bool) -> tuple[str, int]:
        """Append a residual block; return its output and the number of its channels."""
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


def resnet(depth: int, classes: int = 10, seed: int = 0, size: int = 32) -> onnx.ModelProto:
    """A ResNet.  depth: 18 (11.2 M weights) or 50 (23.5 M).  Input x (n, 3, size, size), output y (n, classes).

    size: 32 for a stem of stride 1; larger sizes have the stem of the paper, 7x7 of stride 2 and a pool.
    """
    net = _Net(seed)
    if size == 32:
        x = net.node("Relu", net.conv("x", 3, 64, 3))
    else:
        x = net.node("Relu", net.conv("x", 3, 64, 7, 2))
        x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks in zip(WIDTHS, STAGES[depth], strict=True):
        for block in range(blocks):
            stride = 2 if width > 64 and block == 0 else 1
            x, channels = net.block(x, channels, width, stride, bottleneck=depth == 50)
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    net.nodes.append(helper.make_node("Gemm", [x, net.weight(classes, channels)], ["y"], name="y", transB=1))
    return net.model(f"resnet{depth}", size, {"y": classes})


def detector(size: int = 640, seed: int = 0) -> onnx.ModelProto:
    """A detector shaped like YOLOv8s (11.1 M weights): SiLU, split blocks, a pooling pyramid, two paths through three scales.

    Input x (n, 3, size, size); output: boxes and classes at each scale, (n, 144, size / 8 .. 32, ...).
    """
    net = _Net(seed)
    x = net.silu(net.silu("x", 3, 32, 3, 2), 32, 64, 3, 2)
    x = net.split_block(x, 64, 64, 1)
    kept = []
    for channels, count in ((128, 2), (256, 2), (512, 1)):
        x = net.split_block(net.silu(x, channels // 2, channels, 3, 2), channels, channels, count)
        kept.append(x)
    pooled = [net.silu(kept[2], 512, 256, 1)]
    for _ in range(3):
        pooled.append(net.node("MaxPool", pooled[-1], kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1]))
    deep = net.silu(net.node("Concat", *pooled, axis=1), 1024, 512, 1)
    middle = net.split_block(net.node("Concat", net.doubled(deep), kept[1], axis=1), 768, 256, 1, shortcut=False)
    fine = net.split_block(net.node("Concat", net.doubled(middle), kept[0], axis=1), 384, 128, 1, shortcut=False)
    middle = net.split_block(net.node("Concat", net.silu(fine, 128, 128, 3, 2), middle, axis=1), 384, 256, 1, shortcut=False)
    deep = net.split_block(net.node("Concat", net.silu(middle, 256, 256, 3, 2), deep, axis=1), 768, 512, 1, shortcut=False)
    outputs = {}
    for k, (scale, channels) in enumerate(((fine, 128), (middle, 256), (deep, 512))):
        heads = []
        for width, results in ((64, 64), (128, 80)):
            y = net.silu(net.silu(scale, channels, width, 3), width, width, 3)
            heads.append(net.conv(y, width, results, 1, gain=1.0))
        net.nodes.append(helper.make_node("Concat", heads, [f"y{k}"], axis=1))
        outputs[f"y{k}"] = 144
    return net.model("detector", size, outputs)
