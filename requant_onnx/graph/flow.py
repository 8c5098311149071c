"""The flow of activations through a model, from weight to weight, as a small graph for display.

Nodes without their own weight belong to the block before them, except where several paths meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.readers import WeightReader


@dataclass(frozen=True)
class Block:
    """One block of the network.  title: name of the weight, the input or the output, or the operator where paths meet.

    op: operator, "input" or "output".  reader: index of the weight reader, None where there is no weight.
    before: indices of the blocks whose outputs it reads, smaller than its own.
    """

    title: str
    op: str
    reader: int | None
    before: tuple[int, ...]


def flow_of(model: ModelGraph, readers: Sequence[WeightReader]) -> list[Block]:
    """The blocks of the main graph, in its order.  readers: result of find_readers for the same model."""
    numbers = {id(reader.node): k for k, reader in enumerate(readers)}
    blocks = [Block(tensor.name, "input", None, ()) for tensor in model.graph.inputs]
    behind: dict[str, frozenset[int]] = {tensor.name: frozenset({k}) for k, tensor in enumerate(model.graph.inputs)}
    for node in model.nodes:
        if not model.computes(node):
            continue
        before = frozenset().union(*(behind.get(tensor.name, frozenset()) for tensor in _read(node)))
        number = numbers.get(id(node))
        if number is not None or len(before) > 1:
            title = node.op if number is None else readers[number].weight
            blocks.append(Block(title, node.op, number, tuple(sorted(before))))
            before = frozenset({len(blocks) - 1})
        behind.update((tensor.name, before) for tensor in node.outputs)
    ends = [Block(tensor.name, "output", None, tuple(sorted(behind.get(tensor.name, ())))) for tensor in model.graph.outputs]
    return [*blocks, *ends]


def _read(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that a node and the nodes in its bodies read."""
    inner = [each for body in node.subgraphs(recursive=True) for each in body.nodes]
    return [tensor for each in (node, *inner) for tensor in each.inputs]
