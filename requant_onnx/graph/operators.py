"""The operators with weights, one row each, with everything the rest of the code needs to know about an operator.

    operator       weight                 output channels   product             integer kernel
    Conv           (oc, ic/group, ...)    axis 0            ConvProduct         QLinearConv
    ConvTranspose  (ic, oc/group, ...)    axis 1            ConvTransposeProduct
    Gemm           (oc, ic), transB = 1   axis 0            DenseProduct        QGemm
                   (ic, oc), transB = 0   axis 1
                   w @ x, (oc, ic)        axis 0, or 1 with transA
    MatMul         x @ w, (..., ic, oc)   last axis         DenseProduct        QLinearMatMul
                   w @ x, (..., oc, ic)   last but one

Operators with weights that compute no such product have a separate table (holders.py).  A new operator needs a row, and a product
(products.py) if none of these fits; tests/test_operators.py compares every row with the results of ONNX Runtime.
https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from requant_onnx.graph.products import Attributes, ConvProduct, ConvTransposeProduct, DenseProduct, Product, Shape


@dataclass(frozen=True)
class IntegerKernel:
    """An operator of ONNX Runtime that multiplies by an integer weight.

    operator: equivalent float operator.  weight: index of the weight's input.
    parameters: inputs with its scale and zero point; None where the weight is decoded elsewhere, or packed.
    """

    name: str
    operator: str
    weight: int
    parameters: tuple[int, int] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator.

    weights: inputs that may be the weight, the likelier one first.  bias: input that it adds, None if it has none.
    channel_axis: (attributes, input, rank) -> axis of the output channels in the weight at that input.
    fits: whether attributes and the shape of a weight are consistent.
    product: matrix product that it computes with a weight at input 1.
    is_product: whether, with these attributes and weight shape, it computes only that product and a bias.
    bias_factor: attribute by which the bias is multiplied, "" if there is none.
    channels_second: whether its output is (images, channels, ...), so that a BatchNormalization after it can be folded into it.
    kernel: integer kernel that its int8 form is fused into, None if there is none.  float_results: whether that kernel can output
    floats.  refusal: (attributes, whether there is a bias, rank of the weight) -> why it cannot be fused (a sentence without its
    subject), "" if it can.
    fused: its names in ONNX Runtime after it has absorbed an activation.
    reads_blocks: whether it is fused into MatMulNBits if DequantizeLinear reads the codes of its weight directly.
    """

    name: str
    weights: tuple[int, ...]
    bias: int | None
    channel_axis: Callable[[Attributes, int, int], int]
    fits: Callable[[Attributes, Shape], bool]
    product: Callable[[Attributes, Shape], Product]
    is_product: Callable[[Attributes, Shape], bool] = lambda attributes, shape: True
    bias_factor: str = ""
    channels_second: bool = False
    kernel: str | None = None
    float_results: bool = True
    refusal: Callable[[Attributes, bool, int], str] = lambda attributes, has_bias, rank: ""
    fused: tuple[str, ...] = ()
    reads_blocks: Callable[[Attributes], bool] = lambda attributes: False

    def scales_bias(self, attributes: Attributes) -> bool:
        """Whether the bias is multiplied by a factor other than 1."""
        return self.bias_factor != "" and attributes.get(self.bias_factor, 1.0) != 1.0


def _kernel_fits(attributes: Attributes, shape: Shape) -> bool:
    """Whether the attributes of a Conv or ConvTranspose fit the shape of its weight."""
    kernel, group = tuple(shape[2:]), attributes.get("group", 1)
    steps = [attributes.get(name, (1,) * len(kernel)) for name in ("strides", "dilations")]
    pads = attributes.get("pads", (0,) * 2 * len(kernel))
    return (
        len(kernel) >= 1
        and group >= 1
        and shape[0] % group == 0
        and tuple(attributes.get("kernel_shape", kernel)) == kernel
        and all(len(values) == len(kernel) and min(values) >= 1 for values in steps)
        and len(pads) == 2 * len(kernel)
    )


