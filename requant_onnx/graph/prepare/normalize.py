"""Bring a model into the shape that the rewrite starts from."""

from __future__ import annotations

import onnx

from requant_onnx.graph.prepare.fold_batchnorm import fold_batchnorm
from requant_onnx.graph.prepare.opset import raise_opset


def normalize(model: onnx.ModelProto, opset: int) -> tuple[onnx.ModelProto, int]:
    """Fold BatchNormalization, raise the opset.

    May change and return the model given.  Returns the model and how many BatchNormalizations were folded.
    Raises ModelError when the opset cannot be raised.
    """
    folded = fold_batchnorm(model)
    return raise_opset(model, opset), folded
