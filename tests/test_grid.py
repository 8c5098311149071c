"""Tables: no number is split, at any width; piped output has tabs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from requant_onnx.cli.grid import Grid

WIDTHS = (40, 60, 80, 120, 200)


def shown(grid: Grid, width: int, *, terminal: bool = True) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, no_color=True, color_system=None)
    grid.show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def weights() -> Grid:
    grid = Grid("weight", "op", "shape", "bits", "transform", "alpha", "scale", "MSE", "SQNR dB", "bytes before", "after")
    for k in range(3):
        name = f"backbone/stages.{k}/conv1/with/a/long/path/weight_quantized"
        grid.add_row(name, "Conv", "64x64x3x3", "4", "sqrt", "0.7..0.9", "0.01..0.02", "1.2e-04", "19.3", "147,456", "18,701")
    return grid


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_fit_and_numbers_are_whole(width: int) -> None:
    lines = shown(weights(), width)
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)
    assert all("18,701" in line and "19.3" in line for line in lines[1:])  # the most important columns are dropped last
    assert {line.split()[0][:5] for line in lines[1:]} == {"backb"}


def test_a_pipe_gets_everything_apart_by_tabs() -> None:
    lines = shown(weights(), 80, terminal=False)
    rows = [line.split("\t") for line in lines]
    assert {len(row) for row in rows} == {11}
    assert rows[1][0] == "backbone/stages.0/conv1/with/a/long/path/weight_quantized"


def test_names_with_brackets_stay_as_they_are() -> None:
    grid = Grid("weight", "op")
    grid.add_row("a\\[bold]b", "Conv")
    assert shown(grid, 80)[1].split() == ["a[bold]b", "Conv"]
