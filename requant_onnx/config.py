"""The settings of a conversion.  A QuantConfig that exists is valid: a wrong value raises ConfigError when it is built.

>>> QuantConfig.paper(bits=4).granularity.value
'per-tensor'
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from requant_onnx.choices import (
    AUTO_TRANSFORM,
    MAX_BITS,
    ActivationRange,
    BiasType,
    Choice,
    EdgeLayers,
    Form,
    Granularity,
    Int8Levels,
    Int8Speed,
    OptimizeFor,
    RangeMode,
    Refinement,
    Runtime,
    Space,
    Transform,
    width_of,
    widths_in_words,
)
from requant_onnx.errors import ConfigError
from requant_onnx.rules import LayerRule, Rules, rules_of
from requant_onnx.runtimes import RUNTIMES

T = TypeVar("T", bound=Choice | Transform)

METADATA_KEY = "requant_onnx"  # of the metadata_props entry that holds a conversion's settings


@dataclass(frozen=True)
class Budget:
    """A budget, within which bits, exponent and granularity of all weights are chosen by real size and output error.

    Exactly one of the two is given.
    size: largest size of the file, in bytes.
    sqnr_db: output SQNR that the smallest file must reach on calibration inputs, in dB.
    Raises ConfigError if both or neither are given, or a value is out of range.
    """

    size: int | None = None
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.sqnr_db is None):
            raise ConfigError("a budget needs either a size or an output SQNR; give exactly one of the two")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"a file cannot have {self.size} bytes; give a size such as 180kB")
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            raise ConfigError(f"{self.sqnr_db} is not a valid SQNR; give decibels, for example 20")

    @staticmethod
    def parse_size(text: str) -> int:
        """Parse a size in bytes: `180000`, `180kB`, `1.5MB` or `176KiB`.  Raises ConfigError on anything else."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?)?B?", text)
        if match is None:
            raise ConfigError(f"the size '{text}' is not valid; write it as 180000, 180kB or 1.5MB (or KiB, MiB)")
        prefix = (match[2] or "").upper()
        power = " KMG".index(prefix[:1] or " ")
        return int(float(match[1]) * (1024 if prefix.endswith("I") else 1000) ** power)

    def to_dict(self) -> dict[str, int | float]:
        """The budget as options of the command line, by name."""
        return {"size": self.size} if self.size is not None else {"target_sqnr": self.sqnr_db or 0.0}


