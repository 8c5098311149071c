"""Rate-aware rounding: the cost of a code is its error and its bits (rate-aware GPTQ: CERWU, arXiv 2505.18758).

    cost(q) = (wanted - scale * (q - zero))**2 * power + slope * bits(q),    bits(q) = -log2(share of the code q)

with the power of the input (R_kk**2 of feedback.py).  The bits are estimated from the codes of the weight itself, and again after
these have changed: rarer codes become more expensive.  Before an entropy coder, uniform levels with one scale for all weights that
share a second moment matrix are nearly optimal, and the levels reach as far as the weights do.

The slope is the same everywhere: RATE * scale**2 * power.  Error changes with the square of the scale and bits with its logarithm,
so two weights with equal scale**2 * power lose the same amount per bit, regardless of their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant_onnx.numerics.arrays import Float64Array, Int64Array, UInt8Array

CODES, ZERO = 256, 128  # number of codes in a byte, and the code of level 0
REACH = 127  # largest level
RATE = 0.06  # slope in units of scale**2 * power; 0.001 to 0.08 are equally good on ResNet-20 (convert/README.md, "Downloads")
UNSEEN = 0.5  # added to the count of every code, so that the bits of an unused code are finite
TOWARD_ZERO = (1, 2, CODES)  # steps from the nearest level toward zero that are tried, to save bits


@dataclass(frozen=True)
class Price:
    """The price of codes.  bits: bits of each code, (256,).  slope: squared output error per bit."""

    bits: Float64Array
    slope: float

    @classmethod
    def of(cls, codes: UInt8Array, slope: float) -> Price:
        """The price by the shares of the codes, of any shape.

        >>> Price.of(np.array([128] * 95 + [129] * 31, np.uint8), 1.0).bits[[128, 129]].round(1).tolist()
        [0.4, 2.0]
        """
        counts = np.bincount(codes.ravel(), minlength=CODES) + UNSEEN
        return cls(-np.log2(counts / (codes.size + UNSEEN * (np.count_nonzero(counts > UNSEEN) + 2))), slope)

    def again(self, codes: UInt8Array) -> Price:
        """The price by other codes, with the same slope."""
        return Price.of(codes, self.slope)

    def cheapest(self, wanted: Float64Array, code: Int64Array, scale: Float64Array, power: Float64Array) -> Int64Array:
        """The code of least cost among the nearest and some toward zero.  code: nearest code.

        wanted, scale, power: weights, value of a level and factor on the squared error, of one shape or broadcast.
        """
        level = code - ZERO
        sign, size = np.sign(level), np.abs(level)
        best, least = code, self._cost(wanted, code, scale, power)
        for steps in TOWARD_ZERO:
            other = ZERO + sign * np.maximum(size - steps, 0)
            cost = self._cost(wanted, other, scale, power)
            better = cost < least
            best, least = np.where(better, other, best), np.where(better, cost, least)
        return np.asarray(best)

    def _cost(self, wanted: Float64Array, code: Int64Array, scale: Float64Array, power: Float64Array) -> Float64Array:
        return np.asarray((wanted - scale * (code - ZERO)) ** 2 * power + self.slope * self.bits[code])


def entropy(codes: UInt8Array) -> float:
    """The least total bits of all codes, if each is coded independently."""
    counts = np.bincount(codes.ravel(), minlength=CODES)
    shares = counts[counts > 0] / codes.size
    return float(-codes.size * (shares * np.log2(shares)).sum())


def round_by_price(w: Float64Array, scale: Float64Array, importance: Float64Array, slope: float) -> UInt8Array:
    """The codes of least cost, weight by weight.  w: (rows, n).  scale: (rows, 1).  importance: factor on the squared error,
    in the shape of w or broadcast.
    """
    code = np.clip(np.rint(w / scale), -REACH, REACH).astype(np.int64) + ZERO
    power = np.broadcast_to(importance, w.shape)
    found = code.astype(np.uint8)
    for _ in range(2):
        found = Price.of(found, slope).cheapest(w, code, scale, power).astype(np.uint8)
    return found
