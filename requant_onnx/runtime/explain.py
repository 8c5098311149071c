"""The actual treatment of each weight by ONNX Runtime, read from its optimized graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.choices import Form
from requant_onnx.files.leftovers import scratch_folder
from requant_onnx.files.load import LoadedModel, ModelLike
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import ModelGraph, ancestors, find_root, from_constants
from requant_onnx.graph.decode.forms import FORMS, Fate
from requant_onnx.graph.decode.lookup import looks_up_codes
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.operands import weight_operand
from requant_onnx.graph.operators import FLOAT_KERNELS, KERNELS, OPERATORS
from requant_onnx.graph.shapes import find_shapes
from requant_onnx.runtime.sessions import load_runnable, optimized_graph


@dataclass(frozen=True)
class WeightFate:
    """The treatment of a weight of a node.  kernel: operator that reads it.  why: why it is not faster, "" if it is fastest.

    behind: names of all tensors that it is decoded from, including its own.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    fate: Fate
    kernel: str
    why: str
    behind: frozenset[str] = field(default=frozenset(), repr=False)


SLOWER_IN_INT8 = "the conversion kept it off integers, which would be slower here or lose too much (--int8-speed, --int8-min-sqnr)"
CONVERTED = (
    "tools that fold constants (onnxsim, onnxslim, quant_pre_process, a saved optimized model) expand this file to float size, and "
    "quantizers quantize it a second time; give these tools the original model, or the output of requant restore"
)


