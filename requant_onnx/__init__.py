"""requant_onnx: low-bit weights for exported ONNX CNNs, without retraining (REQuant, arXiv 2510.04044)."""

from requant_onnx.config import EdgeLayers, Form, Granularity, QuantConfig, RangeMode, Space, Transform, Version
from requant_onnx.convert import inspect_model, quantize_model
from requant_onnx.data import ImageSet, Normalisation, load_images
from requant_onnx.errors import ConfigError, DataError, ModelError, OutputError, RequantError
from requant_onnx.graph.save import save_model
from requant_onnx.report import InspectReport, QuantReport, ValidationReport, WeightReport
from requant_onnx.validate import validate

__all__ = [
    "ConfigError",
    "DataError",
    "EdgeLayers",
    "Form",
    "Granularity",
    "ImageSet",
    "InspectReport",
    "ModelError",
    "Normalisation",
    "OutputError",
    "QuantConfig",
    "QuantReport",
    "RangeMode",
    "RequantError",
    "Space",
    "Transform",
    "ValidationReport",
    "Version",
    "WeightReport",
    "inspect_model",
    "load_images",
    "quantize_model",
    "save_model",
    "validate",
]
