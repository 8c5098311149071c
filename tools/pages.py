"""The pages of the documentation, read as Markdown: their links, anchors, code blocks and inline code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """A code block.  language: language of its fence, '' if none.  is_excused: whether a comment says why no test runs it."""

    page: Path
    line: int
    language: str
    text: str
    is_excused: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """All Markdown pages of the repository, the front page first."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / ".github").glob("*.md")]
    for folder in ("requant_onnx", "models", "tools"):
        found += sorted(page for page in (ROOT / folder).rglob("*.md") if "build" not in page.parts)  # packages from npm
    return found


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def _inline(page: Path, kind: str) -> Iterator[Token]:
    for token in _tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def links(page: Path) -> list[str]:
    """The targets of all links and pictures."""
    found = [str(token.attrs["href"]) for token in _inline(page, "link_open")]
    return found + [str(token.attrs["src"]) for token in _inline(page, "image")]


def anchors(page: Path) -> set[str]:
    """The anchors of all headings, as GitHub makes them."""
    tokens = _tokens(page)
    titles = [after for token, after in pairwise(tokens) if token.type == "heading_open"]
    made: list[str] = []
    for title in titles:
        text = "".join(child.content for child in title.children or ())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in made)
        made.append(f"{slug}-{count}" if count else slug)
    return set(made)


def blocks(page: Path) -> list[Block]:
    """All code blocks, fenced or indented."""
    found, before = [], ""
    for token in _tokens(page):
        if token.type in ("fence", "code_block"):
            line = (token.map or [0])[0] + 1
            found.append(Block(page, line, token.info.strip(), token.content, NOT_RUN.fullmatch(before) is not None))
        before = token.content.strip() if token.type == "html_block" else ""
    return found


def inline_code(page: Path) -> list[str]:
    """All inline code in text and tables."""
    return [token.content for token in _inline(page, "code_inline")]
