"""Decide what happens to each weight.  A plan is data; convert.py carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from requant_onnx.config import EdgeLayers, Granularity, QuantConfig, RangeMode, Space
from requant_onnx.graph.weights import LeftAlone, View, Weight
from requant_onnx.numerics.quantize import Grid

EDGE_BITS = 8


@dataclass(frozen=True)
class PlannedWeight:
    """A weight and the grid it goes on."""

    weight: Weight
    grid: Grid


@dataclass(frozen=True)
class Plan:
    """The decision on every weight of a model, in graph order."""

    planned: tuple[PlannedWeight, ...]
    left_alone: tuple[LeftAlone, ...]


def plan_conversion(view: View, config: QuantConfig) -> Plan:
    """Give each weight its grid; first and last layers by `config.edge_layers`."""
    planned, left = [], list(view.left_alone)
    for weight in view.weights:
        if weight.is_edge and config.edge_layers is EdgeLayers.FLOAT:
            left.append(LeftAlone(weight.name, weight.op, weight.shape, "is a first or last layer, kept in float as asked"))
        else:
            planned.append(PlannedWeight(weight, _grid(weight, config)))
    return Plan(tuple(planned), tuple(left))


def _grid(weight: Weight, config: QuantConfig) -> Grid:
    """Edge layers are never transformed (REQuant, arXiv 2510.04044)."""
    at_8_bits = weight.is_edge and config.edge_layers is EdgeLayers.EIGHT_BIT
    return Grid(
        bits=EDGE_BITS if at_8_bits else config.bits,
        exponent=1.0 if weight.is_edge else config.transform.exponent,
        axis=weight.channel_axis if config.granularity is Granularity.PER_CHANNEL else None,
        search=config.range_mode is RangeMode.SEARCH,
        objective_in_weights=config.objective is Space.WEIGHT,
        round_in_weights=config.rounding is Space.WEIGHT,
    )
