"""The decode as a model-local function, so that its nodes are stored once for all weights that share a grid.

ONNX Runtime inlines functions when it loads a model, and then folds them, for they read initializers only.  The bodies hold
standard operators; `onnx.inliner.inline_local_functions` writes them out for tools that know no functions.
https://onnx.ai/onnx/repo-docs/IR.html#functions
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import onnx
from onnx import helper, numpy_helper

from requant_onnx.graph.packing import FIELDS, shifts
from requant_onnx.numerics.levels import LevelTable

DOMAIN = "requant_onnx"
FUNCTION_OPSET = 18  # BitwiseOr


class Ending(Enum):
    """What a decode function gives: the codes, the integer levels in one of three types, or the weights themselves."""

    CODES = "codes"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    WEIGHTS = "weights"


def decode_function(table: LevelTable, ending: Ending, native: bool, padded: bool, opset: int) -> onnx.FunctionProto:
    """The function that decodes weights of one grid.

    Inputs: the packed fields (or, `native`, the codes in a type of their width), then `shape` of the weight unless native, then
    `count` if padded, then `zero_point` (uint8) and `scale` (float32), both with the rank of the weight or scalar, where used.
    """
    body = _Body()
    codes = body.input("codes") if native else _unpack(body, table.bits, padded)
    if ending is not Ending.CODES:
        body.result(_levels(body, codes, table, ending))
    else:
        body.result(codes)
    stored = ("_native" if native else "") + ("_padded" if padded else "")
    name = f"decode_{table.bits}bit_power_{table.exponent:.4g}_{ending.value}{stored}"
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, name, body.inputs, ["result"], body.nodes, opsets)


def _unpack(body: _Body, bits: int, padded: bool) -> str:
    """Fields -> codes, uint8, in the shape of the weight."""
    widths = FIELDS[bits]
    fields = [body.input(f"field{width}") for width in widths]
    shape = body.input("shape")
    count = body.input("count") if padded else ""
    low, codes = 0, ""
    for field, width in zip(fields, widths, strict=True):
        planes = field if width == 8 else _planes(body, field, width)
        flat = body.node("Reshape", planes, body.constant(np.array([-1], np.int64)))
        whole = body.node("Slice", flat, body.constant(np.array([0], np.int64)), count) if padded else flat
        placed = body.node("BitShift", whole, body.constant(np.uint8(low)), direction="LEFT") if low else whole
        codes = body.node("BitwiseOr", codes, placed) if codes else placed
        low += width
    return body.node("Reshape", codes, shape)


def _planes(body: _Body, field: str, width: int) -> str:
    """(m,) bytes -> (8/width, m) fields: the shift to the left drops what is above, that to the right what is below."""
    amounts = (8 - width - shifts(width))[:, None]
    left = body.node("BitShift", field, body.constant(amounts), direction="LEFT")
    return body.node("BitShift", left, body.constant(np.uint8(8 - width)), direction="RIGHT")


def _levels(body: _Body, codes: str, table: LevelTable, ending: Ending) -> str:
    dtype = np.dtype(np.float32 if ending is Ending.WEIGHTS else ending.value)
    onnx_type = int(helper.np_dtype_to_tensor_dtype(dtype))
    zero_point = body.input("zero_point")
    if table.exponent in (0.5, 1.0):
        k = body.node("Sub", body.node("Cast", codes, to=onnx_type), body.node("Cast", zero_point, to=onnx_type))
        levels = k if table.exponent == 1.0 else body.node("Mul", k, body.node("Abs", k))
    else:
        wide = (body.node("Cast", tensor, to=onnx.TensorProto.INT32) for tensor in (codes, zero_point))
        index = body.node("Add", body.node("Sub", *wide), body.constant(np.int32(table.max_code)))
        levels = body.node("Gather", body.constant(table.integers.astype(dtype)), index)
    return body.node("Mul", levels, body.input("scale")) if ending is Ending.WEIGHTS else levels


class _Body:
    """The nodes of a function under construction, with names t0, t1, ..."""

    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.nodes: list[onnx.NodeProto] = []

    def input(self, name: str) -> str:
        self.inputs.append(name)
        return name

    def constant(self, values: np.ndarray | np.generic) -> str:
        tensor = numpy_helper.from_array(np.asarray(values))
        return self.node("Constant", value=tensor)

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))  # type: ignore[arg-type]
        return output

    def result(self, tensor: str) -> None:
        self.nodes.append(helper.make_node("Identity", [tensor], ["result"]))
