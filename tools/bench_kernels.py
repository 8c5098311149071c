"""Measure the times of ONNX Runtime's integer and float kernels on this machine, for graph/integer/worth.py.

    python tools/bench_kernels.py

Each model has one convolution and runs in one thread.  Times are from ONNX Runtime's profiler, in microseconds: the lower quartile
of 25 runs.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

LAYERS = (  # input channels, output channels, kernel, groups, size of the image
    (3, 32, 3, 1, 112),
    (16, 16, 3, 1, 32),
    (64, 64, 3, 1, 56),
    (256, 256, 3, 1, 14),
    (16, 16, 1, 1, 56),
    (64, 64, 1, 1, 56),
    (512, 512, 1, 1, 7),
    (240, 960, 1, 1, 1),
    (32, 32, 3, 32, 56),
    (144, 144, 3, 144, 28),
    (512, 512, 3, 512, 14),
    (64, 64, 5, 64, 28),
)
CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv")
RUNS = 25


def layer(ic: int, oc: int, kernel: int, groups: int, size: int, on_integers: bool) -> onnx.ModelProto:
    """A model of Conv and Relu, or the same between QuantizeLinear and DequantizeLinear."""
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    shape = (oc, ic // groups, kernel, kernel)
    conv: dict[str, Any] = {"pads": [kernel // 2] * 4, "group": groups}
    if on_integers:
        stored = {"xs": np.float32(0.03), "xz": np.uint8(128), "w": rng.integers(-64, 64, shape).astype(np.int8)}
        stored |= {"ws": np.full(oc, 0.01, np.float32), "wz": np.zeros(oc, np.int8), "ys": np.float32(0.05), "yz": np.uint8(0)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"], **conv),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("QuantizeLinear", ["r", "ys", "yz"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["y"]),
        ]
    else:
        stored = {"w": rng.normal(size=shape).astype(np.float32)}
        nodes = [helper.make_node("Conv", ["x", "w"], ["c"], **conv), helper.make_node("Relu", ["c"], ["y"])]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, ic, size, size])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()]
    graph = helper.make_graph(nodes, "layer", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def profiled(model: onnx.ModelProto, x: np.ndarray, folder: str) -> dict[str, float]:
    """The time of each operator, in microseconds."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {"x": x})
    times: dict[str, list[int]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]].append(event["dur"])
    return {op: float(np.percentile(durations[3:], 25)) for op, durations in times.items()}


def main() -> None:
    print(f"ONNX Runtime {onnxruntime.__version__}, one thread\n")
    print("| layer | products | float | ns/1000 | integer | ns/1000 | ratio | Q, ns an element | DQ |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for ic, oc, kernel, groups, size in LAYERS:
            x = np.random.default_rng(1).normal(size=(1, ic, size, size)).astype(np.float32)
            on_floats, on_integers = (profiled(layer(ic, oc, kernel, groups, size, case), x, folder) for case in (False, True))
            times = [sum(found.get(op, 0.0) for op in CONVOLUTIONS) for found in (on_floats, on_integers)]
            products = oc * ic // groups * kernel**2 * size**2
            rates = [time * 1e6 / products for time in times]
            edges = [on_integers["QuantizeLinear"] * 1e3 / x.size, on_integers["DequantizeLinear"] * 1e3 / (oc * size**2)]
            name = f"{ic} -> {oc}, {kernel}x{kernel}, {size}x{size}" + (", depthwise" if groups > 1 else "")
            print(
                f"| {name} | {products / 1e6:.2f} M | {times[0]:.0f} us | {rates[0]:.1f} | {times[1]:.0f} us | {rates[1]:.1f} "
                f"| {times[1] / times[0]:.2f} | {edges[0]:.2f} | {edges[1]:.2f} |"
            )


if __name__ == "__main__":
    main()
