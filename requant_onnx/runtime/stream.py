"""Run a model piece by piece on calibration inputs, in float and with the weights quantized so far, in parallel streams.

Only tensors that a later node reads are kept.  Inputs run in chunks, so no shape is assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from requant_onnx.files.external import dense_values
from requant_onnx.files.walk import reads_in, subgraphs_of
from requant_onnx.graph.constants import is_random, value_of
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtime.sessions import open_session, run_session

Chunk = dict[str, GenericArray]
FEWEST = 4  # smallest number of chunks, regardless of memory and time
GROWTH = 1.5  # smallest growth of the number of chunks, because new ones must run through all nodes before the layer
AHEAD = 12  # number of coming stops whose tensors must also fit into memory


class Stream:
    """A run of a model up to some node.  values: for each chunk of inputs, the tensors that later nodes read.

    Nodes that read only constants are run again with each piece that needs them, on the current initializers: a Cast or Transpose
    of a weight may be anywhere in the graph, long before the weight is replaced.
    """

    def __init__(self, model: onnx.ModelProto, chunks: Iterable[Chunk]) -> None:
        self.values: list[Chunk] = [dict(chunk) for chunk in chunks]
        self._model = model
        self._stored = {item.name: item for item in model.graph.initializer}
        self._constant = _constant_nodes(model.graph, self._stored)
        self._last = {item.name: len(model.graph.node) for item in model.graph.output}
        self._last = {**{name: k for k, node in enumerate(model.graph.node) for name in _reads(node)}, **self._last}
        self._done = 0
        self.opening = 0.0  # seconds spent on opening sessions

    def advance(self, end: int, replaced: Mapping[str, onnx.TensorProto]) -> None:
        """Run the nodes before `end`.  replaced: initializers with new values."""
        nodes = [node for node in self._model.graph.node[self._done : end] if not self._is_constant(node)]
        made = [name for node in nodes for name in node.output if name]
        wanted = [name for name in made if self._last.get(name, -1) >= end]
        if wanted:
            self._run(nodes, wanted, replaced)
        for chunk in self.values:
            for name in [name for name in chunk if self._last.get(name, -1) < end]:
                del chunk[name]
        self._done = end

    def output(self, index: int) -> Iterator[GenericArray]:
        """The output of node `index`, the next one, for each chunk in turn; the stream does not advance."""
        node = self._model.graph.node[index]
        session, feeds = self._session([node], [node.output[0]], {})
        for chunk in self.values:
            yield run_session(session, "the model", None, {name: chunk[name] for name in feeds})[0]

    def rest(self) -> Callable[[Chunk], list[Any]]:
        """A function from the tensors of a chunk, or replacements, to the outputs of the model.  The stream does not advance."""
        nodes = [node for node in self._model.graph.node[self._done :] if not self._is_constant(node)]
        made = {name for node in nodes for name in node.output}
        names = [item.name for item in self._model.graph.output]
        wanted = [name for name in names if name in made]
        session, feeds = self._session(nodes, wanted, {}) if wanted else (None, [])

        def run(chunk: Chunk) -> list[Any]:
            feed = {name: chunk[name] for name in feeds}
            given = {} if session is None else zip(wanted, run_session(session, "the model", None, feed), strict=True)
            values = {**chunk, **dict(given)}
            return [values[name] for name in names if name in values]

        return run

    def _is_constant(self, node: onnx.NodeProto) -> bool:
        return any(name in self._constant for name in node.output)

    def _run(self, nodes: Sequence[onnx.NodeProto], wanted: list[str], replaced: Mapping[str, onnx.TensorProto]) -> None:
        session, feeds = self._session(nodes, wanted, replaced)
        for chunk in self.values:
            chunk.update(zip(wanted, run_session(session, "the model", None, {name: chunk[name] for name in feeds}), strict=True))

    def _session(
        self, nodes: Sequence[onnx.NodeProto], wanted: list[str], replaced: Mapping[str, onnx.TensorProto]
    ) -> tuple[onnxruntime.InferenceSession, list[str]]:
        nodes = [*self._constants_before(nodes), *nodes]
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in _reads(node)} - made
        stored = [replaced.get(name, self._stored[name]) for name in sorted(read) if name in self._stored]
        feeds = sorted(name for name in read if name in self.values[0])
        inputs = [onnx.helper.make_value_info(name, self._type_of(name, self.values[0][name])) for name in feeds]
        outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
        graph = onnx.helper.make_graph(nodes, "piece", inputs, outputs, stored)
        model = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        model.functions.extend(self._model.functions)
        started = time.perf_counter()
        session = open_session(model, "the model")
        self.opening += time.perf_counter() - started
        return session, feeds

    def _type_of(self, name: str, values: Any) -> onnx.TypeProto:
        """The type of a tensor with these values; that of an empty optional is stated by the node that made it."""
        if values is not None:
            return _type_of(values)
        makers = (node for node in self._model.graph.node if name in node.output)
        stated = next((item.tp for node in makers for item in node.attribute if item.HasField("tp")), None)
        return onnx.helper.make_optional_type_proto(_ANY_FLOATS if stated is None else stated)

    def _constants_before(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The constant nodes that these nodes need, in the order of the graph."""
        waiting = [name for node in nodes for name in _reads(node)]
        needed: dict[int, onnx.NodeProto] = {}
        while waiting:
            index = self._constant.get(waiting.pop(), -1)
            if index >= 0 and index not in needed:
                needed[index] = self._model.graph.node[index]
                waiting.extend(_reads(needed[index]))
        return [needed[index] for index in sorted(needed)]


