"""Run the worked example, tools/example.ipynb, and write its output to the notebook and to tools/example.md.

python tools/run_example.py            # half a minute; needs npm, for the part on the browser
python tools/run_example.py --check    # run it without writing anything
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent
NOTEBOOK, PAGE = TOOLS / "example.ipynb", TOOLS / "example.md"


def read_notebook() -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text("utf-8"))
    return notebook


def run(notebook: dict[str, Any], change: Callable[[str], str] = str) -> dict[str, Any]:
    """Run the cells in order, store their output in the notebook, and return their variables.

    change: function applied to the source of each cell.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(change("".join(cell["source"])), f"{NOTEBOOK.name}, cell {count}", "exec"), variables)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        cell["execution_count"] = count
    return variables


def page_of(notebook: dict[str, Any]) -> str:
    """The notebook as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run the example without writing anything")
    args = parser.parse_args()
    notebook = read_notebook()
    run(notebook)
    if not args.check:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
        PAGE.write_text(page_of(notebook), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