@dataclass(frozen=True)
class Explanation:
    """The treatment of one model by one version of ONNX Runtime.

    runtime: version of ONNX Runtime.  operators: number of nodes by operator, in the optimized graph.
    weights: treatment of each weight.  notes: sentences for users of the file.
    """

    runtime: str
    weights: tuple[WeightFate, ...]
    operators: dict[str, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        weights = [
            {**{key: getattr(w, key) for key in ("name", "op", "kernel", "why")}, "shape": list(w.shape), "fate": w.fate.value}
            for w in self.weights
        ]
        return {"runtime": self.runtime, "weights": weights, "operators": self.operators, "notes": list(self.notes)}


def broken_promises(model: onnx.ModelProto, promised: Mapping[str, Form]) -> dict[str, WeightFate]:
    """The weights that ONNX Runtime does not treat as their form promises.  promised: weight -> folded or int8.

    Raises LoadError when the model does not load.
    """
    return {
        name: weight
        for weight in explain(model).weights
        for name in sorted(weight.behind & promised.keys())
        if weight.fate is not FORMS[promised[name]].promise
    }


def explain(model: ModelLike | LoadedModel) -> Explanation:
    """Load a model in ONNX Runtime with default options, and list the treatment of each weight.

    model: path, ModelProto, bytes or binary file object.  Raises ModelError if it cannot be loaded.
    """
    loaded = load_runnable(model)
    with scratch_folder() as folder:
        runtime, optimized = optimized_graph(loaded.source, loaded.name, folder)
    graph = ModelGraph.of(loaded.proto)
    nodes = [*graph.nodes, *(inner for body in graph.bodies for inner in body.nodes)]
    fates = _Fates.of(optimized.graph)
    shapes = find_shapes(loaded.proto)
    weights = _weights(nodes)
    weights += _held(graph, nodes, shapes, {id(each) for _, tensor in weights for each in ancestors(tensor)})
    decoded = {tensor.name: {each.name for each in ancestors(tensor)} for _, tensor in weights}
    times = Counter(name for names in decoded.values() for name in names)
    weight_fates, settings = [], settings_of(loaded.proto)
    in_int8 = settings is not None and settings.get("form") == str(Form.INT8)
    for node, tensor in weights:
        behind = decoded[tensor.name]
        fate = _fate(node, tensor, {name for name in behind if times[name] == 1}, fates, in_int8=in_int8)
        weight_fates.append(replace(fate, shape=shapes.get(tensor.name, fate.shape), behind=frozenset(behind)))
    weight_fates += [fate for node in nodes for fate in _integer_operators(node)]
    operators = Counter(node.op_type for each in all_graphs(optimized.graph) for node in each.node)
    notes = () if settings is None else (CONVERTED,)
    return Explanation(runtime, tuple(weight_fates), dict(operators.most_common()), notes)


@dataclass(frozen=True)
class _Fates:
    """The nodes of the optimized graph, by tensor.  kernels: tensor -> kernel that reads or outputs it.

    makers, readers: tensor -> another operator that outputs it, or that reads it.
    """

    kernels: dict[str, str]
    makers: dict[str, str]
    readers: dict[str, str]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Fates:
        nodes = [node for each in all_graphs(graph) for node in each.node]
        kernels = {name: n.op_type for n in nodes if n.op_type in KERNELS for name in (*n.input[1:], *n.output)}
        others = [n for n in nodes if n.op_type not in FLOAT_KERNELS and n.op_type not in KERNELS]
        makers = {name: n.op_type for n in others for name in n.output}
        return cls(kernels, makers, {name: n.op_type for n in others for name in n.input})

    def decoder(self, tensors: Collection[str], codes: Collection[str]) -> str:
        """The operator that still decodes in every run, "" if none: it outputs a tensor of the decode, or reads the codes.

        Reading another tensor of the decode proves nothing: a folded weight has readers, and ONNX Runtime merges equal scalars of a
        decode and of the model.
        """
        makers = (self.makers[name] for name in sorted(tensors) if name in self.makers)
        return next(makers, "") or next((self.readers[name] for name in sorted(codes) if name in self.readers), "")


def _weights(nodes: Sequence[gs.Node]) -> list[tuple[gs.Node, gs.Tensor]]:
    weights = []
    for node in nodes:
        operand = weight_operand(node)
        if operand is not None and from_constants(node.inputs[operand]):
            weights.append((node, node.inputs[operand]))
    return weights


def _held(
    graph: ModelGraph, nodes: Sequence[gs.Node], shapes: Mapping[str, tuple[int, ...]], seen: set[int]
) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """The weights of operators that compute no known product, each at its first reader.  seen: ids of tensors already counted."""
    for node in nodes:
        holder = holder_of(node)
        if holder is None or not graph.computes(node):
            continue
        for operand, tensor in enumerate(node.inputs):
            shape = shapes.get(tensor.name, tuple(n if isinstance(n, int) else -1 for n in tensor.shape or ()))
            constant = id(tensor) in graph.constant_tensors and id(tensor) not in seen
            if constant and holder.may_hold(operand, shape):
                seen.add(id(tensor))
                yield node, tensor


def _integer_operators(node: gs.Node) -> Iterator[WeightFate]:
    """A weight that an integer kernel reads already in the file."""
    if node.op in KERNELS:
        tensor = node.inputs[KERNELS[node.op].weight]
        if from_constants(tensor):
            shape = tuple(n if isinstance(n, int) else -1 for n in tensor.shape or ())
            yield WeightFate(tensor.name, node.op, shape, Fate.FUSED, node.op, "")


def _codes_of(tensor: gs.Tensor) -> set[str]:
    """The names of the constants that a weight is decoded from, except scalars."""
    return {each.name for each in ancestors(tensor) if isinstance(each, gs.Constant) and math.prod(each.shape) > 1}


def _fate(node: gs.Node, tensor: gs.Tensor, exclusive: set[str], fates: _Fates, *, in_int8: bool) -> WeightFate:
    """The treatment of a weight.

    exclusive: tensors of its decode that no other weight is decoded from.  in_int8: whether the file has the int8 form.
    """
    shape = tuple(n if isinstance(n, int) else -1 for n in tensor.shape or ())
    results = {output.name for output in _results(node)}
    kernel = next((fates.kernels[name] for name in (*results, *sorted(exclusive)) if name in fates.kernels), "")
    decoder = fates.decoder(exclusive, exclusive & _codes_of(tensor))
    if find_root(tensor) is not None:
        return WeightFate(tensor.name, node.op, shape, Fate.FLOAT, node.op, "stored as float; convert the model")
    if kernel:
        why = "it rounds its activations to int8 by default" if kernel == "MatMulNBits" else ""
        return WeightFate(tensor.name, node.op, shape, Fate.FUSED, kernel, why)
    if looks_up_codes(node):
        return WeightFate(tensor.name, node.op, shape, Fate.EVERY_RUN, node.op, "only the entries that are looked up are decoded")
    if decoder:
        return WeightFate(tensor.name, node.op, shape, Fate.EVERY_RUN, node.op, _why_decoded(node, tensor, decoder))
    return WeightFate(tensor.name, node.op, shape, Fate.FOLDED, node.op, _why_float(node, in_int8=in_int8))


def _results(node: gs.Node) -> Iterator[gs.Tensor]:
    """The output of a node and the tensors a fused kernel may output instead: after Relu, Clip or QuantizeLinear."""
    tensor = node.outputs[0]
    while True:
        yield tensor
        follower = tensor.outputs[0] if len(tensor.outputs) == 1 else None
        if follower is None or follower.op not in ("Relu", "Clip", "QuantizeLinear"):
            return
        tensor = follower.outputs[0]


def _producer(tensor: gs.Tensor) -> str:
    return tensor.inputs[0].op if tensor.inputs else ""


def _why_decoded(node: gs.Node, tensor: gs.Tensor, decoder: str) -> str:
    if decoder != "DequantizeLinear":
        return f"ONNX Runtime does not fold {decoder}"
    if _producer(node.inputs[0]) == "DequantizeLinear":
        codes = tensor.inputs[0].inputs[0]
        quantized = any(result.outputs and result.outputs[0].op == "QuantizeLinear" for result in _results(node))
        if not quantized and not (node.op in OPERATORS and OPERATORS[node.op].float_results):
            return "its output is not quantized, so no integer kernel can be used"
        kind = onnx.TensorProto.DataType.Name(codes.dtype).lower() if isinstance(codes.dtype, int) else codes.dtype
        if kind is not None and str(kind) not in ("int8", "uint8"):
            return f"no integer kernel reads codes of type {kind}; int8 is supported"
        return "ONNX Runtime has no integer kernel for the nodes after it"
    return (
        "ONNX Runtime never folds DequantizeLinear; use --form folded, or session.disable_quant_qdq=1 (requant_onnx.load_session)"
    )


def _why_float(node: gs.Node, *, in_int8: bool) -> str:
    if _producer(node.inputs[0]) == "DequantizeLinear":
        return "the decode gives a float weight, so no integer kernel can be used"
    return f"float speed, because its activations are float; {SLOWER_IN_INT8 if in_int8 else '--form int8 quantizes them'}"
