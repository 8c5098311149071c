"""The settings of a conversion.  A QuantConfig that exists is valid: a wrong value raises ConfigError when it is built.

>>> QuantConfig(bits=4, transform=Transform.parse("power:0.6")).transform
Transform(exponent=0.6)
>>> QuantConfig.paper(bits=4).granularity.value
'per-tensor'
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from enum import Enum
from typing import TypeVar

from requant_onnx.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8
METADATA_KEY = "requant_onnx"  # of the metadata_props entry that holds a conversion's settings
EXPONENTS, AUTO_BITS = (1.0, 3 / 4, 2 / 3, 1 / 2), 6  # of the automatic transform
TRANSFORMS = "auto, sqrt, none or power:A with A in 1/3 .. 1"  # the texts that Transform.parse reads
MIN_EXPONENT, MAX_EXPONENT = 1 / 3, 1.0  # 255**3 < 2**24: every level up to 8 bits is exact in float32


class Choice(Enum):
    """One of a few; its text is that of the command line."""

    def __str__(self) -> str:
        return str(self.value)


class Granularity(Choice):
    """Which weights share one range: all of a tensor, or those of one output channel."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


class RangeMode(Choice):
    """How alpha is chosen: `search` minimizes the error over (0, 1], `max` takes alpha = 1."""

    SEARCH = "search"
    MAX = "max"


class EdgeLayers(Choice):
    """What the first and last layers get: quantization without the transform, none at all, or 8 bits."""

    PLAIN = "plain"
    FLOAT = "float"
    EIGHT_BIT = "8bit"


class Form(Choice):
    """How codes are decoded: `qdq` by DequantizeLinear at every inference, `folded` once, when ONNX Runtime loads the model,
    to a float weight, `int8` likewise to an int8 weight, for integer kernels with quantized activations."""

    QDQ = "qdq"
    FOLDED = "folded"
    INT8 = "int8"


class Refinement(Choice):
    """How far rounding goes beyond the nearest level, given calibration inputs: `bias` corrects the mean of each channel,
    `feedback` also pushes errors into weights not yet rounded, `descent` also searches on, and fits the scales."""

    NONE = "none"
    BIAS = "bias"
    FEEDBACK = "feedback"
    DESCENT = "descent"

    @property
    def sees_outputs(self) -> bool:
        """Whether levels are chosen by the output error."""
        return self in (Refinement.FEEDBACK, Refinement.DESCENT)


class ActivationRange(Choice):
    """How the range of an activation is chosen: all values seen, least squared error, or all but the outermost percentile."""

    MIN_MAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"


class Int8Levels(Choice):
    """How far the int8 weights of the int8 form reach: 127, or 64, with which sums of two products of codes fit 16 bits, as the
    kernels for x86 CPUs without VNNI need (they saturate); or what is exact on the CPU that converts."""

    SAFE = "64"
    FULL = "127"
    AUTO = "auto"


class Int8Speed(Choice):
    """Which layers of the int8 form run on integers: those that a table of costs says are faster so, or all that can."""

    AUTO = "auto"
    ALL = "all"


class BiasType(Choice):
    """How biases and other vectors are stored: as float16 where that changes no output by more than the weights' own error does
    (by default in the folded and int8 forms), or as they are."""

    AUTO = "auto"
    HALF = "float16"
    FLOAT = "float32"


class Space(Choice):
    """Where distances are measured: between weights `w`, or between transformed weights `v = sign(w) * |w|**a`."""

    WEIGHT = "weight"
    TRANSFORMED = "transformed"


@dataclass(frozen=True)
class Transform:
    """The power transform `v = sign(w) * |w|**exponent`; 1/2 is the paper's square root, 1 leaves weights as they are.

    None: chosen for each weight from EXPONENTS, by its output error on calibration inputs; 1 where there are none, in the qdq
    form, and above AUTO_BITS bits, where all are as good.
    """

    exponent: float | None

    def __post_init__(self) -> None:
        if self.exponent is not None and not MIN_EXPONENT <= self.exponent <= MAX_EXPONENT:
            raise ConfigError(f"the exponent {self.exponent} is outside 1/3 .. 1; 0.5 is the square root, 1 no transform")

    @classmethod
    def parse(cls, text: str) -> Transform:
        """`auto`, `sqrt`, `none` or `power:A`.  Raises ConfigError on anything else."""
        named = {"auto": None, "sqrt": 0.5, "none": 1.0}
        if text in named:
            return cls(named[text])
        kind, _, value = text.partition(":")
        try:
            exponent = float(value) if kind == "power" else math.nan
        except ValueError:
            exponent = math.nan
        if math.isnan(exponent):
            raise ConfigError(f"the transform '{text}' is not understood; give {TRANSFORMS}")
        return cls(exponent)

    def __str__(self) -> str:
        if self.exponent is None:
            return "auto"
        return {0.5: "sqrt", 1.0: "none"}.get(self.exponent, f"power:{self.exponent:g}")


