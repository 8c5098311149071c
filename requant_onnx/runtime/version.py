"""The installed version of ONNX Runtime."""

from __future__ import annotations

import onnxruntime


def runtime_version() -> str:
    """The version of the package onnxruntime, such as 1.20.1."""
    return str(onnxruntime.__version__)