class Setting(Generic[T]):
    """A field of QuantConfig that accepts a value or its text, as on the command line; reading it gives the value.

    Setting it raises ConfigError if the value has another type, or if the text is not that of a value.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, config: object | None, owner: type) -> T:
        value: T = self._default if config is None else vars(config)[self._name]
        return value

    def __set__(self, config: object, value: T | str) -> None:
        kind = type(self._default)
        found: object = kind.parse(value, self._name) if isinstance(value, str) else value
        if not isinstance(found, kind):
            raise ConfigError(f"{self._name} must be a {kind.__name__}, not {value!r}")
        vars(config)[self._name] = found


@dataclass(frozen=True)
class QuantConfig:
    """Settings of `quantize_model`.  The defaults were chosen on the CIFAR-10 train split (convert/README.md, "Defaults").

    Choices may also be given as text, as on the command line.
    bits: bits per weight, one of LEVELS, or a budget within which they are chosen.
    granularity: weights that share a scale.  transform: transform of the weights.  range_mode: choice of alpha.
    edge_layers: treatment of the first and last layers.
    objective: space in which alpha minimizes the mean squared error.
    rounding: space in which the nearest level is chosen; `weight` never has the larger weight error.
    form: how codes are stored and decoded.  runtime: runtime that reads the file; see RUNTIMES.
    symmetric: whether the zero points of all weights are in the middle of the codes.
    refinement: use of the calibration inputs, in addition to the ranges of activations.
    biases: type of biases and other vectors.
    keep_inputs: whether weights that a caller may replace (initializers that are also graph inputs) stay in float.
    activation_range, int8_levels, int8_speed: settings of the int8 form only.
    int8_min_sqnr: output SQNR in dB that the int8 form must keep; nodes whose activations cost more stay float.  -inf: no limit.
    overrides: rules for single layers (LayerRule, text, or a table from patterns to settings); the last one that matches wins.
    optimize_for: bytes that count; for downloads, bits are the average bits of a weight after compression.
    Raises ConfigError if a value is out of range, or values contradict each other.
    """

    bits: float | Budget = 8
    granularity: Setting[Granularity] = Setting(Granularity.PER_CHANNEL)
    transform: Setting[Transform] = Setting(AUTO_TRANSFORM)
    range_mode: Setting[RangeMode] = Setting(RangeMode.SEARCH)
    edge_layers: Setting[EdgeLayers] = Setting(EdgeLayers.EIGHT_BIT)
    objective: Setting[Space] = Setting(Space.WEIGHT)
    rounding: Setting[Space] = Setting(Space.WEIGHT)
    form: Setting[Form] = Setting(Form.QDQ)
    runtime: Setting[Runtime] = Setting(Runtime.ORT)
    symmetric: bool = False
    refinement: Setting[Refinement] = Setting(Refinement.DESCENT)
    biases: Setting[BiasType] = Setting(BiasType.AUTO)
    keep_inputs: bool = False
    activation_range: Setting[ActivationRange] = Setting(ActivationRange.OUTPUT)
    int8_levels: Setting[Int8Levels] = Setting(Int8Levels.SAFE)
    int8_speed: Setting[Int8Speed] = Setting(Int8Speed.AUTO)
    int8_min_sqnr: float = 15.0
    overrides: Rules = ()
    optimize_for: Setting[OptimizeFor] = Setting(OptimizeFor.FILE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", rules_of(self.overrides))
        if not isinstance(self.bits, Budget):
            width = width_of(self.bits)
            if width is None:
                raise ConfigError(f"bits must be one of {widths_in_words()}, not {self.bits!r}")
            object.__setattr__(self, "bits", width)
        for name in ("symmetric", "keep_inputs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a bool, not {getattr(self, name)!r}")
        if (
            isinstance(self.int8_min_sqnr, bool)
            or not isinstance(self.int8_min_sqnr, int | float)
            or math.isnan(self.int8_min_sqnr)
        ):
            raise ConfigError(f"int8_min_sqnr must be a number of decibels, not {self.int8_min_sqnr!r}")
        self._check_runtime()

    def _check_runtime(self) -> None:
        row = RUNTIMES[self.runtime]
        runtime = f"{row.title} (--runtime {self.runtime})"
        for rule in self.rules:
            if rule.form is Form.INT8 and self.form is not Form.INT8:
                raise ConfigError(f"the layer rule for '{rule.pattern}' sets form int8, which is for whole models; use --form int8")
            if not rule.keep:
                changed = {name: value for name in ("bits", "form") if (value := getattr(rule, name)) is not None}
                replace(self, overrides=(), **changed)  # raises where the runtime does not read it
        if self.optimize_for.compresses and self.form is Form.INT8:
            raise ConfigError(
                f"the int8 form cannot be optimized for downloads; drop --optimize-for {self.optimize_for}, or --form int8"
            )
        if self.form not in row.forms:
            forms = " or ".join(map(str, row.forms))
            raise ConfigError(f"the {self.form} form does not work with {runtime}; choose --form {forms}")
        if not isinstance(self.bits, Budget) and self.bits not in row.bits:
            widths = " or ".join(map(str, row.bits))
            raise ConfigError(f"{self.bits}-bit codes do not work with {runtime}; choose --bits {widths}")
        if self.biases is BiasType.HALF and not row.half:
            raise ConfigError(f"files for {runtime} cannot hold float16; drop --biases float16")
        if row.native4 and row.symmetric and self.form is Form.INT8 and self.bits != MAX_BITS:
            raise ConfigError(f"the int8 form for {row.title} only has codes of 8 bits; choose --bits 8, or --form qdq")

    def of_layer(self, names: Collection[str], op: str) -> QuantConfig:
        """The settings of one weight, without rules.  names, op: as in LayerRule.matches."""
        own: dict[str, Any] = {"overrides": ()}
        for rule in self.rules:
            if rule.matches(names, op):
                given = {name: getattr(rule, name) for name in ("bits", "form", "transform", "granularity")}
                own.update((name, value) for name, value in given.items() if value is not None)
        if "bits" in own:
            own["edge_layers"] = EdgeLayers.PLAIN if self.edge_layers is EdgeLayers.EIGHT_BIT else self.edge_layers
        return replace(self, **own)

    def kept_in_float(self, names: Collection[str], op: str) -> LayerRule | None:
        """The rule that keeps a weight in float; None if there is none."""
        matching = [rule for rule in self.rules if rule.matches(names, op)]
        return matching[-1] if matching and matching[-1].keep else None

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """The rules for single layers."""
        return rules_of(self.overrides)

    @property
    def is_symmetric(self) -> bool:
        """Whether the zero points of all weights are in the middle of the codes, by `symmetric` or because the runtime needs it."""
        return self.symmetric or RUNTIMES[self.runtime].symmetric

    @classmethod
    def paper(cls, bits: float | Budget = 8) -> QuantConfig:
        """The configuration of REQuant as published (arXiv 2510.04044): per tensor, square root, searched alpha, rounding in
        transformed space, first and last layer without the transform, biases in float32."""
        return cls(
            bits=bits,
            granularity=Granularity.PER_TENSOR,
            transform=Transform(0.5),
            edge_layers=EdgeLayers.PLAIN,
            rounding=Space.TRANSFORMED,
            refinement=Refinement.NONE,
            biases=BiasType.FLOAT,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as texts and numbers of the command line; `from_dict` reads them."""
        names = [item.name for item in fields(self) if OPTIONS_OF_FORM.get(item.name, self.form) is self.form]
        values = {name: getattr(self, name) for name in names}
        plain: dict[str, Any] = {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}
        plain.pop("overrides")
        if self.form is Form.INT8 and not math.isfinite(self.int8_min_sqnr):
            plain["int8_min_sqnr"] = str(self.int8_min_sqnr)  # which JSON lacks
        if self.rules:
            plain["overrides"] = [str(rule) for rule in self.rules]
        return {**plain, "bits": "auto", **self.bits.to_dict()} if isinstance(self.bits, Budget) else plain

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> QuantConfig:
        """The configuration that `to_dict` wrote, which is in `report.config` and in JSON reports.  Raises ConfigError.

        >>> QuantConfig.from_dict(QuantConfig(4, form=Form.FOLDED).to_dict()) == QuantConfig(4, form=Form.FOLDED)
        True
        """
        given = dict(settings)
        size, sqnr_db = given.pop("size", None), given.pop("target_sqnr", None)
        if given.get("bits") == "auto":
            given["bits"] = Budget(size=size, sqnr_db=sqnr_db)
        if isinstance(given.get("int8_min_sqnr"), str):
            given["int8_min_sqnr"] = float(given["int8_min_sqnr"])
        known = [item.name for item in fields(cls)]
        strange = sorted(given.keys() - set(known))
        if strange:
            raise ConfigError(f"a configuration has no setting '{strange[0]}'; its settings are {', '.join(known)}")
        return cls(**given)


OPTIONS_OF_FORM = {"activation_range": Form.INT8, "int8_levels": Form.INT8, "int8_speed": Form.INT8, "int8_min_sqnr": Form.INT8}
"""Settings that apply to one form only, by name."""

ENUMS: dict[str, type[Choice]] = {item.name: type(item.default) for item in fields(QuantConfig) if isinstance(item.default, Choice)}
"""Settings with a fixed set of choices, by name."""
