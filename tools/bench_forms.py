"""Compare size, load time, memory, latency and accuracy of every form with ONNX Runtime's own quantizer, as Markdown.

    python tools/bench_forms.py                                   ResNet-18 and ResNet-50 shapes, and our ResNet-20
    REQUANT_MODELS=DIR python tools/bench_forms.py resnet56_cifar10 googlenet_cifar10
    python tools/bench_forms.py resnet20 --accuracy               also top-1 on the 10,000 CIFAR-10 test images

Latencies are measured in one process for all forms of a model, in turn, with two threads; the table gives ratios of medians.  Load
time and memory are medians of three separate processes.  Calibration uses the same 256 images of CIFAR-10's train split.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from architectures import resnet
from cifar import find_cifar

from requant_onnx import (
    Calibration,
    Form,
    ImageSet,
    Normalization,
    QuantConfig,
    Refinement,
    load_images,
    quantize_model,
    save_model,
)
from requant_onnx.inputs.images import CIFAR_MEAN_STD
from requant_onnx.runtime.sessions import quiet_options

ROOT = Path(__file__).parents[1]
CIFAR = Normalization(*CIFAR_MEAN_STD["cifar10"])
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCHES = {1: 40, 32: 8}  # images -> rounds
NO_DECODE = {"session.disable_quant_qdq": "1"}
PROBE = """
import json, sys, time
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 2
for key, value in json.loads(sys.argv[2]).items():
    options.add_session_config_entry(key, value)
before = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - before
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, peak * 1024]))
"""


@dataclass
class Row:
    """A form of a model.  latency: batch -> times of the runs, in ms."""

    name: str
    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    latency: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A model with the normalization of its images.  labeled: whether its accuracy is meaningful."""

    name: str
    model: onnx.ModelProto
    normalization: Normalization
    labeled: bool

    @property
    def input(self) -> str:
        return str(self.model.graph.input[0].name)


def subject_of(name: str) -> Subject:
    if name in ("resnet18", "resnet50"):
        return Subject(f"ResNet-{name[6:]} shapes", resnet(int(name[6:])), CIFAR, labeled=False)
    if name == "resnet20":
        return Subject("ResNet-20, ours", onnx.load(ROOT / "models" / "resnet20_cifar10.onnx"), CIFAR, labeled=True)
    model = onnx.load(Path(os.environ["REQUANT_MODELS"]) / f"{name}.onnx")
    return Subject(name, model, CIFAR if "googlenet" in name or "preact" in name else IMAGENET, labeled=True)


def rows_of(subject: Subject, train: ImageSet, folder: Path) -> list[Row]:
    """Write every form of a model."""
    calibration = Calibration(train, subject.normalization)
    rows = [Row("float", folder / "float.onnx")]
    onnx.save(subject.model, rows[0].path)

    def ours(name: str, settings: dict[str, str] | None = None, **options: object) -> None:
        config = QuantConfig(**options)  # type: ignore[arg-type]
        path = folder / f"{name.replace(' ', '_')}.onnx"
        model, _ = quantize_model(subject.model, config, calibration=calibration if config.form is Form.INT8 else None)
        save_model(model, path)
        rows.append(Row(name, path, settings or {}))

    for bits in (8, 4):
        ours(f"qdq {bits} bits", bits=bits)
        rows.append(Row(f"qdq {bits} bits, disable_quant_qdq", rows[-1].path, NO_DECODE))
    for bits in (8, 6, 4, 3, 2):
        ours(f"folded {bits} bits", bits=bits, form=Form.FOLDED)
    for bits in (8, 4):
        ours(f"int8 {bits} bits", bits=bits, form=Form.INT8, refinement=Refinement.NONE)
    for name, kind in (("ORT W8A8", "QInt8"), ("ORT W4A8", "QInt4")):
        rows.append(Row(name, folder / f"{kind}.onnx"))
        quantize_with_onnxruntime(subject, train, rows[0].path, rows[-1].path, kind)
    return rows