class Runtime(Choice):
    """What the file is written for; RUNTIMES says what that means."""

    ORT = "ort"
    PORTABLE = "portable"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    WEB = "web"
    MOBILE = "mobile"


@dataclass(frozen=True)
class RuntimeRow:
    """What a file for one runtime may contain.

    title: the runtime, for users.  forms: the possible ones, the default first.  bits: the possible widths of codes.
    native4: whether DequantizeLinear reads UINT4 (or INT4), for the codes of 4 bits.
    signed: whether codes that DequantizeLinear reads are INT8 and INT4, not UINT8 and UINT4.
    symmetric: whether zero points, also those of activations, are 0.
    half: whether scales and biases may be stored as float16.
    grouped: whether weights are decoded together and then split.
    paired: whether each reader of an activation on integers has a DequantizeLinear of its own, pools and reshapes too.
    int32_biases: whether biases of integer kernels are stored as integers.
    checked: whether ONNX Runtime is asked if it does with each weight what the form promises.
    """

    title: str
    forms: tuple[Form, ...] = (Form.QDQ, Form.FOLDED, Form.INT8)
    bits: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))
    native4: bool = False
    signed: bool = False
    symmetric: bool = False
    half: bool = True
    grouped: bool = True
    paired: bool = False
    int32_biases: bool = True
    checked: bool = True


RUNTIMES: dict[Runtime, RuntimeRow] = {
    Runtime.ORT: RuntimeRow("ONNX Runtime from 1.20 on", native4=True),
    Runtime.PORTABLE: RuntimeRow("any runtime", signed=True, half=False, grouped=False, paired=True),
    Runtime.OPENVINO: RuntimeRow("OpenVINO", signed=True, paired=True),
    Runtime.TENSORRT: RuntimeRow(
        "TensorRT",
        forms=(Form.QDQ, Form.INT8),
        bits=(4, 8),
        native4=True,
        signed=True,
        symmetric=True,
        half=False,
        grouped=False,
        paired=True,
        int32_biases=False,
        checked=False,
    ),
    Runtime.WEB: RuntimeRow("onnxruntime-web", forms=(Form.FOLDED, Form.INT8, Form.QDQ)),
    Runtime.MOBILE: RuntimeRow("ONNX Runtime's .ort files", forms=(Form.QDQ, Form.INT8), signed=True),
}
"""What a file for each runtime may contain."""


