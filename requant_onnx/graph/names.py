"""Names of tensors and nodes: those in use in a model, and new ones that do not collide with them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from requant_onnx.files.walk import all_graphs


class FreshNames:
    """A source of names that the model does not use yet."""

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


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
    for group in (graph.input, graph.output, graph.initializer, graph.value_info):
        yield from (item.name for item in group)
    yield from (item.values.name for item in graph.sparse_initializer)
