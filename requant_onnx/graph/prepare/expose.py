"""Move constant weights to where they can be converted: into the main graph, in the shape that their reader expects.

1. Initializers are removed from the list of inputs, where IR 3 required them.
2. Model-local functions that hold weights are inlined, as ONNX Runtime does when it loads them
   (https://onnx.ai/onnx/api/inliner.html).
3. Transpose, Reshape, Unsqueeze, Squeeze and Flatten between a constant and its only reader are computed in advance.
4. Sparse weights become dense if codes of 8 bits are not larger.
5. Weights in bodies of If, Loop and Scan move to the main graph, which bodies can read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import takewhile

import onnx
from onnx import inliner

from requant_onnx.errors import ModelError
from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.constants import FLOATS, PASS_THROUGH, is_standard_proto, load_proto, value_of
from requant_onnx.graph.edit import delete_where, drop_stale_types, drop_unread, list_only_inputs, rename_reads, tensor_proto
from requant_onnx.graph.holders import holder_of
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operators import OPERATORS
from requant_onnx.graph.reshapes import RESHAPING, reshaped
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.text import first_line

MAX_CHAIN = 16
INDEX_BYTES = 8  # per value of a sparse tensor
MAX_NODES = 200_000


def expose_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its weights where `find_weights` finds them.  May change and return the given model.

    Raises ModelError when its functions cannot be inlined.
    """
    list_only_inputs(model)
    model = _inline(model)
    _fill_sparse(model.graph)
    for graph in all_graphs(model.graph):
        _apply_reshapes(model, graph)
    names = FreshNames(model)
    defined = Counter(name for graph in all_graphs(model.graph) for name in _defined_in(graph))
    for body in [body for graph in all_graphs(model.graph) for node in graph.node for body in subgraphs_of(node)]:
        _hoist(model.graph, body, names, defined)
    return model


def _fill_sparse(graph: onnx.GraphProto) -> None:
    """Make sparse weights dense (step 4)."""
    read = {node.input[k] for node, k in _operands(graph)}
    doomed = []
    for k, sparse in enumerate(graph.sparse_initializer):
        values, size = sparse.values, math.prod(sparse.dims)
        stored = math.prod(values.dims) * (onnx.helper.tensor_dtype_to_np_dtype(values.data_type).itemsize + INDEX_BYTES)
        if values.name in read and values.data_type in FLOATS and 0 < size <= stored:
            graph.initializer.append(tensor_proto(load_proto(sparse), values.name))
            doomed.append(k)
    delete_where(graph.sparse_initializer, doomed)


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = (node for function in model.functions for node in function.node)
    return inlined(model) if any(node.op_type in OPERATORS or _holds(node) for node in nodes) else model


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its functions, except those whose opset differs from that of the model.

    Raises ModelError when they cannot be inlined.
    """
    if _inlined_nodes(model) > MAX_NODES:
        raise ModelError(
            f"the functions of the model make more than {MAX_NODES:,} nodes when inlined, too many nodes; export it without them"
        )
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # the inliner raises many types
        raise ModelError(f"the functions of the model cannot be inlined ({first_line(error)}); export it without them") from None


def _inlined_nodes(model: onnx.ModelProto) -> int:
    """The number of nodes that the model has after its functions are inlined."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(nodes: Collection[onnx.NodeProto]) -> int:
        bodies = [body for node in nodes for body in subgraphs_of(node)]
        return sum(size_of_call(node) for node in nodes) + sum(size_of(body.node) for body in bodies)

    def size_of_call(node: onnx.NodeProto) -> int:
        name = (node.domain, node.op_type)
        if name not in functions:
            return 1
        if name not in sizes:
            sizes[name] = MAX_NODES + 1  # while it is being counted: the value for recursive calls
            sizes[name] = size_of(functions[name].node)
        return sizes[name]

    return size_of(model.graph.node)


def _holds(node: onnx.NodeProto) -> bool:
    """Whether the purpose of an operator is to use a weight; an Add may have one, but seldom does."""
    holder = holder_of(node)
    return holder is not None and not holder.is_table


def _is_weight(node: onnx.NodeProto, operand: int, tensor: onnx.TensorProto) -> bool:
    """Whether a constant counts as a weight where it is read."""
    holder = None if node.op_type in OPERATORS else holder_of(node)
    return tensor.data_type in FLOATS and (holder is None or holder.may_hold(operand, tensor.dims))


