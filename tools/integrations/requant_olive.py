"""A pass for Olive (https://github.com/microsoft/Olive): requant convert as a step of a workflow.

    pip install olive-ai requant_onnx
    python requant_olive.py workflow.json

with a pass in workflow.json, which gives options of `requant convert`; width is the option that a search may choose:

    "passes": {"quantize": {"type": "Requant", "options": ["--for", "web"], "width": 4}}

Copy this file to the directory of the workflow.  From Python: `olive.workflows.run(workflow, package_config=package_config())`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.workflows import run

from requant_onnx.cli.main import main as requant


class Requant(Pass):  # type: ignore[misc]
    """Weights of an ONNX model in 2 to 8 bits, by requant convert."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:  # noqa: ARG003
        return {
            "options": PassConfigParam(type_=list, default_value=["--for", "web"], description="options of requant convert"),
            "width": PassConfigParam(type_=int, default_value=None, description="bits per weight, 2 to 8; overrides the options"),
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> ONNXModelHandler:
        output = Path(output_model_path)
        if output.suffix != ".onnx":
            output = output / Path(model.model_path).name
        output.parent.mkdir(parents=True, exist_ok=True)
        width = [] if config.width is None else ["--bits", str(config.width)]
        code = requant(["convert", str(model.model_path), str(output), "--quiet", "--force", *config.options, *width])
        if code:
            raise RuntimeError(f"requant convert ended with exit code {code}; its message is above")
        return ONNXModelHandler(model_path=str(output))


def package_config() -> dict[str, Any]:
    """Olive's own passes, and this one."""
    found: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    anything = {"supported_providers": ["*"], "supported_accelerators": ["*"], "supported_precisions": ["*"]}
    found["passes"]["Requant"] = {"module_path": f"{Path(__file__).stem}.Requant", **anything}
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(sys.argv[1], package_config=package_config())
