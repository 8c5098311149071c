"""Goals: options that go together, by what a file is for.  Every other option overrides them."""

from __future__ import annotations

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
    "server": Goal("speed on a CPU: integer kernels where they are faster", {"form": "int8", "bits": "8", "int8-levels": "auto"}),
    "edge": Goal("a small file at float speed whose answers hardly change", {"form": "folded", "bits": "5"}),
    "archive": Goal("the smallest file whose outputs keep 35 dB", {"form": "folded", "bits": "auto", "target-sqnr": "35"}),
    "exact": Goal("answers that do not change: 8 bits, fully refined", {"form": "folded", "bits": "8", "refinement": "descent"}),
}


def lines_of(goal: str) -> str:
    """A goal as TOML, to be edited.

    >>> print(lines_of("web"))
    runtime = "web"
    form = "folded"
    bits = "4"
    """
    return "\n".join(f'{name} = "{value}"' for name, value in GOALS[goal].options.items())
