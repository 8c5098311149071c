"""Turn a quantized model back into a plain float model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import onnx

from requant_onnx.config import METADATA_KEY
from requant_onnx.errors import ConfigError, ModelError
from requant_onnx.files.load import ModelLike, is_large, materialize
from requant_onnx.files.walk import all_graphs, reads_in, subgraphs_of
from requant_onnx.graph.edit import delete_where, drop_stale_types, set_initializer
from requant_onnx.graph.readers import constant_part
from requant_onnx.graph.restore import constants_of, fix_grids, restore_activations, restore_lookups
from requant_onnx.runtime.sessions import load_runnable, open_cpu_session, run_session


@dataclass(frozen=True)
class RestoreReport:
    """The result of a restoration.

    constants: number of constants (weights, biases and other vectors) that are float again.  activations: number of activations.
    left: types of operators that still work on integers."""

    constants: int
    activations: int
    left: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def restore_model(model: ModelLike) -> tuple[onnx.ModelProto, RestoreReport]:
    """Turn a quantized model into a plain float model.  Returns the new model and a report.

    model: path, ModelProto, bytes or binary file object, in any form of requant_onnx, or with QuantizeLinear and DequantizeLinear
    nodes of other tools.  It does not change.
    Weights become the floats that their codes represent.  Activations are no longer rounded, so a model in the int8 form answers
    like one with float layers.
    Raises ModelError if the model cannot be loaded, or the float model does not run or would exceed 2 GB; ConfigError if nothing
    is quantized.
    """
    restored = materialize(load_runnable(model).copy())
    fix_grids(restored)
    activations = restore_activations(restored)
    restore_lookups(restored)
    constants = _restore_constants(restored)
    if not constants and not activations:
        raise ConfigError("nothing in the model is quantized, so there is nothing to restore; use the model as it is")
    delete_where(restored.metadata_props, [k for k, item in enumerate(restored.metadata_props) if item.key == METADATA_KEY])
    left = {node.op_type for graph in all_graphs(restored.graph) for node in graph.node if _on_integers(node.op_type)}
    if is_large(restored):
        raise ModelError("the float model would be larger than 2 GB, which restore cannot write")
    open_cpu_session(restored, "the restored model")
    return restored, RestoreReport(constants, activations, tuple(sorted(left)))


def _on_integers(op: str) -> bool:
    return op.startswith(("QLinear", "Quantize", "Dequantize", "DynamicQuantize", "MatMulInteger", "ConvInteger")) or op in (
        "MatMulNBits",
        "QGemm",
    )


def _restore_constants(model: onnx.ModelProto) -> int:
    """Replace decodes by initializers with their results.  Changes `model`.  Returns the number of new initializers."""
    graph = model.graph
    constant = constants_of(graph)
    reads = [[*node.input, *(name for body in subgraphs_of(node) for name in reads_in(body))] for node in graph.node]
    outputs = {item.name for item in graph.output}
    read = outputs.union(*(names for k, names in enumerate(reads) if k not in constant.nodes))
    wanted = sorted(constant.decodes & read)
    values: dict[str, np.ndarray] = {}
    if wanted:
        session = open_cpu_session(constant_part(model, wanted), "the decodes of the model")
        values = dict(zip(wanted, run_session(session, "the decodes of the model", wanted, {}), strict=True))
    floats = {name: value for name, value in values.items() if value.dtype.kind == "f"}
    doomed: set[int] = set()
    while True:
        read = outputs.union(*(names for k, names in enumerate(reads) if k not in doomed)) - floats.keys()
        more = {k for k in constant.nodes - doomed if read.isdisjoint(name for name in graph.node[k].output if name)}
        if not more:
            break
        doomed |= more
    for k in constant.nodes - doomed:  # a node with several outputs drops those that are stored now
        graph.node[k].output[:] = ["" if name in floats else name for name in graph.node[k].output]
    delete_where(graph.node, doomed)
    read = {*reads_in(graph), *(item.name for item in graph.input)}  # the default value of an input stays
    delete_where(graph.initializer, [k for k, item in enumerate(graph.initializer) if item.name not in read])
    for name, value in floats.items():
        set_initializer(graph, value, name)
    drop_stale_types(graph, floats)
    return len(floats)
