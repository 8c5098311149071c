"""Conversions for compressed downloads: sizes are compressed sizes, measured by compressing the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from requant_onnx.config import Budget
from requant_onnx.convert.ladder import HELD_OUT
from requant_onnx.convert.plan import PlannedWeight
from requant_onnx.convert.prepare import Prepared, copied
from requant_onnx.convert.rates import Rated, rate_weights, unit_for
from requant_onnx.convert.report import sqnr_db as decibels
from requant_onnx.convert.steps import convert
from requant_onnx.convert.write import Built
from requant_onnx.errors import ConfigError
from requant_onnx.files.compressed import compress
from requant_onnx.files.load import is_large
from requant_onnx.files.wire import pieces_of
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.progress import Progress
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sensitivity import output_error_against
from requant_onnx.runtime.stream import Chunk

IMAGES = 64  # calibration inputs on which sensitivities are measured
TRIES = 7  # largest number of files tried
CLOSE = 0.01  # fraction of the size; a file at most this far below it is good enough
CLOSE_DB, DB_A_BIT = 0.2, 5.0  # an SQNR at most this far above the target is good enough; approximate dB per bit of all weights
FIRST = 0.93  # share of a file that is assumed to be codes, for the first try
FEWEST = 0.01  # smallest average number of bits per weight


@dataclass(frozen=True)
class _Try:
    """A file tried.  bits: intended bits of all codes.  value: its compressed size in bytes, or its output SQNR in dB."""

    bits: float
    value: float
    built: Built


def write_for_download(
    prepared: Prepared, calibration: Calibration | None, progress: Progress | None, threads: int | None
) -> Built:
    """Choose a step for each weight, quantize and write; with a budget, repeat this until the compressed file meets it.

    Raises ConfigError if no file tried meets the budget, the model is above 2 GB, or a layer rule has no effect.
    """
    if is_large(prepared.model):
        raise ConfigError("a model above 2 GB cannot be compressed as a whole; drop --optimize-for")
    config, chunks = prepared.config, list[Chunk]()
    free = [item for item in prepared.plan.planned if _is_free(item, prepared)]
    _check_rules(prepared, free)
    if calibration is not None and free:
        chunks = list(calibration_chunks(prepared.model, replace(calibration, count=min(calibration.count, IMAGES))))
    search = _Search(prepared, rate_weights(prepared, free, chunks, progress), progress, threads)
    if not isinstance(config.bits, Budget):
        return search.built(config.bits * search.count)
    if config.bits.size is not None:
        return search.small_enough(config.bits.size)
    assert calibration is not None
    held = calibration_chunks(prepared.model, calibration)
    return search.good_enough(config.bits.sqnr_db or 0.0, held[HELD_OUT - 1 :: HELD_OUT] or held)


def _is_free(item: PlannedWeight, prepared: Prepared) -> bool:
    """Whether the step may be chosen: no rule sets bits or transform, and the values do not reach results directly."""
    weight = item.weight
    asked = [rule for rule in prepared.config.rules if rule.matches(weight.names, weight.op)]
    return not weight.is_table and all(rule.bits is None and rule.transform is None for rule in asked)


def _check_rules(prepared: Prepared, free: list[PlannedWeight]) -> None:
    """Raise ConfigError if a layer rule sets a granularity, and the step is chosen for all weights that it matches."""
    names = {item.weight.name for item in free}
    for rule in (rule for rule in prepared.config.rules if rule.granularity is not None):
        matched = [item for item in prepared.plan.planned if rule.matches(item.weight.names, item.weight.op)]
        if matched and all(item.weight.name in names for item in matched):
            raise ConfigError(
                f"the layer rule for '{rule.pattern}' sets a granularity, which has no effect with --optimize-for "
                f"{prepared.config.optimize_for}, which chooses a step for each weight; set its bits too, or drop the granularity"
            )


@dataclass(frozen=True)
class _Search:
    prepared: Prepared
    weights: tuple[Rated, ...]
    progress: Progress | None
    threads: int | None

    @property
    def count(self) -> int:
        """The number of elements of all weights whose step is chosen."""
        return sum(each.count for each in self.weights)

    def built(self, bits: float) -> Built:
        """The file whose codes with a chosen step take about `bits` in total.  Its report has the compressed size."""
        unit = unit_for(self.weights, bits)
        chosen = {each.item.weight.name: each.planned(unit) for each in self.weights}
        planned = [chosen.get(item.weight.name, item) for item in self.prepared.plan.planned]
        model, report = convert(copied(self.prepared), planned, self.progress, self.threads)
        file = b"".join(pieces_of(model))
        return model, replace(report, download_bytes=len(compress(file, self.prepared.config.optimize_for)))

    def small_enough(self, size: int) -> Built:
        """The file with the most bits among those tried with at most `size` compressed bytes.  Raises ConfigError if none has."""

        def measure(built: Built) -> float:
            return float(built[1].download_bytes or 0)

        tries = self._tried(8 * FIRST * size, measure, size * (1 - CLOSE / 2), size * CLOSE / 2, 1 / 8)
        fitting = [each for each in tries if each.value <= size]
        if not fitting:
            least = min(int(each.value) for each in tries)
            raise ConfigError(
                f"the smallest file found has {least:,} compressed bytes, more than {size:,}; allow a larger file, or drop --keep"
            )
        return max(fitting, key=lambda each: each.bits).built

    def good_enough(self, sqnr_db: float, chunks: Sequence[Chunk]) -> Built:
        """The file with the fewest bits among those tried that reach an output SQNR in dB on `chunks`.

        Raises ConfigError if none does.
        """
        error = output_error_against(self.prepared.model, chunks)

        def measure(built: Built) -> float:
            return decibels(1.0, error(built[0]))

        tries = self._tried(
            sqnr_db / DB_A_BIT * self.count, measure, sqnr_db + CLOSE_DB / 2, CLOSE_DB / 2, DB_A_BIT / max(1, self.count)
        )
        reaching = [each for each in tries if each.value >= sqnr_db]
        if not reaching:
            best = max(each.value for each in tries)
            raise ConfigError(f"the best output SQNR found is {best:.1f} dB, below {sqnr_db:g} dB; lower the target, or see --form")
        return min(reaching, key=lambda each: each.bits).built

    def _tried(self, bits: float, measure: Callable[[Built], float], wanted: float, close: float, slope: float) -> list[_Try]:
        """Try files until the value of one is within `close` of `wanted`.

        bits: bits of the first file.  measure: value of a file.  slope: approximate change of the value per bit.
        """
        tries: list[_Try] = []
        for _ in range(TRIES):
            bits = max(bits, FEWEST * self.count)
            if any(each.bits == bits for each in tries):
                break
            built = self.built(bits)
            tries.append(_Try(bits, measure(built), built))
            if abs(tries[-1].value - wanted) <= close or not self.count:
                break
            bits = _next(tries, wanted, slope)
        return tries


def _next(tries: Sequence[_Try], wanted: float, slope: float) -> float:
    """The bits to try next: between values around `wanted`; until there are both, a step by the slope, doubled each time."""
    below = max((each for each in tries if each.value <= wanted), key=lambda each: each.value, default=None)
    above = min((each for each in tries if each.value > wanted), key=lambda each: each.value, default=None)
    if below is not None and above is not None:
        return below.bits + (wanted - below.value) / (above.value - below.value) * (above.bits - below.bits)
    last = below or above
    assert last is not None
    return last.bits + (wanted - last.value) / slope * 2.0 ** (len(tries) - 1)
