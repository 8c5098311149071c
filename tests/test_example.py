"""The worked example runs, and its page matches the notebook.  tools/run_example.py --check runs it unchanged."""

from __future__ import annotations

import re

import pytest
import run_example
from conftest import missing, parsed
from demo import serve


def test_the_page_is_the_notebook() -> None:
    assert run_example.page_of(run_example.read_notebook()) == run_example.PAGE.read_text("utf-8")


def test_the_commands_of_the_page_are_commands() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", run_example.PAGE.read_text("utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert len([parsed(command) for command in commands]) == 3


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_cells_run() -> None:
    """Quickly: on 8 images, and with 3 bits everywhere instead of a search for the best bits."""
    try:
        serve.install_runtime()
    except serve.DemoError as error:
        missing(str(error))
    quick = {"COUNT = 64": "COUNT = 8", "Budget(size=SIZE)": "3"}
    notebook = run_example.read_notebook()
    source = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert all(source.count(old) == 1 for old in quick)

    def change(cell: str) -> str:
        for old, new in quick.items():
            cell = cell.replace(old, new)
        return cell

    variables = run_example.run(notebook, change)
    assert variables["sent"]["float"] > 8 * variables["sent"]["converted"]
    assert variables["compared"].agreement > 0.9
    printed = [line for cell in notebook["cells"] for output in cell.get("outputs", ()) for line in output["text"]]
    assert printed[-1].endswith("times smaller\n")
