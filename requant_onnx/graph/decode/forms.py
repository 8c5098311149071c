"""The forms of weights: how codes are stored and decoded in the graph.

    qdq      codes or their integer levels -> DequantizeLinear     ONNX Runtime runs it at every inference
    folded   levels -> Mul with the scale                          ONNX Runtime folds it into a float weight at load
    int8     levels -> int8 -> DequantizeLinear                    levels folded at load, the rest fused into an integer kernel

Codes are packed to their true width (packing.py), or stored as INT8, UINT8 or UINT4 if that is their width and the target
runtime can read it.  Weights that differ only in the number of channels are decoded together and then split, because the nodes
of a decode can be larger than the codes of a weight.  https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx

from requant_onnx.choices import Form
from requant_onnx.graph.decode.nodes import Level, onnx_type, write_codes, write_levels, write_scale
from requant_onnx.graph.decode.packing import BYTE, PACKINGS
from requant_onnx.graph.decode.writer import Constants, Decode, DecodeWriter, Scales
from requant_onnx.numerics.kinds import GridKind, LevelDecode
from requant_onnx.numerics.quantize import QuantizedWeight

INT4_OPSET = 21  # first opset with UINT4, and with 16-bit DequantizeLinear
DEQUANTIZE_OPSET = 19  # the oldest opset whose DequantizeLinear all runtimes support
SPLIT_OPSET = 13  # first opset where Split reads its sizes
GROUP_ELEMENTS = 1 << 18  # largest group: in larger ones the nodes' size is negligible and memory at load matters


@dataclass(frozen=True)
class Target:
    """The runtime and opset that a file is written for.  opset: opset of the model.

    native4, signed, half, grouped: see RuntimeRow in config.py.
    """

    opset: int
    native4: bool = True
    signed: bool = False
    half: bool = True
    grouped: bool = True

    def stores_natively(self, bits: float) -> bool:
        """Whether codes of this width have a tensor type that DequantizeLinear reads."""
        return bits == BYTE or (bits == 4 and self.native4 and self.opset >= INT4_OPSET)


@dataclass(frozen=True)
class Coded:
    """A quantized weight that is to be written.  name: tensor to output.  emit: its ONNX type.

    looked_up: whether its readers look up entries, so that levels and scales are output and decoded after the readers (lookup.py).
    base: earlier stages, whose decoded sum the folded form adds.
    """

    name: str
    quantized: QuantizedWeight
    emit: int
    form: Form
    looked_up: bool = False
    base: tuple[QuantizedWeight, ...] = ()

    @property
    def stages(self) -> tuple[QuantizedWeight, ...]:
        """All stages, in the order of their addition."""
        return (*self.base, self.quantized)

    @property
    def payload(self) -> int:
        """The approximate bytes of codes, scales and zero points."""
        return sum(
            PACKINGS[q.table.bits].bytes_of(q.codes.size) + q.scale.size * (3 if q.has_half_scale else 5) for q in self.stages
        )


def reads_codes(form: Form, decode: LevelDecode) -> bool:
    """Whether DequantizeLinear reads the codes themselves: with its zero point, they are the levels of a uniform grid."""
    return FORMS[form].dequantizes_codes and decode is LevelDecode.IDENTITY


def required_opset(form: Form, bits: float, kind: GridKind, native4: bool) -> int:
    """The opset that the decode of such a weight needs.  native4: see Target."""
    if not FORMS[form].dequantizes:
        return SPLIT_OPSET
    native = Target(INT4_OPSET, native4).stores_natively(bits) and reads_codes(form, kind.decode)
    return INT4_OPSET if native and bits < BYTE else DEQUANTIZE_OPSET


def group_weights(weights: Iterable[Coded], target: Target) -> list[tuple[Coded, ...]]:
    """Weights to decode together: of the same grid, form and type, and of the same shape except for the number of channels."""
    groups: dict[object, list[Coded]] = {}
    rooms: dict[object, int] = {}
    for weight in weights:
        key: object = group_key(weight, target)
        rooms[key] = rooms.get(key, 0) + weight.quantized.codes.size
        if rooms[key] > GROUP_ELEMENTS and key in groups:
            groups[weight.name, key] = groups.pop(key)  # the group is full: rename it
            rooms[key] = weight.quantized.codes.size
        groups.setdefault(key, []).append(weight)
    return [tuple(group) for group in groups.values()]


def group_key(weight: Coded, target: Target) -> tuple[object, ...]:
    """The key shared by weights that can be decoded together.

    Weights with the same first stage have the same later ones, except for the types of scales, so every stage has the same groups.
    """
    q, *later = weight.stages
    if decodes_after_lookup(weight) or not target.grouped:
        return (weight.name,)
    if reads_codes(weight.form, q.table.decode) and target.stores_natively(q.table.bits):
        return (weight.name,)  # a single node reads the codes
    shape = q.codes.shape if q.axis is None else (*q.codes.shape[: q.axis], -1, *q.codes.shape[q.axis + 1 :])
    return (weight.form, weight.emit, q.table, shape, q.axis, q.has_half_scale, *(stage.table for stage in later))


def decodes_after_lookup(weight: Coded) -> bool:
    """Whether the readers of a weight read levels."""
    return weight.looked_up and FORMS[weight.form].decodes_lookups


def decode_of(group: Sequence[Coded], target: Target, constants: Constants) -> Decode:
    """The decode of one group of weights."""
    writer = DecodeWriter(constants)
    stages = [_stack(stage) for stage in zip(*(weight.stages for weight in group), strict=True)]
    FORMS[group[0].form].write(writer, group, stages, target)
    return writer.finish()


def bytes_of_each(group: Sequence[Coded], decode: Decode) -> dict[str, int]:
    """The size of a decode, shared among its weights in proportion to their payload."""
    edges = np.cumsum([0] + [weight.payload for weight in group]) / sum(weight.payload for weight in group)
    shares = np.diff(np.rint(edges * decode.bytes).astype(int))
    return {weight.name: int(share) for weight, share in zip(group, shares, strict=True)}


def wide_level_type(largest: int, target: Target) -> Level:
    """The narrowest integer type beyond int8 in which levels can be dequantized."""
    return np.int16 if largest <= 32767 and target.opset >= INT4_OPSET else np.int32


@dataclass(frozen=True)
class _Stack:
    """The weights of a group concatenated along the grid's axis; several per-tensor weights are stacked along a new first axis."""

    quantized: QuantizedWeight
    sizes: tuple[int, ...]
    added_axis: bool


