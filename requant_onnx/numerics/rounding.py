"""The loops of rounding to codes and back; quantize.py says what they compute."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from requant_onnx.numerics.compiled import FloatArray, IntArray, Values, compiled


@compiled
def encode_rows(rows: Values, scales: FloatArray, zero_points: IntArray, thresholds: FloatArray) -> npt.NDArray[np.uint8]:
    """The code of each weight: how many of its row's thresholds are not above it.

    rows: (rows, n).  scales: (rows,) of one step in weight space.  thresholds: the whole table (2K,).  Returns (rows, n).
    """
    count, n = rows.shape
    max_code = thresholds.size // 2
    codes = np.empty((count, n), np.uint8)
    for r in range(count):
        start = max_code - zero_points[r]
        own = scales[r] * thresholds[start : start + max_code]
        for i in range(n):
            code, width = 0, (max_code + 1) >> 1
            while width > 0:
                code += width if own[code + width - 1] <= rows[r, i] else 0
                width >>= 1
            codes[r, i] = code
    return codes


@compiled
def decode_rows(codes: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The value of each code.  codes: (rows, n).  values: (rows, 2**bits).  Returns (rows, n)."""
    count, n = codes.shape
    decoded = np.empty((count, n), np.float32)
    for r in range(count):
        for i in range(n):
            decoded[r, i] = values[r, codes[r, i]]
    return decoded
