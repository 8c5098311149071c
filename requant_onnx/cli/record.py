"""The record of convert-many: one line of JSON a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from requant_onnx.files.atomic import write_atomically

RECORD = "requant.jsonl"


@dataclass(frozen=True)
class Line:
    """What became of one model.

    model, output: paths relative to the folders of models and of results.
    status: converted, copied (nothing to convert) or failed.
    bytes_before, bytes_after: of the files, 0 where it failed.
    sqnr_db: of the weight with the least; None where none has any error.
    digest: SHA-256 of the model, its external data included.  settings: options as TOML, and the version.
    """

    model: str
    output: str
    status: str
    error: str
    bytes_before: int
    bytes_after: int
    converted: int
    skipped: int
    sqnr_db: float | None
    notes: tuple[str, ...]
    seconds: float
    digest: str
    settings: str

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        return self.status != "failed"


def read_record(record: Path) -> dict[str, Line]:
    """The lines of an earlier run; none of those that are damaged."""
    lines = {}
    for text in record.read_text("utf-8").splitlines() if record.is_file() else ():
        try:
            line = Line(**{**json.loads(text), "notes": tuple(json.loads(text)["notes"])})
        except (ValueError, TypeError, KeyError):
            continue
        lines[line.model] = line
    return lines


def write_record(record: Path, lines: Mapping[str, Line]) -> None:
    """Write one line a model, by name."""
    kept = [json.dumps(asdict(lines[name]), allow_nan=False) for name in sorted(lines)]
    write_atomically(record, "".join(f"{line}\n" for line in kept).encode())
