"""Which bits, transform and granularity each weight gets, so that the output error is least for the bytes they take.

Errors of different weights add up in the output, nearly, each about in proportion to the squared error of the weight.  So

    noise(grid) = noise(reference grid) * (error(grid) / error(reference grid))**slope

with the error of every grid exact, and the noise measured on the reference grid (slope 1 for smaller errors) and on that of fewest
bits, which gives the slope between.  Bytes are those of the decode in the file; what weights decoded together share is divided
among them, and the choice is made again with the new shares until it stays: a multiple-choice knapsack each time.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import onnx

from requant_onnx.config import Refinement
from requant_onnx.convert.layerwise import probe_layers
from requant_onnx.convert.nearest import workers
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.graph.decode.forms import Coded, Target, decode_of, group_key
from requant_onnx.graph.decode.nodes import Constants
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.arrays import Float32Array, Float64Array
from requant_onnx.numerics.kinds import GridKind
from requant_onnx.numerics.knapsack import Front, pareto_front
from requant_onnx.numerics.quantize import Grid, quantize_weight
from requant_onnx.progress import Progress
from requant_onnx.runtime.sensitivity import noise_of_each
from requant_onnx.runtime.stream import Chunk

BLIND_POWER = 2  # of errors relative to the weight, without calibration: none gets far above the others (README, "Bits ...")
ROUNDS = 12
MAX_POINTS = 4_000
CONSTANT_BYTES = 64  # below it, a constant that decodes share is one that all of them read
Picks = tuple[int, ...]


@dataclass(frozen=True)
class Offer:
    """One grid for one weight.

    error: weighted squared error; noise: what it does to the output.  own: bytes of its own; shared: of what is stored once for
    all weights with the same key.
    """

    grid: Grid
    error: float
    noise: float
    own: int
    shared: int
    key: Hashable


@dataclass(frozen=True)
class Market:
    """All offers for all weights."""

    planned: tuple[PlannedWeight, ...]
    offers: tuple[tuple[Offer, ...], ...]

    def noise(self, picks: Picks) -> float:
        """Of the output, over its power, by the additive model."""
        return math.fsum(own[k].noise for own, k in zip(self.offers, picks, strict=True))

    def bytes(self, picks: Picks) -> int:
        """Of all decodes in the file, about."""
        taken = [own[k] for own, k in zip(self.offers, picks, strict=True)]
        shared: dict[Hashable, int] = {}
        for offer in taken:
            shared[offer.key] = max(shared.get(offer.key, 0), offer.shared)
        return sum(offer.own for offer in taken) + sum(shared.values())

    def chosen(self, picks: Picks) -> tuple[PlannedWeight, ...]:
        """The weights with their grids."""
        return tuple(
            PlannedWeight(item.weight, own[k].grid, item.form)
            for item, own, k in zip(self.planned, self.offers, picks, strict=True)
        )

    def smallest(self) -> Picks:
        """The picks of least bytes, about."""
        return min(self._settled(lambda _: 0), key=self.bytes)

    def least_noise(self) -> Picks:
        """The picks of least noise."""
        return min(self._settled(lambda front: len(front.sizes) - 1), key=self.noise)

    def within(self, size: int) -> Picks | None:
        """The picks of least noise in at most `size` bytes; None where nothing is that small."""
        found = self._settled(lambda front: front.best_within(size))
        fitting = [picks for picks in found if self.bytes(picks) <= size]
        return min(fitting, key=self.noise, default=None)

    def alike_within(self, size: int) -> list[Picks]:
        """The picks of the same bits for all, each with the best of its grids, in at most `size` bytes; least noise first."""
        widths = {offer.grid.bits for own in self.offers for offer in own}
        found = (tuple(_best_of(own, bits) for own in self.offers) for bits in sorted(widths))
        return sorted((picks for picks in found if self.bytes(picks) <= size), key=self.noise)

    def reaching(self, noise: float) -> Picks | None:
        """The smallest picks with at most so much noise; None where nothing has so little."""
        found = self._settled(lambda front: front.smallest_within(noise))
        fitting = [picks for picks in found if self.noise(picks) <= noise * (1 + 1e-9)]
        return min(fitting, key=self.bytes, default=None)

    def front(self, picks: Picks, count: int) -> list[Picks]:
        """About `count` of the best compromises between bytes and noise, from the smallest on, with shares as for `picks`."""
        front = self._front(self._members(picks))
        marks = np.linspace(front.sizes[0], front.sizes[-1], count)
        points = dict.fromkeys(int(k) for k in np.searchsorted(front.sizes, marks, side="right") - 1)
        return [self._picks(front, point) for point in points]

    def _settled(self, choose: Callable[[Front], int | None]) -> list[Picks]:
        """The picks of every round, until they repeat, and those of one grid for all, which share the most."""
        members = Counter({offer.key: len(self.offers) for own in self.offers for offer in own})  # as if all were shared by all
        found = self._alike()
        for _ in range(ROUNDS):
            front = self._front(members)
            point = choose(front)
            picks = self._picks(front, 0 if point is None else point)
            if picks in found:
                break
            found.append(picks)
            members = self._members(picks)
        return found

    def _alike(self) -> list[Picks]:
        """For every grid the picks that take it wherever it is offered, else the nearest in bits."""
        kinds = dict.fromkeys((o.grid.bits, o.grid.kind, o.grid.axis is None) for own in self.offers for o in own)
        return [tuple(_nearest(own, *kind) for own in self.offers) for kind in kinds]

    def _members(self, picks: Picks) -> Counter[Hashable]:
        return Counter(own[k].key for own, k in zip(self.offers, picks, strict=True))

    def _front(self, members: Mapping[Hashable, int]) -> Front:
        sizes = [np.array([o.own + round(o.shared / max(1, members[o.key])) for o in own], np.int64) for own in self.offers]
        errors = [np.array([o.noise for o in own]) for own in self.offers]
        return pareto_front(sizes, errors, MAX_POINTS)

    @staticmethod
    def _picks(front: Front, point: int) -> Picks:
        return tuple(front.choices_at(point))


def _best_of(offers: Sequence[Offer], bits: int) -> int:
    """The offer of least noise of those nearest in bits."""
    return min(range(len(offers)), key=lambda k: (abs(offers[k].grid.bits - bits), offers[k].noise))


def _nearest(offers: Sequence[Offer], bits: int, kind: GridKind, whole: bool) -> int:
    """The offer most alike."""

    def distance(k: int) -> tuple[float, ...]:
        grid = offers[k].grid
        return abs(grid.bits - bits), grid.kind.distance(kind), float((grid.axis is None) != whole)

    return min(range(len(offers)), key=distance)


def open_market(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    min_scales: Mapping[str, Float64Array],
    target: Target,
    chunks: Sequence[Chunk],
    refinement: Refinement,
    progress: Progress | None,
    threads: int | None,
) -> Market:
    """Measure every offer.  chunks: of calibration inputs; without, errors of all weights count by the square of their relative
    size, and their transform is not a choice, for the weights alone do not tell which is better (README, "Defaults").

    min_scales: least scales, by weight.  refinement: what rounding will do later.
    """
    grids = {item.weight.name: _probed(item) for item in planned}
    importances, noise = _sensitivities(model, planned, grids, min_scales, chunks, refinement, progress) if chunks else ({}, {})

    def price(item: PlannedWeight) -> tuple[Offer, ...]:
        w, name = item.weight.load(), item.weight.name
        every = [grid for grid in (item.grid, *item.others) if chunks or grid.kind == item.grid.kind]
        offers = [_offer(model, item, grid, w, importances.get(name), min_scales.get(name), target) for grid in every]
        errors = {offer.grid: offer.error for offer in offers}
        known = [(errors[grid], found) for grid, found in zip(grids[name], noise.get(name, ()), strict=bool(noise))]
        rate = float(np.square(w, dtype=np.float64).sum())
        return tuple(
            replace(offer, noise=_noise_at(offer.error, known) if known else (offer.error / rate) ** BLIND_POWER if rate else 0.0)
            for offer in offers
        )

    offers = []
    with ThreadPoolExecutor(workers(threads)) as executor:
        for done, own in enumerate(executor.map(price, planned), 1):
            offers.append(own)
            if progress is not None:
                progress("comparing bits", done, len(planned))
    return Market(planned, tuple(offers))


def _probed(item: PlannedWeight) -> tuple[Grid, ...]:
    """The grids on which noise is measured: the first, and the same of fewest bits."""
    fewest = min((item.grid, *item.others), key=lambda grid: grid.bits).bits
    coarse = next((g for g in item.others if g == replace(item.grid, bits=fewest)), item.grid)
    return (item.grid, coarse) if coarse.bits < item.grid.bits else (item.grid,)


def _noise_at(error: float, known: Sequence[tuple[float, float]]) -> float:
    """Noise in proportion to the error, from the known point of next smaller error on by a power law to that of next larger."""
    (fine, low), (coarse, high) = known[0], known[-1]
    if error <= fine or min(fine, low) <= 0.0 or coarse <= fine:
        return low * error / fine if fine > 0.0 else 0.0
    slope = max(0.0, math.log(max(high, low) / low) / math.log(coarse / fine))
    return float(low * (error / fine) ** slope)


def _sensitivities(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    grids: Mapping[str, Sequence[Grid]],
    min_scales: Mapping[str, Float64Array],
    chunks: Sequence[Chunk],
    refinement: Refinement,
    progress: Progress | None,
) -> tuple[dict[str, Float32Array], dict[str, tuple[float, ...]]]:
    """What errors count, and the noise that each weight alone makes in the output on each of its grids; both by weight."""
    importances = {}
    cases: dict[str, list[dict[str, Float32Array]]] = {}
    for done, probe in enumerate(probe_layers(model, planned, grids, chunks, refinement, min_scales), 1):
        name = probe.layer.weight
        importances[name] = probe.importance
        cases[name] = [{name: q.dequantize(), **({} if bias is None else {probe.layer.bias: bias})} for q, bias in probe.found]
        if progress is not None:
            progress("measuring sensitivity", done, len(planned))
    for item in planned:
        name = item.weight.name
        if name not in cases:
            w = item.weight.load()
            cases[name] = [{name: quantize_weight(w, grid, min_scales.get(name)).dequantize()} for grid in grids[name]]
    every = [case for own in cases.values() for case in own]
    found = noise_of_each(model, every, {name for case in every for name in case}, chunks)
    return importances, {name: tuple(itertools.islice(found, len(own))) for name, own in cases.items()}


def _offer(
    model: onnx.ModelProto,
    item: PlannedWeight,
    grid: Grid,
    w: Float32Array,
    importance: Float32Array | None,
    min_scale: Float64Array | None,
    target: Target,
) -> Offer:
    q = quantize_weight(w, grid, min_scale, importance)
    difference = q.dequantize().astype(np.float64) - w
    error = float((difference**2 * (1.0 if importance is None else importance)).sum())
    coded = Coded(item.weight.name, q, item.weight.emit, item.form)
    alone = decode_of((coded,), target, Constants(FreshNames(model)))
    tables = sum(size for size in (tensor.ByteSize() for tensor in alone.shared.values()) if size > CONSTANT_BYTES)
    shared = max(0, alone.bytes - coded.payload)
    return Offer(grid, error, 0.0, alone.bytes - shared, shared + tables, group_key(coded, target))
