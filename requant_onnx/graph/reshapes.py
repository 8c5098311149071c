"""Nodes that only change the shape of a tensor, and their effect on its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from requant_onnx.numerics.arrays import GenericArray

RESHAPING = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class Reshaped:
    """The new shape that a node outputs, and the permutation if it is a Transpose."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None


def reshaped(op: str, shape: tuple[int, ...], attributes: Mapping[str, Any], operand: GenericArray | None) -> Reshaped | None:
    """The effect of one of RESHAPING on a tensor of that shape.  operand: its second input.  None where they do not fit.

    https://onnx.ai/onnx/operators/, Transpose, Reshape, Unsqueeze, Squeeze, Flatten
    """
    given = attributes.get("axes") if operand is None else operand.ravel().tolist()
    numbers = [int(n) for n in given] if given is not None and (operand is None or operand.dtype.kind == "i") else None
    if op == "Transpose":
        wanted = attributes.get("perm")
        order = tuple(int(n) for n in wanted) if isinstance(wanted, Sequence) else tuple(reversed(range(len(shape))))
        return Reshaped(tuple(shape[n] for n in order), order) if sorted(order) == list(range(len(shape))) else None
    if op == "Flatten":
        axis = int(attributes.get("axis", 1))
        return Reshaped((math.prod(shape[:axis]), math.prod(shape[axis:]))) if -len(shape) <= axis <= len(shape) else None
    if op == "Reshape":
        return None if numbers is None else _to_shape(shape, numbers, bool(attributes.get("allowzero", 0)))
    rank = len(shape) + (len(numbers or ()) if op == "Unsqueeze" else 0)
    axes = {n % rank for n in numbers} if numbers and rank else {k for k, n in enumerate(shape) if n == 1}
    if numbers and (len(axes) != len(numbers) or any(not -rank <= n < rank for n in numbers)):
        return None
    if op == "Squeeze":
        return Reshaped(tuple(n for k, n in enumerate(shape) if k not in axes)) if all(shape[k] == 1 for k in axes) else None
    rest = iter(shape)
    return Reshaped(tuple(1 if k in axes else next(rest) for k in range(rank))) if numbers is not None else None


def _to_shape(shape: tuple[int, ...], wanted: list[int], zero_is_zero: bool) -> Reshaped | None:
    if not zero_is_zero and any(n == 0 and k >= len(shape) for k, n in enumerate(wanted)):
        return None
    sizes = [shape[k] if n == 0 and not zero_is_zero else n for k, n in enumerate(wanted)]
    known, size = math.prod(n for n in sizes if n != -1), math.prod(shape)
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = size // known
    return Reshaped(tuple(sizes)) if min(sizes, default=0) >= 0 and math.prod(sizes) == size else None
