"""The time of a conversion: the time left, the layers on which it is spent, and the progress of the work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

RESERVE = 0.05  # share of the time limit for writing the file and checking it
RUN_SHARE = 0.5  # largest share of the time left for running the model; the rest is for refining its layers
PRIOR = 1.0  # seconds added to both estimated and measured time, so that their ratio starts at 1


@dataclass(frozen=True)
class Clock:
    """The clock of a conversion.  limit: time limit in seconds, None for none.  started: time.perf_counter() at the start."""

    limit: float | None = None
    started: float = field(default_factory=lambda: time.perf_counter())  # noqa: PLW0108  # looked up when it is called

    @property
    def elapsed(self) -> float:
        """The seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """The seconds until the file has to be written; infinite without a limit."""
        return float("inf") if self.limit is None else self.limit * (1 - RESERVE) - self.elapsed


@dataclass(frozen=True)
class Cost:
    """The estimated times for one layer, in seconds, and the gain from refining it, in any unit.

    running: time to run the model up to the layer.  least: time to correct its bias.  full: time of the full refinement.
    """

    running: float
    least: float
    full: float
    gain: float


class Schedule:
    """Chooses the layers to refine fully, by gain per second, and estimates the remaining time from that of finished layers."""

    def __init__(self, clock: Clock, costs: Sequence[Cost]) -> None:
        self._clock, self._costs = clock, costs
        self._chosen = set(range(len(costs)))
        self._ran, self._fitted = _Ratio(), {True: _Ratio(), False: _Ratio()}
        self._shown = 0.0
        self.full = self.least = 0  # numbers of layers refined fully, and of those with only a bias correction
        self._plan(0)

    @property
    def is_over(self) -> bool:
        """Whether no time is left for a layer."""
        return self._clock.left <= 0.0

    def is_full(self, number: int) -> bool:
        """Whether a layer is refined fully."""
        return number in self._chosen

    def done(self, number: int, ran: float, fitted: float) -> None:
        """Record a finished layer.  ran, fitted: seconds spent on running the model up to it, and on refining it."""
        cost = self._costs[number]
        self._ran.add(cost.running, ran)
        full = self.is_full(number)
        self._fitted[full].add(cost.full if full else cost.least, fitted)
        self.full, self.least = self.full + full, self.least + (not full)
        self._plan(number + 1)

    def fraction(self, number: int) -> float:
        """The elapsed share of the estimated total time once layer `number` is done; it never decreases."""
        rest = sum(self._running(k) + self._fitting(k) for k in range(number + 1, len(self._costs)))
        elapsed = self._clock.elapsed
        self._shown = max(self._shown, elapsed / max(elapsed + rest, 1e-9))
        return self._shown

    def _plan(self, first: int) -> None:
        """Choose the layers to refine fully, from layer `first` on."""
        if self._clock.limit is None:
            return
        rest = range(first, len(self._costs))
        left = self._clock.left - sum(self._running(k) + self._costs[k].least * self._fitted[False].value for k in rest)
        self._chosen.difference_update(rest)
        for k in sorted(rest, key=lambda k: -self._costs[k].gain / self._more(k)):
            if self._more(k) <= left:
                self._chosen.add(k)
                left -= self._more(k)

    def _running(self, number: int) -> float:
        return self._costs[number].running * self._ran.value

    def _fitting(self, number: int) -> float:
        cost, full = self._costs[number], self.is_full(number)
        return (cost.full if full else cost.least) * self._fitted[full].value

    def _more(self, number: int) -> float:
        """The seconds by which the full refinement takes longer than a bias correction, positive."""
        cost = self._costs[number]
        return max(1e-6, cost.full * self._fitted[True].value - cost.least * self._fitted[False].value)


class _Ratio:
    """The ratio of measured to estimated seconds, starting at 1."""

    def __init__(self) -> None:
        self._estimated = self._measured = PRIOR

    @property
    def value(self) -> float:
        return self._measured / self._estimated

    def add(self, estimated: float, measured: float) -> None:
        self._estimated += estimated
        self._measured += measured