def quantize_with_onnxruntime(subject: Subject, train: ImageSet, source: Path, output: Path, kind: str) -> None:
    """Run onnxruntime.quantization.quantize_static with its usual settings: QDQ, per channel, uint8 activations, min-max."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415  (slow, and it warns)
    from onnxruntime.quantization.calibrate import CalibrationDataReader  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([subject.normalization.apply(train.x[k : k + 32]) for k in range(0, len(train), 32)])

        def get_next(self) -> dict[str, object] | None:
            x = next(self.batches, None)
            return None if x is None else {subject.input: x}

    if kind == "QInt4":
        raised = onnx.version_converter.convert_version(subject.model, max(21, subject.model.opset_import[0].version))
        source = output.with_suffix(".opset21.onnx")
        onnx.save(raised, source)
    quantize_static(
        source,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=getattr(QuantType, kind),
        per_channel=True,
    )


def measure_latency(subject: Subject, rows: list[Row], x: np.ndarray) -> None:
    """Fill in Row.latency: each round runs every form once, in a rotating order."""
    sessions = []
    for row in rows:
        options = quiet_options()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not occupy the cores
        for key, value in row.settings.items():
            options.add_session_config_entry(key, value)
        sessions.append(onnxruntime.InferenceSession(str(row.path), options, providers=["CPUExecutionProvider"]))
    for batch, rounds in BATCHES.items():
        feed = {subject.input: x[:batch]}
        for k in range(rounds + 2):
            for i in [(i + k) % len(rows) for i in range(len(rows))]:
                started = time.perf_counter()
                sessions[i].run(None, feed)
                if k >= 2:  # the first two are warm-ups
                    rows[i].latency.setdefault(batch, []).append((time.perf_counter() - started) * 1000)
    del sessions
    gc.collect()


def probe(row: Row) -> tuple[float, float]:
    """The load time in s, and the peak memory in MB."""
    command = [sys.executable, "-c", PROBE, str(row.path), json.dumps(row.settings)]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    return statistics.median(f[0] for f in found), statistics.median(f[1] for f in found) / 1e6


def accuracy(subject: Subject, row: Row, test: ImageSet) -> float:
    options = quiet_options()
    for key, value in row.settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(row.path), options, providers=["CPUExecutionProvider"])
    assert test.y is not None
    hits = 0
    for k in range(0, len(test), 100):
        scores = session.run(None, {subject.input: subject.normalization.apply(test.x[k : k + 100])})[0]
        hits += int((np.asarray(scores).argmax(1) == test.y[k : k + 100]).sum())
    return hits / len(test)


def table(subject: Subject, rows: list[Row], top1: Callable[[Row], str]) -> None:
    print(f"\n**{subject.name}**\n")
    print("| form | file | load | memory | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " | top-1 |")
    print("|---" * (5 + len(BATCHES)) + "|")
    reference = {batch: statistics.median(rows[0].latency[batch]) for batch in BATCHES}
    for row in rows:
        seconds, megabytes = probe(row)
        medians = {batch: statistics.median(row.latency[batch]) for batch in BATCHES}
        ratios = " | ".join(f"{medians[batch] / reference[batch]:.2f} ({medians[batch]:.2f} ms)" for batch in BATCHES)
        size = row.path.stat().st_size
        print(f"| {row.name} | {size:,} B | {seconds:.2f} s | {megabytes:.0f} MB | {ratios} | {top1(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50", "resnet20"])
    parser.add_argument("--accuracy", action="store_true")
    args = parser.parse_args()
    folder = find_cifar("cifar10")
    if folder is None:
        sys.exit("CIFAR-10 is missing; see python tools/cifar.py --help")
    train, test = load_images(f"cifar10:{folder}", split="train").first(256), load_images(f"cifar10:{folder}")
    print(f"ONNX Runtime {onnxruntime.__version__}, two threads")
    for name in args.models:
        subject = subject_of(name)
        with tempfile.TemporaryDirectory() as files:
            rows = rows_of(subject, train, Path(files))
            measure_latency(subject, rows, subject.normalization.apply(test.x[: max(BATCHES)]))
            measured = args.accuracy and subject.labeled
            table(subject, rows, lambda row, s=subject, m=measured: f"{accuracy(s, row, test):.2%}" if m else "")  # type: ignore[misc]


if __name__ == "__main__":
    main()
