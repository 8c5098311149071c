"""requant_onnx: low-bit weights for exported ONNX CNNs, without retraining (REQuant, arXiv 2510.04044)."""

from requant_onnx.config import (
    ActivationRange,
    BiasType,
    Budget,
    EdgeLayers,
    Form,
    Granularity,
    Int8Levels,
    Int8Speed,
    QuantConfig,
    RangeMode,
    Refinement,
    Runtime,
    Space,
    Transform,
)
from requant_onnx.convert.pipeline import inspect_model, quantize_model
from requant_onnx.convert.report import ActivationReport, FrontPoint, InspectReport, QuantReport, ValidationReport, WeightReport
from requant_onnx.convert.restore import RestoreReport, restore_model
from requant_onnx.errors import ConfigError, ConvertedError, DataError, ModelError, OutputError, RequantError
from requant_onnx.evaluate.validate import validate
from requant_onnx.files.save import save_model
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.images import ImageSet, Normalization, load_images
from requant_onnx.runtime.explain import Explanation, explain
from requant_onnx.runtime.sessions import load_session, use_custom_ops
from requant_onnx.webpage.pages import html_report

__all__ = [
    "ActivationRange",
    "ActivationReport",
    "BiasType",
    "Budget",
    "Calibration",
    "ConfigError",
    "ConvertedError",
    "DataError",
    "EdgeLayers",
    "Explanation",
    "Form",
    "FrontPoint",
    "Granularity",
    "ImageSet",
    "InspectReport",
    "Int8Levels",
    "Int8Speed",
    "ModelError",
    "Normalization",
    "OutputError",
    "QuantConfig",
    "QuantReport",
    "RangeMode",
    "Refinement",
    "RequantError",
    "RestoreReport",
    "Runtime",
    "Space",
    "Transform",
    "ValidationReport",
    "WeightReport",
    "explain",
    "html_report",
    "inspect_model",
    "load_images",
    "load_session",
    "quantize_model",
    "restore_model",
    "save_model",
    "use_custom_ops",
    "validate",
]
