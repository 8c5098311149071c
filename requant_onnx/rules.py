"""Rules for single layers: the weights that a rule matches, and the settings that it changes.

head.*=bits:8           a glob, matched against the names of a weight and of its nodes
re:block[0-3]=bits:3    a regular expression for the whole name
op:Gemm=form:folded     every weight that an operator of this type reads
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from requant_onnx.choices import Choice, Form, Granularity, Transform, width_of, widths_in_words
from requant_onnx.errors import ConfigError

Rules: TypeAlias = "Sequence[LayerRule | str] | Mapping[str, Any]"
"""Rules as accepted from callers: LayerRules, strings, or a table from patterns to settings."""
KEEP = "float"
PARTS = "bits:N, form:F, transform:T, granularity:G, or float"
KINDS: dict[str, type[Choice | Transform]] = {"form": Form, "granularity": Granularity, "transform": Transform}


@dataclass(frozen=True)
class LayerRule:
    """Settings of the weights that match a pattern; None keeps the setting of the model.

    pattern: glob, re:REGEX or op:TYPE.
    bits: bits per weight, also in edge layers, and also within a budget.  form, transform, granularity: as in QuantConfig.
    keep: whether the weights stay float.
    Raises ConfigError if the pattern or a value is not valid.
    """

    pattern: str
    keep: bool = False
    bits: float | None = None
    form: Form | None = None
    transform: Transform | None = None
    granularity: Granularity | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("a layer rule has an empty pattern; give a name, a glob, re:REGEX or op:TYPE")
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ConfigError(f"'{self.pattern}' is not a regular expression ({error})") from None
        if self.bits is not None:
            width = width_of(self.bits)
            if width is None:
                raise ConfigError(f"the layer rule for '{self.pattern}' sets bits {self.bits!r}; give {widths_in_words()}")
            object.__setattr__(self, "bits", width)
        if self.keep and any((self.bits, self.form, self.transform, self.granularity)):
            raise ConfigError(f"the layer rule for '{self.pattern}' both keeps weights in float and converts them; give only one")

    @classmethod
    def parse(cls, text: str) -> LayerRule:
        """Parse `PATTERN=bits:8,form:folded` or `PATTERN=float`.  Raises ConfigError.

        >>> LayerRule.parse("re:.*/fc=bits:8").bits, LayerRule.parse("head*=float").keep
        (8, True)
        """
        pattern, equals, settings = text.rpartition("=")
        if not equals:
            raise ConfigError(f"the layer rule '{text}' sets nothing; write it as PATTERN={PARTS}")
        pairs = [part.partition(":")[::2] for part in settings.split(",")]
        return cls.of(pattern, {name.strip(): value.strip() for name, value in pairs})

    @classmethod
    def of(cls, pattern: str, settings: Mapping[str, Any] | str) -> LayerRule:
        """Make a rule from a table such as {"bits": 8, "form": "folded"}, or from "float" or "keep".  Raises ConfigError."""
        if settings in ("keep", {"keep": True}):
            return cls(pattern, keep=True)
        if isinstance(settings, str):
            return cls.parse(f"{pattern}={settings}")
        given: dict[str, Any] = {}
        for name, value in settings.items():
            option = f"the {name} of the layer rule for '{pattern}'"
            if name == KEEP and value in ("", True):
                given["keep"] = True
            elif name == "bits":
                given[name] = float(value) if re.fullmatch(r"\d+(\.\d+)?", str(value)) else value
            elif name in KINDS:
                kind = KINDS[name]
                given[name] = value if isinstance(value, kind) else kind.parse(str(value), option)
            else:
                raise ConfigError(f"the layer rule for '{pattern}' sets '{name}', but it can only set {PARTS}")
        return cls(pattern, **given)

    def __str__(self) -> str:
        set_here = [(item.name, getattr(self, item.name)) for item in fields(self)[2:]]
        settings = [KEEP] if self.keep else [f"{name}:{value}" for name, value in set_here if value is not None]
        return f"{self.pattern}={','.join(settings)}"

    def matches(self, names: Collection[str], op: str) -> bool:
        """Whether the rule matches a weight.  names: names of the weight and of its readers.  op: type of these nodes."""
        kind, _, rest = self.pattern.partition(":")
        if kind == "op" and rest:
            return fnmatch.fnmatchcase(op, rest)
        if kind == "re" and rest:
            return any(re.fullmatch(rest, name) for name in names)
        return any(name == self.pattern or fnmatch.fnmatchcase(name, self.pattern) for name in names)


def rules_of(given: Rules) -> tuple[LayerRule, ...]:
    """The given rules as LayerRules.  Raises ConfigError."""
    if isinstance(given, Mapping):
        return tuple(LayerRule.of(pattern, settings) for pattern, settings in given.items())
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"layer rules must be a list of rules, or a table from patterns to settings, not {given!r}")
    return tuple(rule if isinstance(rule, LayerRule) else LayerRule.parse(str(rule)) for rule in given)


def check_matches(rules: Collection[LayerRule], weights: Collection[tuple[Collection[str], str]]) -> None:
    """Raise ConfigError if a rule matches no weight.  weights: names and operator type of each weight."""
    for rule in rules:
        if not any(rule.matches(names, op) for names, op in weights):
            known = sorted({name for names, _ in weights for name in names} | {f"op:{op}" for _, op in weights})
            near = difflib.get_close_matches(re.sub(r"^re:|[*?\[\]]", "", rule.pattern), known, 3, 0.4) or known[:3]
            listed = ", ".join(f"'{name}'" for name in near)
            raise ConfigError(
                f"the pattern '{rule.pattern}' matches no weight of the model" + (f"; similar names are {listed}" if near else "")
            )
