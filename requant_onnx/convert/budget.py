"""Conversions within a budget: the best file of a limited size, or the smallest file that reaches an output SQNR."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from requant_onnx.config import Budget
from requant_onnx.convert.allocate import BLIND_POWER, Market, Picks, open_market
from requant_onnx.convert.ladder import HELD_OUT
from requant_onnx.convert.nearest import Result, quantize_all
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.prepare import Prepared, copied
from requant_onnx.convert.report import FrontPoint, sqnr_db
from requant_onnx.convert.steps import convert
from requant_onnx.convert.write import Built, write
from requant_onnx.errors import ConfigError
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.quantize import Grid
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import output_error_against
from requant_onnx.runtime.stream import Chunk

IMAGES = 64  # calibration inputs on which sensitivities are measured
TRIES = 8  # largest number of steps of each search
FINE = 3  # bits from which fractional widths gain nothing: held-out errors of two models were the same or worse
CLOSE_BYTES = 32  # a file less than this many bytes below the limit is good enough
CLOSE_DB = 0.2  # an SQNR at most this far above the target is good enough
SLACK = 2_000  # bytes by which the size of decodes may be overestimated
FRONT_POINTS = 12  # points of the Pareto front in the report
OF_OUTPUT = "the table of sizes gives the output SQNR with nearest levels, estimated weight by weight; refinement improves it"
OF_WEIGHTS = "the table of sizes gives the SQNR of the weights, because without --calibrate the output is unknown"


def write_within(
    prepared: Prepared, budget: Budget, calibration: Calibration | None, progress: Progress | None, threads: int | None
) -> Built:
    """Choose grids within the budget, quantize and write.  The model is never larger than `budget.size` bytes.

    calibration: inputs on which output errors are measured; None to estimate them from the weights.
    Raises ConfigError if no choice of bits that was found meets the budget.
    """
    if not prepared.plan.planned:
        model, report = write(prepared, [], {})
        if budget.size is not None and model.ByteSize() > budget.size:
            text = f"no weight can be converted, so the file keeps {model.ByteSize():,} bytes, more than {budget.size:,}"
            raise ConfigError(f"{text}; give a larger size, or convert more weights")
        return model, report
    chunks: Sequence[Chunk] = ()
    if calibration is not None:
        chunks = calibration_chunks(prepared.model, replace(calibration, count=min(calibration.count, IMAGES)))
    min_scales = prepared.integers.min_scales
    refinement = prepared.config.refinement
    planned = _offered(prepared, budget.size, threads)
    market = open_market(prepared.model, planned, min_scales, prepared.target, chunks, refinement, progress, threads)
    search = _Search(prepared, market, progress, threads, {})
    held: Sequence[Chunk] = ()
    if calibration is not None:
        held = calibration_chunks(prepared.model, calibration)
        held = held[HELD_OUT - 1 :: HELD_OUT] or held
    if budget.size is not None:
        picks, (model, report) = search.small_enough(budget.size, held)
    else:
        assert budget.sqnr_db is not None
        picks, (model, report) = search.good_enough(budget.sqnr_db, held)
    rest = model.ByteSize() - market.bytes(picks)
    points = [
        FrontPoint(market.bytes(p) + rest, _decibels(_reported_error(market, p, chunks))) for p in market.front(picks, FRONT_POINTS)
    ]
    return model, replace(report, front=tuple(points), notes=(*report.notes, OF_OUTPUT if chunks else OF_WEIGHTS))


def _offered(prepared: Prepared, size: int | None, threads: int | None) -> tuple[PlannedWeight, ...]:
    """The weights and their candidate grids; without fractional widths if FINE bits for all weights fit the size."""
    planned = prepared.plan.planned
    if size is None:
        return planned
    fine = [min((item.grid, *item.others), key=lambda grid: abs(grid.bits - FINE)) for item in planned]
    alike = tuple(replace(item, grid=grid, others=()) for item, grid in zip(planned, fine, strict=True))
    results = list(quantize_all(alike, prepared.integers.min_scales, None, threads))
    if size < write(copied(prepared), results, {})[0].ByteSize():
        return planned
    return tuple(replace(item, others=tuple(grid for grid in item.others if grid.bits % 1 == 0)) for item in planned)


def _reported_error(market: Market, picks: Picks, chunks: Sequence[Chunk]) -> float:
    """The estimated error of picks for users: of the output, or, without calibration, a power mean over the weights."""
    error = market.output_error(picks)
    return error if chunks else (error / len(market.planned)) ** (1 / BLIND_POWER)


@dataclass(frozen=True)
class _Search:
    """The search for a file.  nearest: weights already rounded to nearest levels, by name and grid."""

    prepared: Prepared
    market: Market
    progress: Progress | None
    threads: int | None
    nearest: dict[tuple[str, Grid], Result]

    def small_enough(self, size: int, chunks: Sequence[Chunk]) -> tuple[Picks, Built]:
        """The file with the least output error in at most `size` bytes, and its picks.

        chunks: held-out inputs on which the choice of the additive model, which is an estimate, is compared with the best file with
        the same bits for all weights; without any, there is no comparison.
        """
        found = [self._small_enough(size)]
        if not chunks:
            return found[0]
        found += self._uniform_file(*found[0], size)
        error = output_error_against(self.prepared.model, chunks)
        return min(found, key=lambda each: error(each[1][0]))

    def _small_enough(self, size: int) -> tuple[Picks, Built]:
        """The file with the least output error by the additive model, and its picks.  Raises ConfigError if none is found."""
        limit = size
        for _ in range(TRIES):
            picks = self._fitting(limit)
            built = self._built(picks)
            excess = built[0].ByteSize() - size
            if excess <= 0:
                return picks, built
            limit -= excess
        raise ConfigError(f"no choice of bits was found for a file of {size:,} bytes; allow a slightly larger file")

    def _uniform_file(self, picks: Picks, built: Built, size: int) -> Iterator[tuple[Picks, Built]]:
        """The best other file of `alike_within` that has at most `size` bytes, if one is found."""
        room = self.market.bytes(picks) + size - built[0].ByteSize() + SLACK
        for alike in self.market.alike_within(room)[:TRIES]:
            other = self._built(alike)
            if other[0].ByteSize() <= size and alike != picks:
                yield alike, other
                return

    def good_enough(self, sqnr_db: float, chunks: Sequence[Chunk]) -> tuple[Picks, Built]:
        """The smallest file tried with this output SQNR in dB on `chunks`, and its picks.  Raises ConfigError if there is none."""
        error = output_error_against(self.prepared.model, chunks)
        best: tuple[Picks, Built] | None = None
        reached, reaches, misses = -math.inf, -math.inf, math.inf  # best SQNR; largest aim that met it, least that missed
        aim, seen = -sqnr_db, set()
        for _ in range(TRIES):
            picks = self.market.reaching(10 ** (aim / 10)) or self.market.least_error()
            if picks in seen:
                break
            seen.add(picks)
            built = self._built(picks)
            sqnr = _decibels(error(built[0]))
            reached = max(reached, sqnr)
            if sqnr >= sqnr_db:
                reaches = max(reaches, aim)
                if best is None or built[0].ByteSize() < best[1][0].ByteSize():
                    best = picks, built
                if sqnr <= sqnr_db + CLOSE_DB:
                    break
            else:
                misses = min(misses, aim)
            aim += sqnr - sqnr_db
            if not reaches < aim < misses:
                aim = (reaches + misses) / 2 if math.isfinite(reaches + misses) else aim
        if best is None:
            raise ConfigError(
                f"the best output SQNR found is {reached:.1f} dB, below the target of {sqnr_db:g} dB; lower the target, or "
                "see --form and --edge-layers"
            )
        return best

    def _fitting(self, size: int) -> Picks:
        """The picks with the least output error whose file, with nearest levels, has at most `size` bytes.

        Raises ConfigError if there are none.
        """
        smallest = self.market.smallest()
        least = self._size(smallest)
        if least > size:
            raise ConfigError(
                f"the smallest possible file has {least:,} bytes, more than {size:,}; allow a larger file, or see --edge-layers"
            )
        # bytes of decodes that are known to fit, and known not to fit
        best, low, high = smallest, self.market.bytes(smallest), sys.maxsize
        limit, seen = size - (least - low), set()
        for _ in range(TRIES):
            picks = self.market.within(limit)
            if picks is None:
                break
            excess = self._size(picks) - size
            if excess <= 0:
                best = min(best, picks, key=self.market.output_error)
                low = limit
            else:
                high = min(high, self.market.bytes(picks))
            limit = min(limit - excess, high - 1)
            if limit <= low:
                limit = (low + high) // 2
            if -excess in range(CLOSE_BYTES) or high - low <= 1 or (excess <= 0 and picks in seen):
                break
            seen.add(picks)
        return best

    def _built(self, picks: Picks) -> Built:
        return convert(copied(self.prepared), self.market.chosen(picks), self.progress, self.threads)

    def _size(self, picks: Picks) -> int:
        chosen = self.market.chosen(picks)
        missing = tuple(item for item in chosen if (item.weight.name, item.grid) not in self.nearest)
        for result in quantize_all(missing, self.prepared.integers.min_scales, None, self.threads):
            self.nearest[result.planned.weight.name, result.planned.grid] = result
        model, _ = write(copied(self.prepared), [self.nearest[item.weight.name, item.grid] for item in chosen], {})
        return int(model.ByteSize())


def _decibels(error: float) -> float:
    return sqnr_db(1.0, error)
