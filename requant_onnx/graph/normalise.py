"""Bring a model into the shape that the rewrite starts from."""

from __future__ import annotations

import onnx

from requant_onnx.graph.edit import delete_where
from requant_onnx.graph.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.opset import raise_opset


def normalise(model: onnx.ModelProto, opset: int) -> tuple[onnx.ModelProto, int]:
    """Fold BatchNormalization, take initializers off the list of inputs (IR 3 demands them there), raise the opset.

    May change and return the model given.  Returns the model and how many BatchNormalizations were folded.
    Raises ModelError when the opset cannot be raised.
    """
    if model.ir_version < 4:
        stored = {item.name for item in model.graph.initializer}
        delete_where(model.graph.input, [k for k, item in enumerate(model.graph.input) if item.name in stored])
        model.ir_version = 4
    folded = fold_batchnorm(model)
    return raise_opset(model, opset), folded
