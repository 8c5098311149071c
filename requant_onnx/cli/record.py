"""The record of convert-many: one line of JSON per model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from requant_onnx.files.atomic import write_atomically

RECORD = "requant.jsonl"


@dataclass(frozen=True)
class Line:
    """The result for one model.

    model, output: paths relative to the directories of models and of results.
    status: converted, copied (nothing to convert) or failed.
    bytes_before, bytes_after: file sizes in bytes, 0 if it failed.
    sqnr_db: lowest SQNR of all weights; None if no weight has any error.
    digest: SHA-256 of the model, including its external data.  settings: options as TOML, digests of the data
    that they name, and the version.
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
        """Whether the result exists."""
        return self.status != "failed"


def read_record(record: Path) -> dict[str, Line]:
    """The lines of an earlier run, without damaged ones."""
    lines = {}
    for text in record.read_text("utf-8").splitlines() if record.is_file() else ():
        try:
            line = Line(**{**json.loads(text), "notes": tuple(json.loads(text)["notes"])})
        except (ValueError, TypeError, KeyError):
            continue
        lines[line.model] = line
    return lines


def write_record(record: Path, lines: Mapping[str, Line]) -> None:
    """Write one line per model, sorted by name."""
    kept = [json.dumps(asdict(lines[name]), allow_nan=False) for name in sorted(lines)]
    write_atomically(record, "".join(f"{line}\n" for line in kept).encode())
