"""Store the weight of a Gemm as (ic, oc), the only layout that ONNX Runtime fuses after DequantizeLinear (MatMulNBits, from 1.26).

    y = x @ W.T  (transB = 1)  ->  y = x @ V  (transB = 0),   V = W.T

https://onnx.ai/onnx/operators/onnx__Gemm.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import onnx

from requant_onnx.files.walk import reads_in
from requant_onnx.graph.constants import ModelGraph, Root, find_root, is_standard
from requant_onnx.graph.edit import drop_stale_types, drop_unread, set_initializer
from requant_onnx.graph.names import FreshNames


def transpose_gemm(model: ModelGraph, weights: Collection[str], former: dict[str, str] | None = None) -> None:
    """Transpose the weight of every Gemm with transB=1 that reads one of these weights.  Changes the model.

    former: dictionary to which the names of new weights are added, with the names of the weights that they are made from.
    """
    graph, names = model.proto.graph, FreshNames(model.proto)
    by_output = {node.output[0]: node for node in graph.node if node.op_type == "Gemm"}
    former, reads = {} if former is None else former, Counter(reads_in(graph))
    readers: dict[str, list[onnx.NodeProto]] = {}
    roots: dict[str, Root] = {}
    for gemm in model.nodes:
        node = by_output.get(gemm.outputs[0].name) if gemm.op == "Gemm" and is_standard(gemm) else None
        root = find_root(gemm.inputs[1]) if node is not None and gemm.attrs.get("transB", 0) else None
        if node is not None and root is not None and root.name in weights and len(root.tensor.shape) == 2:
            readers.setdefault(node.input[1], []).append(node)
            roots[node.input[1]] = root
    for edge, root in roots.items():
        in_place = not root.in_node and root.name == edge and reads[edge] == len(readers[edge])
        name = edge if in_place else names.take(f"{edge}_transposed")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(root.edge_dtype)
        set_initializer(graph, np.ascontiguousarray(root.load().T.astype(dtype)), name)
        drop_stale_types(graph, [name])
        if not in_place:
            former[name] = former.get(root.name, root.name)
        for node in readers[edge]:
            node.input[1] = name
            next(item for item in node.attribute if item.name == "transB").i = 0
    drop_unread(graph, roots)