def _stack(parts: Sequence[QuantizedWeight]) -> _Stack:
    first, axis = parts[0], parts[0].axis
    if len(parts) == 1:
        return _Stack(first, (1,), False)
    join = np.stack if axis is None else np.concatenate
    scale, zero_point, alpha = (join([getattr(q, name) for q in parts]) for name in ("scale", "zero_point", "alpha"))
    codes = np.stack([q.codes for q in parts]) if axis is None else np.concatenate([q.codes for q in parts], axis)
    stacked = QuantizedWeight(codes, scale, zero_point, alpha, axis or 0, first.table)
    return _Stack(stacked, tuple(q.scale.size for q in parts), axis is None)


def _write_folded(writer: DecodeWriter, group: Sequence[Coded], stages: Sequence[_Stack], target: Target) -> None:
    single, cast, weights = group[0].name if len(group) == 1 else None, group[0].emit != onnx.TensorProto.FLOAT, ""
    for k, stack in enumerate(stages, 1):
        q, output = stack.quantized.mirrored(), None if cast or k < len(stages) else single
        levels, dtype = write_levels(writer, q, np.float32, plain=target.signed)
        if dtype is not np.float32:
            levels = writer.node("Cast", levels, to=onnx.TensorProto.FLOAT)
        scale = write_scale(writer, q, q.broadcast(q.scale), target.half)
        if k == 1:
            weights = writer.node("Mul", levels, scale, output=output)
        else:
            weights = writer.node("Add", weights, writer.node("Mul", levels, scale), output=output)
    if cast:
        weights = writer.node("Cast", weights, output=single, to=group[0].emit)
    _write_split(writer, weights, stages[0], [weight.name for weight in group])


def _write_qdq(writer: DecodeWriter, group: Sequence[Coded], stages: Sequence[_Stack], target: Target) -> None:
    """DequantizeLinear of the codes of a uniform grid, else of the integer levels, whose zero point is 0."""
    (stack,) = stages
    q = stack.quantized
    if group[0].looked_up:
        _write_lookup(writer, group[0], target)
        return
    if reads_codes(Form.QDQ, q.table.decode):
        bits = q.table.bits if target.stores_natively(q.table.bits) else BYTE
        middle = q.table.symmetric_zero_point if target.signed else 0
        if bits == q.table.bits:
            codes = writer.own_codes("q", q.codes, bits, middle)
        else:
            codes = write_codes(writer, q.codes, q.table.bits, middle)
        for weight, piece in zip(group, _write_split(writer, codes, stack), strict=True):
            zero_point = writer.own_codes("z", weight.quantized.zero_point, bits, middle)
            _write_dequantize(writer, weight, piece, writer.own("s", weight.quantized.scale), zero_point)
        return
    levels, dtype = write_levels(writer, q, wide_level_type(_largest_level(q), target), plain=target.signed)
    for weight, piece in zip(group, _write_split(writer, levels, stack), strict=True):
        zeros = writer.shared(np.zeros(weight.quantized.scale.shape, dtype))
        _write_dequantize(writer, weight, piece, writer.own("s", weight.quantized.scale), zeros)


