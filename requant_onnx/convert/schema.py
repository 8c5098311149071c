"""The JSON Schema of the reports (https://json-schema.org, draft 2020-12), generated from their types.

It is in requant_onnx/report.schema.json, for tools that read --json reports; `python -m requant_onnx.convert.schema` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from requant_onnx.convert.report import SCHEMA_VERSION, InspectReport, QuantReport, ValidationReport

Schema: TypeAlias = dict[str, Any]
NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}  # JSON has no infinity
PLAIN: dict[Any, Schema] = {
    int: {"type": "integer"},
    float: NUMBER,
    str: {"type": "string"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    Any: {},
}


def report_schema() -> Schema:
    """The schema of the reports of convert, validate and inspect; further keys are allowed."""
    kinds = {"convert": QuantReport, "validate": ValidationReport, "inspect": InspectReport}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://requant-onnx/report/{SCHEMA_VERSION}",
        "title": "Reports of requant_onnx",
        "anyOf": [{"$ref": f"#/$defs/{kind}"} for kind in kinds],
        "$defs": {kind: _object(report) for kind, report in kinds.items()},
    }


def _object(kind: Any) -> Schema:
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind)]
    return {"type": "object", "properties": {name: _of(hints[name]) for name in names}, "required": names}


def _of(hint: Any) -> Schema:
    """The schema of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        schema = PLAIN[hint]
    elif origin in (Union, UnionType):
        schema = {"anyOf": [_of(each) for each in arguments]}
    elif origin is tuple:
        schema = {"type": "array", "items": _of(arguments[0])}
    elif origin in (dict, Mapping):
        schema = {"type": "object", "additionalProperties": _of(arguments[1])}
    elif is_dataclass(hint):
        schema = _object(hint)
    else:  # a NamedTuple
        values = [_of(each) for each in get_type_hints(hint).values()]
        schema = {"type": "array", "prefixItems": values, "minItems": len(values), "maxItems": len(values)}
    return schema


if __name__ == "__main__":
    print(json.dumps(report_schema(), indent=1))
