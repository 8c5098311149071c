"""The version of ONNX Runtime that is installed."""

from __future__ import annotations

import onnxruntime


def runtime_version() -> str:
    """The version of the package onnxruntime, as 1.20.1."""
    return str(onnxruntime.__version__)