def _operands(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Every input that may be a weight, as (node, index)."""
    for node in graph.node:
        holder = holder_of(node)
        if node.op_type in OPERATORS and is_standard_proto(node):
            yield from ((node, k) for k in sorted(OPERATORS[node.op_type].weights) if k < len(node.input))
        elif holder is not None:
            yield from ((node, k) for k in range(len(node.input)) if holder.weights is None or k in holder.weights)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The constants of a graph (not of its bodies) that no caller can replace, by tensor name."""
    constants = {item.name: item for item in graph.initializer}
    for node in graph.node:
        value = value_of(node)
        if value is not None:
            constants[node.output[0]] = value
    inputs = {item.name for item in graph.input}
    return {name: tensor for name, tensor in constants.items() if name not in inputs}


def _apply_reshapes(model: onnx.ModelProto, graph: onnx.GraphProto) -> None:
    """Apply step 3 to one graph."""
    producers = {output: node for node in graph.node for output in node.output}
    constants, readers = _constants(graph), Counter(reads_in(model.graph))
    outer = {**_constants(model.graph), **constants}
    stale: list[str] = []
    for reader, operand in list(_operands(graph)):
        chain = _chain(reader.input[operand], producers, readers)
        root = chain[-1].input[0] if chain else ""
        steps = [node for node in reversed(chain) if node.op_type in RESHAPING]
        if not steps or root not in constants or readers[root] != 1 or not _is_weight(reader, operand, constants[root]):
            continue
        values = _stepped(load_proto(constants[root]), steps, outer)
        if values is None:
            continue
        constants[root].CopyFrom(tensor_proto(values, constants[root].name))
        _bypass(reader, operand, chain, root)
        stale += [name for node in steps for name in (*node.output, *node.input[1:])]
        drop_stale_types(graph, [root, *(output for node in chain for output in node.output)])
    dead = {name for name in stale if name in producers}
    delete_where(graph.node, [k for k, node in enumerate(graph.node) if node.op_type in RESHAPING and dead.issuperset(node.output)])
    drop_unread(graph, set(stale) - dead)


def _chain(name: str, producers: dict[str, onnx.NodeProto], readers: Counter[str]) -> list[onnx.NodeProto]:
    """The nodes from a reader back to a constant, as long as each has only one reader."""
    return list(takewhile(lambda node: readers[node.output[0]] == 1, nodes_behind(name, producers)))


def nodes_behind(name: str, producers: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes before a tensor that change no value, from the tensor backwards."""
    for _ in range(MAX_CHAIN):
        node = producers.get(name)
        if node is None or node.op_type not in (*RESHAPING, *PASS_THROUGH) or not is_standard_proto(node) or not node.input:
            return
        yield node
        name = node.input[0]


def _stepped(values: GenericArray, steps: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> GenericArray | None:
    """The values after all of the nodes; None when one has an operand that is not constant or does not fit."""
    for node in steps:
        given = [constants.get(name) for name in node.input[1:] if name]
        if None in given:
            return None
        operand = load_proto(given[0]) if given and given[0] is not None else None
        after = reshaped(node.op_type, values.shape, _attributes(node), operand)
        if after is None:
            return None
        values = values.transpose(after.permutation) if after.permutation is not None else values.reshape(after.shape)
    return values


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _bypass(reader: onnx.NodeProto, operand: int, chain: list[onnx.NodeProto], root: str) -> None:
    """Connect each node that stays in the chain to the previous one that stays."""
    source = root
    for node in reversed(chain):
        if node.op_type not in RESHAPING:
            node.input[0], source = source, node.output[0]
    reader.input[operand] = source


def _defined_in(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (item.name for item in graph.initializer)
    for node in graph.node:
        yield from node.output


def _hoist(graph: onnx.GraphProto, body: onnx.GraphProto, names: FreshNames, defined: Counter[str]) -> None:
    """Move the float constants that are weights in this body to the main graph `graph`."""
    constants = _constants(body)
    interface = {item.name for each in all_graphs(body) for item in each.output}
    wanted: dict[str, None] = {}
    for each in all_graphs(body):  # nested bodies read its constants too
        defined_inside = set(_defined_in(each)) if each is not body else set()
        for node, operand, name in _sources(each):
            fits = name in constants and _is_weight(node, operand, constants[name]) and math.prod(constants[name].dims) > 0
            if fits and name not in defined_inside and name not in interface:
                wanted[name] = None
    for name in wanted:
        tensor = graph.initializer.add()
        tensor.CopyFrom(constants[name])
        tensor.name = name if defined[name] == 1 else names.take(name)
        rename_reads(body, {name: tensor.name})
    delete_where(body.initializer, [k for k, item in enumerate(body.initializer) if item.name in wanted])
    delete_where(body.node, [k for k, node in enumerate(body.node) if node.op_type == "Constant" and node.output[0] in wanted])
    drop_stale_types(body, wanted)


def _sources(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, int, str]]:
    """The tensor that each operand comes from, through nodes that change no value, as (node, operand, tensor)."""
    producers = {output: node for node in graph.node for output in node.output}
    for node, operand in _operands(graph):
        behind = [step.input[0] for step in nodes_behind(node.input[operand], producers)]
        yield node, operand, behind[-1] if behind else node.input[operand]
