"""Compare time, memory and output SQNR of calibrated conversions with those of other tools, as Markdown.

    python tools/bench_peers.py --aimet A/bin/python --nncf N/bin/python

Each option is the Python interpreter of an environment with the tool (aimet-onnx, nncf).  All tools get the same model and 256
noise images.  The output SQNR, relative to the float model, is measured on 64 other images, on ONNX Runtime's CPU provider (for
AIMET, in its own simulation).  Weights have 4 bits and one scale per output channel, with float activations; for tools that do not
support this, weights and activations have 8 bits.  Runs longer than 15 minutes are stopped and marked in the table.  MobileNetV2 is
read from $REQUANT_MODELS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from requant_onnx.inputs.calibration import NATURAL
from requant_onnx.inputs.synthetic import noise_images

ROOT = Path(__file__).parents[1]
LIMIT = 15 * 60  # seconds
IMAGES, JUDGED = 256, 64
START = """
import json, resource, sys, time
import numpy as np, onnx, onnxruntime
path, data, out = sys.argv[1:]
given = np.load(data)
name = onnx.load(path).graph.input[0].name
fitted, judged = [[{name: x[k : k + 16]} for k in range(0, len(x), 16)] for x in (given["fitted"], given["judged"])]
def run(model):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in judged])
started = time.perf_counter()
"""
END = """
seconds = time.perf_counter() - started
np.save(out, outputs())
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
OURS = """
from requant_onnx import Calibration, Form, QuantConfig, quantize_model
made, _ = quantize_model(path, QuantConfig({bits}, form=Form("{form}")), calibration=Calibration.from_feeds(fitted))
outputs = lambda: run(made.SerializeToString())
"""
AIMET = """
import aimet_onnx
from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
sim = aimet_onnx.QuantizationSimModel(
    onnx.load(path), param_type="int4", activation_type="int16", config_file=get_path_for_per_channel_config()
)
for tensor in sim.activation_names:
    if tensor in sim.qc_quantize_op_dict:
        sim.qc_quantize_op_dict[tensor].enabled = False
{step}
sim.compute_encodings(fitted[:1])
outputs = lambda: np.concatenate([sim.session.run(None, feed)[0] for feed in judged])
"""
NNCF = """
import nncf
preset = nncf.QuantizationPreset.MIXED
made = nncf.quantize(onnx.load(path), nncf.Dataset(fitted), subset_size=len(fitted), preset=preset, fast_bias_correction={fast})
outputs = lambda: run(made.SerializeToString())
"""


@dataclass(frozen=True)
class Run:
    """The run of a tool.  python: "ours", or the option that names its interpreter.  code: code that computes `outputs`."""

    title: str
    python: str
    code: str


RUNS = (
    Run("ours, 4-bit weights (folded)", "ours", OURS.format(form="folded", bits=4)),
    Run("AIMET SeqMSE, 4-bit weights", "aimet", AIMET.format(step="aimet_onnx.apply_seq_mse(sim, fitted)")),
    Run("ours, 8-bit weights and activations (int8)", "ours", OURS.format(form="int8", bits=8)),
    Run("NNCF, 8-bit weights and activations", "nncf", NNCF.format(fast=True)),
    Run("NNCF with full bias correction", "nncf", NNCF.format(fast=False)),
    Run("AIMET AdaRound, 4-bit weights", "aimet", AIMET.format(step="aimet_onnx.apply_adaround(sim, fitted)")),
)


def measured(python: str, code: str, model: Path, data: Path, folder: str) -> tuple[str, np.ndarray | None]:
    """The time and memory as text, and the outputs; on failure, a description of it, and None."""
    command = [python, "-W", "ignore", "-c", START + code + END, str(model), str(data), f"{folder}/out.npy"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT, cwd=folder)
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT // 60} minutes |", None
    if done.returncode:
        return f"fails: {done.stderr.strip().splitlines()[-1][:120]} |", None
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return f"{seconds:.1f} s | {peak / 1e9:.2f} GB", np.load(f"{folder}/out.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for tool in ("aimet", "nncf"):
        parser.add_argument(f"--{tool}", metavar="PYTHON", help="Python interpreter of an environment with the tool")
    args = parser.parse_args()
    models = {
        "ResNet-20, 32x32": (ROOT / "models/resnet20_cifar10.onnx", 32),
        "MobileNetV2, 224x224": (Path(os.environ.get("REQUANT_MODELS", ".")) / "mobilenetv2_imagenet.onnx", 224),
    }
    print("| model | tool | time | memory | output SQNR |\n|---|---|---|---|---|")
    for title, (model, size) in models.items():
        if not model.exists():
            print(f"| {title} | skipped: the model is missing | | | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.npz"
            images = [NATURAL.apply(noise_images(count, 3, size, size, seed)) for count, seed in ((IMAGES, 0), (JUDGED, 1))]
            np.savez(data, fitted=images[0], judged=images[1])
            _, exact = measured(sys.executable, "outputs = lambda: run(path)", model, data, folder)
            assert exact is not None
            for run in RUNS:
                python = sys.executable if run.python == "ours" else getattr(args, run.python)
                if python is None:
                    continue
                text, found = measured(python, run.code, model, data, folder)
                sqnr = "" if found is None else f"{10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()):.1f} dB"
                print(f"| {title} | {run.title} | {text} | {sqnr} |", flush=True)


if __name__ == "__main__":
    main()
