"""Data flows one way, and the public names are these."""

from __future__ import annotations

import ast
from pathlib import Path

import requant_onnx

PACKAGE = Path(requant_onnx.__file__).parent
LAYERS = (
    {"errors", "config", "leftovers", "cache"},
    {"jobs"},
    {"numerics"},
    {"graph"},
    {"image_folder"},
    {"data", "noise"},
    {"runtime"},
    {"calibrate", "explain"},
    {"plan", "report"},
    {"execute", "lockstep"},
    {"feedback", "integers", "sensitivity"},
    {"layerwise"},
    {"allocate"},
    {"build"},
    {"budget"},
    {"convert"},
    {"validate", "pairing"},
    {"anatomy", "comparison"},
    {"tables"},
    {"study"},
    {"webpage"},
    {"toml_config"},
    {"options", "values"},
    {"terminal", "outputs"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
)
FORBIDDEN = {
    "numerics": {"onnx", "onnxruntime", "onnx_graphsurgeon", "rich"},
    "graph": {"onnxruntime", "rich"},
    "convert": {"onnxruntime", "rich"},
}


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "requant_onnx":
            names.update(f"requant_onnx.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_a_layer() -> None:
    assert {name for name, _ in modules()} == set().union(*LAYERS)


def test_no_module_imports_from_a_layer_above_its_own() -> None:
    level = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    for name, path in modules():
        for imported in imports(path):
            if imported.startswith("requant_onnx."):
                below = imported.split(".")[1]
                assert level[below] <= level[name], f"{path} imports {imported}"


def test_forbidden_packages() -> None:
    for name, path in modules():
        used = {imported.split(".")[0] for imported in imports(path)}
        assert not used & FORBIDDEN.get(name, set()), path


def test_public_names() -> None:
    assert sorted(requant_onnx.__all__) == [
        "ActivationRange", "ActivationReport", "Budget", "Calibration", "ConfigError", "DataError", "EdgeLayers",
        "Explanation", "Form", "FrontPoint", "Granularity", "ImageSet", "InspectReport", "Int8Levels", "ModelError",
        "Normalization", "OutputError", "QuantConfig", "QuantReport", "RangeMode", "Refinement", "RequantError", "Space",
        "Transform", "ValidationReport", "Version", "WeightReport", "explain", "html_report", "inspect_model", "load_images",
        "load_session", "quantize_model", "save_model", "validate",
    ]  # fmt: skip
    assert all(hasattr(requant_onnx, name) for name in requant_onnx.__all__)


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= 50
    assert sorted(lengths)[len(lengths) // 2] <= 12
