"""The documentation pages: links have targets, commands and options exist, code runs, and `requant help` shows the pages."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT, laplace, small_cnn
from conftest import parse as parse_model
from pages import Block, anchors, blocks, inline_code, links, pages
from test_image_folder import write
from write_options import PAGE, commands, page, whole_parser

from requant_onnx.cli.main import main
from requant_onnx.cli.parser import parse
from requant_onnx.cli.toml_options import read_options
from requant_onnx.cli.topics import PACKAGE, TOPICS, text_of
from requant_onnx.cli.values import config_of
from requant_onnx.files.load import load_model

PAGES = pages()
BLOCKS = [block for path in PAGES for block in blocks(path)]
RUN_ELSEWHERE = {"cpp": "tools/check_cpp.py", "javascript": "tools/check_runtimes", "yaml": "its commands are checked"}
SHELL = ("bash", "console", "yaml", "text", "")  # languages of blocks whose lines may be commands
SLOW = (
    "--max-drop",
    "--size",
    "compare",
    "convert-many",
    "report",
    "--for archive",
    "--for transformers.js",
)  # words of commands that are only parsed
SOURCES = [*(ROOT / "tools").glob("check*"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*/*.py")]
EACH_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def commands_in(text: str) -> Iterator[str]:
    """The single commands of a shell script, without prompts, comments and output."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        stripped = re.sub(r"^\s*(- run: |\$ )?|\s+#.*$", "", line)
        for part in stripped.split(" && "):
            if re.match(r"(requant|python3?|pip|\.) |tools/", part):
                yield part


def documented_commands() -> dict[str, str]:
    """All commands in blocks and in text -> their places."""
    found = {}
    for block in BLOCKS:
        if block.language in SHELL and not block.is_excused:
            found.update(dict.fromkeys(commands_in(block.text), str(block)))
    for path in PAGES:
        codes = [code for code in inline_code(path) if re.match(r"(requant|python|pip|tools/check\w*) ", code)]
        found.update({part: str(path) for code in codes for part in code.split(" && ")})
    return found


COMMANDS = documented_commands()


def is_shape(command: str) -> bool:
    """Whether a command in text is only named (`requant convert`), or shows its syntax (`requant COMMAND --help`)."""
    return re.fullmatch(r"requant (COMMAND|TOPIC|[a-z-]+)( --help| TOPIC)?|requant .*\[.*", command) is not None


@EACH_PAGE
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if not link.startswith(("https://", "http://")):
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), link
            assert there.is_relative_to(ROOT)
            assert not anchor or anchor in anchors(there), link


def test_anchors_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One `--two`: three?\n## One\n### One\n```\n# Not\n```\n")
    assert anchors(tmp_path / "a.md") == {"one---two-three", "one", "one-1"}


def test_the_front_page_is_short_and_has_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 180
    setup = text.partition("\n## Set up\n")[2].partition("\n## ")[0]
    assert [block.count("\n") - block.count("\\\n") for block in re.findall(r"```bash\n(.*?)```", setup, re.DOTALL)] == [1, 1]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("requant ") and not is_shape(c)])
def test_commands_can_be_parsed(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser itself; the settings of conversions are valid too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requant.toml").write_text("")
    try:
        args = parse(whole_parser(), shlex.split(command)[1:])
    except SystemExit as stopped:
        assert stopped.code == 0, COMMANDS[command]  # noqa: PT017
        return
    if hasattr(args, "refinement"):
        config_of(args)
    if args.parser.prog.endswith(" help"):
        assert args.topic is None or text_of(args.topic)


def test_commands_that_are_named_exist() -> None:
    names = {command.split()[1] for command in COMMANDS if command.startswith("requant ") and is_shape(command)}
    assert names - {"COMMAND", "TOPIC"} <= set(commands())


def test_other_commands_exist() -> None:
    """For Python: the file and its options.  For pip: the extra.  All others are listed here."""
    extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().partition("extras_require]")[2], re.MULTILINE)
    known = r"\. \.venv/bin/activate|python3? -m (venv \.venv|requant_onnx)|pip download|pip install (--quiet )?(\.|requant_onnx)"
    for command, where in COMMANDS.items():
        if command.startswith("requant ") or re.fullmatch(known, command):
            continue
        extra = re.fullmatch(r"pip install (?:--quiet |-e )*'(?:\.|requant_onnx)\[([\w,]+)\]'", command)
        tool = re.fullmatch(r"(?:python )?(tools/[\w/]+(?:\.py)?)( .*)?", command)
        if extra:
            assert set(extra[1].split(",")) <= set(extras), f"{where}: {command}"
        else:
            assert tool, f"{where}: nothing here checks '{command}'"
            source = (ROOT / tool[1]).read_text("utf-8")
            source += (ROOT / "tools" / "runtime_matrix.py").read_text("utf-8") if tool[1].endswith("check_runtimes") else ""
            for option in re.findall(r"--[\w-]+", tool[2] or ""):
                assert option in source, f"{where}: {command}"


@EACH_PAGE
def test_no_merge_is_left_half_done(path: Path) -> None:
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text("utf-8"), re.MULTILINE)


