"""Take screenshots of the demo page in headless Chromium, in light and dark, at desktop and phone widths.

    python tools/demo_screenshot.py tools/demo/demo.png

Needs chromium with its chromedriver, selenium and pillow.
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
from base64 import b64decode
from pathlib import Path
from typing import Any

from demo.serve import BUILD, DemoError, build_site, install_runtime, server_of
from PIL import Image

WIDE, NARROW = 1000, 390
GAP = 24


def open_browser() -> Any:
    """A headless Chromium.  Raises DemoError if it is missing."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise DemoError("there is no chromium with its chromedriver")
    from selenium import webdriver  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def open_page(browser: Any, url: str, width: int, scheme: str) -> None:
    """Load the page and wait for its result.  scheme: light or dark."""
    shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(url)
    wait(browser)


def wait(browser: Any) -> None:
    """Wait until both models have answered."""
    browser.set_script_timeout(20)
    state = browser.execute_async_script("""const done = arguments[0];
        const look = () => ["done", "failed"].includes(document.querySelector("main").dataset.state)
            ? setTimeout(() => done(document.querySelector("main").dataset.state), 350) : setTimeout(look, 20);
        look();""")
    if state != "done":
        raise DemoError(browser.execute_script("return document.getElementById('error').textContent"))


def shot(browser: Any) -> Image.Image:
    """The screenshot of the whole page."""
    data = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})["data"]
    return Image.open(io.BytesIO(b64decode(data))).convert("RGB")


def main(path: str) -> int:
    """Join the screenshots at desktop width, light above dark, with those at phone width next to them."""
    server = server_of(build_site(BUILD / "site", install_runtime()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_address[1]}/"
    browser = open_browser()
    try:
        shots = []
        for width, scheme in ((WIDE, "light"), (WIDE, "dark"), (NARROW, "light")):
            open_page(browser, url, width, scheme)
            shots.append(shot(browser))
            print(f"{width} px, {scheme}: {browser.find_element('id', 'slowdown').text} the time of a run")
    finally:
        browser.quit()
        server.shutdown()
    light, dark, phone = shots
    joined = Image.new("RGB", (WIDE + GAP + NARROW, max(light.height + GAP + dark.height, phone.height)), "#c8ced6")
    for item, place in ((light, (0, 0)), (dark, (0, light.height + GAP)), (phone, (WIDE + GAP, 0))):
        joined.paste(item, place)
    joined.quantize(96, dither=Image.Dither.NONE).save(Path(path), optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
