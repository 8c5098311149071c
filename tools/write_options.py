"""Write the options of every command, and the terms, from the code into the page on the command line.

    python tools/write_options.py           # after a change of an option, its default or its help

A test compares the page with the parser.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from requant_onnx.cli.options import parser_of
from requant_onnx.cli.parser import commands_of
from requant_onnx.webpage.terms import TERMS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "requant_onnx" / "cli" / "README.md"
START, END = "<!-- options: written by python tools/write_options.py, from here -->", "<!-- options: to here -->"
TERMS_START, TERMS_END = "<!-- terms: written by python tools/write_options.py, from here -->", "<!-- terms: to here -->"


def whole_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with commands that do nothing."""
    return parser_of(*[_nothing] * len(inspect.signature(parser_of).parameters))


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, by name."""
    return commands_of(whole_parser())


def page() -> str:
    """The whole page, with the options and the terms as they are now."""
    before, _, rest = PAGE.read_text("utf-8").partition(TERMS_START)
    terms = "\n".join(f"- **{term}**: {text}" for term, text in sorted(TERMS.items(), key=lambda item: item[0].lower()))
    before, _, rest = f"{before}{TERMS_START}\n\n{terms}\n\n{TERMS_END}{rest.partition(TERMS_END)[2]}".partition(START)
    written: list[str] = []
    first: dict[str, str] = {}
    for name, parser in commands().items():
        rows = _rows(parser)
        written += _command(name, parser, rows, first)
        first = first or rows
    return f"{before}{START}\n{chr(10).join(written)}\n\n{END}{rest.partition(END)[2]}"


def _nothing(_: argparse.Namespace) -> None: ...


def _rows(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The names and meanings of a command's arguments, with the titles of groups, which have no meaning, between them."""
    rows = {}
    for group in parser._action_groups:
        if group not in (parser._positionals, parser._optionals):
            rows[f"**{group.title}**"] = ""
        rows.update({_name(action): _plain(parser, action) for action in group._group_actions})
    return rows


def _command(name: str, parser: argparse.ArgumentParser, rows: dict[str, str], first: dict[str, str]) -> Iterator[str]:
    """The lines of a command.  first: rows of the first command, which are not repeated."""
    files = "".join(f" [{a.metavar}]" if a.nargs == "?" else f" {a.metavar}" for a in parser._get_positional_actions())
    options = " [options]" if "--config" in parser._option_string_actions else ""
    yield f"\n### requant {name}\n"
    yield f"`requant {name}{files}{options}`\n"
    yield "| option | meaning |"
    yield "|---|---|"
    same = [row for row, text in rows.items() if row.startswith("`-") and first.get(row) == text]
    left = [row for row in rows if row not in same]
    for row, following in zip(left, [*left[1:], "**"], strict=True):
        if rows[row] or not following.startswith("**"):  # omit the title of an empty group
            yield f"| {row} | {rows[row]} |"
    if same:
        yield f"\nThese options are the same as for `requant {next(iter(commands()))}`: {'; '.join(same)}."
    if parser.epilog:
        yield f"\n```text\n{parser.epilog}\n```"


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names[:-1]} {action.metavar}`"


def _plain(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an option, with Markdown characters escaped."""
    text = (action.help or "") % {"prog": parser.prog, "default": action.default}
    return re.sub(r"([*_|<>\\`])", r"\\\1", text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
