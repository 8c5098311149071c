"""Rounding to codes and back; quantize.py defines the formulas."""

from __future__ import annotations

import numpy as np

from requant_onnx.numerics.arrays import AnyArray, Float32Array, Float64Array, Int64Array, UInt8Array
from requant_onnx.numerics.parallel import slices

PIECE = 1 << 18  # weights in a row that are rounded at once


def encode_rows(rows: AnyArray, scales: Float64Array, zero_points: Int64Array, thresholds: Float64Array) -> UInt8Array:
    """The code of each weight, (rows, n): the number of thresholds of its row that are not above it.

    rows: weights, (rows, n).  scales: scale of one step in weight space, (rows,).  thresholds: whole table, (2K,).
    """
    codes = np.empty(rows.shape, np.uint8)
    max_code = thresholds.size // 2
    for w, scale, start, code in zip(rows, scales, max_code - zero_points, codes, strict=True):
        row_thresholds = scale * thresholds[start : start + max_code]
        for piece in slices(w.size, PIECE):
            code[piece] = row_thresholds.searchsorted(w[piece].astype(np.float64), side="right")
    return codes


def decode_rows(codes: UInt8Array, values: Float32Array) -> Float32Array:
    """The value of each code, (rows, n).  codes: (rows, n).  values: value of every code, (rows, K+1)."""
    decoded = np.empty(codes.shape, np.float32)
    for code, row, value in zip(codes, values, decoded, strict=True):
        for piece in slices(code.size, PIECE):
            value[piece] = row.take(code[piece])
    return decoded
