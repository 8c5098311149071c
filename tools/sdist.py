"""The source distribution: the package, and beside it the tests with the models and tools that they need.

setuptools reads such a list from a file MANIFEST.in at the top only; setup.cfg names this class instead.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.sdist import sdist

DIRECTORIES = (".ci", ".github", "models", "requant_onnx", "tests", "tools")
FILES = (".gitignore", ".pre-commit-hooks.yaml", "CHANGELOG.md")
GENERATED = {"__pycache__", "build"}  # as .gitignore says


class Sdist(sdist):  # type: ignore[misc]
    """The command that writes it."""

    def make_distribution(self) -> None:
        found = [path for name in DIRECTORIES for path in sorted(Path(name).rglob("*")) if path.is_file()]
        kept = [path for path in found if not GENERATED.intersection(path.parts) and path.suffix != ".pyc"]
        self.filelist.extend([str(path) for path in kept] + [name for name in FILES if Path(name).exists()])
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()
