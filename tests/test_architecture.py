"""A module's directory determines its permitted imports, each third-party package has one home, and public names are fixed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import requant_onnx

PACKAGE = Path(requant_onnx.__file__).parent
MAP = (PACKAGE / "README.md").read_text("utf-8")
FLOORS = (
    ("errors", "choices", "runtimes", "rules", "config", "progress", "text"),
    ("numerics", "files"),
    ("graph", "inputs"),
    ("runtime",),
    ("convert",),
    ("evaluate",),
    ("webpage",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Rooms and single modules, from the bottom up: each may import from lower floors, but not from its own."""
BASE = FLOORS[0]
ROOMS = tuple(room for floor in FLOORS[1:-1] for room in floor)
HOMES = {
    "argparse": {"cli"},
    "brotli": {"files"},
    "csv": {"cli"},
    "distributed": {"evaluate"},
    "google": {"files"},
    "jinja2": {"webpage"},
    "markupsafe": {"webpage"},
    "matplotlib": {"webpage"},
    "multiprocessing": {"evaluate"},
    "onnxruntime": {"runtime"},
    "PIL": {"inputs", "webpage"},
    "platformdirs": {"evaluate"},
    "pycocotools": {"evaluate"},
    "rich": {"cli"},
    "shtab": {"cli"},
    "threadpoolctl": {"convert"},
    "tomli": {"cli"},
    "tomllib": {"cli"},
    "zstandard": {"files"},
    "numpy": set(ROOMS) - {"cli"},
    "onnx": {"files", "graph", "runtime", "convert", "evaluate", "cli"},
    "onnx_graphsurgeon": {"graph", "runtime"},
}
"""Package -> the rooms that may import it, for every package outside the standard library."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(dotted: tuple[str, ...]) -> str:
    """The room, or top-level module, of a path in the package."""
    return dotted[0] if dotted else "__init__"


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The imported modules of the package, as parts relative to it."""
    for name in imports(path):
        parts = tuple(name.split(".")[1:])
        if name.split(".")[0] == "requant_onnx" and parts:
            yield parts


def below(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def test_every_module_is_in_a_room() -> None:
    known = {name for floor in FLOORS for name in floor}
    assert {room_of(below(path)) for path in modules()} == known


def test_no_module_imports_from_a_room_above_or_beside_its_own() -> None:
    floor_of = {name: k for k, floor in enumerate(FLOORS) for name in floor}
    for path in modules():
        here = room_of(below(path))
        for parts in own_imports(path):
            there = room_of(parts)
            allowed = there == here or floor_of[there] < floor_of[here] or (here in BASE and there in BASE)
            assert allowed, f"{path} is in {here} and imports {'.'.join(parts)}"


def test_no_circle_of_modules() -> None:
    """Nor inside a room.  TopologicalSorter raises CycleError, which names the cycle."""
    known = {below(path): path for path in modules()}
    arrows = {name: [parts for parts in own_imports(path) if parts in known] for name, path in known.items()}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(known)


def test_each_package_has_its_home() -> None:
    for path in modules():
        here = room_of(below(path))
        for name in {name.split(".")[0] for name in imports(path)} - {"requant_onnx"}:
            if name in HOMES:
                assert here in HOMES[name], f"{path} is in {here} and imports {name}"
            else:
                assert name in sys.stdlib_module_names, f"{name}, which {path} imports, has no home in HOMES"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_they_are_for(room: str) -> None:
    """Their __init__ contains only a docstring, and the map repeats it."""
    text = (PACKAGE / room / "__init__.py").read_text("utf-8")
    docstring = importlib.import_module(f"requant_onnx.{room}").__doc__
    assert docstring is not None
    assert len(ast.parse(text).body) == 1
    assert f"| `{room}/` | {' '.join(docstring.split())} |" in MAP


def test_the_map_names_files_that_exist() -> None:
    named = re.findall(r"`([a-z0-9_/]+\.py)`", MAP)
    assert len(named) > 20
    missing = [name for name in named if not (PACKAGE / name).is_file()]
    assert not missing


def test_public_names() -> None:
    assert sorted(requant_onnx.__all__) == [
        "ActivationRange", "ActivationReport", "BiasType", "Budget", "Calibration", "ConfigError", "ConvertedError", "DataError",
        "EdgeLayers", "Explanation", "Form", "FrontPoint", "Granularity", "ImageSet", "InspectReport", "Int8Levels",
        "Int8Speed", "LayerRule", "ModelError",
        "Normalization", "OptimizeFor", "OutputError", "QualityError", "QuantConfig",
         "QuantReport", "RangeMode", "Refinement", "RequantError", "RestoreReport",
        "Runtime", "SavedStage", "Space", "Stage",
        "Transform", "ValidationReport", "WeightReport", "explain", "html_report", "inspect_model", "load_images",
        "load_session", "quantize_model", "quantize_progressively", "restore_model", "save_model", "save_progressive",
        "use_custom_ops", "use_provider", "validate",
    ]  # fmt: skip
    assert all(hasattr(requant_onnx, name) for name in requant_onnx.__all__)
    assert set(requant_onnx.__all__) < set(dir(requant_onnx))
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    typed = {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("requant_onnx")
        for alias in node.names
    }
    assert typed == {name: getattr(requant_onnx, name) for name in requant_onnx.__all__}  # for type checkers and at run time


def test_the_package_is_imported_at_once() -> None:
    code = "import sys, requant_onnx; print('numpy' in sys.modules, 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= 50
    assert sorted(lengths)[len(lengths) // 2] <= 12
