"""requant_onnx: low-bit weights for exported ONNX CNNs, without retraining (REQuant, arXiv 2510.04044).

Names are imported on first use, so that importing the package itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from requant_onnx.choices import (
        ActivationRange,
        BiasType,
        EdgeLayers,
        Form,
        Granularity,
        Int8Levels,
        Int8Speed,
        OptimizeFor,
        RangeMode,
        Refinement,
        Runtime,
        Space,
        Transform,
    )
    from requant_onnx.config import Budget, QuantConfig
    from requant_onnx.convert.pipeline import inspect_model, quantize_model
    from requant_onnx.convert.progressive import Stage, quantize_progressively
    from requant_onnx.convert.report import ActivationReport, FrontPoint, InspectReport, QuantReport, ValidationReport, WeightReport
    from requant_onnx.convert.restore import RestoreReport, restore_model
    from requant_onnx.errors import ConfigError, ConvertedError, DataError, ModelError, OutputError, QualityError, RequantError
    from requant_onnx.evaluate.validate import validate
    from requant_onnx.files.planes import SavedStage, save_progressive
    from requant_onnx.files.save import save_model
    from requant_onnx.inputs.calibration import Calibration
    from requant_onnx.inputs.images import ImageSet, Normalization, load_images
    from requant_onnx.rules import LayerRule
    from requant_onnx.runtime.explain import Explanation, explain
    from requant_onnx.runtime.sessions import load_session, use_custom_ops, use_provider
    from requant_onnx.webpage.pages import html_report

_HOMES = {
    "requant_onnx.choices": (
        "ActivationRange",
        "BiasType",
        "EdgeLayers",
        "Form",
        "Granularity",
        "Int8Levels",
        "Int8Speed",
        "OptimizeFor",
        "RangeMode",
        "Refinement",
        "Runtime",
        "Space",
        "Transform",
    ),
    "requant_onnx.config": (
        "Budget",
        "QuantConfig",
    ),
    "requant_onnx.convert.pipeline": (
        "inspect_model",
        "quantize_model",
    ),
    "requant_onnx.convert.progressive": (
        "Stage",
        "quantize_progressively",
    ),
    "requant_onnx.convert.report": (
        "ActivationReport",
        "FrontPoint",
        "InspectReport",
        "QuantReport",
        "ValidationReport",
        "WeightReport",
    ),
    "requant_onnx.convert.restore": (
        "RestoreReport",
        "restore_model",
    ),
    "requant_onnx.errors": (
        "ConfigError",
        "ConvertedError",
        "DataError",
        "ModelError",
        "OutputError",
        "QualityError",
        "RequantError",
    ),
    "requant_onnx.evaluate.validate": ("validate",),
    "requant_onnx.files.planes": (
        "SavedStage",
        "save_progressive",
    ),
    "requant_onnx.files.save": ("save_model",),
    "requant_onnx.inputs.calibration": ("Calibration",),
    "requant_onnx.inputs.images": (
        "ImageSet",
        "Normalization",
        "load_images",
    ),
    "requant_onnx.rules": ("LayerRule",),
    "requant_onnx.runtime.explain": (
        "Explanation",
        "explain",
    ),
    "requant_onnx.runtime.sessions": (
        "load_session",
        "use_custom_ops",
        "use_provider",
    ),
    "requant_onnx.webpage.pages": ("html_report",),
}

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
    "LayerRule",
    "ModelError",
    "Normalization",
    "OptimizeFor",
    "OutputError",
    "QualityError",
    "QuantConfig",
    "QuantReport",
    "RangeMode",
    "Refinement",
    "RequantError",
    "RestoreReport",
    "Runtime",
    "SavedStage",
    "Space",
    "Stage",
    "Transform",
    "ValidationReport",
    "WeightReport",
    "explain",
    "html_report",
    "inspect_model",
    "load_images",
    "load_session",
    "quantize_model",
    "quantize_progressively",
    "restore_model",
    "save_model",
    "save_progressive",
    "use_custom_ops",
    "use_provider",
    "validate",
]


if not TYPE_CHECKING:  # a module that has it has every name, to a type checker

    def __getattr__(name: str) -> object:
        """Import a public name from the module where it lives (PEP 562)."""
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("requant_onnx")
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module 'requant_onnx' has no attribute '{name}'")
        value: object = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
