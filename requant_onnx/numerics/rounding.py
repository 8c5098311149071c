"""The loops of rounding to codes and back; quantize.py says what they compute."""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float32Array, Float64Array, Int64Array, UInt8Array
from requant_onnx.numerics.compiled import compiled


@compiled
def encode_rows(
    rows: AnyArray, scales: Float64Array, zero_points: Int64Array, thresholds: Float64Array, power: float
) -> UInt8Array:
    """The code of each weight, (rows, n): the number of thresholds of its row that are not above it.

    rows: weights, (rows, n).  scales: scale of one step in weight space, (rows,).  thresholds: whole table, (2K,).
    power: 1/a, from which a first guess is computed that the thresholds then correct.
    """
    count, n = rows.shape
    max_code = thresholds.size // 2
    codes = np.empty((count, n), np.uint8)
    for r in range(count):
        zero_point = zero_points[r]
        start = max_code - zero_point
        row_thresholds = scales[r] * thresholds[start : start + max_code]
        inverse = 1.0 / scales[r]
        for i in range(n):
            w = np.float64(rows[r, i])
            ratio = min(abs(w) * inverse, 1e6)  # beyond every level, and finite also where the scale is tiny
            k = ratio if power == 1.0 else ratio ** (1.0 / power) if power != 2.0 else np.sqrt(ratio)
            code = min(max(zero_point + int(k + 0.5 if w >= 0.0 else -k - 0.5), 0), max_code)
            while code < max_code and row_thresholds[code] <= w:
                code += 1
            while code > 0 and row_thresholds[code - 1] > w:
                code -= 1
            codes[r, i] = code
    return codes


@compiled
def decode_rows(codes: UInt8Array, values: Float32Array) -> Float32Array:
    """The value of each code, (rows, n).  codes: (rows, n).  values: value of every code, (rows, 2**bits)."""
    count, n = codes.shape
    decoded = np.empty((count, n), np.float32)
    for r in range(count):
        for i in range(n):
            decoded[r, i] = values[r, codes[r, i]]
    return decoded
