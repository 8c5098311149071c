"""Compile the C++ code in the documentation of forms, and compare its results with those of Python.  Needs g++ and npm.

    python tools/check_cpp.py

The library of ONNX Runtime comes from the npm package onnxruntime-node.  No npm package for Linux has its headers; the package
for Unity has the same ones.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from requant_onnx import Calibration, Form, QuantConfig, Refinement, load_session, quantize_model, save_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "requant_onnx" / "graph" / "decode" / "README.md"
LIBRARY = ("onnxruntime-node@1.30.0", "package/bin/napi-v6/linux/x64/libonnxruntime.so.1")
INSIDE = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"
HEADERS = ("com.github.asus4.onnxruntime@0.4.9", INSIDE)
FORMS = {Form.QDQ: 4, Form.FOLDED: 3, Form.INT8: 8}
TOLERANCE = 1e-5
MAIN = """
#include <array>
#include <fstream>
#include <vector>
{includes}
int main() {{
    {lines}
    std::ofstream("scores.f32", std::ios::binary).write(reinterpret_cast<const char*>(scores), 10 * sizeof(float));
}}
"""


def main() -> int:
    """Check every form."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package, inside in (LIBRARY, HEADERS):
            unpack(package, inside, folder)
        write_program(folder)
        command = ["g++", "-std=c++17", "-I.", "main.cpp", "./libonnxruntime.so.1", "-Wl,-rpath,.", "-o", "main"]
        subprocess.run(command, cwd=folder, check=True)
        wrong = [form for form, bits in FORMS.items() if not is_same(form, bits, folder)]
        return 1 if wrong else 0


def unpack(package: str, inside: str, folder: Path) -> None:
    """Unpack a file, or the files of a directory, of an npm package into a directory."""
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True)
    with tarfile.open(folder / done.stdout.strip()) as archive:
        for item in archive:
            if item.isfile() and item.name.startswith(inside):
                data = archive.extractfile(item)
                assert data is not None
                (folder / Path(item.name).name).write_bytes(data.read())


def write_program(folder: Path) -> None:
    """Write a program with the code from the documentation of forms, and pixels from a file."""
    code = re.search(r"```cpp\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert code is not None
    lines = code[1].splitlines()
    includes = [line for line in lines if line.startswith("#")]
    body = "\n".join(line for line in lines if not line.startswith("#"))
    read = 'std::ifstream("pixels.f32", std::ios::binary).read(reinterpret_cast<char*>(pixels.data()), pixels.size() * 4);'
    filled, count = re.subn(r"(std::vector<float> pixels\(.*\n)", rf"\1{read}\n", body)
    assert count == 1
    (folder / "main.cpp").write_text(MAIN.format(includes="\n".join(includes), lines=filled))


def is_same(form: Form, bits: int, folder: Path) -> bool:
    """Convert in one form, run in C++, and compare."""
    x = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    calibration = Calibration(count=16) if form is Form.INT8 else None
    config = QuantConfig(bits, form=form, refinement=Refinement.NONE)
    made, _ = quantize_model(ROOT / "models" / "resnet20_cifar10.onnx", config, calibration=calibration)
    save_model(made, folder / "small.onnx")
    x.tofile(folder / "pixels.f32")
    subprocess.run(["./main"], cwd=folder, check=True)
    scores = np.fromfile(folder / "scores.f32", np.float32)
    expected = np.asarray(load_session(folder / "small.onnx").run(None, {"input": x})[0]).ravel()
    error = float(np.abs(scores - expected).max() / np.abs(expected).max())
    limit = TOLERANCE if form is not Form.INT8 else 0.05
    print(f"C++, {form} {bits} bits: largest difference {error:.1e} of the largest score{'' if error <= limit else ' WRONG'}")
    return error <= limit


if __name__ == "__main__":
    sys.exit(main())
