"""The width of codes in compressed files: the one that compresses best.

A compressor with Huffman codes needs at least one bit for each byte, so weights that are mostly zero compress better with two or
four codes in a byte.  Codes whose width does not divide a byte evenly hide their common patterns from the compressor.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from requant_onnx.choices import LEVELS, OptimizeFor
from requant_onnx.convert.nearest import Result
from requant_onnx.files.compressed import compress
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.decode.packing import PACKINGS, pack
from requant_onnx.numerics.arrays import UInt8Array
from requant_onnx.numerics.kinds import UNIFORM
from requant_onnx.numerics.levels import level_table
from requant_onnx.numerics.quantize import QuantizedWeight
from requant_onnx.numerics.ranges import symmetric_zero_point

PIECE = 1 << 18  # number of codes on which widths are compared
NARROW = (4, 2)  # widths in bits that divide a byte evenly


def narrowed(result: Result, aim: OptimizeFor) -> Result:
    """The same weight in codes of the width that compresses best; unchanged if its grid has no step, or its form dequantizes."""
    grid = result.planned.grid
    if grid.step is None or FORMS[result.planned.form].dequantizes:
        return result
    found = [result.quantized]
    found += [q for bits in NARROW if (q := of_width(result.quantized, bits)) is not None]
    best = min(found, key=lambda q: len(compress(_stored(q), aim)))
    return replace(result, quantized=best, planned=replace(result.planned, grid=replace(grid, bits=best.table.bits)))


def of_width(q: QuantizedWeight, bits: float) -> QuantizedWeight | None:
    """The same levels in narrower codes; None if these cannot hold them."""
    levels, middle = q.levels(), symmetric_zero_point(bits)
    low, high = int(levels.min()), int(levels.max())
    zero = next((z for z in (middle, middle - 1) if low >= -z and high < LEVELS[bits] - z), None)
    if zero is None:
        return None
    codes = (levels + zero).astype(np.uint8)
    return replace(q, codes=codes, zero_point=np.full_like(q.zero_point, zero), table=level_table(bits, UNIFORM))


def _stored(q: QuantizedWeight) -> bytes:
    """The bytes in the file of the first PIECE codes, at most."""
    packing = PACKINGS[q.table.bits]
    codes: UInt8Array = q.codes.ravel()[:PIECE]
    return pack(codes[: codes.size // packing.codes * packing.codes].reshape(-1, packing.codes), packing)[0].tobytes()
