"""The choices of a conversion: settings with a fixed set of values, and the transform.

>>> Transform.parse("power:0.6")
Transform(exponent=0.6)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from requant_onnx.errors import ConfigError

LEVELS: dict[float, int] = {
    1.6: 3,
    2: 4,
    2.33: 5,
    2.67: 6,
    3: 8,
    3.33: 10,
    3.67: 12,
    4: 16,
    4.5: 22,
    5: 32,
    5.5: 45,
    6: 64,
    7: 128,
    8: 256,
}
"""The number of levels (distinct codes) by bits of a weight.  Fractional widths have as many levels as fit if several codes share
8 to 14 bits (graph/decode/packing.py); finer steps would hardly matter."""
MAX_BITS = 8
CLOSE_BITS = 0.01  # 2.333 and 7/3 are 2.33
EXPONENTS, AUTO_BITS = (1.0, 3 / 4, 2 / 3, 1 / 2), 6  # of the automatic transform
TRANSFORMS = "auto, sqrt, none or power:A with A in 1/3 .. 1"  # the texts that Transform.parse reads
MIN_EXPONENT, MAX_EXPONENT = 1 / 3, 1.0  # 255**3 < 2**24: every level up to 8 bits is exact in float32


C = TypeVar("C", bound="Choice")


class Choice(Enum):
    """One value of a fixed set; `str` gives its text on the command line."""

    @classmethod
    def parse(cls: type[C], text: str, option: str) -> C:
        """The member whose value is `text`.  Raises a ConfigError that names the option and the choices."""
        try:
            return cls(text)
        except ValueError:
            raise ConfigError(f"{option} '{text}' is not one of {', '.join(map(str, cls))}") from None

    def __str__(self) -> str:
        return str(self.value)


class Granularity(Choice):
    """The weights that share one range: all weights of a tensor, or those of one output channel."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


class RangeMode(Choice):
    """How alpha is chosen: `search` minimizes the error over (0, 1], `max` sets alpha = 1."""

    SEARCH = "search"
    MAX = "max"


class EdgeLayers(Choice):
    """Treatment of the first and last layers: quantization without the transform, no quantization, or 8 bits (except for a
    layer with more than a twentieth of the weights, such as a large classifier)."""

    PLAIN = "plain"
    FLOAT = "float"
    EIGHT_BIT = "8bit"


class Form(Choice):
    """How codes are decoded: `qdq` by DequantizeLinear at every inference; `folded` once, when ONNX Runtime loads the model,
    to a float weight; `int8` also once, to an int8 weight, for integer kernels with quantized activations."""

    QDQ = "qdq"
    FOLDED = "folded"
    INT8 = "int8"


class Refinement(Choice):
    """How rounding goes beyond the nearest level, given calibration inputs: `bias` corrects the mean of each channel,
    `feedback` also moves errors into weights not yet rounded, `descent` also continues the search and fits the scales."""

    NONE = "none"
    BIAS = "bias"
    FEEDBACK = "feedback"
    DESCENT = "descent"

    @property
    def sees_outputs(self) -> bool:
        """Whether the levels are chosen by the output error."""
        return self in (Refinement.FEEDBACK, Refinement.DESCENT)


class ActivationRange(Choice):
    """How the range of an activation is chosen: least error of the model's outputs, all observed values, least squared error of
    the activation itself, or all values except the outermost percentile.  On noise, `output` is `minmax` with some headroom."""

    OUTPUT = "output"
    MIN_MAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"

    @property
    def minimizes_error(self) -> bool:
        """Whether the range is, or starts from, the one of least squared error."""
        return self in (ActivationRange.OUTPUT, ActivationRange.MSE)


class Int8Levels(Choice):
    """The largest int8 weight of the int8 form: 127; or 64, for which the sum of two products of codes fits in 16 bits, as the
    saturating kernels of x86 CPUs without VNNI need; or the larger one that is exact on the CPU that converts."""

    SAFE = "64"
    FULL = "127"
    AUTO = "auto"


class Int8Speed(Choice):
    """Which layers of the int8 form run on integers: those that are faster by a table of costs, or all that can."""

    AUTO = "auto"
    ALL = "all"


class BiasType(Choice):
    """How biases and other vectors are stored: unchanged, or as float16 where that changes no output by more than the error of
    the weights does (the default in the folded and int8 forms)."""

    AUTO = "auto"
    HALF = "float16"
    FLOAT = "float32"


class OptimizeFor(Choice):
    """Which bytes count: those of the file, or those of a compressed download, by brotli as web servers use it (`download`
    alone), by gzip or by zstd.  For downloads, codes that compress well are chosen, and sizes are compressed sizes."""

    FILE = "file"
    BROTLI = "download:br"
    GZIP = "download:gz"
    ZSTD = "download:zst"

    @property
    def compresses(self) -> bool:
        """Whether compressed bytes are counted."""
        return self is not OptimizeFor.FILE

    @classmethod
    def _missing_(cls, value: object) -> OptimizeFor | None:
        return cls.BROTLI if value == "download" else None


class Space(Choice):
    """The space in which distances are measured: of weights `w`, or of transformed weights `v = sign(w) * |w|**a`."""

    WEIGHT = "weight"
    TRANSFORMED = "transformed"


@dataclass(frozen=True)
class Transform:
    """The power transform `v = sign(w) * |w|**exponent`; 1/2 is the paper's square root, 1 means no transform.

    exponent: 1/3 .. 1, or None, which chooses from EXPONENTS for each weight, by the output error on calibration inputs.  None is
    1 without calibration inputs, in the qdq form, and above AUTO_BITS bits, where all exponents are equally good.
    Raises ConfigError if the exponent is out of range.
    """

    exponent: float | None

    def __post_init__(self) -> None:
        if self.exponent is not None and not MIN_EXPONENT <= self.exponent <= MAX_EXPONENT:
            raise ConfigError(f"the exponent {self.exponent} is outside 1/3 .. 1; 0.5 is the square root, and 1 means no transform")

    @classmethod
    def parse(cls, text: str, option: str = "transform") -> Transform:
        """Parse `auto`, `sqrt`, `none` or `power:A`.  Raises a ConfigError that names the option on anything else."""
        named = {"auto": None, "sqrt": 0.5, "none": 1.0}
        if text in named:
            return cls(named[text])
        kind, _, value = text.partition(":")
        try:
            exponent = float(value) if kind == "power" else math.nan
        except ValueError:
            exponent = math.nan
        if math.isnan(exponent):
            raise ConfigError(f"{option} '{text}' is not valid; give {TRANSFORMS}")
        return cls(exponent)

    def __str__(self) -> str:
        if self.exponent is None:
            return "auto"
        return {0.5: "sqrt", 1.0: "none"}.get(self.exponent, f"power:{self.exponent:g}")


AUTO_TRANSFORM = Transform(None)


class Runtime(Choice):
    """The runtime for which the file is written; RUNTIMES describes each of them."""

    ORT = "ort"
    PORTABLE = "portable"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    WEB = "web"
    MOBILE = "mobile"


def width_of(bits: object) -> float | None:
    """The width in LEVELS that a number stands for, as an int if it is whole; None if there is none.

    >>> width_of(4.0), width_of(7 / 3), width_of(2.5)
    (4, 2.33, None)
    """
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        return None
    return next((width for width in LEVELS if abs(width - bits) < CLOSE_BITS), None)


def widths_in_words() -> str:
    """All widths as text for sentences: 1.6, 2, ... or 8."""
    *most, last = map(str, LEVELS)
    return f"{', '.join(most)} or {last}"
