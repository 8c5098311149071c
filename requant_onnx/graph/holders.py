"""Operators with weights that compute no product that refinement supports: their weights are rounded to the nearest levels.

    operator                     weight                             one scale per
    LSTM, GRU, RNN               W and R, (directions, rows, n)     row of a gate, per direction
    Gather                       the table                          entry that can be looked up
    Einsum                       every operand                      last index that is in the result
    DeformConv, FusedConv        (oc, ic/group, ...)                output channel
    FusedGemm, FusedMatMul, ...  (oc, ic) or (ic, oc)               output channel
    EmbedLayerNormalization      the tables                         entry that can be looked up
    Add, Sub, Mul                a table of at least two axes       index of the last axis

A table that an elementwise operator reads reaches the result directly, not through a sum of many products.  It is stored at 8
bits, and skipped if it contains exact numbers (coordinates, masks), as a table of which entries are looked up is.
https://onnx.ai/onnx/operators/ and https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from requant_onnx.graph.products import Attributes

MICROSOFT = "com.microsoft"
NORMALIZATIONS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
RECURRENT_VECTORS = (3, 7)  # inputs of LSTM, GRU and RNN: the bias, and the peepholes of an LSTM
MIN_TABLE = 512  # elements; a smaller table takes less space than its decode


@dataclass(frozen=True)
class Holder:
    """One operator.

    domain: "" for the standard domain.  weights: inputs that may be weights, None for all.
    channel_axis: (attributes, input, rank) -> axis with one scale per index; None for one scale in all.
    is_table: whether its values reach the result directly.  looks_up: whether it reads only some entries of its weight.
    is_recurrent: whether the first axis of its weights is the direction.
    """

    name: str
    weights: tuple[int, ...] | None
    channel_axis: Callable[[Attributes, int, int], int | None]
    domain: str = ""
    is_table: bool = False
    looks_up: bool = False
    is_recurrent: bool = False

    def is_parameter(self, operand: int) -> bool:
        """Whether an input may be a weight, or a vector of parameters."""
        return self.weights is None or operand in self.weights or (self.is_recurrent and operand in RECURRENT_VECTORS)

    @property
    def multiplies_either(self) -> bool:
        """Whether the weight can be one of several operands, which are multiplied with each other."""
        return not self.is_table and (self.weights is None or 0 in self.weights) and not self.looks_up

    def may_hold(self, operand: int, shape: Sequence[int]) -> bool:
        """Whether a constant of that shape at that input is a weight: of at least two dimensions, and not a small table."""
        if self.weights is not None and operand not in self.weights:
            return False
        if not (self.is_table or self.looks_up):
            return len(shape) >= 2
        return sum(n > 1 for n in shape) >= 2 and math.prod(shape) >= MIN_TABLE


def _einsum_axis(attributes: Attributes, operand: int, rank: int) -> int | None:
    """The last axis whose letter occurs in the result.  https://onnx.ai/onnx/operators/onnx__Einsum.html"""
    operands, arrow, result = str(attributes.get("equation", "")).replace(" ", "").partition("->")
    terms = operands.split(",")
    if "." in operands or operand >= len(terms) or len(terms[operand]) != rank:
        return None
    kept = [k for k, letter in enumerate(terms[operand]) if (letter in result if arrow else operands.count(letter) == 1)]
    return kept[-1] if kept else None


def _matmul_axis(attributes: Attributes, operand: int, rank: int) -> int:
    turned = attributes.get("transB" if operand == 1 else "transA", 0)
    return rank - 2 if bool(turned) is (operand == 1) else rank - 1


@dataclass(frozen=True)
class _Fixed:
    """A channel axis that is the same in every node; a negative one counts from the last."""

    axis: int

    def __call__(self, attributes: Attributes, operand: int, rank: int) -> int:
        return self.axis % rank


_ROWS: tuple[Holder, ...] = (
    *(Holder(name, (1, 2), _Fixed(1), is_recurrent=True) for name in ("LSTM", "GRU", "RNN")),
    Holder("Gather", (0,), lambda attributes, operand, rank: int(attributes.get("axis", 0)) % rank, looks_up=True),
    Holder("Einsum", None, _einsum_axis),
    Holder("DeformConv", (1,), _Fixed(0)),
    *(Holder(name, None, _Fixed(-1), is_table=True) for name in ("Add", "Sub", "Mul")),
    *(Holder(name, (1,), _Fixed(0), MICROSOFT) for name in ("FusedConv", "NhwcFusedConv")),
    Holder("FusedGemm", (1,), lambda attributes, operand, rank: 0 if attributes.get("transB", 0) else 1, MICROSOFT),
    *(Holder(name, (1, 0), _matmul_axis, MICROSOFT) for name in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")),
    Holder("Attention", (1,), _Fixed(-1), MICROSOFT),
    Holder("EmbedLayerNormalization", (2, 3, 4), _Fixed(0), MICROSOFT, looks_up=True),
)
HOLDERS: dict[tuple[str, str], Holder] = {(row.domain, row.name): row for row in _ROWS}
"""The rows by domain and name."""


def holder_of(node: gs.Node | onnx.NodeProto) -> Holder | None:
    """The row of a node's operator; None if it has none."""
    name = node.op_type if isinstance(node, onnx.NodeProto) else node.op
    return HOLDERS.get(("" if node.domain in (None, "ai.onnx") else node.domain, name))