def _has_plain_pads(attributes: Attributes, shape: Shape) -> bool:
    return attributes.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in attributes


def _rows_first(attributes: Attributes) -> bool:
    return bool(attributes.get("transB", 0))


def _gemm_axis(attributes: Attributes, operand: int, rank: int) -> int:
    if operand == 0:
        return 1 if attributes.get("transA", 0) else 0
    return 0 if _rows_first(attributes) else 1


def _is_plain_gemm(attributes: Attributes, shape: Shape) -> bool:
    return not attributes.get("transA", 0) and attributes.get("alpha", 1.0) == 1.0


def _gemm_refusal(attributes: Attributes, has_bias: bool, _: int) -> str:
    scaled = attributes.get("alpha", 1.0) != 1.0 or (has_bias and attributes.get("beta", 1.0) != 1.0)
    return "is read by a Gemm with alpha, beta or transA" if scaled or attributes.get("transA", 0) else ""


def _matmul_refusal(_: Attributes, __: bool, rank: int) -> str:
    why = "has more than two dimensions, for which ONNX Runtime's integer kernel takes no scale per channel"
    return why if rank != 2 else ""


CONV = Operator(
    name="Conv",
    weights=(1,),
    bias=2,
    channel_axis=lambda attributes, operand, rank: 0,
    fits=_kernel_fits,
    product=lambda attributes, shape: ConvProduct(shape, attributes),
    channels_second=True,
    kernel="QLinearConv",
    float_results=False,
    fused=("FusedConv",),
)
CONV_TRANSPOSE = Operator(
    name="ConvTranspose",
    weights=(1,),
    bias=2,
    channel_axis=lambda attributes, operand, rank: 1,
    fits=_kernel_fits,
    product=lambda attributes, shape: ConvTransposeProduct(shape, attributes),
    is_product=_has_plain_pads,
    channels_second=True,
)
GEMM = Operator(
    name="Gemm",
    weights=(1, 0),
    bias=2,
    channel_axis=_gemm_axis,
    fits=lambda attributes, shape: len(shape) == 2,
    product=lambda attributes, shape: DenseProduct(shape, attributes, _rows_first(attributes)),
    is_product=_is_plain_gemm,
    bias_factor="beta",
    kernel="QGemm",
    refusal=_gemm_refusal,
    fused=("FusedGemm",),
    reads_blocks=lambda attributes: not _rows_first(attributes),
)
MATMUL = Operator(
    name="MatMul",
    weights=(1, 0),
    bias=None,
    channel_axis=lambda attributes, operand, rank: rank - 1 if operand == 1 else rank - 2,
    fits=lambda attributes, shape: True,
    product=lambda attributes, shape: DenseProduct(shape, attributes),
    is_product=lambda attributes, shape: math.prod(shape[:-2]) == 1,
    kernel="QLinearMatMul",
    refusal=_matmul_refusal,
    fused=("FusedMatMul",),
    reads_blocks=lambda attributes: True,
)
OPERATORS: dict[str, Operator] = {row.name: row for row in (CONV, CONV_TRANSPOSE, GEMM, MATMUL)}
"""The operators whose weights are converted, by name."""

KERNELS: dict[str, IntegerKernel] = {
    row.name: row
    for row in (
        IntegerKernel("QLinearConv", "Conv", 3, (4, 5)),
        IntegerKernel("QLinearMatMul", "MatMul", 3, (4, 5)),
        IntegerKernel("QGemm", "Gemm", 3, (4, 5)),
        IntegerKernel("ConvInteger", "Conv", 1),
        IntegerKernel("MatMulInteger", "MatMul", 1),
        IntegerKernel("MatMulIntegerToFloat", "MatMul", 1),
        IntegerKernel("DynamicQuantizeMatMul", "MatMul", 1),
        IntegerKernel("MatMulNBits", "MatMul", 1),
    )
}
"""Integer kernels by name.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md"""

FLOAT_KERNELS = frozenset(name for row in OPERATORS.values() for name in (row.name, *row.fused))
"""The operators that read float weights in a graph that ONNX Runtime has optimized."""
