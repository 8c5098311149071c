"""Features of the CPU of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "amd64", "i386", "i686")


def adds_exactly() -> bool:
    """Whether ONNX Runtime's integer kernels add products of 8-bit codes without saturation: with VNNI, and on non-x86 CPUs.

    False for an x86 CPU with unknown features.  https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    if platform.machine().lower() not in X86:
        return True
    try:
        return "vnni" in CPUINFO.read_text()
    except OSError:
        return False
