"""Refinement must not depend on how a graph is written: the same trained net in many notations has the same loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL
from onnx import TensorProto, helper, numpy_helper
from oracle import run

from requant_onnx import Calibration, Form, Int8Speed, QuantConfig, quantize_model
from requant_onnx.inputs.synthetic import noise_images

WITHIN = 1.0  # dB
IMAGES, HELD_OUT = Calibration(count=32), noise_images(32, 3, 32, 32, seed=9).astype(np.float32) / 255 * 4 - 2
Rewriting = Callable[[onnx.ModelProto], None]
REWRITINGS: dict[str, Rewriting] = {}


def rewriting(function: Rewriting) -> Rewriting:
    REWRITINGS[function.__name__] = function
    return function


def weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    stored = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            yield node, stored[node.input[1]]


def drop(model: onnx.ModelProto, tensor: onnx.TensorProto) -> onnx.TensorProto:
    kept = onnx.TensorProto()
    kept.CopyFrom(tensor)
    model.graph.initializer.remove(tensor)
    return kept


def store(model: onnx.ModelProto, values: np.ndarray, name: str) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return name


def put_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def behind(model: onnx.ModelProto, stored: Callable[[np.ndarray], np.ndarray], at_head: bool, step: tuple[str, int]) -> None:
    """Store transformed values for each weight, and invert that by nodes at the head of the graph, or just before the reader."""
    head: list[onnx.NodeProto] = []
    body: list[onnx.NodeProto] = []
    made = {node.output[0]: tensor for node, tensor in weights(model)}
    for node in list(model.graph.node):
        if node.output[0] in made:
            tensor = drop(model, made[node.output[0]])
            w = numpy_helper.to_array(tensor)
            source = store(model, stored(w), f"{tensor.name}_stored")
            op, argument = step
            if op == "Reshape":
                shape = store(model, np.array(w.shape, np.int64), f"{tensor.name}_shape")
                turn = helper.make_node(op, [source, shape], [tensor.name])
            elif op == "Squeeze":
                turn = helper.make_node(op, [source, store(model, np.array([0]), f"{tensor.name}_axes")], [tensor.name])
            elif op == "Cast":
                turn = helper.make_node(op, [source], [tensor.name], to=argument)
            elif op == "Transpose":
                turn = helper.make_node(op, [source], [tensor.name], perm=list(reversed(range(w.ndim))))
            else:
                turn = helper.make_node(op, [source], [tensor.name])
            (head if at_head else body).append(turn)
        body.append(node)
    put_nodes(model, head + body)


for place in (True, False):
    where = "at the head" if place else "before the reader"
    for title, change, step in (
        ("Identity", lambda w: w, ("Identity", 0)),
        ("Cast", lambda w: w.astype(np.float16), ("Cast", TensorProto.FLOAT)),
        ("Reshape", lambda w: w.reshape(-1), ("Reshape", 0)),
    ):
        REWRITINGS[f"weights behind {title}, {where}"] = partial(behind, stored=change, at_head=place, step=step)
REWRITINGS["weights behind Transpose"] = lambda model: behind(model, lambda w: w.T, False, ("Transpose", 0))
REWRITINGS["weights behind Squeeze"] = lambda model: behind(model, lambda w: w[None], False, ("Squeeze", 0))
REWRITINGS["float64 weights"] = lambda model: behind(model, lambda w: w.astype(np.float64), True, ("Cast", TensorProto.FLOAT))


@rewriting
def weights_in_constant_nodes(model: onnx.ModelProto) -> None:
    tensors = [drop(model, tensor) for _, tensor in list(weights(model))]
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
    put_nodes(model, [*constants, *model.graph.node])


@rewriting
def weights_that_are_inputs(model: onnx.ModelProto) -> None:
    for item in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, item.dims))


@rewriting
def weights_that_are_computed(model: onnx.ModelProto) -> None:
    nodes = []
    made = {node.output[0]: tensor for node, tensor in weights(model)}
    half = store(model, np.float32(0.5), "half")
    for node in list(model.graph.node):
        if node.output[0] in made:
            tensor = drop(model, made[node.output[0]])
            source = store(model, numpy_helper.to_array(tensor) * 2, f"{tensor.name}_twice")
            nodes.append(helper.make_node("Mul", [source, half], [tensor.name]))
        nodes.append(node)
    put_nodes(model, nodes)


@rewriting
def biases_as_add(model: onnx.ModelProto) -> None:
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = []
    for node in list(model.graph.node):
        nodes.append(node)
        if node.op_type == "Conv" and len(node.input) == 3:
            bias = store(model, stored[node.input[2]].reshape(1, -1, 1, 1), f"{node.output[0]}_b")
            result = node.output[0]
            del node.input[2]
            node.output[0] = f"{result}_product"
            nodes.append(helper.make_node("Add", [node.output[0], bias], [result]))
    put_nodes(model, nodes)


@rewriting
def explicit_pads(model: onnx.ModelProto) -> None:
    nodes = []
    for node in list(model.graph.node):
        pads = next((item for item in node.attribute if item.name == "pads"), None)
        if node.op_type == "Conv" and pads is not None and any(pads.ints):
            top, left, bottom, right = pads.ints
            amounts = store(model, np.array([0, 0, top, left, 0, 0, bottom, right]), f"{node.output[0]}_pads")
            padded = f"{node.output[0]}_padded"
            nodes.append(helper.make_node("Pad", [node.input[0], amounts], [padded]))
            node.input[0] = padded
            node.attribute.remove(pads)
        nodes.append(node)
    put_nodes(model, nodes)


@rewriting
def a_fixed_batch(model: onnx.ModelProto) -> None:
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.shape.dim[0].dim_value = 8


@rewriting
def another_order_of_nodes(model: onnx.ModelProto) -> None:
    """Order nodes as late as possible: depth first from the output."""
    makers = {name: node for node in model.graph.node for name in node.output}
    order: list[onnx.NodeProto] = []

    def visit(name: str) -> None:
        node = makers.pop(name, None)
        if node is not None:
            for read in reversed(node.input):
                visit(read)
            order.append(node)

    visit(model.graph.output[0].name)
    put_nodes(model, order)


def between(model: onnx.ModelProto, op: str) -> None:
    nodes = []
    for node in list(model.graph.node):
        nodes.append(node)
        if node.op_type == "Relu":
            result = node.output[0]
            node.output[0] = f"{result}_before"
            nodes.append(helper.make_node(op, [node.output[0]], [result]))
    put_nodes(model, nodes)


REWRITINGS["Identity between layers"] = lambda model: between(model, "Identity")
REWRITINGS["Dropout between layers"] = lambda model: between(model, "Dropout")


@rewriting
def relu_as_clip(model: onnx.ModelProto) -> None:
    zero = store(model, np.float32(0), "zero")
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.append(zero)


@rewriting
def gemm_as_matmul_and_add(model: onnx.ModelProto) -> None:
    nodes = []
    for node in list(model.graph.node):
        if node.op_type == "Gemm":
            stored = {item.name: item for item in model.graph.initializer}
            w = store(model, numpy_helper.to_array(stored[node.input[1]]).T, "matrix")
            nodes += [
                helper.make_node("MatMul", [node.input[0], w], ["product"]),
                helper.make_node("Add", ["product", node.input[2]], [node.output[0]]),
            ]
        else:
            nodes.append(node)
    put_nodes(model, nodes)


@rewriting
def batch_normalization_kept(model: onnx.ModelProto) -> None:
    nodes = []
    stored = {item.name: item for item in model.graph.initializer}
    for node in list(model.graph.node):
        nodes.append(node)
        if node.op_type == "Conv":
            w = stored[node.input[1]]
            channels, result = w.dims[0], node.output[0]
            scale = np.random.default_rng(channels).uniform(0.5, 2, channels).astype(np.float32)
            w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w) / scale.reshape(-1, 1, 1, 1), w.name))
            beta = numpy_helper.to_array(stored[node.input[2]])
            values = (scale, beta, np.zeros(channels, np.float32), np.full(channels, 1 - 1e-5, np.float32))
            names = [store(model, value, f"{result}_bn{k}") for k, value in enumerate(values)]
            del node.input[2]
            node.output[0] = f"{result}_product"
            nodes.append(helper.make_node("BatchNormalization", [node.output[0], *names], [result]))
    put_nodes(model, nodes)


@rewriting
def channels_last(model: onnx.ModelProto) -> None:
    item = model.graph.input[0]
    name = item.name
    dims = item.type.tensor_type.shape.dim
    dims[1].dim_value, dims[3].dim_value = 32, 3
    item.name = "pixels"
    put_nodes(model, [helper.make_node("Transpose", ["pixels"], [name], perm=[0, 3, 1, 2]), *model.graph.node])


@rewriting
def half_precision(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    source, result = model.graph.input[0].name, model.graph.output[0].name
    for node in model.graph.node:
        node.input[:] = ["half_in" if name == source else name for name in node.input]
        node.output[:] = ["half_out" if name == result else name for name in node.output]
    ends = [
        helper.make_node("Cast", [source], ["half_in"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half_out"], [result], to=TensorProto.FLOAT),
    ]
    del model.graph.value_info[:]
    put_nodes(model, [ends[0], *model.graph.node, ends[1]])


@rewriting
def more_outputs(model: onnx.ModelProto) -> None:
    for node in [node for node in model.graph.node if node.op_type == "Relu"][::4]:
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))


@rewriting
def local_functions(model: onnx.ModelProto) -> None:
    """Put each Conv into its own function, and call it."""
    nodes = []
    for k, node in enumerate(list(model.graph.node)):
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        inner = onnx.NodeProto.FromString(node.SerializeToString())
        inner.input[:], inner.output[:] = ["a", "w", "b"], ["y"]
        function = helper.make_function("local", f"layer{k}", ["a", "w", "b"], ["y"], [inner], [model.opset_import[0]])
        model.functions.append(function)
        nodes.append(helper.make_node(f"layer{k}", list(node.input), list(node.output), domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))
    put_nodes(model, nodes)


def written(name: str) -> onnx.ModelProto:
    model = onnx.load(OWN_MODEL)
    if name:
        REWRITINGS[name](model)
    return model


def outputs(model: onnx.ModelProto) -> np.ndarray:
    item = model.graph.input[0]
    x = HELD_OUT.transpose(0, 2, 3, 1) if item.name == "pixels" else HELD_OUT
    size = item.type.tensor_type.shape.dim[0].dim_value or len(x)
    return np.concatenate([run(model, {item.name: x[k : k + size]})[0] for k in range(0, len(x), size)])


@cache
def loss(name: str, form: Form) -> float:
    """The output SQNR, in dB."""
    model = written(name)
    made, report = quantize_model(model, QuantConfig(3, form=form, int8_speed=Int8Speed.ALL), calibration=IMAGES)
    assert len(report.converted) >= 18  # in float16, the first and the last are too small to gain
    exact = outputs(model).astype(np.float64)
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - outputs(made)).sum()))


IN_INT8 = (
    "weights behind Cast, at the head",
    "explicit_pads",
    "gemm_as_matmul_and_add",
)
"""Rewritings that could prevent integer kernels for an activation."""


@pytest.mark.slow
@pytest.mark.parametrize("name", REWRITINGS)
def test_a_rewriting_loses_the_same(name: str) -> None:
    assert abs(loss(name, Form.FOLDED) - loss("", Form.FOLDED)) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_INT8)
def test_a_rewriting_loses_the_same_in_int8(name: str) -> None:
    assert abs(loss(name, Form.INT8) - loss("", Form.INT8)) < WITHIN


@pytest.mark.parametrize("name", REWRITINGS)
def test_a_rewriting_is_the_same_net(name: str) -> None:
    np.testing.assert_allclose(outputs(written(name)), outputs(written("")), atol=0.05)
