"""Layers as matrix products: a weight as matrices (rows, n), one a group of channels, and the node that multiplies with it.

Conv           (oc, ic/group, kh, kw)  -> group x (oc/group, ic/group * kh * kw)
ConvTranspose  (ic, oc/group, kh, kw)  -> the same of the Conv over the spread input: channels swapped, kernel turned round
Gemm, MatMul   (oc, ic) or (ic, oc)    -> (oc, ic)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

from requant_onnx.files.walk import reads_in
from requant_onnx.graph.constants import find_root, import_graph, is_standard
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.operands import CONVERTIBLE, fits, weight_operand
from requant_onnx.numerics.moments import Values, Window, patches

T = TypeVar("T", bound=np.generic)
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Layer:
    """A node with a weight of its own.

    index: of the node.  weight: name of the stored tensor; shape: of it.  x: activation it reads.  output: its output.
    bias: name of a bias that only this node reads, "" for none.  bias_values: (oc,), zeros for none.
    added_to: the other input of an Add that alone reads the output, "" for none.
    """

    index: int
    op: str
    weight: str
    shape: tuple[int, ...]
    x: str
    output: str
    bias: str
    bias_values: npt.NDArray[np.float32]
    attributes: dict[str, Any] = field(repr=False, default_factory=dict)
    added_to: str = ""

    @property
    def group(self) -> int:
        """Groups of channels that are multiplied apart."""
        return int(self.attributes.get("group", 1))

    @property
    def can_correct(self) -> bool:
        """Whether it has a bias to correct."""
        return self.bias != ""

    def bias_of(self, g: int) -> npt.NDArray[np.float64]:
        """(rows,) the bias of one group; 0 where there is none."""
        return np.asarray(self.bias_values.reshape(self.group, -1)[g].astype(np.float64))

    def matrices(self, w: npt.NDArray[T]) -> list[npt.NDArray[T]]:
        """The weight, or anything of its shape, as (rows, n) for each group."""
        if self.op == "Conv":
            return list(w.reshape(self.group, w.shape[0] // self.group, -1))
        if self.op == "ConvTranspose":
            parts = w.reshape(self.group, -1, *w.shape[1:]).swapaxes(1, 2)
            turned = np.flip(parts, tuple(range(3, parts.ndim)))
            return list(np.ascontiguousarray(turned).reshape(self.group, w.shape[1], -1))
        matrix = w.reshape(w.shape[-2:])
        return [np.ascontiguousarray(matrix if self._rows_first else matrix.T)]

    def tensor(self, matrices: Sequence[npt.NDArray[T]]) -> npt.NDArray[T]:
        """The inverse of `matrices`."""
        if self.op == "Conv":
            return np.ascontiguousarray(np.stack(matrices).reshape(self.shape))
        if self.op == "ConvTranspose":
            parts = np.stack(matrices).reshape(self.group, self.shape[1], -1, *self.shape[2:])
            turned = np.flip(parts, tuple(range(3, parts.ndim))).swapaxes(1, 2)
            return np.ascontiguousarray(turned).reshape(self.shape)
        matrix = matrices[0] if self._rows_first else matrices[0].T
        return np.ascontiguousarray(matrix).reshape(self.shape)

    def corrected_bias(self, difference: npt.NDArray[np.float32], means: npt.NDArray[np.float64]) -> npt.NDArray[np.float32] | None:
        """(oc,) the bias that makes up for what an error of the weights adds to the mean of the output.

        difference: shape of the weight; means: (ic,) of the input.  None where they do not fit or are too large, and for
        ConvTranspose, where it depends on the place.
        """
        parts = self.matrices(difference)
        kernel = int(np.prod(self.shape[2:])) if self.op == "Conv" else 1
        if self.op == "ConvTranspose" or means.size * kernel != self.group * parts[0].shape[1]:
            return None
        inputs = np.repeat(means, kernel).reshape(self.group, -1)
        added = [part.astype(np.float64) @ own for part, own in zip(parts, inputs, strict=True)]
        with np.errstate(over="ignore"):
            bias = (self.bias_values - np.concatenate(added)).astype(np.float32)
        return bias if np.isfinite(bias).all() else None

    def importance(self, powers: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
        """What the squared error of each weight counts in that of the output: the power of its input, 1 on average.

        powers: (n,) for each group.
        """
        mean = max(float(np.mean(powers)), 1e-30)
        floored = [np.maximum(power / mean, 1e-6) for power in powers]
        return self.tensor([np.tile(power.astype(np.float32), (self.matrix_rows, 1)) for power in floored])

    def by_row(self, parameter: npt.NDArray[T]) -> list[npt.NDArray[T]]:
        """A scale or zero point, () or (channels,), for each row of each group.  ConvTranspose: all groups share its channels."""
        rows = self.matrix_rows
        if parameter.size == 1 or self.op == "ConvTranspose":
            return [np.broadcast_to(parameter, (rows,)).copy() for _ in range(self.group)]
        return list(parameter.reshape(self.group, rows).copy())

    @property
    def matrix_rows(self) -> int:
        """Output channels of a group."""
        if self.op == "ConvTranspose":
            return self.shape[1]
        return self.bias_values.size // self.group

    @property
    def scale_is_shared(self) -> bool:
        """Whether a scale belongs to rows of several groups."""
        return self.op == "ConvTranspose" and self.group > 1

    @property
    def _rows_first(self) -> bool:
        return self.op == "Gemm" and bool(self.attributes.get("transB", 0))

    def places(self, x: Values) -> Iterator[tuple[slice, list[Values]]]:
        """(images, [(places, n) for each group]): what the rows are multiplied with.  x: (n, ic, ...), or (..., ic)."""
        if self.op not in CONVOLUTIONS:
            flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
            yield slice(0, len(x)), [flat]
        elif self.op == "Conv":
            yield from patches(x, self._window(x.shape[2:]))
        else:
            yield from patches(*self._spread(x))

    def results(self, y: Values) -> list[Values]:
        """The output as (places, rows) for each group."""
        if self.op not in CONVOLUTIONS:
            return [y.reshape(-1, y.shape[-1])]
        flat = np.moveaxis(y, 1, -1).reshape(-1, self.group, y.shape[1] // self.group)
        return [np.ascontiguousarray(flat[:, g]) for g in range(self.group)]

    def _window(self, size: tuple[int, ...]) -> Window:
        kernel = self.shape[2:]
        ones = (1,) * len(kernel)
        strides, dilations = (tuple(self.attributes.get(name, ones)) for name in ("strides", "dilations"))
        return Window(kernel, strides, self._pads(size, kernel, strides, dilations), dilations, self.group)

    def _pads(
        self, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
    ) -> tuple[tuple[int, int], ...]:
        """https://onnx.ai/onnx/operators/onnx__Conv.html, auto_pad and pads."""
        auto = self.attributes.get("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
                for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
            ]
            halves = [(t // 2, t - t // 2) for t in totals]
            return tuple(halves if auto == "SAME_UPPER" else [(b, a) for a, b in halves])
        pads = self.attributes.get("pads", (0,) * (2 * len(kernel))) if auto == "NOTSET" else (0,) * (2 * len(kernel))
        return tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))

    def _spread(self, x: Values) -> tuple[Values, Window]:
        """ConvTranspose as a Conv of stride 1: zeros between the inputs, and around them what the kernel reaches.

        https://onnx.ai/onnx/operators/onnx__ConvTranspose.html, without auto_pad and output_shape
        """
        kernel = self.shape[2:]
        zeros, ones = (0,) * len(kernel), (1,) * len(kernel)
        strides, dilations = (tuple(self.attributes.get(name, ones)) for name in ("strides", "dilations"))
        pads = tuple(self.attributes.get("pads", zeros + zeros))
        extra = tuple(self.attributes.get("output_padding", zeros))
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
        spread = np.zeros((*x.shape[:2], *size), x.dtype)
        spread[_cut(slice(None, None, s) for s in strides)] = x
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        around = tuple(
            (r - a, r - b + e) for r, a, b, e in zip(reach, pads[: len(kernel)], pads[len(kernel) :], extra, strict=True)
        )
        trimmed = spread[_cut(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(around, size, strict=True))]
        return trimmed, Window(kernel, ones, tuple((max(a, 0), max(b, 0)) for a, b in around), dilations, self.group)


