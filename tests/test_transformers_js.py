"""transformers.js from npm finds and runs the file that --for transformers.js writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, OWN_NORMALIZATION, missing
from demo import serve
from demo_screenshot import open_browser
from onnxruntime import InferenceSession

from requant_onnx.cli.main import main

NPM_VERSION = "4.3.2"
PAGE = """<!doctype html><title>transformers.js</title><script type="importmap">{"imports": {
    "onnxruntime-common": "/node_modules/onnxruntime-common/dist/esm/index.js",
    "onnxruntime-web/webgpu": "/node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs"}}</script>
<script type="module">
window.answer = (async () => {
    const {env, pipeline} = await import("/transformers.web.min.js");
    Object.assign(env, {allowRemoteModels: false, allowLocalModels: true, localModelPath: "/"});
    Object.assign(env, {useBrowserCache: false, useWasmCache: false});
    env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
    env.backends.onnx.wasm.numThreads = 1;
    const classify = await pipeline("image-classification", "repo", {dtype: "q4", device: "wasm"});
    return await classify("/image.png", {top_k: 3});
})().catch((error) => `${error.stack}`);
</script>"""


def install_transformers_js() -> Path:
    """Install transformers.js and return its file for browsers, which imports onnxruntime-web."""
    script = serve.BUILD / f"transformers.web-{NPM_VERSION}.min.js"
    if not script.exists():
        if shutil.which("npm") is None:
            missing("npm is missing, which installs transformers.js")
        name = f"@huggingface/transformers@{NPM_VERSION}"
        done = subprocess.run(["npm", "pack", "--silent", name], cwd=serve.BUILD, check=False, capture_output=True, text=True)
        if done.returncode:
            missing(f"npm cannot fetch {name}")
        packed = serve.BUILD / done.stdout.strip()
        with tarfile.open(packed) as archive:
            member = archive.extractfile("package/dist/transformers.web.min.js")
            assert member is not None
            script.write_bytes(member.read())
        packed.unlink()
    return script


def write_repository(folder: Path) -> None:
    """Write ResNet-20 as an exporter of transformers does: config.json, preprocessor_config.json, onnx/model.onnx."""
    model = onnx.load(OWN_MODEL)
    for node in model.graph.node:
        node.input[:] = ["pixel_values" if name == "input" else name for name in node.input]
    model.graph.input[0].name = "pixel_values"
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    labels = {str(k): name for k, name in enumerate(serve.CLASSES)}
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "id2label": labels}))
    images = {"do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    mean = {"image_mean": OWN_NORMALIZATION.mean, "image_std": OWN_NORMALIZATION.std}
    kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images | mean | kind))


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_transformers_js_loads_what_is_written_for_it(tmp_path: Path) -> None:
    pytest.importorskip("selenium")
    write_repository(tmp_path / "repo")
    command = ["convert", str(tmp_path / "repo" / "onnx" / "model.onnx"), str(tmp_path / "repo"), "--for", "transformers.js"]
    assert main([*command, "--calibrate-limit", "8"]) == 0
    (tmp_path / "repo" / "onnx" / "model.onnx").unlink()  # only q4 is left
    pixels = np.load(serve.IMAGES)["x"][serve.SHOWN[1]]
    (tmp_path / "image.png").write_bytes(serve.png(pixels))
    (tmp_path / "index.html").write_text(PAGE)
    try:
        modules = serve.install_runtime().parents[1]
        script = install_transformers_js()
        browser = open_browser()
    except serve.DemoError as error:
        missing(str(error))
    parts = [*modules.glob("onnxruntime-common/dist/esm/*.js"), *modules.glob("onnxruntime-web/dist/*[ms]")]
    site = {f"/node_modules/{path.relative_to(modules).as_posix()}": path for path in parts}
    site |= {f"/{path.relative_to(tmp_path).as_posix()}": path for path in tmp_path.rglob("*") if path.is_file()}
    server = serve.server_of(site | {"/": tmp_path / "index.html", "/transformers.web.min.js": script})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        browser.get(f"http://localhost:{server.server_address[1]}/")
        found = browser.execute_async_script("window.answer.then(arguments[0])")
        log = browser.get_log("browser")
    finally:
        browser.quit()
        server.shutdown()
        server.server_close()
        thread.join()
    assert isinstance(found, list), (found, log)
    session = InferenceSession(tmp_path / "repo" / "onnx" / "model_q4.onnx", providers=["CPUExecutionProvider"])
    scores = np.asarray(session.run(None, {"pixel_values": OWN_NORMALIZATION.apply(pixels.transpose(2, 0, 1)[None])})[0])[0]
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    best = np.argsort(-shares)[:3]
    assert [item["label"] for item in found] == [serve.CLASSES[k] for k in best]
    np.testing.assert_allclose([item["score"] for item in found], shares[best], atol=1e-3)