@EACH_PAGE
def test_options_in_the_text_exist(path: Path) -> None:
    known = {option for parser in commands().values() for option in parser._option_string_actions}
    known |= {"--version", "--print-completion"}
    tools = "".join(tool.read_text("utf-8") for tool in SOURCES)
    for code in inline_code(path) if path.name != "CHANGELOG.md" else []:
        for option in re.findall(r"(?<!\S)--[a-z0-9][\w-]*", code):
            assert option in known or option in tools, code


def test_every_block_is_accounted_for() -> None:
    """Commands are parsed, Python is run, TOML is read; the rest is checked elsewhere, prose, or excused by a comment."""
    for block in BLOCKS:
        assert block.language in (*SHELL, *RUN_ELSEWHERE, "python", "toml"), str(block)
        if block.language == "bash" and not block.is_excused:
            lines = [line for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines() if line.strip()]
            parts = [part for line in lines for part in re.sub(r"\s+#.*$", "", line).split(" && ")]
            assert parts == list(commands_in(block.text)), f"{block}: not all lines are commands that a test knows"


KEPT = "classifier.1.weight"  # the layer that the front page keeps in float


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the commands of the front page read."""
    model = small_cnn()
    for item in (*model.graph.initializer, *model.graph.node):
        if isinstance(item, onnx.NodeProto):
            item.input[:] = [KEPT if name == "w4" else name for name in item.input]
        elif item.name == "w4":
            item.name = KEPT
    onnx.save(model, tmp_path / "net.onnx")
    text = "net (float[1, 3, 640, 640] x) => (float[1, 6, 20, 20] y) { y = Conv<strides = [32, 32]>(x, w) }"
    onnx.save(parse_model(text, w=laplace(6, 3, 32, 32)), tmp_path / "yolo.onnx")
    (tmp_path / "zoo").mkdir()
    shutil.copy(tmp_path / "net.onnx", tmp_path / "zoo")
    for k in range(8):
        write(tmp_path / f"photos/{k}.png", 20 + k, 30, seed=k)
        write(tmp_path / f"val/{'ab'[k % 2]}/{k}.png", 20 + k, 30, seed=k)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table_commands() -> list[str]:
    return [code for code in inline_code(ROOT / "README.md") if re.match(r"requant [a-z-]+ \S+\.onnx ", code)]


@pytest.mark.slow
def test_the_commands_of_the_front_page_run(workplace: Path) -> None:
    ran = 0
    for command in table_commands():
        if not any(word in command for word in SLOW):
            options = ["--calibrate-limit", "8", "--force-quality", "--force"] if " convert " in command else []
            assert main([*shlex.split(command)[1:], "--quiet", *options]) == 0, command
            ran += 1
    assert ran >= 8
    for name in ("small", "phone", "trt"):
        load_model(workplace / f"{name}.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and "example.md" not in str(b)], ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a small model and the sample images, at the paths that the code uses; `run_example.py` runs the example."""
    model = small_cnn()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 32
    model.graph.input[0].name = model.graph.node[0].input[0] = "input"
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "sample_images.npz", tmp_path / "models")
    for name in ("models/resnet20_cifar10.onnx", "small.onnx"):
        onnx.save(model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"x": np.zeros((1, 3, 32, 32), np.float32)})
    assert "Error" not in capsys.readouterr().out


def test_toml_is_read(tmp_path: Path) -> None:
    for k, block in enumerate(block for block in BLOCKS if block.language == "toml"):
        path = tmp_path / f"{k}.toml"
        path.write_text(block.text, "utf-8")
        assert read_options(path, "convert", commands())


def test_the_page_lists_the_options_as_they_are() -> None:
    """After a change of an option, its default or its help, run: python tools/write_options.py."""
    assert PAGE.read_text("utf-8") == page()


@pytest.mark.parametrize("name", TOPICS)
def test_topics_are_pages_and_sections_that_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", name]) == 0
    printed = capsys.readouterr().out
    heading = TOPICS[name].heading
    assert printed.startswith("# " if heading is None else f"## {heading}\n")
    assert printed.count("\n") > 5
    assert printed.count("```") % 2 == 0
    assert not re.search(r"\]\((?!https)|<!--", re.sub(r"```.*?```|`[^`]*`", "", printed, flags=re.DOTALL))


def test_help_lists_the_topics_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}\t" in printed for name in TOPICS)
    assert main(["help", "form"]) == 2
    assert capsys.readouterr().err == "error: there is no topic 'form'; did you mean 'forms'?\n"
    assert main(["help", "zzz"]) == 2
    assert capsys.readouterr().err == "error: there is no topic 'zzz'; requant help lists the topics\n"


def test_a_link_to_a_topic_names_it() -> None:
    assert "(`requant help options`)" in text_of("conversion")
    assert "tools/results.md](" not in text_of("conversion")


def test_every_page_of_the_package_is_a_topic_and_is_installed() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.md")}
    assert found == {topic.page for topic in TOPICS.values()}
    patterns = (ROOT / "setup.cfg").read_text().partition("package_data]")[2].partition("[")[0].split()
    assert all(any(Path(page).match(pattern) and page.count("/") == pattern.count("/") for pattern in patterns) for page in found)