def _cut(spatial: Iterable[slice]) -> tuple[slice, ...]:
    """An index of the spatial axes of (n, c, ...)."""
    return (slice(None), slice(None), *spatial)


def find_layers(model: onnx.ModelProto, weights: Collection[str]) -> list[Layer]:
    """The nodes that alone read one of these weights, in graph order; others are left out."""
    readers = Counter(name for name in reads_in(model.graph))
    layers = []
    for index, node in enumerate(import_graph(model).nodes):
        operand = weight_operand(node) if node.op in CONVERTIBLE and is_standard(node) else None
        root = find_root(node.inputs[operand]) if operand == 1 else None
        if root is None or root.name not in weights or readers[root.name] != 1 or not _is_plain(node, root.tensor.shape):
            continue
        bias, values = _bias(node, readers)
        if values is not None:
            shape = tuple(int(n) for n in root.tensor.shape)
            names = (node.inputs[0].name, node.outputs[0].name, bias)
            layers.append(Layer(index, node.op, root.name, shape, *names, values, dict(node.attrs), _added_to(node)))
    return layers


def give_biases(model: onnx.ModelProto, weights: Collection[str]) -> None:
    """A bias of its own for each Conv, ConvTranspose and Gemm with one of these weights: zeros, or a copy.  Changes `model`."""
    readers, names = Counter(reads_in(model.graph)), FreshNames(model)
    proto = {node.output[0]: node for node in model.graph.node if node.output}
    interface = {item.name for item in (*model.graph.input, *model.graph.output)}
    for node in import_graph(model).nodes:
        if node.op not in ("Conv", "ConvTranspose", "Gemm") or not is_standard(node):
            continue
        root = find_root(node.inputs[1])
        values = None if root is None or root.name not in weights else _bias(node, readers)[1]
        target = proto[node.outputs[0].name]
        has_own = len(target.input) > 2 and target.input[2] and readers[target.input[2]] == 1 and target.input[2] not in interface
        stored = any(item.name == target.input[2] for item in model.graph.initializer) if has_own else False
        if values is None or (has_own and stored) or (node.op == "Gemm" and node.attrs.get("beta", 1.0) != 1.0):
            continue
        name = names.take(f"{target.input[1]}_bias")
        set_initializer(model.graph, values, name)
        del target.input[2:]
        target.input.append(name)


