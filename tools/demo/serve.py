"""Serve a page that runs a float model and its converted file side by side in the browser, with onnxruntime-web.

    python tools/demo/serve.py                     # then open http://localhost:8000
    python tools/demo/serve.py --for download      # another goal of requant convert
    python tools/demo/serve.py --converted my.onnx # your own file, made from models/resnet20_cifar10.onnx

Converts models/resnet20_cifar10.onnx, compresses both files (with gzip, and with brotli if it is installed), installs
onnxruntime-web from npm into tools/demo/build, and serves all of this.  Nothing else is downloaded, and the page loads nothing from
other servers.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from requant_onnx.choices import OptimizeFor
from requant_onnx.cli.goals import GOALS
from requant_onnx.cli.main import main as requant
from requant_onnx.errors import ConfigError
from requant_onnx.files.compressed import compress

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
BUILD = FOLDER / "build"  # which git ignores
NPM_VERSION = "1.30.0"
MODEL = ROOT / "models" / "resnet20_cifar10.onnx"
IMAGES = ROOT / "models" / "sample_images.npz"
SHOWN = (107, 6, 117, 68, 3, 12, 47, 93, 0, 46, 60, 51)  # images of the samples: one or more for each answer that there is
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)  # models/README.md
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".png": "image/png",
    ".json": "application/json",
    ".gz": "application/gzip",
}


class DemoError(Exception):
    """What keeps the demo from starting, in one sentence."""


Site = dict[str, Path]
"""The files by address.  Beside a file, FILE.br and FILE.gz are what is sent to a browser that takes them."""


def install_runtime(build: Path = BUILD) -> Path:
    """The directory of onnxruntime-web's files, installed from npm where it is missing.  Raises DemoError."""
    package = build / "node_modules" / "onnxruntime-web"
    manifest = package / "package.json"
    if not manifest.exists() or json.loads(manifest.read_text())["version"] != NPM_VERSION:
        if shutil.which("npm") is None:
            raise DemoError("npm, which installs onnxruntime-web, is missing; install Node.js")
        build.mkdir(parents=True, exist_ok=True)
        (build / "package.json").write_text("{}")
        command = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", f"onnxruntime-web@{NPM_VERSION}"]
        if subprocess.run(command, cwd=build, check=False).returncode:
            raise DemoError(f"npm cannot install onnxruntime-web {NPM_VERSION}")
    for name in RUNTIME_FILES:
        sent = package / "dist" / f"{name}.gz"
        if not sent.exists():
            sent.write_bytes(gzip.compress((package / "dist" / name).read_bytes(), 6))
    return package / "dist"


def convert(goal: str, output: Path, options: Sequence[str]) -> None:
    """Convert the model of the demo.  Raises DemoError."""
    code = requant(["convert", str(MODEL), str(output), "--for", goal, "--force", "--quiet", *options])
    if code:
        raise DemoError(f"requant convert --for {goal} failed with exit code {code}")


def describe(name: str, title: str, folder: Path) -> dict[str, str | int]:
    """Compress a model of the site, and return what the page says of it."""
    data = (folder / f"{name}.onnx").read_bytes()
    (folder / f"{name}.onnx.gz").write_bytes(compress(data, OptimizeFor.GZIP))
    try:
        (folder / f"{name}.onnx.br").write_bytes(compress(data, OptimizeFor.BROTLI))
    except ConfigError as error:
        print(f"note: gzip is used, because brotli is not available: {error}")
    return {"id": name, "title": title, "url": f"{name}.onnx", "bytes": len(data)}


def png(pixels: np.ndarray) -> bytes:
    """An RGB image (height, width, 3) of uint8 as a PNG file."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def build_site(folder: Path, runtime: Path, goal: str = "web", options: Sequence[str] = (), converted: Path | None = None) -> Site:
    """Make every file that the page needs.  Raises DemoError.

    options: more of them for requant convert.  converted: a file made from the model of the demo, which is shown instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(MODEL, folder / "float.onnx")
    if converted is None:
        convert(goal, folder / "converted.onnx", options)
    elif converted.is_file():
        shutil.copyfile(converted, folder / "converted.onnx")
    else:
        raise DemoError(f"'{converted}' is not a file; give a model that was made from {MODEL.name}")
    made = f"requant, --for {goal}" if converted is None else converted.name
    models = [describe("float", "float, 32 bits", folder), describe("converted", made, folder)]
    pictures = [f"image{index}.png" for index in SHOWN]
    x = np.load(IMAGES)["x"]
    for name, index in zip(pictures, SHOWN, strict=True):
        (folder / name).write_bytes(png(x[index]))
    command = f"requant convert --for {goal}" if converted is None else "requant convert"
    shown = {
        "models": models,
        "command": command,
        "images": pictures,
        "classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        "version": NPM_VERSION,
    }
    (folder / "demo.json").write_text(json.dumps(shown))
    files = {"/": FOLDER / "index.html", "/demo.json": folder / "demo.json"}
    for item in models:
        files |= {f"/{item['url']}": folder / str(item["url"]), f"/{item['url']}.gz": folder / f"{item['url']}.gz"}
    files |= {f"/{name}": folder / name for name in pictures}
    return files | {f"/ort/{name}": runtime / name for name in RUNTIME_FILES}


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for the addresses of a site, compressed where the browser takes it."""

    site: Site

    def do_GET(self) -> None:
        path = self.site.get(self.path.partition("?")[0])
        if path is None:
            self.send_error(404)
            return
        packed, encoding = self._packed(path)
        data = packed.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(data)))
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # for timers of 5 instead of 100 microseconds
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        with contextlib.suppress(ConnectionError):  # the page was closed
            self.end_headers()
            self.wfile.write(data)

    def _packed(self, path: Path) -> tuple[Path, str]:
        """The file that is sent, and its Content-Encoding.  Browsers take brotli over https and from localhost only."""
        accepted = {item.partition(";")[0].strip() for item in self.headers.get("Accept-Encoding", "").split(",")}
        for suffix, encoding in ((".br", "br"), (".gz", "gzip")):
            packed = path.with_name(path.name + suffix)
            if encoding in accepted and packed.exists():
                return packed, encoding
        return path, ""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def server_of(site: Site, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server, at a free port by default; its caller runs serve_forever().  Raises DemoError."""
    try:
        return ThreadingHTTPServer((host, port), type("Handler", (_Handler,), {"site": site}))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(f"cannot listen at {host}:{port} ({reason}); give another --port") from None


def main() -> int:
    """Build the site and serve it until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    what = "address to listen at; 0.0.0.0 also serves other machines, which get gzip instead of brotli"
    parser.add_argument("--host", default="127.0.0.1", help=what)
    parser.add_argument("--for", dest="goal", choices=tuple(GOALS), default="web", help="goal of requant convert (default: web)")
    parser.add_argument("--converted", metavar="FILE", type=Path, help="converted model to show, instead of one made by --for")
    args = parser.parse_args()
    try:
        site = build_site(BUILD / "site", install_runtime(), args.goal, converted=args.converted)
        server = server_of(site, args.host, args.port)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"http://localhost:{server.server_address[1]}  (press Ctrl-C to stop)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
