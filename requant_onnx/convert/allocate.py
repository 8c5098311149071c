"""Choose bits, transform and granularity of each weight, to minimize the output error for a given size.

The output errors caused by different weights nearly add up, and each is roughly a power of the squared error of its weight:

    output_error(grid) = output_error(reference grid) * (error(grid) / error(reference grid))**slope

The error of a weight is computed for every grid.  The output error is measured on the reference grid and on the grids of fewest
bits, which determine the slope; for errors smaller than that of the reference grid, the slope is 1.

The size of a weight is that of its decode in the file; bytes that several weights share are divided among them.  Each choice is a
multiple-choice knapsack problem, which is solved again with the new shares until the choice no longer changes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from requant_onnx.choices import Refinement
from requant_onnx.convert.layerwise import probe_layers
from requant_onnx.convert.nearest import workers
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.graph.decode.forms import Coded, Target, decode_of, group_key
from requant_onnx.graph.decode.writer import Constants
from requant_onnx.graph.names import FreshNames
from requant_onnx.numerics.arrays import Float32Array, Float64Array
from requant_onnx.numerics.kinds import GridKind
from requant_onnx.numerics.knapsack import Front, pareto_front
from requant_onnx.numerics.quantize import Grid, quantize_weight
from requant_onnx.progress import Progress
from requant_onnx.runtime.sensitivity import output_errors
from requant_onnx.runtime.stream import Chunk

BLIND_POWER = 2  # exponent of relative errors without calibration, so that no error is far above the others (README.md, "Bits ...")
ROUNDS = 12  # largest number of choices with new shares
MAX_POINTS = 4_000  # points of the Pareto front
Picks = tuple[int, ...]  # index of the offer chosen for each weight


@dataclass(frozen=True)
class Offer:
    """A candidate grid for one weight.

    error: squared error of the weight, weighted by importance.  output_error: resulting output error, relative to output power.
    exclusive: bytes of its decode that it does not share.  shared: bytes stored once for all weights with the same key.
    tables: bytes of constants and nodes that decodes of any key may share, by what they compute.
    """

    grid: Grid
    error: float
    output_error: float
    exclusive: int
    shared: int
    key: Hashable
    tables: Mapping[Hashable, int] = field(default_factory=dict)

    def shares(self) -> dict[Hashable, int]:
        """The bytes that it shares with other weights, by key."""
        return {self.key: self.shared, **self.tables}

    def price(self, members: Mapping[Hashable, int]) -> int:
        """The bytes, including its part of shared bytes.  members: number of weights that share each key."""
        return self.exclusive + round(sum(size / max(1, members[key]) for key, size in self.shares().items()))


@dataclass(frozen=True)
class Market:
    """The candidate grids of all weights.  planned: weights.  offers: candidates for each weight, in the same order."""

    planned: tuple[PlannedWeight, ...]
    offers: tuple[tuple[Offer, ...], ...]

    def output_error(self, picks: Picks) -> float:
        """The output error relative to output power, estimated as a sum over the weights."""
        return math.fsum(offers[k].output_error for offers, k in zip(self.offers, picks, strict=True))

    def bytes(self, picks: Picks) -> int:
        """The approximate size of all decodes in the file, in bytes."""
        chosen = [offers[k] for offers, k in zip(self.offers, picks, strict=True)]
        shared: dict[Hashable, int] = {}
        for offer in chosen:
            for key, size in offer.shares().items():
                shared[key] = max(shared.get(key, 0), size)
        return sum(offer.exclusive for offer in chosen) + sum(shared.values())

    def chosen(self, picks: Picks) -> tuple[PlannedWeight, ...]:
        """The weights with the chosen grids."""
        return tuple(
            PlannedWeight(item.weight, offers[k].grid, item.form)
            for item, offers, k in zip(self.planned, self.offers, picks, strict=True)
        )

    def smallest(self) -> Picks:
        """The picks with approximately the fewest bytes."""
        return min(self._rounds(lambda _: 0), key=self.bytes)

    def least_error(self) -> Picks:
        """The picks with approximately the least output error."""
        return min(self._rounds(lambda front: len(front.sizes) - 1), key=self.output_error)

    def within(self, size: int) -> Picks | None:
        """The picks with the least output error among those found with at most `size` bytes; None if there are none."""
        rounds = self._rounds(lambda front: front.best_within(size))
        fitting = [picks for picks in rounds if self.bytes(picks) <= size]
        return min(fitting, key=self.output_error, default=None)

    def alike_within(self, size: int) -> list[Picks]:
        """The picks with the same bits for all weights and at most `size` bytes, by ascending output error.

        Either each weight has its best grid of these bits, or all weights have the same kind of grid.
        """
        widths = {offer.grid.bits for offers in self.offers for offer in offers}
        uniform = [*(tuple(_best_of(offers, bits) for offers in self.offers) for bits in sorted(widths)), *self._one_grid_picks()]
        return sorted((picks for picks in uniform if self.bytes(picks) <= size), key=self.output_error)

    def reaching(self, output_error: float) -> Picks | None:
        """The picks with the fewest bytes among those found with at most this output error; None if there are none."""
        rounds = self._rounds(lambda front: front.smallest_within(output_error))
        fitting = [picks for picks in rounds if self.output_error(picks) <= output_error * (1 + 1e-9)]
        return min(fitting, key=self.bytes, default=None)

    def front(self, picks: Picks, count: int) -> list[Picks]:
        """At most `count` points of the Pareto front of bytes and output error, by ascending bytes, shared as for `picks`."""
        front = self._front(self._members(picks))
        marks = np.linspace(front.sizes[0], front.sizes[-1], count)
        points = dict.fromkeys(int(k) for k in np.searchsorted(front.sizes, marks, side="right") - 1)
        return [self._picks(front, point) for point in points]

    def _rounds(self, choose: Callable[[Front], int | None]) -> list[Picks]:
        """The picks with one grid for all weights, which share the most bytes, and those of every round until they repeat.

        choose: index of a point of the front; None means the smallest.
        """
        every = {key for offers in self.offers for offer in offers for key in offer.shares()}
        members = Counter(dict.fromkeys(every, len(self.offers)))  # as if every key were shared by all weights
        rounds = self._one_grid_picks()
        for _ in range(ROUNDS):
            front = self._front(members)
            point = choose(front)
            picks = self._picks(front, 0 if point is None else point)
            if picks in rounds:
                break
            rounds.append(picks)
            members = self._members(picks)
        return rounds

    def _one_grid_picks(self) -> list[Picks]:
        """For every grid, the picks with the most similar offer for each weight."""
        kinds = dict.fromkeys((o.grid.bits, o.grid.kind, o.grid.axis is None) for offers in self.offers for o in offers)
        return [tuple(_nearest(offers, *kind) for offers in self.offers) for kind in kinds]

    def _members(self, picks: Picks) -> Counter[Hashable]:
        return Counter(key for offers, k in zip(self.offers, picks, strict=True) for key in offers[k].shares())

    def _front(self, members: Mapping[Hashable, int]) -> Front:
        sizes = [np.array([offer.price(members) for offer in offers], np.int64) for offers in self.offers]
        errors = [np.array([o.output_error for o in offers]) for offers in self.offers]
        return pareto_front(sizes, errors, MAX_POINTS)

    @staticmethod
    def _picks(front: Front, point: int) -> Picks:
        return tuple(front.choices_at(point))


def _best_of(offers: Sequence[Offer], bits: float) -> int:
    """The index of the offer with the least output error among those nearest in bits."""
    return min(range(len(offers)), key=lambda k: (abs(offers[k].grid.bits - bits), offers[k].output_error))


def _nearest(offers: Sequence[Offer], bits: float, kind: GridKind, whole: bool) -> int:
    """The index of the most similar offer: by bits, then kind, then granularity.  whole: whether the scale is per-tensor."""

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
    """Measure the bytes and the output error of every candidate grid.

    chunks: calibration inputs.  Without any, the output error is the square of the weight's relative squared error, and the kind of
    grid is not chosen, because weights alone do not show which kind is better (README.md, "Defaults").
    min_scales: least scales by weight, (oc,) or (1,).  refinement: refinement that the conversion will use.
    """
    grids = {item.weight.name: _probed(item) for item in planned}
    importances, measured_errors = (
        sensitivities(model, planned, grids, min_scales, chunks, refinement, progress) if chunks else ({}, {})
    )

    def price(item: PlannedWeight) -> tuple[Offer, ...]:
        w, name = item.weight.load(), item.weight.name
        every = [grid for grid in (item.grid, *item.others) if chunks or grid.kind == item.grid.kind]
        offers = [_offer(model, item, grid, w, importances.get(name), min_scales.get(name), target) for grid in every]
        errors = {offer.grid: offer.error for offer in offers}
        measured = measured_errors.get(name, ())
        known = [(errors[grid], error) for grid, error in zip(grids[name], measured, strict=bool(measured_errors))]
        power = float(np.square(w, dtype=np.float64).sum())
        blind = [(offer.error / power) ** BLIND_POWER if power else 0.0 for offer in offers]
        return tuple(
            replace(offer, output_error=_error_at(offer.error, known) if known else guess)
            for offer, guess in zip(offers, blind, strict=True)
        )

    offers = []
    with ThreadPoolExecutor(workers(threads)) as executor:
        for done, priced in enumerate(executor.map(price, planned), 1):
            offers.append(priced)
            if progress is not None:
                progress("comparing bits", done, len(planned))
    return Market(planned, tuple(offers))


def _probed(item: PlannedWeight) -> tuple[Grid, ...]:
    """The grids on which output errors are measured: the first, and those of fewest whole bits and fewest bits of the same kind."""
    fewer = [g for g in item.others if g.bits < item.grid.bits and (g.kind, g.axis) == (item.grid.kind, item.grid.axis)]
    whole = min((g for g in fewer if g.bits % 1 == 0), key=lambda g: g.bits, default=None)
    least = min(fewer, key=lambda g: g.bits, default=None)
    return tuple(dict.fromkeys(g for g in (item.grid, whole, least) if g is not None))


def _error_at(error: float, known: Sequence[tuple[float, float]]) -> float:
    """The output error: proportional to the error of the weight up to the first known point, and a power law after it.

    known: (error of the weight, output error), by ascending error.
    """
    fine, low = known[0]
    if error <= fine or min(fine, low) <= 0.0:
        return low * error / fine if fine > 0.0 else 0.0
    for (fine, low), (coarse, high) in itertools.pairwise(known):
        if coarse > fine and (error <= coarse or coarse == known[-1][0]):
            slope = max(0.0, math.log(max(high, low) / low) / math.log(coarse / fine))
            return float(low * (error / fine) ** slope)
    return low * error / fine


def sensitivities(
    model: onnx.ModelProto,
    planned: tuple[PlannedWeight, ...],
    grids: Mapping[str, Sequence[Grid]],
    min_scales: Mapping[str, Float64Array],
    chunks: Sequence[Chunk],
    refinement: Refinement,
    progress: Progress | None,
) -> tuple[dict[str, Float32Array], dict[str, tuple[float, ...]]]:
    """The importance of each element's squared error, and the output error, relative to output power, of each grid, both by weight.

    Importances have the shape of the weight; weights that `probe_layers` does not yield have none.  Output errors are measured with
    all other weights in float.
    """
    importances = {}
    cases: dict[str, list[dict[str, Float32Array]]] = {}
    for done, probe in enumerate(probe_layers(model, planned, grids, chunks, refinement, min_scales), 1):
        name = probe.layer.weight
        importances[name] = probe.importance
        cases[name] = [{name: q.dequantize(), **({} if bias is None else {probe.layer.bias: bias})} for q, bias in probe.trials]
        if progress is not None:
            progress("measuring sensitivity", done, len(planned))
    for item in planned:
        name = item.weight.name
        if name not in cases:
            w = item.weight.load()
            cases[name] = [{name: quantize_weight(w, grid, min_scales.get(name)).dequantize()} for grid in grids[name]]
    every = [case for trials in cases.values() for case in trials]
    errors = output_errors(model, every, {name for case in every for name in case}, chunks)
    return importances, {name: tuple(itertools.islice(errors, len(trials))) for name, trials in cases.items()}


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
    shared = max(0, alone.bytes - coded.payload)
    tables: dict[Hashable, int] = dict(alone.shared_sizes().items())
    return Offer(grid, error, 0.0, alone.bytes - shared, shared, group_key(coded, target), tables)
