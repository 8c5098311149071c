"""Setuptools commands that are specific to this project; setup.cfg names them.

The source distribution also contains the tests, with the models and tools that they need; setuptools could read such a list only
from a file MANIFEST.in in the top directory.  The description for package indexes is the README without links to files, because
the files do not exist on the index.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

DIRECTORIES = (".ci", ".github", "models", "requant_onnx", "tests", "tools")
FILES = (".gitignore", ".pre-commit-hooks.yaml", "CHANGELOG.md")
GENERATED = {"__pycache__", "build"}  # as in .gitignore
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[([^\]]+)\]\((?!https?://|#)[^)\s]+\)")


def without_links_to_files(text: str) -> str:
    """Markdown with links to files replaced by their text, and pictures by their description."""
    return "".join(part if part.startswith("```") else LINK.sub(r"\1", part) for part in FENCED.split(text))


class EggInfo(egg_info):  # type: ignore[misc]
    """The command that provides the metadata of both distributions."""

    def run(self) -> None:
        metadata = self.distribution.metadata
        metadata.long_description = without_links_to_files(metadata.long_description)
        super().run()


class Sdist(sdist):  # type: ignore[misc]
    """The command that writes the source distribution."""

    def make_distribution(self) -> None:
        found = [path for name in DIRECTORIES for path in sorted(Path(name).rglob("*")) if path.is_file()]
        kept = [path for path in found if not GENERATED.intersection(path.parts) and path.suffix != ".pyc"]
        self.filelist.extend([str(path) for path in kept] + [name for name in FILES if Path(name).exists()])
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()
