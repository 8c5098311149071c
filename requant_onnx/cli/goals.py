"""Goals: sets of options by the purpose of a file.  Every option that is given overrides them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple


class Goal(NamedTuple):
    """title: what the file is for.  options: as in a file for --config, by long name."""

    title: str
    options: dict[str, str]


GOALS = {
    "web": Goal("a small download for onnxruntime-web, at float speed", {"runtime": "web", "form": "folded", "bits": "4"}),
    "download": Goal(
        "the smallest download from a server that compresses with brotli, at float speed",
        {"runtime": "web", "form": "folded", "bits": "3", "optimize-for": "download:br"},
    ),
    "transformers.js": Goal(
        "as web, for transformers.js: where OUT is the directory of a model, OUT/onnx/model_q4.onnx",
        {"runtime": "web", "form": "folded", "bits": "4"},
    ),
    "server": Goal("speed on a CPU: integer kernels where they are faster", {"form": "int8", "bits": "8", "int8-levels": "auto"}),
    "edge": Goal("a small file at float speed whose answers hardly change", {"form": "folded", "bits": "5"}),
    "archive": Goal("the smallest file whose outputs keep 35 dB", {"form": "folded", "bits": "auto", "target-sqnr": "35"}),
    "exact": Goal("answers that do not change: 8 bits, fully refined", {"form": "folded", "bits": "8", "refinement": "descent"}),
}

TRANSFORMERS_JS_SUFFIX = {"q4": "_q4", "q8": "_quantized"}
"""dtype -> suffix of the file name, as in DEFAULT_DTYPE_SUFFIX_MAPPING (src/utils/dtypes.js) of transformers.js from 3 on."""


def lines_of(goal: str, names: Collection[str] | None = None) -> str:
    """The options of a goal as TOML.  names: options to include, with underscores (default: all).

    >>> print(lines_of("web"))
    runtime = "web"
    form = "folded"
    bits = "4"
    """
    return "\n".join(
        f'{name} = "{value}"' for name, value in GOALS[goal].options.items() if names is None or name.replace("-", "_") in names
    )


def dtype_of(bits: str) -> str:
    """The dtype with which transformers.js finds a file; it only determines the name of the file.  bits: text of --bits.

    >>> dtype_of("4"), dtype_of("auto"), dtype_of("6")
    ('q4', 'q4', 'q8')
    """
    return "q8" if bits in ("5", "6", "7", "8") else "q4"


def place_for_transformers_js(bits: str, source: Path, directory: Path) -> Path:
    """The path of the file in a model's directory.  Its name starts with that of a source in a directory `onnx`, else with model.

    >>> place_for_transformers_js("4", Path("net.onnx"), Path("repo")).as_posix()
    'repo/onnx/model_q4.onnx'
    >>> place_for_transformers_js("8", Path("repo/onnx/vision_model.onnx"), Path("repo")).as_posix()
    'repo/onnx/vision_model_quantized.onnx'
    """
    name = source.stem if source.absolute().parent.name == "onnx" else "model"
    return directory / "onnx" / f"{name}{TRANSFORMERS_JS_SUFFIX[dtype_of(bits)]}.onnx"
