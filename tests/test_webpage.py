"""The page: in a real browser where there is one, and as text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import missing, small_cnn

from requant_onnx import ConfigError, ImageSet, QuantConfig, html_report, quantize_model
from requant_onnx.cli.main import main

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
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links if link != "data:,")
    assert not re.search(r"(src|href|action)=.?https?:|@import|url\((?!#)", text)
    for told in ("error over alpha", "weights and levels", "scales of the channels", "folded at load", "feedback", "noise"):
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
    assert main(["report", models[0], str(page), str(page.with_name("third.html"))]) == 2  # no model
    assert not page.with_name("third.html").exists()


def test_a_missing_extra_is_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "requant_onnx.webpage.report_page")
    with pytest.raises(ConfigError, match=r"needs 'jinja2'; install it with: pip install 'requant_onnx\[report\]'"):
        html_report(page.with_name("in.onnx"), page.with_name("out.onnx"))


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
        cells = f"[...document.querySelectorAll('tbody tr')].map(row => row.cells[{k}].textContent.trim())"
        return [str(text) for text in browser.execute_script(f"return {cells}")]

    def click(k: int) -> str:
        browser.execute_script(f"document.querySelectorAll('thead button')[{k}].click()")
        return str(browser.execute_script(f"return document.querySelectorAll('thead th')[{k}].getAttribute('aria-sort')"))

    names = column(0)
    sqnr = [float(text) for text in column(6)]
    assert len(names) == 4
    assert click(6) == "ascending"
    assert [float(text) for text in column(6)] == sorted(sqnr)
    assert click(6) == "descending"
    assert [float(text) for text in column(6)] == sorted(sqnr, reverse=True)
    assert click(0) == "ascending"
    assert column(0) == names  # in the order of the graph
    assert not browser.execute_script("return document.querySelector('details').open")
    browser.execute_script("document.querySelector('tbody a').click()")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert browser.execute_script("return document.querySelector('details').open")
    assert browser.get_log("browser") == []
