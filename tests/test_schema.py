"""The JSON reports match their schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import ROOT, small_cnn

from requant_onnx.cli.main import main
from requant_onnx.convert.schema import report_schema

STORED = ROOT / "requant_onnx/report.schema.json"


def test_the_stored_schema_is_that_of_the_types() -> None:
    assert json.loads(STORED.read_text("utf-8")) == report_schema()  # python -m requant_onnx.convert.schema > it


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reports")
    source, made, data = (str(folder / name) for name in ("in.onnx", "out.onnx", "data.npz"))
    onnx.save(small_cnn(), source)
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8), y=rng.integers(0, 10, 20))
    commands = {
        "convert": ["convert", source, made, "--bits", "4"],
        "validate": ["validate", source, made, "--data", data],
        "inspect": ["inspect", source, "--sensitivity", "--limit", "4"],
    }
    for name, command in commands.items():
        assert main([*command, "--json", str(folder / f"{name}.json")]) == 0
    return {name: json.loads(Path(folder / f"{name}.json").read_text()) for name in commands}


@pytest.mark.parametrize("kind", ["convert", "validate", "inspect"])
def test_reports_are_valid(kind: str, reports: dict[str, dict[str, Any]]) -> None:
    schema = report_schema()
    one = {"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(reports[kind], one)
    assert reports[kind]["schema_version"] == 1
    damaged = {key: value for key, value in reports[kind].items() if key not in {"skipped", "bytes"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, one)
