"""Tables for a terminal, which never split a number, and tab-separated lines for a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

GAP = 2  # spaces between columns
NARROWEST = 16  # smallest width to which the first column may be shortened, in the middle of its cells
DROPPED = (
    "gzip bytes", "zstd bytes", "brotli bytes",
    "scale", "alpha", "MSE", "kernel", "largest difference", "cosine", "seconds", "skipped", "transform", "layer", "form", "shape",
    "weights", "bytes before", "x smaller", "op", "kind",
)  # fmt: skip
"""Titles of columns, the least important first: they are omitted if the terminal is too narrow."""


class Grid:
    """Rows of text under titles.  left: titles of left-aligned columns, in addition to the first two."""

    def __init__(self, *titles: str, left: Sequence[str] = ()) -> None:
        self._titles = titles
        self._left = {*titles[:2], *left}
        self._rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row.  cells: one per title, with rich markup."""
        self._rows.append([Text.from_markup(cell, emoji=False).plain for cell in cells])

    def show(self, console: Console) -> None:
        """Print the table, at most as wide as the terminal; to a file or a pipe, print all of it, separated by tabs."""
        if not console.is_terminal:
            for row in [list(self._titles), *self._rows]:
                if not console.quiet:  # rich would turn tabs into spaces
                    console.file.write("\t".join(row).rstrip("\t") + "\n")
            return
        shown = list(range(len(self._titles)))
        for title in DROPPED:
            if self._width(shown) <= console.width:
                break
            shown = [k for k in shown if self._titles[k] != title or k == 0]
        widths = {k: self._widest(k) for k in shown}
        widths[0] = max(min(widths[0], NARROWEST), widths[0] - max(0, self._width(shown) - console.width))
        for number, row in enumerate([list(self._titles), *self._rows]):
            cells = [_cell(row[k], widths[k], self._titles[k] in self._left) for k in shown]
            self._line(console, (" " * GAP).join(cells).rstrip(), "bold" if number == 0 else "")

    def _widest(self, column: int) -> int:
        return max(len(row[column]) for row in [list(self._titles), *self._rows])

    def _width(self, shown: Sequence[int]) -> int:
        return sum(self._widest(k) for k in shown) + GAP * (len(shown) - 1)

    @staticmethod
    def _line(console: Console, text: str, style: str = "") -> None:
        console.print(Text(text, style=style), no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)


def _cell(text: str, width: int, left: bool) -> str:
    """A cell, padded or shortened in the middle.

    >>> _cell("stages.0.conv1.weight", 12, True), _cell("7", 3, False)
    ('stages…weight', '  7')
    """
    if len(text) > width:
        half = width // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.ljust(width) if left else text.rjust(width)
