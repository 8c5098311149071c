"""Convert a model in every form, run it in JavaScript, and compare with ONNX Runtime in Python.  Needs node and npm.

    python tools/check_javascript.py [MODEL.onnx]

Sessions have the options that the README's section "Deploy" gives.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from requant_onnx import Calibration, Form, QuantConfig, load_session, quantize_model, save_model

RUNTIMES = ("onnxruntime-node", "onnxruntime-web")
VERSION = "1.30.0"
CASES = {
    "qdq 8 bits": QuantConfig(8),
    "qdq 4 bits": QuantConfig(4),
    "folded 4 bits": QuantConfig(4, form=Form.FOLDED),
    "folded 3 bits": QuantConfig(3, form=Form.FOLDED),
    "int8, 8 bits": QuantConfig(8, form=Form.INT8),
}
OPTIONS = {Form.QDQ: {"extra": {"session": {"disable_quant_qdq": "1"}}}}
TOLERANCE = (
    1e-5  # of the largest score: float32 sums of 576 products in another order differ by sqrt(576) * 6e-8 a layer, 20 layers
)
INT8_TOLERANCE = 0.05  # one activation of 256 levels that rounds the other way moves the scores by up to a few per cent
SCRIPT = Path(__file__).with_name("run_model.mjs")
OWN_MODEL = Path(__file__).parents[1] / "models" / "resnet20_cifar10.onnx"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=OWN_MODEL)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "package.json").write_text("{}")
        packages = [f"{runtime}@{VERSION}" for runtime in RUNTIMES]
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", *packages], cwd=folder, check=True)
        x = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
        x.tofile(folder / "x.f32")
        for case, config in CASES.items():
            wrong += not _is_same(args.model, case, config, folder, x)
    return 1 if wrong else 0


def _is_same(model: Path, case: str, config: QuantConfig, folder: Path, x: np.ndarray) -> bool:
    calibration = Calibration(count=64) if config.form is Form.INT8 else None
    made, _ = quantize_model(model, config, calibration=calibration)
    save_model(made, folder / "model.onnx")
    (folder / "options.json").write_text(json.dumps(OPTIONS.get(config.form, {})))
    session = load_session(folder / "model.onnx")
    expected = np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])
    good = True
    for runtime in RUNTIMES:
        found = _in_javascript(runtime, folder, x).reshape(expected.shape)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        right = error < (INT8_TOLERANCE if config.form is Form.INT8 else TOLERANCE)
        good &= right
        print(f"{case:14} {runtime} {VERSION}: largest difference {error:.1e} of the largest score{'' if right else ' WRONG'}")
    return good


def _in_javascript(runtime: str, folder: Path, x: np.ndarray) -> np.ndarray:
    dims = ",".join(map(str, x.shape))
    command = ["node", str(SCRIPT.resolve()), runtime, "model.onnx", "options.json", "x.f32", dims, "y.f32"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{runtime} fails: {done.stderr[-2000:]}")
    return np.fromfile(folder / "y.f32", np.float32)


if __name__ == "__main__":
    sys.exit(main())
