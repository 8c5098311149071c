"""Make random CNNs from the structures that exporters write; each one is valid and runs in ONNX Runtime.

Weights are stored as initializers, in Constant nodes, in float16 and bfloat16, before Identity, Cast, Transpose, Reshape and
Unsqueeze, computed, shared between layers, in branches and in model-local functions.  Layers have one to three dimensions, and are
grouped, depthwise, dilated and transposed, with residuals, concatenations and BatchNormalization on either side.  There are
also LSTM, GRU and RNN, Einsum, embeddings, tables, layers in float16, sequences, and rows whose number depends on the data.
The opset is 7 to 25.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

T = TypeVar("T")
OPSETS = (7, 8, 9, 11, 13, 15, 18, 20, 21, 23, 25)
LOCAL = "local"


def random_model(seed: int) -> onnx.ModelProto:
    """A CNN of one to eight random layers and a random head.  The same seed gives the same model."""
    return Generator(np.random.default_rng(seed)).model()


@dataclass
class Generator:
    """A graph under construction; `tensor` and `shape` (channels, then sizes) are the output of the last layer."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    tensor: str = "x"
    shape: tuple[int, ...] = ()
    opset: int = 18
    count: int = 0

    def model(self) -> onnx.ModelProto:
        self.opset = int(self.random.choice(OPSETS))
        rank = int(self.random.choice([2, 2, 2, 1, 3]))
        self.shape = (int(self.random.choice([3, 4, 8, 16])), *(int(n) for n in self.random.integers(5, 10, rank)))
        batch: str | int = "n" if self.random.random() < 0.7 else int(self.random.integers(1, 4))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *self.shape])
        for _ in range(self.random.integers(1, 9)):
            self.pick(self.convolution, self.convolution, self.convolution, self.transposed, self.normalized, self.activation,
                      self.pool, self.residual, self.concatenation, self.branches, self.function,
                      self.recurrent, self.einsum, self.embedding, self.table, self.half, self.sequence)()  # fmt: skip
        rows = self.selected_rows() if self.opset >= 13 and self.chance(0.1) else None
        self.head()
        outputs = [helper.make_tensor_value_info(self.tensor, TensorProto.FLOAT, [batch, *self.shape])]
        stored = [item for item in self.initializers if item.data_type != TensorProto.BFLOAT16]  # NumPy lacks bfloat16
        if stored and self.chance(0.05):
            weight = self.pick(*stored)
            outputs.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
        outputs += [] if rows is None else [rows]
        graph = helper.make_graph(self.nodes, "random", [x], outputs, self.initializers)
        if self.opset < 9:
            graph.input.extend(helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in self.initializers)
        imports = [helper.make_opsetid("", self.opset), *([helper.make_opsetid(LOCAL, 1)] if self.functions else [])]
        ir_version = 3 if self.opset < 9 else 8 if self.opset < 21 else 10
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=self.functions)

    def convolution(self, out: int | None = None, keep: bool = False) -> None:
        """Append a Conv, with or without BatchNormalization.  keep: whether the size stays the same."""
        ic, rank = self.shape[0], len(self.shape) - 1
        groups = [g for g in (1, 1, 2, 4, ic) if ic % g == 0]
        group = int(self.random.choice(groups))
        oc = out or group * int(self.random.integers(1, 1 + max(1, 32 // group)))
        group = group if oc % group == 0 else 1
        kernel, dilation = int(self.random.choice([1, 3])), int(self.random.choice([1, 1, 2]))
        same, stride = dilation * (kernel - 1) // 2, 1 if keep else int(self.random.choice([1, 1, 2]))
        pad = same if keep or min(self.shape[1:]) < 2 * same + 1 else int(self.random.integers(0, same + 1))
        weight = self.weight((oc, ic // group, *[kernel] * rank))
        sizes = [(n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n in self.shape[1:]]
        attributes: dict[str, Any] = {
            "group": group,
            "strides": [stride] * rank,
            "pads": [pad] * 2 * rank,
            "dilations": [dilation] * rank,
        }
        self.add("Conv", [weight, *self.bias(oc)], (oc, *sizes), **attributes)
        if self.chance(0.3):
            self.normalized()

    def transposed(self) -> None:
        ic, rank = self.shape[0], len(self.shape) - 1
        group = int(self.random.choice([g for g in (1, 1, 2) if ic % g == 0]))
        each, stride = int(self.random.integers(1, 9)), int(self.random.choice([1, 2]))
        weight = self.weight((ic, each, *[2] * rank))
        sizes = [(n - 1) * stride + 2 for n in self.shape[1:]]
        if np.prod(sizes) > 4000:
            return
        attributes: dict[str, Any] = {"group": group, "strides": [stride] * rank}
        self.add("ConvTranspose", [weight, *self.bias(group * each)], (group * each, *sizes), **attributes)

    def normalized(self) -> None:
        c = self.shape[0]
        operands = [self.constant(np.float32(self.random.uniform(0.5, 1.5, c))) for _ in range(4)]
        self.add("BatchNormalization", operands, self.shape)

    def activation(self) -> None:
        self.add(self.pick("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu"), [], self.shape)

    def pool(self) -> None:
        if min(self.shape[1:]) >= 2:
            rank = len(self.shape) - 1
            sizes = [n // 2 for n in self.shape[1:]]
            kernel: dict[str, Any] = {"kernel_shape": [2] * rank, "strides": [2] * rank}
            self.add(self.pick("MaxPool", "AveragePool"), [], (self.shape[0], *sizes), **kernel)

    def residual(self) -> None:
        start, shape = self.tensor, self.shape
        self.convolution(keep=True)
        self.activation()
        self.convolution(out=shape[0], keep=True)
        self.add("Add", [start], shape)

    def concatenation(self) -> None:
        start, shape = self.tensor, self.shape
        ends = []
        for _ in range(self.random.integers(2, 4)):
            self.tensor, self.shape = start, shape
            self.convolution(keep=True)
            ends.append((self.tensor, self.shape[0]))
        self.tensor = ends[0][0]
        self.add("Concat", [name for name, _ in ends[1:]], (sum(c for _, c in ends), *shape[1:]), axis=1)

    def branches(self) -> None:
        """Append an If with a Conv in each branch."""
        oc, rank, reads = int(self.random.integers(1, 24)), len(self.shape) - 1, self.tensor
        taken = self.constant(np.array(self.chance(0.5)))
        bodies = []
        for name in ("a", "b"):
            weight = numpy_helper.from_array(self.values((oc, self.shape[0], *[1] * rank)), self.pick("w", f"{name}.w"))
            out = f"{name}.out.{self.count}"
            conv = helper.make_node("Conv", [reads, weight.name], [out])
            info = helper.make_tensor_value_info(out, TensorProto.FLOAT, [None, oc, *self.shape[1:]])
            constant = helper.make_node("Constant", [], [weight.name], value=weight)
            stored = ([constant, conv], []) if self.opset < 9 else ([conv], [weight])  # IR 3 requires initializers among the inputs
            bodies.append(helper.make_graph(stored[0], name, [], [info], stored[1]))
        self.tensor = taken
        self.add("If", [], (oc, *self.shape[1:]), then_branch=bodies[0], else_branch=bodies[1])

    def function(self) -> None:
        """Append a call of a model-local function that contains a Conv."""
        if self.opset < 15:
            return
        oc, rank = int(self.random.integers(1, 24)), len(self.shape) - 1
        name, values = f"conv{len(self.functions)}", self.values((oc, self.shape[0], *[1] * rank))
        constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(values))
        nodes = [constant, helper.make_node("Conv", ["x", "w"], ["z"])]
        imports = [helper.make_opsetid("", self.opset)]
        self.functions.append(helper.make_function(LOCAL, name, ["x"], ["z"], nodes, imports))
        self.add(name, [], (oc, *self.shape[1:]), domain=LOCAL)

    def recurrent(self) -> None:
        """Append an LSTM, GRU or RNN over all places of an image, in one or both directions."""
        op, gates = self.pick(("LSTM", 4), ("GRU", 3), ("RNN", 1))
        c, sizes, hidden, both = self.shape[0], self.shape[1:], int(self.random.integers(2, 13)), self.chance(0.5)
        d = 2 if both else 1
        self.add("Reshape", [self.constant(np.array([0, c, -1]))], (c, int(np.prod(sizes))))
        self.add("Transpose", [], self.shape, perm=[2, 0, 1])
        operands = [self.constant(self.values((d, gates * hidden, n))) for n in (c, hidden)]
        bias = [self.constant(self.values((d, 2 * gates * hidden)))] if self.chance(0.5) else []
        direction = "bidirectional" if both else "forward"
        self.add(op, [*operands, *bias], self.shape, hidden_size=hidden, direction=direction)
        self.add("Transpose", [], self.shape, perm=[2, 1, 3, 0])
        self.add("Reshape", [self.constant(np.array([0, d * hidden, *sizes]))], (d * hidden, *sizes))

    def einsum(self) -> None:
        """Append a product over channels."""
        if self.opset >= 12:
            places, oc = "xyz"[: len(self.shape) - 1], int(self.random.integers(1, 24))
            self.add("Einsum", [self.weight((oc, self.shape[0]))], (oc, *self.shape[1:]), equation=f"bc{places},dc->bd{places}")

    def embedding(self) -> None:
        """Append a lookup of a table row for each place, by its largest channel."""
        rank, d, c = len(self.shape) - 1, 16, self.shape[0]
        self.add("ArgMax", [], self.shape[1:], axis=1, keepdims=0)
        self.add("Gather", [self.constant(self.values((max(64, c), d)))], self.shape, left=True)
        self.add("Transpose", [], self.shape, perm=[0, rank + 1, *range(1, rank + 1)])
        self.shape = (d, *self.shape)

    def table(self) -> None:
        """Append a table of positions, or of factors."""
        self.add(self.pick("Add", "Mul"), [self.constant(self.values((1, *self.shape)) + np.float32(1))], self.shape)

    def half(self) -> None:
        """Append a Conv in float16."""
        oc, rank = int(self.random.integers(1, 24)), len(self.shape) - 1
        weight = self.constant(self.values((oc, self.shape[0], *[1] * rank)).astype(np.float16))
        self.add("Cast", [], self.shape, to=TensorProto.FLOAT16)
        self.add("Conv", [weight], (oc, *self.shape[1:]))
        self.add("Cast", [], self.shape, to=TensorProto.FLOAT)

    def sequence(self) -> None:
        """Append a conversion to a sequence and back."""
        if self.opset >= 11:
            self.add("SequenceConstruct", [self.tensor], self.shape)
            self.add("SequenceAt", [self.constant(np.array(1))], self.shape)

    def selected_rows(self) -> onnx.ValueInfoProto:
        """Append a product per positive value of the input, so that their number depends on the data."""
        places = self.node("NonZero", [self.node("Greater", ["x", self.constant(np.float32(0))])])
        values = self.node("GatherND", ["x", self.node("Transpose", [places])])
        column = self.node("Unsqueeze", [values, self.constant(np.array([1]))])
        rows = self.node("MatMul", [column, self.constant(self.values((1, 200)))])
        return helper.make_tensor_value_info(rows, TensorProto.FLOAT, [None, 200])

    def head(self) -> None:
        """Append the head: nothing, or rows of features and a Gemm or MatMul."""
        if self.chance(0.2):
            return
        self.add("GlobalAveragePool", [], (self.shape[0], *[1] * (len(self.shape) - 1)))
        c, classes = self.shape[0], int(self.random.integers(2, 40))
        if len(self.shape) == 2 and self.chance(0.5):  # (n, c, 1): a product per row, with the weight on the left
            self.add("MatMul", [self.weight((classes, c))], (classes, 1), left=True)
            return
        self.add("Flatten", [], (c,))
        if self.chance(0.5):
            self.add("MatMul", [self.weight((c, classes))], (classes,))
            return
        turned = int(self.chance(0.5))
        weight = self.weight((classes, c) if turned else (c, classes))
        bias = [self.constant(self.values((classes,)))] if self.opset < 11 or self.chance(0.5) else []
        self.add("Gemm", [weight, *bias], (classes,), transB=turned, alpha=self.pick(1.0, 0.5), beta=self.pick(1.0, 2.0))

    def weight(self, shape: tuple[int, ...]) -> str:
        """The name of a tensor with values of the shape: an earlier one, or a new constant, possibly before other nodes."""
        fitting = [name for name, values in self.shared.items() if values.shape == shape]
        if fitting and self.chance(0.3):
            return self.pick(*fitting)
        ways = [self.stored, self.stored, self.in_constant, self.behind_identity, self.in_half, self.behind_transpose]
        name = self.pick(*ways, self.behind_reshape, self.behind_unsqueeze, self.computed)(self.values(shape))
        self.shared[name] = np.empty(shape)
        return name

    def stored(self, values: np.ndarray) -> str:
        return self.constant(values)

    def in_constant(self, values: np.ndarray) -> str:
        return self.node("Constant", [], value=numpy_helper.from_array(values))

    def behind_identity(self, values: np.ndarray) -> str:
        return self.node("Identity", [self.constant(values)])

    def in_half(self, values: np.ndarray) -> str:
        kinds = (TensorProto.FLOAT16, TensorProto.BFLOAT16) if self.opset >= 13 else (TensorProto.FLOAT16,)
        kind = self.pick(*kinds)
        return self.node("Cast", [self.constant(values.astype(helper.tensor_dtype_to_np_dtype(kind)))], to=TensorProto.FLOAT)

    def behind_transpose(self, values: np.ndarray) -> str:
        order = [int(k) for k in self.random.permutation(values.ndim)]
        turned = np.ascontiguousarray(values.transpose(order))
        return self.node("Transpose", [self.constant(turned)], perm=np.argsort(order).tolist())

    def behind_reshape(self, values: np.ndarray) -> str:
        shape = self.constant(np.array(values.shape, np.int64))
        return self.node("Reshape", [self.constant(values.reshape(values.shape[0], -1)), shape])

    def behind_unsqueeze(self, values: np.ndarray) -> str:
        axes = [k for k, n in enumerate(values.shape) if n == 1 and k > 1]
        squeezed = self.constant(values.squeeze(tuple(axes)))
        if self.opset < 13:
            return self.node("Unsqueeze", [squeezed], axes=axes) if axes else squeezed
        return self.node("Unsqueeze", [squeezed, self.constant(np.array(axes, np.int64))]) if axes else squeezed

    def computed(self, values: np.ndarray) -> str:
        gain = self.constant(np.float32(2) + np.zeros((values.shape[0], *[1] * (values.ndim - 1)), np.float32))
        return self.node("Mul", [self.constant(values / 2), gain])

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        """Values with heavy tails, and a spread that keeps the magnitude of activations."""
        return self.random.laplace(scale=1 / np.sqrt(2 * np.prod(shape[1:])), size=shape).astype(np.float32)

    def bias(self, channels: int) -> list[str]:
        return [self.constant(self.values((channels,)))] if self.chance(0.5) else []

    def constant(self, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(values, self.fresh("c")))
        return self.initializers[-1].name

    def node(self, op: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, and return the output."""
        name = self.fresh(self.pick("t", "t", "d1", "node/"))
        self.nodes.append(helper.make_node(op, inputs, [name], name="" if self.chance(0.2) else f"{op}{self.count}", domain=domain))
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes[-1].attribute.extend(helper.make_attribute(key, value) for key, value in given.items())
        return name

    def add(
        self, op: str, more: Sequence[str], shape: tuple[int, ...], *, left: bool = False, domain: str = "", **attributes: Any
    ) -> None:
        """Append a node after the last one.  left: whether `more` comes first."""
        self.tensor = self.node(op, [*more, self.tensor] if left else [self.tensor, *more], domain=domain, **attributes)
        self.shape = shape

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}.{self.count}"

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def pick(self, *choices: T) -> T:
        return choices[int(self.random.integers(len(choices)))]
