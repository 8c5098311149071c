"""The page: in a real browser, if available, and as text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import laplace, missing, parse, small_cnn

from requant_onnx import ConfigError, ImageSet, QuantConfig, html_report, quantize_model
from requant_onnx.cli.main import main
from requant_onnx.convert.report import Compared, FileSizes, ValidationReport
from requant_onnx.evaluate.examples import Examples
from requant_onnx.evaluate.verdict import Level, judge
from requant_onnx.graph.activations import ActivationRange, activation_ranges
from requant_onnx.graph.constants import ModelGraph
from requant_onnx.graph.flow import Block, flow_of
from requant_onnx.graph.readers import find_readers
from requant_onnx.numerics.outputs import OutputReport
from requant_onnx.webpage.network import draw

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.xdist_group("webpage")  # one page, one browser
HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    onnx.save(small_cnn(), folder / "in.onnx")
    options = ["--bits", "3", "--form", "folded", "--calibrate", "noise", "--html", str(folder / "out.html"), "-q"]
    assert main(["convert", str(folder / "in.onnx"), str(folder / "out.onnx"), *options]) == 0
    return folder / "out.html"


class _Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    parsed = _Ids()
    parsed.feed(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links if not link.startswith("data:"))
    assert not re.search(r"(src|href|action)=.?https?:|@import|url\((?!#)", text)
    for told in (
        "Can I ship this?",
        "error over alpha",
        "weights and levels",
        "scales of the channels",
        "folded at load",
        "feedback",
        "noise",
    ):
        assert told in text
    assert "bits = &#34;3&#34;" in text


@pytest.mark.slow
def test_the_same_run_gives_the_same_charts(page: Path) -> None:
    from requant_onnx.evaluate.weight_comparison import dissect  # noqa: PLC0415
    from requant_onnx.webpage.figures import charts_of  # noqa: PLC0415

    weights = dissect(page.with_name("in.onnx"), page.with_name("out.onnx"), None)
    assert [charts_of(weight, 0) for weight in weights] == [charts_of(weight, 0) for weight in weights]


@pytest.mark.slow
def test_hostile_names_are_text() -> None:
    model = small_cnn()
    for item in model.graph.initializer:
        item.name = HOSTILE if item.name == "w2" else item.name
    model.graph.node[2].input[1] = HOSTILE
    made, report = quantize_model(model, QuantConfig(bits=4))
    text = html_report(model, made, conversion=report, settings=[(HOSTILE, HOSTILE)])
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "{{7*7}}" in text


@pytest.mark.slow
def test_without_images_that_fit_the_weights_are_shown_all_the_same() -> None:
    model = small_cnn()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    made, _ = quantize_model(model, QuantConfig(bits=4))
    text = html_report(model, made)
    assert "Outputs were not compared" in text
    assert "error over alpha" in text
    images = ImageSet(np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64))
    assert "top-1 accuracy" in html_report(model, made, images)


@pytest.mark.slow
def test_pages_do_not_replace_files(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(page.with_name("in.onnx")), str(page.with_name("out.onnx"))]
    before = page.read_bytes()
    for output in (page, page.parent, page.with_name("none") / "a.html", page.with_name("in.onnx")):
        assert main(["report", *models, str(output)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert page.read_bytes() == before
    assert main(["report", *models, str(page.with_name("again.html"))]) == 0
    assert main(["report", models[0], str(page), str(page.with_name("third.html"))]) == 2  # not a model
    assert not page.with_name("third.html").exists()


def test_a_missing_extra_is_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "requant_onnx.webpage.report_page")
    with pytest.raises(ConfigError, match=r"needs 'jinja2'; install it with: pip install 'requant_onnx\[report\]'"):
        html_report(page.with_name("in.onnx"), page.with_name("out.onnx"))


def test_the_verdict_is_that_of_the_worst_reason() -> None:
    report = ValidationReport(
        images=1000, top1=Compared(0.92, 0.918), top1_error=0.003, agreement=0.985, agreement_error=0.004, agreement_of="top-1",
        sqnr_db=25.0, bytes=FileSizes(1000, 200), latency_ms=Compared(1.0, 1.0), latency_spread=Compared(0.0, 0.0),
        latency_ratio=1.0, latency_batch=1, notes=(), outputs=(OutputReport("y", (1, 10), "scores", 25.0, 1.0, 0.1, 0.985),),
    )  # fmt: skip
    sizes = FileSizes(1000, 200)
    assert judge(report, sizes).level is Level.GOOD
    broken = replace(report.outputs[0], sqnr_db=float("nan"))
    for change, level, said in (
        ({"top1": Compared(0.92, 0.905)}, Level.DOUBTFUL, "changes by -1.50 points (standard error 0.30)"),
        ({"top1": Compared(0.92, 0.89)}, Level.BAD, "changes by -3.00 points"),
        ({"agreement": 0.94}, Level.DOUBTFUL, "94.00% of the top-1 answers"),
        ({"agreement": 0.7, "top1": None}, Level.BAD, "70.00% of the top-1 answers"),
        ({"latency_ratio": 1.6}, Level.DOUBTFUL, "takes 1.60 times as long"),
        ({"outputs": (broken,)}, Level.BAD, "The output SQNR is nan"),
        ({"outputs": (replace(broken, sqnr_db=12.0),)}, Level.DOUBTFUL, "The output SQNR is 12.0 dB"),
    ):
        found = judge(replace(report, **change), sizes)
        assert found.level is level
        assert any(said in reason.text for reason in found.reasons if reason.level is level)
    assert judge(None, sizes).level is Level.DOUBTFUL
    assert judge(report, FileSizes(200, 1000)).level is Level.BAD
    assert judge(report, sizes, ("The inputs are noise.",)).level is Level.DOUBTFUL


def test_blocks_are_weights_and_places_where_ways_meet() -> None:
    model = parse(
        """net (float[n, 4, 8, 8] x) => (float[n, 4, 8, 8] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w1)
            b = Sigmoid(a)
            c = Mul(a, b)
            d = Conv<pads = [1, 1, 1, 1]>(c, w2)
            e = Add(d, c)
            y = Relu(e)
        }""",
        w1=laplace(4, 4, 3, 3), w2=laplace(4, 4, 3, 3, seed=1),
    )  # fmt: skip
    graph = ModelGraph.of(model)
    found = [(block.title, block.op, block.reader, block.before) for block in flow_of(graph, find_readers(graph))]
    assert found == [
        ("x", "input", None, ()),
        ("w1", "Conv", 0, (0,)),
        ("w2", "Conv", 1, (1,)),  # both inputs of the swish come from the same block
        ("Add", "Add", None, (1, 2)),
        ("y", "output", None, (3,)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_picture_goes_from_the_top_down_and_no_blocks_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flow = [Block("x", "input", None, ())]
    for k in range(1, 40):
        before = sorted({int(n) for n in rng.integers(max(0, k - 6), k, rng.integers(1, 4))})
        flow.append(Block(f"a name of a block that is rather long, {k}", "Add", None, tuple(before)))
    network = draw(flow, [])
    corners = [(box.x, box.y) for box in network.boxes]
    assert len(set(corners)) == len(flow)
    for block, (_, y) in zip(flow, corners, strict=True):
        assert all(corners[k][1] < y for k in block.before)
    assert all(len(box.name) <= 25 for box in network.boxes)
    assert len(network.lines) == sum(len(block.before) for block in flow)


def test_examples_are_the_inputs_that_differ_most() -> None:
    scores = np.eye(4)[[0, 1, 2, 3, 0]] * 5.0
    other = scores.copy()
    other[3] = [6.0, 0.0, 0.0, 5.0]  # another answer
    other[1] += 0.1
    watched = Examples(np.array([0, 1, 2, 3, 1]), (8, 8))
    watched.add(0, 3, [scores[:3]], [other[:3]])
    watched.add(3, 2, [scores[3:]], [other[3:]])
    assert [(example.index, example.differs) for example in watched.worst] == [(3, True), (1, False)]
    assert watched.worst[0].answers == ("class 3 (98%)", "class 0 (73%)")
    assert watched.worst[0].label == "class 3"
    assert watched.worst[1].sqnr_db == pytest.approx(10 * np.log10(25 / 0.04))
    assert [tuple(asdict(change).values()) for change in watched.changes] == [("class 3", "class 3", "class 0", 1)]


def test_ranges_of_activations_are_read_from_the_graph() -> None:
    model = parse(
        """net (float[n, 8] x) => (float[n, 8] y) {
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
        }""",
        s=np.float32(0.5), z=np.uint8(100),
    )  # fmt: skip
    assert activation_ranges(ModelGraph.of(model)) == [ActivationRange("x", -50.0, 77.5, "uint8")]


def test_the_page_of_a_conversion_shows_no_accuracy(tmp_path: Path) -> None:
    """Calibration images have labels that the model was trained on."""
    onnx.save(small_cnn(), tmp_path / "in.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.integers(0, 256, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 10, 48))
    command = [
        "convert",
        str(tmp_path / "in.onnx"),
        str(tmp_path / "out.onnx"),
        "--html",
        str(tmp_path / "a.html"),
        "-q",
        "--force",
    ]
    data = ["--calibrate", str(tmp_path / "images.npz"), "--calibrate-limit"]
    assert main([*command, *data, "40"]) == 0
    text = (tmp_path / "a.html").read_text()
    assert "<span>top-1 accuracy" not in text
    assert f"Compared on 8 images from {tmp_path / 'images.npz'}" in text
    (tmp_path / "a.html").unlink()
    assert main([*command, *data, "48"]) == 0
    text = (tmp_path / "a.html").read_text()
    assert "<span>top-1 accuracy" not in text
    assert "The conversion also used these inputs" in text


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_every_screen_and_theme_without_errors(browser: Any, page: Path, width: int, theme: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    browser.execute_script("for (const item of document.querySelectorAll('details')) item.open = true")
    root = "document.scrollingElement"
    assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (color == "rgb(255, 255, 255)") is (theme == "light")
    stroke = "return getComputedStyle(document.querySelector('figure svg path[style*=\"--c1\"]')).stroke"
    assert browser.execute_script(stroke).startswith("rgb")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_the_table_sorts_and_links_open_the_details(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())

    def column(k: int) -> list[str]:
        cells = f"[...document.querySelectorAll('[data-sortable] tbody tr')].map(row => row.cells[{k}].textContent.trim())"
        return [str(text) for text in browser.execute_script(f"return {cells}")]

    def click(k: int) -> str:
        browser.execute_script(f"document.querySelectorAll('[data-sortable] thead button')[{k}].click()")
        head = f"document.querySelectorAll('[data-sortable] thead th')[{k}]"
        return str(browser.execute_script(f"return {head}.getAttribute('aria-sort')"))

    names = column(0)
    assert browser.execute_script("return document.querySelectorAll('svg.network a').length") == len(names)
    sqnr = [float(text) for text in column(6)]
    assert len(names) == 4
    assert click(6) == "ascending"
    assert [float(text) for text in column(6)] == sorted(sqnr)
    assert click(6) == "descending"
    assert [float(text) for text in column(6)] == sorted(sqnr, reverse=True)
    assert click(0) == "ascending"
    assert column(0) == names  # in the order of the graph
    assert not browser.execute_script("return document.querySelector('details').open")
    browser.execute_script("document.querySelector('[data-sortable] tbody a').click()")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert browser.execute_script("return document.querySelector('details').open")
    assert browser.get_log("browser") == []


def test_the_page_is_used_by_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By  # noqa: PLC0415
    from selenium.webdriver.common.keys import Keys  # noqa: PLC0415

    browser.get(page.as_uri())
    color = "return getComputedStyle(document.querySelector('svg.network rect.weight')).fill"
    by_error = browser.execute_script(color)
    browser.find_element(By.ID, "by-error").send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(color) != by_error
    links = browser.find_elements(By.CSS_SELECTOR, "svg.network a")
    browser.execute_script("arguments[0].focus()", links[1])
    assert browser.execute_script("return document.activeElement === arguments[0]", links[1])
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert browser.execute_script("return document.querySelectorAll('details')[1].open")
    term = browser.find_element(By.CSS_SELECTOR, "a.term")
    assert term.get_attribute("title")
    term.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector(':target').tagName") == "DT"


def test_nothing_is_cut_on_a_phone(browser: Any, page: Path) -> None:
    """All text is within the page, or within a scrollable box."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(page.as_uri())
    browser.execute_script("for (const item of document.querySelectorAll('details')) item.open = true")
    cut = """return [...document.querySelectorAll('main *')].filter((item) => !item.closest('.scroll, pre')
        && (item.getBoundingClientRect().right > 390.5 || item.scrollWidth > item.clientWidth + 1 && item.clientWidth > 0
            && getComputedStyle(item).overflowX === 'hidden')).map((item) => item.outerHTML.slice(0, 80))"""
    assert browser.execute_script(cut) == []
    inner = """return [...document.querySelectorAll('svg.network text')].filter((text) =>
        text.getComputedTextLength() > 182).map((text) => text.textContent)"""
    assert browser.execute_script(inner) == []
