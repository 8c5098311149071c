"""The plan of a conversion: the grid and the form of each weight.  A plan is only data; steps.py carries it out."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from requant_onnx.choices import AUTO_BITS, EXPONENTS, LEVELS, MAX_BITS, EdgeLayers, Form, Granularity, Int8Levels, RangeMode, Space
from requant_onnx.config import Budget, QuantConfig
from requant_onnx.graph.decode.forms import FORMS, required_opset
from requant_onnx.graph.weights import SkippedWeight, View, Weight
from requant_onnx.numerics.arrays import Float32Array
from requant_onnx.numerics.kinds import UNIFORM, GridKind, PowerGrid
from requant_onnx.numerics.quantize import Grid, QuantizedWeight, decoded_sum
from requant_onnx.runtimes import RUNTIMES

EDGE_BITS = 8  # bits of first and last layers, and of tables
REFERENCE_BITS = 4  # bits of the reference grid within a budget
SHORT_CHANNEL = 600  # elements; in longer channels, scales take less than 2 % of the size of the codes
DOMINANT_SHARE, FEWEST_WEIGHTS = 1 / 2, 4  # share of all elements that is most of them, in a model of at least so many weights
LARGE, LARGE_SHARE = 1 << 16, 1 / 20  # elements of a large weight, and its share of all above which 8 bits cost more than they gain
TERNARY = 3  # number of levels for which all kinds of grids are the same
BALANCED = (3, 5)  # numbers of levels that are always symmetric, because zero points gain nothing
SAFE_BITS = 7  # enough for levels up to 64; an eighth bit would be unused


@dataclass(frozen=True)
class PlannedWeight:
    """A weight, its grid, and the form in which it is stored.

    others: grids that may be chosen instead: of other kinds, which calibration inputs compare, and, within a budget, of other bits
    and granularity.
    base: earlier stages of a progressive file; the grid quantizes the residual.  given: codes that are fixed already.
    """

    weight: Weight
    grid: Grid
    form: Form
    others: tuple[Grid, ...] = ()
    base: tuple[QuantizedWeight, ...] = ()
    given: QuantizedWeight | None = None

    def offset(self) -> Float32Array | None:
        """The decoded sum of the earlier stages, in the shape of the weight; None where there are none."""
        return decoded_sum(self.base) if self.base else None

    def decoded(self, quantized: QuantizedWeight) -> Float32Array:
        """The weight that a file decodes from the earlier stages and these codes."""
        return decoded_sum((*self.base, quantized))


@dataclass(frozen=True)
class Plan:
    """The plan for every weight of a model, in graph order.  skipped: weights that stay in float, and why."""

    planned: tuple[PlannedWeight, ...]
    skipped: tuple[SkippedWeight, ...]


def plan_conversion(view: View, config: QuantConfig, integers: Collection[str] = ()) -> Plan:
    """Choose the grid and form of each weight; in first and last layers, by `config.edge_layers`.

    A first or last layer with a large share of all elements is quantized like any other layer.  The classifier of a MobileNetV2
    has 37 % of them: 8 bits instead of 4 would make the file a third larger, and the outputs 0.1 dB better.

    integers: weights that integer kernels read, in the int8 form.
    """
    planned, left = [], list(view.skipped)
    total = sum(math.prod(weight.shape) for weight in view.weights)
    for weight in view.weights:
        reason = kept_in_float(weight, config)
        if reason is not None:
            left.append(SkippedWeight(weight.name, weight.op, weight.shape, reason, weight.stored_bytes))
        else:
            own = config.of_layer(weight.names, weight.op)
            is_edge = weight.is_edge and not _is_dominant(weight, total, len(view.weights))
            planned.append(_planned(weight, own, is_edge, weight.name in integers))
    return Plan(tuple(planned), tuple(left))


def _is_dominant(weight: Weight, total: int, count: int) -> bool:
    """Whether a weight has a large share of all elements.  total: number of elements of all weights.  count: number of weights."""
    size = math.prod(weight.shape)
    return count >= FEWEST_WEIGHTS and size > total * (LARGE_SHARE if size >= LARGE else DOMINANT_SHARE)


def opset_for(config: QuantConfig) -> int:
    """The smallest opset that supports the decodes of a conversion with these settings."""
    both, native4 = (False, True), RUNTIMES[config.runtime].native4
    forms = {config.form, *(rule.form for rule in config.rules if rule.form is not None)}
    widths = {bits for edge in both for form in forms for bits in _widths(config, edge, form)}
    widths |= {rule.bits for rule in config.rules if rule.bits is not None}
    kinds = {kind for edge in both for bits in widths for kind in _kinds(config, bits, edge)}
    kinds |= {PowerGrid(rule.transform.exponent) for rule in config.rules if rule.transform and rule.transform.exponent}
    return max(required_opset(form, bits, kind, native4) for form in forms for bits in widths for kind in kinds)


def kept_in_float(weight: Weight, config: QuantConfig) -> str | None:
    """Why the settings keep this weight in float (a sentence without its subject); None if they do not."""
    rule = config.kept_in_float(weight.names, weight.op)
    if rule is not None:
        return f"is kept in float by the rule '{rule.pattern}'"
    if weight.is_edge and config.edge_layers is EdgeLayers.FLOAT:
        return "is in a first or last layer, which --edge-layers keeps in float"
    return None


def _planned(weight: Weight, config: QuantConfig, is_edge: bool, integer: bool) -> PlannedWeight:
    form, row = _form(config, integer), RUNTIMES[config.runtime]
    grids = [
        Grid(
            bits=bits,
            kind=kind,
            axis=weight.channel_axis if granularity is Granularity.PER_CHANNEL else None,
            search=config.range_mode is RangeMode.SEARCH,
            objective_in_weights=config.objective is Space.WEIGHT,
            round_in_weights=config.rounding is Space.WEIGHT,
            limit=_limit(config) if FORMS[form].on_integers else None,
            half_scales=row.half and (FORMS[form].half_scales or weight.lookup_axis is not None),
            symmetric=config.is_symmetric
            or LEVELS[bits] in BALANCED
            or (bits == MAX_BITS and row.signed and not FORMS[form].dequantizes),
        )
        for bits in ([EDGE_BITS] if weight.is_table or not _has_pairs(weight, config) else _widths(config, is_edge, form))
        for granularity in _granularities(weight, config)
        for kind in _kinds(config, bits, is_edge)
    ]
    return PlannedWeight(weight, grids[0], form, tuple(grids[1:]))


def _form(config: QuantConfig, integer: bool) -> Form:
    """The form of a weight.  integer: whether an integer kernel reads it."""
    fallback = FORMS[config.form].fallback
    if integer or fallback is None:
        return config.form
    return fallback if fallback in RUNTIMES[config.runtime].forms else RUNTIMES[config.runtime].forms[0]


def _limit(config: QuantConfig) -> int:
    """The largest level of the int8 form; `int8_levels` is for the kernels of ONNX Runtime, and other runtimes get 127."""
    return int((config.int8_levels if RUNTIMES[config.runtime].checked else Int8Levels.FULL).value)


def _has_pairs(weight: Weight, config: QuantConfig) -> bool:
    """Whether 4-bit codes can be stored: TensorRT's parser needs an even number of them in each row."""
    return RUNTIMES[config.runtime].checked or weight.shape[-1] % 2 == 0


