"""A diagram of the network from top to bottom, with a block per weight, which links to its details."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from requant_onnx.evaluate.weight_comparison import ComparedWeight
from requant_onnx.graph.flow import Block

WIDTH, HEIGHT, ACROSS, DOWN = 190, 34, 214, 50  # size of a block, and distances of their corners, in pixels
EDGE = 8  # margin of the diagram
LETTERS = 25  # largest length of a title
BEST_DB, WORST_DB = 50.0, 5.0  # output SQNR of the palest and of the strongest color


@dataclass(frozen=True)
class Box:
    """A block in the diagram.  x, y: its corner.  link: id of its weight.  error, bits: strength of its color, 0..100, or None."""

    x: int
    y: int
    title: str
    name: str
    note: str
    error: float | None
    bits: float | None
    link: str


@dataclass(frozen=True)
class Network:
    """The diagram.  lines: SVG path of each connection."""

    width: int
    height: int
    boxes: Sequence[Box]
    lines: Sequence[str]


def draw(flow: Sequence[Block], weights: Sequence[ComparedWeight]) -> Network:
    """Lay out the blocks: each is below all blocks it reads, near their middle."""
    places = _places(flow)
    corners = [(EDGE + lane * ACROSS, EDGE + rank * DOWN) for lane, rank in places]
    boxes = [_box(block, weights, *corner) for block, corner in zip(flow, corners, strict=True)]
    lines = [_line(corners[source], corners[k]) for k, block in enumerate(flow) for source in block.before]
    lanes, ranks = (max((place[k] for place in places), default=-1) + 1 for k in (0, 1))
    return Network(2 * EDGE + lanes * ACROSS, 2 * EDGE + ranks * DOWN, boxes, lines)


def _places(flow: Sequence[Block]) -> list[tuple[int, int]]:
    """The (lane, rank) of each block."""
    places: list[tuple[int, int]] = []
    taken: set[tuple[int, int]] = set()
    for block in flow:
        above = [places[k] for k in block.before]
        rank = max((place[1] + 1 for place in above), default=0)
        wanted = sum(place[0] for place in above) // len(above) if above else 0
        lane = next(lane for lane in sorted(range(len(flow) + 1), key=lambda k: (abs(k - wanted), k)) if (lane, rank) not in taken)
        taken.add((lane, rank))
        places.append((lane, rank))
    return places


def _line(source: tuple[int, int], target: tuple[int, int]) -> str:
    """A path from the middle of a block's lower edge to that of another's upper edge, around the blocks in between."""
    x1, y1, x2, y2 = source[0] + WIDTH // 2, source[1] + HEIGHT, target[0] + WIDTH // 2, target[1]
    if y2 - y1 <= DOWN - HEIGHT:
        return f"M{x1},{y1}L{x2},{y2}"
    side, half = max(source[0], target[0]) + WIDTH + 10, (DOWN - HEIGHT) // 2
    return (
        f"M{x1},{y1}C{x1},{y1 + half} {side},{y1} {side},{y1 + DOWN // 2}V{y2 - DOWN // 2}C{side},{y2} {x2},{y2 - half} {x2},{y2}"
    )


def _box(block: Block, weights: Sequence[ComparedWeight], x: int, y: int) -> Box:
    short = block.title if len(block.title) <= LETTERS else f"…{block.title[1 - LETTERS :]}"
    if block.reader is None:
        return Box(x, y, block.title, short, block.op if block.title != block.op else "", None, None, "")
    weight = weights[block.reader]
    bits = weight.bits if weight.outcome == "grid" else None
    parts = [block.op, "" if bits is None else f"{bits} bits", _sqnr(weight.output_sqnr_db)]
    note = ", ".join(part for part in parts if part)
    strength = None if bits is None else min(100, 100 * (9 - bits) / 7)
    return Box(x, y, block.title, short, note, _strength(weight.output_sqnr_db), strength, f"weight-{block.reader}")


def _sqnr(value: float) -> str:
    return "" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f} dB"


def _strength(value: float) -> float | None:
    if math.isnan(value):
        return None
    return round(100 * min(1.0, max(0.0, (BEST_DB - value) / (BEST_DB - WORST_DB))), 1)
