"""The shapes of tensors.  https://onnx.ai/onnx/api/shape_inference.html"""

from __future__ import annotations

import onnx
from onnx.shape_inference import InferenceError, infer_shapes

from requant_onnx.files.load import is_large


def find_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the main graph except outputs, -1 where a size is free.

    Shapes are inferred, or as declared in a model that is too large for inference or has contradictory declarations.
    """
    graph = model.graph
    if not is_large(model):
        try:
            graph = infer_shapes(model).graph
        except InferenceError:  # ONNX Runtime warns about such declarations, and ignores them
            graph = model.graph
    known = {item.name: item.type.tensor_type.shape for item in (*graph.input, *graph.value_info)}
    shapes = {name: tuple(d.dim_value or -1 for d in shape.dim) for name, shape in known.items()}
    return {**shapes, **{item.name: tuple(item.dims) for item in graph.initializer}}
