"""requant in third-party tools: the files of tools/integrations, pre-commit hooks, GitHub action and workflow.

Olive and Ultralytics are not installed, because they need PyTorch: the names that the files import are looked up in their wheels.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import ROOT, missing, parsed, small_cnn, wheel_of
from integrations.requant_ultralytics import on_export_end, quantize_exported

QUICK = ("--for", "web", "--calibrate-limit", "8", "--force-quality")


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def source_of(package: str, path: str) -> str:
    wheel = wheel_of(package)
    if wheel is None:
        missing(f"the wheel of {package} is not in $REQUANT_PACKAGES")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(path).decode()


def exported(folder: Path) -> Path:
    """A model as exported by Ultralytics, with the metadata that it reads later."""
    model = small_cnn()
    onnx.helper.set_model_props(model, {"task": "classify", "names": "{0: 'cat'}"})
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def test_what_ultralytics_exports_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path)
    monkeypatch.setattr("integrations.requant_ultralytics.quantize_exported", lambda path: quantize_exported(path, *QUICK))
    on_export_end(SimpleNamespace(file=tmp_path / "net.pt", args=SimpleNamespace(format="onnx")))
    written = onnx.load(tmp_path / "net_requant.onnx")
    assert (tmp_path / "net_requant.onnx").stat().st_size < path.stat().st_size
    kept = {item.key: item.value for item in written.metadata_props}
    assert kept["names"] == "{0: 'cat'}"


def test_other_formats_and_failures_of_ultralytics_leave_things_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path)
    on_export_end(SimpleNamespace(file=tmp_path / "net.pt", args=SimpleNamespace(format="engine")))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert quantize_exported(tmp_path / "none.onnx") is None
    assert "was not converted (exit code 2)" in capsys.readouterr().out


def test_the_exporter_of_ultralytics_has_what_the_callback_reads() -> None:
    source = source_of("ultralytics", "ultralytics/engine/exporter.py")
    for line in (
        'self.run_callbacks("on_export_end")',
        "callback(self)",
        "self.file = file",
        "fmt = self.args.format = ",
        'f = str(self.file.with_suffix(".onnx"))',
    ):
        assert line in source, line
    assert "def add_callback(self, event: str, func" in source_of("ultralytics", "ultralytics/engine/model.py")


def functions(source: str) -> dict[str, list[str]]:
    """The parameters of all functions and methods of a module, by name."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {node.name: [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)] for node in found}


def test_olive_has_what_the_pass_takes_from_it() -> None:
    """Classes, methods and parameters are checked in its file.  The behavior was tested by hand with 0.13.0."""
    path = ROOT / "tools" / "integrations" / "requant_olive.py"
    own, base = functions(path.read_text("utf-8")), functions(source_of("olive_ai", "olive/passes/olive_pass.py"))
    for name in ("_default_config", "_run_for_config"):
        assert own[name] == base[name]
    for module, name in (
        ("olive/model/__init__.py", "from olive.model.handler import *"),
        ("olive/model/handler/onnx.py", "class ONNXModelHandler("),
        ("olive/passes/__init__.py", '"Pass"'),
        ("olive/passes/pass_config.py", "class PassConfigParam("),
        ("olive/workflows/__init__.py", '"run"'),
        ("olive/package_config.py", "def get_default_config_path() -> str:"),
    ):
        assert name in source_of("olive_ai", module), module
    assert "package_config" in functions(source_of("olive_ai", "olive/workflows/run/run.py"))["run"]
    assert "model_path" in functions(source_of("olive_ai", "olive/model/handler/onnx.py"))["__init__"]


def test_the_hooks_of_pre_commit_are_commands() -> None:
    hooks = {hook["id"]: hook for hook in loaded(".pre-commit-hooks.yaml")}
    text = (ROOT / ".pre-commit-hooks.yaml").read_text("utf-8")
    example = yaml.safe_load("\n".join(line[1:] for line in text.splitlines() if line.startswith("#   ")))
    for hook in example[0]["hooks"]:
        row = hooks[hook["id"]]
        assert (row["language"], row["pass_filenames"]) == ("python", False)
        args = parsed(shlex.join([*row["entry"].split(), *hook["args"]]))
        assert hook["id"] == f"requant-{'convert' if hasattr(args, 'output') else 'validate'}"
    assert {hook["id"] for hook in example[0]["hooks"]} == set(hooks)
    assert example[0]["rev"] == f"v{metadata()['version']}"


def metadata() -> configparser.SectionProxy:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    return config["metadata"]


@pytest.mark.parametrize(("gate", "code"), [("agreement=0", 0), pytest.param("sqnr=300", 4, marks=pytest.mark.slow), ("", 0)])
def test_the_action_converts_and_validates(gate: str, code: int, tmp_path: Path) -> None:
    """The scripts of its steps run as on a runner: bash -e -o pipefail."""
    onnx.save(small_cnn(), tmp_path / "net.onnx")
    (tmp_path / "requant").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m requant_onnx "$@"\n')
    (tmp_path / "requant").chmod(0o755)
    action = loaded(".github/actions/requant/action.yml")
    install, convert, validate = action["runs"]["steps"]
    assert install["run"] == 'python -m pip install --quiet "$PACKAGE"'
    given = {"MODEL": "net.onnx", "OUTPUT": "small.onnx", "GITHUB_OUTPUT": "outputs"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(step: dict[str, Any], options: str) -> int:
        command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
        return subprocess.run(command, cwd=tmp_path, env={**environment, "OPTIONS": options}, check=False).returncode

    assert run(convert, "--bits 8 --calibrate none") == 0
    size = (tmp_path / "small.onnx").stat().st_size
    assert (tmp_path / "outputs").read_text() == f"bytes={size}\n"
    if gate:
        np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
        assert run(validate, f"--data x.npz --fail-below {gate}") == code


def test_the_inputs_of_the_action_reach_its_scripts_as_variables_only() -> None:
    """Inputs inside scripts would be run as commands."""
    action = loaded(".github/actions/requant/action.yml")
    text = (ROOT / ".github" / "actions" / "requant" / "action.yml").read_text("utf-8")
    example = yaml.safe_load("\n".join(line[1:] for line in text.splitlines() if line.startswith("#   ")))[0]
    assert example["uses"].endswith(f"@v{metadata()['version']}")
    parsed(f"requant convert {example['with']['model']} {example['with']['output']} {example['with']['options']}")
    parsed(f"requant validate {example['with']['model']} {example['with']['output']} {example['with']['validate']}")
    used = set()
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
        used |= {re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", value).group(1) for value in step["env"].values()}  # type: ignore[union-attr]
    assert used == set(action["inputs"])
    parsed(f"requant convert net.onnx small.onnx {action['inputs']['options']['default']}")


def test_the_workflow_runs_what_is_there_on_the_versions_that_are_named() -> None:
    workflow = loaded(".github/workflows/check.yml")
    named = re.findall(r"Python :: (3\.\d+)", metadata()["classifiers"])
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == named
    run = (ROOT / ".ci" / "run").read_text("utf-8")
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    for command in commands:
        if command.startswith("tools/"):
            assert os.access(ROOT / command.split()[0], os.X_OK)
            assert command == "tools/check" or command.removesuffix(" dist") in run
    step = workflow["jobs"]["action"]["steps"][-1]
    assert (ROOT / step["uses"] / "action.yml").is_file()
    given = step["with"]
    assert given.keys() <= loaded(".github/actions/requant/action.yml")["inputs"].keys()
    assert (ROOT / given["model"]).is_file()
    parsed(f"requant validate {given['model']} {given['output']} {given['validate']}")