def _write_lookup(writer: DecodeWriter, weight: Coded, target: Target) -> None:
    """The levels, under the weight's name and in the narrowest type, and the scales."""
    q = weight.quantized
    levels, dtype = write_levels(writer, q, wide_level_type(_largest_level(q), target), plain=target.signed)
    writer.node("Cast", levels, output=weight.name, to=onnx_type(dtype))
    scale = write_scale(writer, q, q.broadcast(q.scale), target.half)
    writer.scales[weight.name] = Scales(scale, q.axis is not None, weight.emit)


def _write_int8(writer: DecodeWriter, group: Sequence[Coded], stages: Sequence[_Stack], target: Target) -> None:
    """int8 levels before DequantizeLinear with zero point 0, as integer kernels require."""
    (stack,) = stages
    q = stack.quantized
    levels, _ = write_levels(writer, q, np.int8, plain=target.signed)
    scales = writer.split(write_scale(writer, q, q.scale, target.half), stack.sizes, 0, [None] * len(group))
    for weight, piece, scale in zip(group, _write_split(writer, levels, stack), scales, strict=True):
        # not shared: with session.x64quantprecision, ONNX Runtime replaces each, and fails on a shared one the second time
        zeros = writer.own("z", np.zeros(weight.quantized.scale.shape, np.int8))
        scalar = writer.node("Reshape", scale, writer.shared(np.zeros(0, np.int64))) if stack.added_axis else scale
        _write_dequantize(writer, weight, piece, scalar, zeros)


def _write_dequantize(writer: DecodeWriter, weight: Coded, *inputs: str) -> None:
    axis = {} if weight.quantized.axis is None else {"axis": weight.quantized.axis}
    cast = weight.emit != onnx.TensorProto.FLOAT
    result = writer.node("DequantizeLinear", *inputs, output=None if cast else weight.name, **axis)
    if cast:
        writer.node("Cast", result, output=weight.name, to=weight.emit)


def _write_split(writer: DecodeWriter, tensor: str, stack: _Stack, outputs: Sequence[str] | None = None) -> list[str]:
    """Split the stack into weights of their original shapes."""
    q = stack.quantized
    names: Sequence[str | None] = outputs or [None] * len(stack.sizes)
    if not stack.added_axis:
        return writer.split(tensor, stack.sizes, q.axis or 0, names)
    shape = writer.shared(np.array(q.codes.shape[1:], np.int64))
    pieces = writer.split(tensor, stack.sizes, 0, [None] * len(stack.sizes))
    return [writer.node("Reshape", piece, shape, output=name) for piece, name in zip(pieces, names, strict=True)]


def _largest_level(q: QuantizedWeight) -> int:
    return int(q.table.reach(q.zero_point.astype(np.int64)).max())


class Fate(Enum):
    """The treatment of a weight by ONNX Runtime: it stays a stored float, is decoded to a float at load or in every run, or an
    integer kernel reads its codes."""

    FLOAT = "float"
    FOLDED = "folded at load"
    EVERY_RUN = "decoded every run"
    FUSED = "fused"


@dataclass(frozen=True)
class FormRow:
    """The properties of a form.

    write: appends the decode of a group.  promise: how ONNX Runtime must treat its weights; None for no requirement.
    dequantizes: a DequantizeLinear is the last node.  dequantizes_codes: it reads codes, not levels.
    any_grid: non-uniform grids cost nothing at inference.
    half_scales, half_vectors: scales, and by default biases and other vectors, may be stored as float16.
    transposes_gemm: weights of Gemm are stored as (ic, oc).
    decodes_lookups: entries of a table are looked up as levels and decoded afterwards.
    on_integers: activations are quantized too, for integer kernels: a conversion needs calibration inputs, levels are limited, and
    biases are multiples of channel scales.  fallback: the form of weights that no such kernel reads.
    session_options: session options that run it best, (key, value).  hint: a sentence for users, "" for none.
    """

    write: Callable[[DecodeWriter, Sequence[Coded], Sequence[_Stack], Target], None]
    promise: Fate | None
    dequantizes: bool = True
    dequantizes_codes: bool = False
    any_grid: bool = True
    half_scales: bool = True
    half_vectors: bool = False
    transposes_gemm: bool = False
    decodes_lookups: bool = False
    on_integers: bool = False
    fallback: Form | None = None
    session_options: tuple[tuple[str, str], ...] = ()
    hint: str = ""


FORMS: dict[Form, FormRow] = {
    Form.QDQ: FormRow(
        write=_write_qdq,
        promise=None,
        dequantizes_codes=True,
        any_grid=False,
        half_scales=False,
        transposes_gemm=True,
        decodes_lookups=True,
        session_options=(("session.disable_quant_qdq", "1"),),
        hint="ONNX Runtime decodes these weights at every inference; --form folded decodes them once, at load, for float speed",
    ),
    Form.FOLDED: FormRow(write=_write_folded, promise=Fate.FOLDED, dequantizes=False, half_vectors=True),
    Form.INT8: FormRow(write=_write_int8, promise=Fate.FUSED, half_vectors=True, on_integers=True, fallback=Form.FOLDED),
}
"""The behavior of each form."""
