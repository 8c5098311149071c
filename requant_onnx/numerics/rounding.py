"""Rounding to codes and back; quantize.py says what it computes."""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float32Array, Float64Array, Int64Array, UInt8Array


def encode_rows(rows: AnyArray, scales: Float64Array, zero_points: Int64Array, thresholds: Float64Array) -> UInt8Array:
    """The code of each weight, (rows, n): the number of thresholds of its row that are not above it.

    rows: weights, (rows, n).  scales: scale of one step in weight space, (rows,).  thresholds: whole table, (2K,).
    """
    codes = np.empty(rows.shape, np.uint8)
    max_code = thresholds.size // 2
    for w, scale, start, code in zip(rows, scales, max_code - zero_points, codes, strict=True):
        code[:] = (scale * thresholds[start : start + max_code]).searchsorted(w.astype(np.float64), side="right")
    return codes


def decode_rows(codes: UInt8Array, values: Float32Array) -> Float32Array:
    """The value of each code, (rows, n).  codes: (rows, n).  values: value of every code, (rows, 2**bits)."""
    decoded = np.empty(codes.shape, np.float32)
    for code, row, value in zip(codes, values, decoded, strict=True):
        value[:] = row.take(code)
    return decoded
