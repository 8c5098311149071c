"""Small edits that several rewrites share, such as storing a tensor and dropping unused ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from requant_onnx.files.walk import all_graphs, reads_in
from requant_onnx.graph.constants import PASS_THROUGH, is_standard_proto
from requant_onnx.numerics.arrays import GenericArray, UInt8Array

VARINTS = frozenset((onnx.TensorProto.INT32, onnx.TensorProto.INT64))  # integer types whose values are mostly small
SMALL_BYTES = 1024  # size up to which saving a few bytes matters


def list_only_inputs(model: onnx.ModelProto) -> None:
    """Remove initializers from the list of inputs, where IR 3 required them.  Changes `model`, also to IR 4."""
    if model.ir_version < 4:
        stored = {item.name for item in model.graph.initializer}
        delete_where(model.graph.input, [k for k, item in enumerate(model.graph.input) if item.name in stored])
        model.ir_version = 4


def tensor_proto(values: GenericArray, name: str) -> onnx.TensorProto:
    """A TensorProto with raw data (the varints of typed fields are mostly larger), or the shorter one that `compact` makes."""
    return compact(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))


def compact(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same tensor, with its integers as varints if it is small and becomes smaller, as most shapes and axes do."""
    if tensor.data_type not in VARINTS or not 0 < len(tensor.raw_data) <= SMALL_BYTES:
        return tensor
    values = numpy_helper.to_array(tensor)
    shorter = helper.make_tensor(tensor.name, tensor.data_type, values.shape, values.ravel().tolist())
    return shorter if shorter.ByteSize() < tensor.ByteSize() else tensor


def proto_of_4_bits(values: UInt8Array, name: str, *, signed: bool) -> onnx.TensorProto:
    """A UINT4 or INT4 TensorProto of the low 4 bits.

    A byte holds two values, the first in the low half; an odd count is padded by half a byte.

    https://onnx.ai/onnx/repo-docs/IR.html#tensor-definition and onnx.proto on raw_data

    >>> proto_of_4_bits(np.array([1, 2, 3], np.uint8), "w", signed=False).raw_data.hex()
    '2103'
    """
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.uint8)) & 15
    packed = flat[0::2] | flat[1::2] << 4
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    return helper.make_tensor(name, kind, values.shape, packed.astype(np.uint8).tobytes(), raw=True)


def floats_to_tensors(model: onnx.ModelProto) -> None:
    """Write floats that Constant nodes have as attributes of their own as tensors, as most exporters do.  Changes the model."""
    for holder in (*all_graphs(model.graph), *model.functions):
        for node in holder.node:
            if node.op_type != "Constant" or not is_standard_proto(node):
                continue
            for attribute in node.attribute:
                if attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
                    values = np.array(attribute.f if attribute.name == "value_float" else attribute.floats, np.float32)
                    attribute.CopyFrom(helper.make_attribute("value", tensor_proto(values, "")))


def set_initializer(graph: onnx.GraphProto, values: GenericArray, name: str) -> None:
    """Replace the initializer of that name in place, or append one."""
    for initializer in graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(tensor_proto(values, name))
            return
    graph.initializer.append(tensor_proto(values, name))


def delete_where(items: object, doomed: Iterable[int]) -> None:
    """Delete the given indices of a repeated field."""
    for index in sorted(doomed, reverse=True):
        del items[index]  # type: ignore[attr-defined]


def drop_unread(graph: onnx.GraphProto, candidates: Iterable[str]) -> None:
    """Delete initializers and Constant, Identity and Cast nodes whose outputs are candidates that no node reads.

    The inputs of a deleted node become candidates too.
    """
    candidates = set(candidates)
    while True:
        read = {*reads_in(graph), *(item.name for item in graph.input)}  # the default value of an input stays
        doomed = [
            index
            for index, node in enumerate(graph.node)
            if node.op_type in ("Constant", *PASS_THROUGH) and candidates.issuperset(node.output) and read.isdisjoint(node.output)
        ]
        candidates.update(name for index in doomed for name in graph.node[index].input)
        unread = [k for k, item in enumerate(graph.initializer) if item.name in candidates and item.name not in read]
        delete_where(graph.initializer, unread)
        delete_where(graph.node, doomed)
        if not doomed:
            break


def drop_stale_types(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """Delete the value_info of tensors that no longer exist."""
    gone = set(names)
    delete_where(graph.value_info, [k for k, item in enumerate(graph.value_info) if item.name in gone])


def rename_reads(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename the tensors that nodes read, in a graph and in its bodies, except bodies that define a tensor of that name."""
    for each in all_graphs(graph):
        own = set() if each is graph else {item.name for item in (*each.input, *each.initializer)}
        own |= set() if each is graph else {name for node in each.node for name in node.output}
        for node in each.node:
            for k, name in enumerate(node.input):
                if name in renamed and name not in own:
                    node.input[k] = renamed[name]