@dataclass(frozen=True)
class Budget:
    """Bits (with exponent and granularity) of each weight chosen together, by the real size and the output error of each choice.

    size: bytes that the file may take; sqnr_db: output SQNR that it has to reach, on calibration inputs, in the smallest file.
    One of them.
    """

    size: int | None = None
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.sqnr_db is None):
            raise ConfigError("a budget is either a size or an output SQNR to reach; give one of the two")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"a file of {self.size} bytes is no budget; give a size such as 180kB")
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            raise ConfigError(f"{self.sqnr_db} is no SQNR to reach; give decibels, for instance 20")

    @staticmethod
    def parse_size(text: str) -> int:
        """Bytes; `180000`, `180kB`, `1.5MB`, `176KiB`.  Raises ConfigError on anything else."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?)?B?", text)
        if match is None:
            raise ConfigError(f"the size '{text}' is not understood; write it as 180000, 180kB or 1.5MB (KiB and MiB: of 1024)")
        prefix = (match[2] or "").upper()
        power = " KMG".index(prefix[:1] or " ")
        return int(float(match[1]) * (1024 if prefix.endswith("I") else 1000) ** power)

    def to_dict(self) -> dict[str, int | float]:
        """In the words of the command line."""
        return {"size": self.size} if self.size is not None else {"target_sqnr": self.sqnr_db or 0.0}


@dataclass(frozen=True)
class QuantConfig:
    """What `quantize_model` does.  The defaults were chosen on images of the CIFAR-10 train split (README, "Defaults").

    bits: of each weight, or a budget to choose them by.
    objective: the space whose mean squared error alpha minimizes.
    rounding: the space in which a weight goes to its nearest level; `weight` is never worse in weight error.
    runtime: what the file is written for; see RUNTIMES.
    symmetric: whether all zero points of weights are in the middle of the codes.
    refinement: what calibration inputs are used for, beside the ranges of activations.
    biases: how biases and other vectors are stored.
    keep_inputs: whether weights that a caller may replace (initializers that are inputs of the graph too) stay, in float.
    activation_range, int8_levels, int8_speed: of the int8 form.
    """

    bits: int | Budget = 8
    granularity: Granularity = Granularity.PER_CHANNEL
    transform: Transform = Transform(None)
    range_mode: RangeMode = RangeMode.SEARCH
    edge_layers: EdgeLayers = EdgeLayers.EIGHT_BIT
    objective: Space = Space.WEIGHT
    rounding: Space = Space.WEIGHT
    form: Form = Form.QDQ
    runtime: Runtime = Runtime.ORT
    symmetric: bool = False
    refinement: Refinement = Refinement.DESCENT
    biases: BiasType = BiasType.AUTO
    keep_inputs: bool = False
    activation_range: ActivationRange = ActivationRange.MIN_MAX
    int8_levels: Int8Levels = Int8Levels.SAFE
    int8_speed: Int8Speed = Int8Speed.AUTO

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not isinstance(self.bits, Budget) and not (whole and MIN_BITS <= self.bits <= MAX_BITS):
            raise ConfigError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, not {self.bits!r}")
        for name, kind in {**ENUMS, "transform": Transform, "symmetric": bool, "keep_inputs": bool}.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r}")
        self._check_runtime()

    def _check_runtime(self) -> None:
        row = RUNTIMES[self.runtime]
        if self.form not in row.forms:
            forms = " or ".join(map(str, row.forms))
            raise ConfigError(f"the {self.form} form is not for {row.title} (--runtime {self.runtime}); choose --form {forms}")
        if isinstance(self.bits, int) and self.bits not in row.bits:
            widths = " or ".join(map(str, row.bits))
            raise ConfigError(f"{row.title} (--runtime {self.runtime}) reads no codes of {self.bits} bits; choose --bits {widths}")
        if self.biases is BiasType.HALF and not row.half:
            raise ConfigError(f"files for {row.title} (--runtime {self.runtime}) have no float16; leave --biases float16 out")
        if row.native4 and row.symmetric and self.form is Form.INT8 and self.bits != MAX_BITS:
            raise ConfigError(f"the int8 form for {row.title} has codes of 8 bits; choose --bits 8, or --form qdq")

    @property
    def is_symmetric(self) -> bool:
        """Whether all zero points of weights are in the middle of the codes, as asked or as the runtime needs it."""
        return self.symmetric or RUNTIMES[self.runtime].symmetric

    @classmethod
    def paper(cls, bits: int | Budget = 8) -> QuantConfig:
        """REQuant as published (arXiv 2510.04044): per tensor, square root, searched alpha, rounding in transformed
        space, first and last layer without the transform, biases in float32."""
        return cls(
            bits=bits,
            granularity=Granularity.PER_TENSOR,
            transform=Transform(0.5),
            edge_layers=EdgeLayers.PLAIN,
            rounding=Space.TRANSFORMED,
            refinement=Refinement.NONE,
            biases=BiasType.FLOAT,
        )

    def to_dict(self) -> dict[str, int | float | str]:
        """The settings in the words of the command line."""
        names = [item.name for item in fields(self) if OPTIONS_OF_FORM.get(item.name, self.form) is self.form]
        values = {name: getattr(self, name) for name in names}
        plain: dict[str, int | float | str] = {
            name: value if isinstance(value, int) else str(value) for name, value in values.items()
        }
        return {**plain, "bits": "auto", **self.bits.to_dict()} if isinstance(self.bits, Budget) else plain


OPTIONS_OF_FORM = {"activation_range": Form.INT8, "int8_levels": Form.INT8, "int8_speed": Form.INT8}
"""Settings that only one form has."""

ENUMS: dict[str, type[Choice]] = {
    "granularity": Granularity,
    "range_mode": RangeMode,
    "edge_layers": EdgeLayers,
    "objective": Space,
    "rounding": Space,
    "form": Form,
    "runtime": Runtime,
    "refinement": Refinement,
    "biases": BiasType,
    "activation_range": ActivationRange,
    "int8_levels": Int8Levels,
    "int8_speed": Int8Speed,
}
"""Settings that are one of a few: name -> choices."""

E = TypeVar("E", bound=Choice)


def parse_choice(kind: type[E], text: str, option: str) -> E:
    """The member of `kind` whose value is `text`.  Raises ConfigError that names the option and the choices."""
    try:
        return kind(text)
    except ValueError:
        choices = ", ".join(map(str, kind))
        raise ConfigError(f"{option} '{text}' is not one of {choices}") from None
