"""The page of tools/demo: both models answer in Chromium as in ONNX Runtime, and the displayed facts about their files hold."""

from __future__ import annotations

import http.client
import threading
import zlib
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import OWN_MODEL, OWN_NORMALIZATION, missing
from demo import serve
from demo_screenshot import open_browser, open_page, wait
from onnxruntime import InferenceSession


class Demo(NamedTuple):
    """browser: driver of Chromium.  folder: directory of the site's files."""

    browser: Any
    url: str
    folder: Path

    def text(self, name: str) -> str:
        return str(self.browser.find_element("id", name).text)


def serving(server: ThreadingHTTPServer) -> threading.Thread:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("selenium")
    folder = tmp_path_factory.mktemp("site")
    try:
        browser = open_browser()
    except serve.DemoError as error:
        missing(str(error))
    try:
        try:
            runtime = serve.install_runtime()
        except serve.DemoError as error:
            missing(str(error))
        server = serve.server_of(serve.build_site(folder, runtime, options=("--calibrate-limit", "8")))
        thread = serving(server)
        yield Demo(browser, f"http://localhost:{server.server_address[1]}/", folder)
        server.shutdown()
        server.server_close()
        thread.join()
    finally:
        browser.quit()


def answer(model: Path, pixels: np.ndarray) -> list[tuple[str, float]]:
    """The three best answers of ONNX Runtime for an image, with their probabilities."""
    session = InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = np.asarray(
        session.run(None, {session.get_inputs()[0].name: OWN_NORMALIZATION.apply(pixels.transpose(2, 0, 1)[None])})[0]
    )[0]
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return [(serve.CLASSES[k], float(shares[k])) for k in np.argsort(-shares)[:3]]


def check_answers(demo: Demo, pixels: np.ndarray) -> None:
    for name, model in (("float", OWN_MODEL), ("converted", demo.folder / "converted.onnx")):
        rows = demo.browser.find_elements("css selector", f"#{name}-scores li")
        shown = [(row.text.split()[0], float(row.text.split()[1]) / 100) for row in rows]
        expected = answer(model, pixels)
        assert shown[0][0] == expected[0][0]
        np.testing.assert_allclose([share for _, share in shown], [share for _, share in expected], atol=1e-3)  # shown: 0.1 %


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_page_shows_what_both_models_answer_and_what_was_sent(demo: Demo) -> None:
    open_page(demo.browser, demo.url, 1000, "light")
    x = np.load(serve.IMAGES)["x"]
    check_answers(demo, x[serve.SHOWN[0]])
    for name in ("float", "converted"):
        sent = int(demo.browser.find_element("id", f"{name}-bytes").get_attribute("data-bytes"))
        assert sent == (demo.folder / f"{name}.onnx.br").stat().st_size
        assert demo.text(f"{name}-sent-as") == "brotli"
        assert demo.text(f"{name}-file") == f"{(demo.folder / f'{name}.onnx').stat().st_size / 1000:,.0f} kB"
        assert float(demo.text(f"{name}-run").removesuffix(" ms")) > 0
    assert float(demo.text("ratio").split()[0]) > 7
    assert demo.text("same") == "same"
    demo.browser.find_elements("css selector", "#pictures button")[3].click()
    wait(demo.browser)
    check_answers(demo, x[serve.SHOWN[3]])


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_page_decompresses_gzip_files_and_takes_pictures(demo: Demo, tmp_path: Path) -> None:
    """Of a picture twice as wide as high, the middle is used."""
    open_page(demo.browser, demo.url, 1000, "dark")
    demo.browser.find_element("css selector", "[value=page]").click()
    wait(demo.browser)
    for name in ("float", "converted"):
        sent = int(demo.browser.find_element("id", f"{name}-bytes").get_attribute("data-bytes"))
        assert sent == (demo.folder / f"{name}.onnx.gz").stat().st_size
        assert demo.text(f"{name}-sent-as") == "gzip file"
    pixels = np.load(serve.IMAGES)["x"][77]
    (tmp_path / "wide.png").write_bytes(serve.png(np.pad(pixels, ((0, 0), (16, 16), (0, 0)))))
    demo.browser.find_element("id", "own").send_keys(str(tmp_path / "wide.png"))
    wait(demo.browser)
    check_answers(demo, pixels)
    assert [entry for entry in demo.browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_nothing_of_the_page_is_cut_on_a_phone(demo: Demo) -> None:
    open_page(demo.browser, demo.url, 390, "dark")
    cut = """return [...document.querySelectorAll('main *')].filter((item) => item.getBoundingClientRect().right > 390.5
        || item.scrollWidth > item.clientWidth + 1 && item.clientWidth > 0 && item.tagName !== 'INPUT')
        .map((item) => item.outerHTML)"""
    assert demo.browser.execute_script(cut) == []
    assert demo.browser.execute_script("return document.documentElement.scrollWidth") == 390


@pytest.fixture
def served(tmp_path: Path) -> Iterator[http.client.HTTPConnection]:
    """A server of one file, /net.onnx, uncompressed, as gzip and as brotli."""
    for suffix in ("", ".gz", ".br"):
        (tmp_path / f"net.onnx{suffix}").write_text(f"net{suffix}")
    server = serve.server_of({"/net.onnx": tmp_path / "net.onnx"})
    thread = serving(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    yield connection
    connection.close()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("accepted", "encoding", "body"),
    [("gzip, deflate, br;q=1.0", "br", "net.br"), ("gzip", "gzip", "net.gz"), ("deflate", None, "net"), ("", None, "net")],
)
def test_files_are_sent_as_the_browser_takes_them(
    served: http.client.HTTPConnection, accepted: str, encoding: str | None, body: str
) -> None:
    served.request("GET", "/net.onnx?at=1", headers={"Accept-Encoding": accepted})
    response = served.getresponse()
    assert (response.status, response.headers["Content-Encoding"]) == (200, encoding)
    assert response.read().decode() == body


@pytest.mark.parametrize("path", ["/net.onnx.gz", "/", "/../net.onnx", "//etc/passwd", "/%2e%2e/net.onnx"])
def test_nothing_else_is_served(served: http.client.HTTPConnection, path: str) -> None:
    served.request("GET", path)
    assert served.getresponse().status == 404


def test_a_port_that_is_taken_is_one_sentence() -> None:
    server = serve.server_of({})
    with pytest.raises(serve.DemoError, match="give another --port"):
        serve.server_of({}, port=int(server.server_address[1]))
    server.server_close()
    with pytest.raises(serve.DemoError, match="give another --port"):
        serve.server_of({}, port=70000)


def test_a_converted_file_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(serve.DemoError, match="is not a file; give a model"):
        serve.build_site(tmp_path, tmp_path, converted=tmp_path / "none.onnx")


def test_without_npm_the_demo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(serve.DemoError, match="npm, which installs onnxruntime-web, is missing"):
        serve.install_runtime(tmp_path)


def test_pictures_are_png_files() -> None:
    data = serve.png(np.zeros((2, 3, 3), np.uint8))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[16:24] == b"\0\0\0\3\0\0\0\2"
    assert zlib.decompress(data[41:-16]) == b"\0" * 2 * 10
