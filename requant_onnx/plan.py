"""Decide what happens to each weight.  A plan is data; convert.py carries it out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from requant_onnx.config import AUTO_BITS, EXPONENTS, EdgeLayers, Form, Granularity, Int8Levels, QuantConfig, RangeMode, Space
from requant_onnx.graph.forms import required_opset
from requant_onnx.graph.weights import LeftAlone, View, Weight
from requant_onnx.numerics.quantize import Grid

EDGE_BITS = 8
SAFE_BITS = 7  # levels of 64 at most: an eighth bit of code would be empty


@dataclass(frozen=True)
class PlannedWeight:
    """A weight, the grid it goes on, and how it is stored.

    others: grids to take instead where calibration inputs say that they are better.
    """

    weight: Weight
    grid: Grid
    form: Form
    others: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The decision on every weight of a model, in graph order."""

    planned: tuple[PlannedWeight, ...]
    left_alone: tuple[LeftAlone, ...]


def plan_conversion(view: View, config: QuantConfig, integers: Collection[str] = ()) -> Plan:
    """Give each weight its grid and form; first and last layers by `config.edge_layers`.

    integers: the weights that an integer kernel multiplies with, in the int8 form.
    """
    planned, left = [], list(view.left_alone)
    for weight in view.weights:
        if kept_in_float(weight, config):
            left.append(LeftAlone(weight.name, weight.op, weight.shape, "is a first or last layer, kept in float as asked"))
        else:
            planned.append(_planned(weight, config, weight.name in integers))
    return Plan(tuple(planned), tuple(left))


def opset_for(config: QuantConfig, narrow: bool) -> int:
    """The opset that the decodes of such a conversion need.  narrow: see graph.forms.Target."""
    inner, edge = _bits(config, False), _bits(config, True)
    exponents = [1.0, *_others(config, config.form, inner)] if config.transform.exponent is None else [config.transform.exponent]
    needed = [required_opset(config.form, inner, exponent, narrow) for exponent in exponents]
    return max(*needed, required_opset(config.form, edge, 1.0, narrow))


def kept_in_float(weight: Weight, config: QuantConfig) -> bool:
    """Whether the settings exempt this weight."""
    return weight.is_edge and config.edge_layers is EdgeLayers.FLOAT


def _planned(weight: Weight, config: QuantConfig, integer: bool) -> PlannedWeight:
    """Edge layers are never transformed (REQuant, arXiv 2510.04044)."""
    form = config.form if config.form is not Form.INT8 or integer else Form.FOLDED
    grid = Grid(
        bits=_bits(config, weight.is_edge),
        exponent=1.0 if weight.is_edge else config.transform.exponent or 1.0,
        axis=weight.channel_axis if config.granularity is Granularity.PER_CHANNEL else None,
        search=config.range_mode is RangeMode.SEARCH,
        objective_in_weights=config.objective is Space.WEIGHT,
        round_in_weights=config.rounding is Space.WEIGHT,
        limit=int(config.int8_levels.value) if form is Form.INT8 else None,
        half_scales=form is not Form.QDQ,
    )
    exponents = () if weight.is_edge else _others(config, form, grid.bits)
    return PlannedWeight(weight, grid, form, tuple(replace(grid, exponent=exponent) for exponent in exponents))


def _others(config: QuantConfig, form: Form, bits: int) -> tuple[float, ...]:
    """What the automatic transform may take instead of the exponent 1."""
    fixed = config.transform.exponent is not None or form is Form.QDQ or bits > AUTO_BITS
    return () if fixed else tuple(exponent for exponent in EXPONENTS if exponent != 1.0)


def _bits(config: QuantConfig, is_edge: bool) -> int:
    bits = EDGE_BITS if is_edge and config.edge_layers is EdgeLayers.EIGHT_BIT else config.bits
    safe = config.form is Form.INT8 and config.int8_levels is Int8Levels.SAFE
    return min(bits, SAFE_BITS) if safe else bits
