"""Names: all that a model uses, and fresh ones that collide with none of them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


class FreshNames:
    """Hands out names that the model does not use yet."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._used = {name for graph in all_graphs(model.graph) for name in _names_in(graph)}

    def take(self, wanted: str) -> str:
        """`wanted` itself if it is free, else `wanted_2`, `wanted_3`, ..."""
        name, count = wanted, 1
        while name in self._used:
            count += 1
            name = f"{wanted}_{count}"
        self._used.add(name)
        return name


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph nested in attributes of its nodes."""
    yield graph
    for node in graph.node:
        for body in subgraphs_of(node):
            yield from all_graphs(body)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor name read in a graph, its outputs and the bodies nested in it included."""
    for each in all_graphs(graph):
        for node in each.node:
            yield from node.input
        yield from (output.name for output in each.output)


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
    for group in (graph.input, graph.output, graph.initializer, graph.value_info):
        yield from (item.name for item in group)
    yield from (item.values.name for item in graph.sparse_initializer)