def _added_to(node: Any) -> str:
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != "Add" or not is_standard(readers[0]):
        return ""
    others = [item.name for item in readers[0].inputs if item.name != node.outputs[0].name]
    return str(others[0]) if len(others) == 1 else ""


def _is_plain(node: Any, shape: Sequence[int]) -> bool:
    if not fits(node, shape):
        return False
    if node.op == "MatMul":
        return math.prod(shape[:-2]) == 1
    if node.op == "Gemm":
        return not node.attrs.get("transA", 0) and node.attrs.get("alpha", 1.0) == 1.0
    if node.op == "ConvTranspose":
        return node.attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attrs
    return True


def _bias(node: Any, readers: Counter[str]) -> tuple[str, npt.NDArray[np.float32] | None]:
    """(name if only this node reads it, values); None for values that are not constant or no vector."""
    channels = _channels(node)
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return "", np.zeros(channels, np.float32)
    root = find_root(node.inputs[2])
    if root is None or root.dtype != onnx.TensorProto.FLOAT or tuple(root.tensor.shape) != (channels,):
        return "", None
    own = root.name == node.inputs[2].name and readers[root.name] == 1 and node.attrs.get("beta", 1.0) == 1.0
    return (root.name if own else ""), root.load().astype(np.float32)


def _channels(node: Any) -> int:
    root = find_root(node.inputs[1])
    shape: tuple[int, ...] = tuple(root.tensor.shape) if root is not None else ()
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return int(shape[0])
    if node.op == "ConvTranspose":
        return int(shape[1]) * int(node.attrs.get("group", 1))
    return int(shape[-1])
