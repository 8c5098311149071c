"""requant help: the pages of the documentation that come with the package, whole or by section."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markdown import Markdown

from requant_onnx.cli.grid import Grid
from requant_onnx.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
COMMANDS, CONVERSION, FORMS, METHOD, ARCHITECTURE = (
    f"{room}README.md" for room in ("cli/", "convert/", "graph/decode/", "numerics/", "")
)


class Topic(NamedTuple):
    """page: path in the package.  heading: heading of the section shown, None for the whole page.  about: what it explains."""

    page: str
    heading: str | None
    about: str


TOPICS = {
    "conversion": Topic(CONVERSION, None, "how a model is converted (whole page)"),
    "operators": Topic(CONVERSION, "Which weights are converted", "which operators and weights are converted"),
    "calibration": Topic(CONVERSION, "Calibration", "inputs for better rounding, noise, and the self-check"),
    "refinement": Topic(CONVERSION, "Refinement", "bias correction, error feedback and descent"),
    "int8": Topic(CONVERSION, "Activations of the int8 form", "ranges of activations, and which nodes run on integers"),
    "budgets": Topic(CONVERSION, "Bits for each weight", "files of a given size or accuracy"),
    "layers": Topic(CONVERSION, "Single layers", "how to keep a layer in float, or to set its bits"),
    "downloads": Topic(CONVERSION, "Downloads", "files that compress well"),
    "defaults": Topic(CONVERSION, "Defaults", "how the defaults were chosen"),
    "limits": Topic(CONVERSION, "Limits", "what the tool cannot do"),
    "forms": Topic(FORMS, None, "what a converted file contains (whole page)"),
    "deploy": Topic(FORMS, "How to run a file", "Python, C++ and JavaScript code"),
    "runtimes": Topic(FORMS, "Runtimes", "ONNX Runtime, OpenVINO, TensorRT, web and mobile"),
    "method": Topic(METHOD, None, "levels, ranges, the error curve and the search (whole page)"),
    "commands": Topic(COMMANDS, None, "the command line (whole page)"),
    "validation": Topic(COMMANDS, "Comparing two models", "how validate compares two models"),
    "detectors": Topic(COMMANDS, "Detectors", "boxes, mAP and heads"),
    "gates": Topic(COMMANDS, "Gates for continuous integration", "exit codes that depend on the quality"),
    "reports": Topic(COMMANDS, "Reports", "web pages, JSON, and tables of recipes"),
    "files": Topic(COMMANDS, "Options in a file", "options in a TOML file"),
    "errors": Topic(COMMANDS, "Errors and exit codes", "errors and exit codes"),
    "terms": Topic(COMMANDS, "Terms", "a glossary: SQNR, alpha, folded, and other terms"),
    "options": Topic(COMMANDS, "All options", "every option of every command"),
    "package": Topic(ARCHITECTURE, None, "the architecture of the package (whole page)"),
    "python": Topic(ARCHITECTURE, "Python", "the Python API"),
}


def run_help(args: argparse.Namespace) -> None:
    """requant help: list the topics, or show one.  Raises ConfigError if there is no such topic."""
    console = Console(emoji=False, highlight=False)
    if args.topic is None:
        grid = Grid("topic", "what it explains")
        for name, topic in TOPICS.items():
            grid.add_row(name, topic.about)
        grid.show(console)
        return
    text = text_of(args.topic)
    if console.is_terminal:
        console.print(Markdown(text, hyperlinks=False))
    else:
        print(text)


def text_of(name: str) -> str:
    """The Markdown of a topic, with links as names of other topics.  Raises ConfigError if there is no such topic."""
    if name not in TOPICS:
        near = [topic for topic, row in TOPICS.items() if name.lower() in re.findall(r"\w+", row.about.lower())]
        near = near or difflib.get_close_matches(name, TOPICS, 1)
        raise ConfigError(
            f"there is no topic '{name}'; " + (f"did you mean '{near[0]}'?" if near else "requant help lists the topics")
        )
    page = PACKAGE / TOPICS[name].page
    return _without_files(_section(page.read_text("utf-8"), TOPICS[name].heading), page)


def _section(text: str, heading: str | None) -> str:
    """The lines from a heading to the next heading of the same or a higher level."""
    if heading is None:
        return text
    lines, level = [], 0
    for line, depth in _lines(text):
        if level and 0 < depth <= level:
            break
        if depth and line[depth:].strip() == heading:
            level = depth
        if level:
            lines.append(line)
    return "\n".join(lines).strip()


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a page, each with its heading level; 0 for lines that are not headings."""
    is_code = False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        match = None if is_code else re.match("#+(?= )", line)
        yield line, len(match[0]) if match else 0


def _without_files(text: str, page: Path) -> str:
    """Replace links to files by their text and topic, replace pictures by their description, and remove comments."""

    def name(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        path = (page.parent / target).resolve() if target else page
        found = [
            name
            for name, topic in TOPICS.items()
            if PACKAGE / topic.page == path and anchor == (topic.heading or "").lower().replace(" ", "-")
        ]
        return f"{match[1]} (`requant help {found[0]}`)" if found else match[1]

    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[([^]]*)\]\([^)]*\)", r"(Picture: \1)", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)([^)]*)\)", name, text)