class Lanes:
    """Parallel runs of a model, each with its own weights, on as many chunks as memory allows.

    runs: one Stream per run.  seconds: approximate time to reach each stop, for all chunks that are run there.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        chunks: Sequence[Chunk],
        runs: int,
        stops: Sequence[int],
        memory: int,
        seconds: float = float("inf"),
    ) -> None:
        """Plan the chunks.  stops: nodes where the runs will stop.  memory: limit of their tensors, in bytes.  seconds: time limit.

        At least FEWEST chunks are run.
        """
        self._model, self._chunks = model, chunks
        trial, sizes, times = Stream(model, chunks[:1]), [], []
        for stop in stops:
            started, opening = time.perf_counter(), trial.opening
            trial.advance(stop, {})
            opening = trial.opening - opening
            sizes.append(runs * _bytes(trial.values[0]))
            times.append((runs * opening, runs * (time.perf_counter() - started - opening)))
        ahead = [max(sizes[k : k + AHEAD]) for k in range(len(sizes))]
        rooms = [int(min(len(chunks), max(FEWEST, memory // max(1, size)))) for size in ahead]
        running = sum(each * room for (_, each), room in zip(times, rooms, strict=True))
        if running > seconds:
            rooms = [min(room, max(FEWEST, int(room * seconds / running))) for room in rooms]
        self._room = dict(zip(stops, rooms, strict=True))
        self.seconds = [once + each * room for (once, each), room in zip(times, rooms, strict=True)]
        self.runs = [Stream(model, chunks[: self._room.get(stops[0], len(chunks)) if stops else None]) for _ in range(runs)]

    def advance(self, end: int, replaced: Sequence[Mapping[str, onnx.TensorProto]]) -> None:
        """Run the nodes before `end`, possibly on fewer or more chunks than before.  replaced: as for Stream, for each run."""
        active = len(self.runs[0].values)
        room = self._room.get(end, active)
        for run, weights in zip(self.runs, replaced, strict=True):
            del run.values[room:]
            run.advance(end, weights)
        if room >= GROWTH * active or active < room == len(self._chunks):
            for run, weights in zip(self.runs, replaced, strict=True):
                more = Stream(self._model, self._chunks[active:room])
                more.advance(end, weights)
                run.values += more.values


def _bytes(chunk: Chunk) -> int:
    return sum(values.nbytes for values in chunk.values() if isinstance(values, np.ndarray))


def _constant_nodes(graph: onnx.GraphProto, stored: Collection[str]) -> dict[str, int]:
    """Tensor -> index of the node that outputs it, for nodes whose inputs are constants or outputs of such nodes.

    Nodes without inputs (Constant, but also random generators) and nodes with bodies do not count.
    """
    constant: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        names = [name for name in node.input if name]
        computed = names and all(name in stored or name in constant for name in names)
        if computed and not is_random(node.op_type) and not any(subgraphs_of(node)):
            constant.update((name, index) for name in node.output if name)
    return constant


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Store the values of Constant nodes and sparse initializers as initializers, so that they are not kept for every chunk.

    Changes `model`.
    """
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(numpy_helper.from_array(dense_values(sparse), sparse.values.name))
    del model.graph.sparse_initializer[:]
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


_ANY_FLOATS = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)


def _type_of(values: Any) -> onnx.TypeProto:
    """The type of a value from ONNX Runtime: a tensor of numbers or strings, or a sequence of these."""
    if isinstance(values, list):
        element = _type_of(values[0] if values else np.zeros(0, np.float32))
        element.tensor_type.ClearField("shape")  # the tensors of a sequence may differ in shape
        return onnx.helper.make_sequence_type_proto(element)
    kind = onnx.TensorProto.STRING if values.dtype.kind in "OSU" else onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    return onnx.helper.make_tensor_type_proto(kind, [None] * values.ndim)
