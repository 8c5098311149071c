"""Values as text for sentences, tables and pages."""

from __future__ import annotations

import math
from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """The first line of a message without its full stop, for quotation inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def is_unicode(path: str) -> bool:
    """Whether a path is Unicode text; in Linux, a name may consist of any bytes, for which Python uses surrogates.

    >>> is_unicode("café.onnx"), is_unicode("caf\\udce9.onnx")
    (True, False)
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def shape_text(shape: Iterable[int]) -> str:
    """A shape as text, with ? for an unknown size.

    >>> shape_text((16, 3, -1))
    '16x3x?'
    """
    return "x".join("?" if n < 0 else str(n) for n in shape) or "?"


def decibels(value: float, unit: str = " dB") -> str:
    """A signal-to-noise ratio in decibels.

    >>> decibels(20.04), decibels(math.inf)
    ('20.0 dB', 'exact')
    """
    return "exact" if value == math.inf else f"{value:.1f}{unit}"