def _widths(config: QuantConfig, is_edge: bool, form: Form) -> list[float]:
    """The candidate widths in bits; within a budget, REFERENCE_BITS come first."""
    asked: list[float]
    if is_edge and config.edge_layers is EdgeLayers.EIGHT_BIT:
        asked = [EDGE_BITS]
    elif isinstance(config.bits, Budget):
        asked = [REFERENCE_BITS, *(bits for bits in RUNTIMES[config.runtime].bits if bits != REFERENCE_BITS)]
    else:
        asked = [config.bits]
    safe = FORMS[form].on_integers and _limit(config) == int(Int8Levels.SAFE.value)
    return list(dict.fromkeys(min(bits, SAFE_BITS) for bits in asked)) if safe else asked


def _granularities(weight: Weight, config: QuantConfig) -> list[Granularity]:
    """The candidates; within a budget, short channels may share a scale (not in int8, whose biases have steps per channel)."""
    per_channel = config.granularity is Granularity.PER_CHANNEL
    if weight.channel_axis is None:
        return [Granularity.PER_TENSOR]
    channels = weight.shape[weight.channel_axis]
    short = math.prod(weight.shape) < SHORT_CHANNEL * channels
    if per_channel and isinstance(config.bits, Budget) and not FORMS[config.form].on_integers and short:
        return [Granularity.PER_CHANNEL, Granularity.PER_TENSOR]
    return [config.granularity]


def _kinds(config: QuantConfig, bits: float, is_edge: bool) -> list[GridKind]:
    """The candidate kinds, uniform first if the transform is automatic.  Edge layers are never transformed (arXiv 2510.04044)."""
    if is_edge:
        return [UNIFORM]
    if config.transform.exponent is not None:
        return [PowerGrid(config.transform.exponent)]
    differ = bits <= AUTO_BITS and LEVELS[bits] != TERNARY
    return [PowerGrid(exponent) for exponent in EXPONENTS] if FORMS[config.form].any_grid and differ else [UNIFORM]
