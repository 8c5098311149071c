"""Iterators over the graphs, reads and stored tensors of a model, including bodies of If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import TensorProto


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph nested in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for body in subgraphs_of(node):
            yield from all_graphs(body)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node, such as the bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor name that a graph reads, including its outputs and the reads of nested bodies."""
    for each in all_graphs(graph):
        for node in each.node:
            yield from node.input
        yield from (output.name for output in each.output)


def stored_tensors(model: onnx.ModelProto, skip_main: bool = False) -> Iterator[TensorProto]:
    """Every tensor stored in the model: initializers and attributes, including bodies, functions and training information.

    skip_main: whether the dense initializers of the main graph are skipped.
    """
    training = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    bodies = [body for function in model.functions for node in function.node for body in subgraphs_of(node)]
    for root in (model.graph, *training, *bodies):
        for graph in all_graphs(root):
            if not (skip_main and graph is model.graph):
                yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            yield from _in_attributes(graph.node)
    for function in model.functions:
        yield from _in_attributes(function.node)


def _in_attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from ((attribute.t,) if attribute.HasField("t") else ())
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
