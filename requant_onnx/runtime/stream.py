"""Run a model piece by piece on calibration inputs, in float and with the weights quantized so far, side by side.

Only tensors that a later node reads are kept; inputs are run in chunks, so that nothing is assumed about shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
import onnxruntime

from requant_onnx.files.walk import reads_in, subgraphs_of
from requant_onnx.graph.constants import value_of
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtime.sessions import open_session, run_session

Chunk = dict[str, GenericArray]


class Stream:
    """One run of a model, up to some node.  values: for each chunk of inputs, the tensors that are still to be read."""

    def __init__(self, model: onnx.ModelProto, chunks: Iterable[Chunk]) -> None:
        self.values: list[Chunk] = [dict(chunk) for chunk in chunks]
        self._model = model
        self._stored = {item.name: item for item in model.graph.initializer}
        self._reads = [set(_reads(node)) for node in model.graph.node]
        self._last = {name: k for k, names in enumerate(self._reads) for name in names}
        self._done = 0

    def advance(self, end: int, replaced: Mapping[str, onnx.TensorProto]) -> None:
        """Run the nodes before `end`.  replaced: initializers with other values."""
        nodes = self._model.graph.node[self._done : end]
        made = [name for node in nodes for name in node.output if name]
        wanted = [name for name in made if self._last.get(name, -1) >= end]
        if wanted:
            self._run(nodes, set(made), wanted, replaced)
        for chunk in self.values:
            for name in [name for name in chunk if self._last.get(name, -1) < end]:
                del chunk[name]
        self._done = end

    def output(self, index: int) -> list[GenericArray]:
        """What node `index`, the next one, gives for each chunk; it is not advanced over."""
        node = self._model.graph.node[index]
        session, feeds = self._session([node], set(node.output), [node.output[0]], {})
        return [run_session(session, "the model", None, {name: chunk[name] for name in feeds})[0] for chunk in self.values]

    def _run(
        self, nodes: Iterable[onnx.NodeProto], made: set[str], wanted: list[str], replaced: Mapping[str, onnx.TensorProto]
    ) -> None:
        session, feeds = self._session(nodes, made, wanted, replaced)
        for chunk in self.values:
            chunk.update(zip(wanted, run_session(session, "the model", None, {name: chunk[name] for name in feeds}), strict=True))

    def _session(
        self, nodes: Iterable[onnx.NodeProto], made: set[str], wanted: list[str], replaced: Mapping[str, onnx.TensorProto]
    ) -> tuple[onnxruntime.InferenceSession, list[str]]:
        nodes = list(nodes)
        read = {name for node in nodes for name in _reads(node)} - made
        stored = [replaced.get(name, self._stored[name]) for name in sorted(read) if name in self._stored]
        feeds = sorted(name for name in read if name in self.values[0])
        inputs = [_typed(name, self.values[0][name]) for name in feeds]
        outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
        graph = onnx.helper.make_graph(nodes, "piece", inputs, outputs, stored)
        model = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        model.functions.extend(self._model.functions)
        return open_session(model, "the model"), feeds


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Store the values of Constant nodes as initializers, so that they are not kept once a chunk.  Changes `model`."""
    kept = []
    for node in model.graph.node:
        value = value_of(node)
        if value is None:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    yield from (name for name in node.input if name)
    for body in subgraphs_of(node):
        yield from reads_in(body)


def _typed(name: str, values: GenericArray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * values.ndim)
