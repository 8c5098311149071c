"""Convert three models in every form at 8, 4, 3 and 2 bits, one of them also at 2.33 and 1.6, run the files in other runtimes, and
compare with ONNX Runtime.

    tools/check_runtimes                         the run of CI, which writes nothing
    tools/check_runtimes --all                   also runtimes without a promise
    tools/check_runtimes --all --write tools/runtimes.md

Each runtime runs in its own virtual environment under .venv, in the version given here; JavaScript needs node and npm.
The exit code is 1 if the outputs of a promised runtime differ from those of ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from requant_onnx import Calibration, Form, Int8Speed, QuantConfig, Refinement, Runtime, load_session, quantize_model, save_model
from requant_onnx.evaluate.jobs import open_executor
from requant_onnx.runtimes import RUNTIMES

ROOT = Path(__file__).parents[1]
TOOLS = Path(__file__).parent
NPM_VERSION = "1.30.0"
WIDTHS = (8, 4, 3, 2.33, 2, 1.6)
FRACTIONS = "mixed"  # the subject that is also converted at fractional bits: the smallest, whose channels fill no block
TOLERANCE = {Form.QDQ: 0.02, Form.FOLDED: 0.02, Form.INT8: 0.2}
"""Tolerance relative to the root mean square of the outputs.  By default, ONNX Runtime's MatMulNBits and OpenVINO's fully connected
layers round their inputs to 8 bits; integer kernels round all activations, and a different rounding changes all later values.
Wrong outputs differ by 0.5 or more."""
BROKEN = ("ONNX Runtime 1.24.4", "mixed", Form.INT8)
"""The case that fails on CPUs with AMX: QLinearConv is wrong there, also in 1.23 (issue 26324 of ONNX Runtime; fixed in 1.25)."""
AMX = "amx_int8" in Path("/proc/cpuinfo").read_text()


@dataclass(frozen=True)
class Entry:
    """A runtime.  runner: name in run_models.py, or the npm package.  packages: from PyPI, none for this environment.

    targets: values of --runtime whose files it runs.  promised: whether its outputs must match ONNX Runtime's.
    """

    name: str
    runner: str
    targets: tuple[Runtime, ...]
    packages: tuple[str, ...] = ()
    promised: bool = True


ENTRIES = (
    Entry(
        f"ONNX Runtime {onnxruntime.__version__}",
        "onnxruntime",
        (Runtime.ORT, Runtime.PORTABLE, Runtime.OPENVINO, Runtime.WEB, Runtime.MOBILE),
    ),
    Entry("ONNX Runtime 1.24.4", "onnxruntime", (Runtime.ORT, Runtime.PORTABLE), ("onnxruntime==1.24.4",)),
    Entry("ONNX Runtime 1.20.1", "onnxruntime", (Runtime.ORT, Runtime.PORTABLE), ("onnxruntime==1.20.1",)),
    Entry(f"onnxruntime-node {NPM_VERSION}", "onnxruntime-node", (Runtime.ORT, Runtime.PORTABLE)),
    Entry(f"onnxruntime-web {NPM_VERSION}", "onnxruntime-web", (Runtime.WEB, Runtime.PORTABLE)),
    Entry("OpenVINO 2026.4.1", "openvino", (Runtime.OPENVINO, Runtime.PORTABLE), ("openvino==2026.4.1",)),
    Entry(f"ONNX's ReferenceEvaluator {onnx.__version__}", "reference", (Runtime.PORTABLE,)),
    Entry("OpenCV 5.0.0", "opencv", (Runtime.PORTABLE,), ("opencv-python-headless==5.0.0.93",), promised=False),
    Entry("tract 0.23.9", "tract", (Runtime.PORTABLE,), ("tract==0.23.9",), promised=False),
    Entry("MNN 3.6.1", "mnn", (Runtime.PORTABLE,), ("MNN==3.6.1",), promised=False),
    Entry("TVM 0.27.0", "tvm", (Runtime.PORTABLE,), ("apache-tvm==0.27.0.post1", "onnx"), promised=False),
)


@dataclass(frozen=True)
class Case:
    """A file.  scores: outputs of ONNX Runtime."""

    subject: str
    target: Runtime
    form: Form
    bits: float
    path: Path
    input: Path
    dims: tuple[int, ...]
    scores: np.ndarray


def mixed() -> onnx.ModelProto:
    """A model with odd numbers of channels, depthwise, strided and transposed convolutions, MatMul and Gemm."""
    text = """<ir_version: 8, opset_import: ["": 13]> mixed (float[2, 3, 20, 20] x) => (float[2, 12] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a)
        c = Conv<group = 27, pads = [1, 1, 1, 1]>(b, w2, b2) d = Relu(c)
        e = Conv<strides = [2, 2]>(d, w3, b3) f = Relu(e)
        g = ConvTranspose<strides = [2, 2]>(f, w4, b4) h = Relu(g)
        i = GlobalAveragePool(h) j = Flatten(i) k = MatMul(j, w5) l = Relu(k) m = MatMul(l, w6) n = Relu(m)
        y = Gemm<transB = 1>(n, w7, b7) }"""
    model = parser.parse_model(text)
    shapes = {"w1": (27, 3, 3, 3), "w2": (27, 1, 3, 3), "w3": (40, 27, 1, 1), "w4": (40, 33, 2, 2), "w5": (33, 64), "w6": (64, 45)}
    shapes |= {"w7": (12, 45), "b1": (27,), "b2": (27,), "b3": (40,), "b4": (33,), "b7": (12,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        fan_in = shape[0] if name in ("w4", "w5", "w6") else np.prod(shape[1:]) if len(shape) > 1 else 100
        values = rng.laplace(size=shape, scale=1 / np.sqrt(fan_in)) + (0.2 / fan_in if len(shape) > 1 else 0.0)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return model


def subjects() -> Iterator[tuple[str, onnx.ModelProto, tuple[int, ...]]]:
    """The models, as (name, model, input shape)."""
    for name in ("resnet20", "mobilenet"):
        yield name, onnx.load(ROOT / "models" / f"{name}_cifar10.onnx"), (2, 3, 32, 32)
    yield "mixed", mixed(), (2, 3, 20, 20)


def write_cases(folder: Path, targets: set[Runtime]) -> list[Case]:
    """Convert every subject for every target, in a process per core."""
    for name, _, dims in subjects():
        np.random.default_rng(1).normal(size=dims).astype(np.float32).tofile(folder / f"{name}.f32")
    with open_executor() as executor:
        jobs = [executor.submit(cases_of, folder, name, target) for name, *_ in subjects() for target in sorted(targets, key=str)]
        return [case for job in jobs for case in job.result()]


def cases_of(folder: Path, name: str, target: Runtime) -> list[Case]:
    """Convert a subject for a target, in every form and width."""
    model, dims = next((model, dims) for subject, model, dims in subjects() if subject == name)
    x = np.fromfile(folder / f"{name}.f32", np.float32).reshape(dims)
    cases = []
    for form in RUNTIMES[target].forms:
        for bits in (bits for bits in WIDTHS if name == FRACTIONS or bits % 1 == 0):
            path = folder / f"{name}-{target}-{form}-{bits}.onnx"
            calibration = Calibration(count=16) if form is Form.INT8 else None
            config = QuantConfig(bits, form=form, runtime=target, refinement=Refinement.NONE, int8_speed=Int8Speed.ALL)
            save_model(quantize_model(model, config, calibration=calibration)[0], path)
            session = load_session(path)
            scores = np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])
            cases.append(Case(name, target, form, bits, path, folder / f"{name}.f32", dims, scores))
    return cases


def run(entry: Entry, cases: list[Case], folder: Path) -> dict[str, str]:
    """The verdict by file: 'right', or a description of the failure."""
    outputs = folder / entry.name.replace(" ", "-")
    outputs.mkdir()
    mine = [case for case in cases if case.target in entry.targets]
    listed = [
        {"model": str(case.path), "input": str(case.input), "dims": case.dims, "output": str(outputs / f"{case.path.stem}.f32")}
        for case in mine
    ]
    (outputs / "cases.json").write_text(json.dumps(listed))
    command, where = command_of(entry, folder)
    command = [*command, str(outputs / "cases.json")]
    for _ in mine:  # repeat if native code crashed; finished cases are skipped
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        raise SystemExit(f"{entry.name} does not run: {(done.stdout + done.stderr)[-2000:]}")
    return {case.path.stem: judged(entry, case, outputs / f"{case.path.stem}.f32") for case in mine}


def command_of(entry: Entry, folder: Path) -> tuple[list[str], Path]:
    """The command that runs cases, and its working directory."""
    if entry.runner.startswith("onnxruntime-"):
        if not (folder / "package.json").exists():
            (folder / "package.json").write_text("{}")
            packages = [f"{each.runner}@{NPM_VERSION}" for each in ENTRIES if each.runner.startswith("onnxruntime-")]
            subprocess.run(["npm", "install", "--silent", "--ignore-scripts", *packages], cwd=folder, check=True)
        return ["node", str(TOOLS / "run_model.mjs"), entry.runner], folder
    python = Path(sys.executable)
    if entry.packages:
        environment = ROOT / ".venv" / entry.packages[0].replace("==", "-")
        python = environment / "bin" / "python"
        if not python.exists():
            venv.create(environment, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "numpy", *entry.packages]
            if subprocess.run(install, check=False).returncode:
                shutil.rmtree(environment)
                raise SystemExit(f"{entry.name} cannot be installed: {entry.packages}")
    return [str(python), str(TOOLS / "run_models.py"), entry.runner], ROOT


def judged(entry: Entry, case: Case, output: Path) -> str:
    """The verdict: 'right', or a description of the failure."""
    failure = Path(f"{output}.error")
    if failure.exists():
        return f"refuses: {failure.read_text()[:200]}"
    found = np.fromfile(output, np.float32)
    if found.size != case.scores.size:
        return f"WRONG: {found.size} numbers, not {case.scores.size}"
    error = float(np.linalg.norm(found - case.scores.ravel()) / np.linalg.norm(case.scores))
    if error <= TOLERANCE[case.form]:
        return "right"
    return "broken" if (entry.name, case.subject, case.form) == BROKEN and AMX else f"WRONG: off by {error:.2g}"


def table(results: dict[tuple[str, Runtime], dict[str, list[str]]]) -> str:
    """The table as Markdown, with a row per runtime and target, and a column per form and width."""
    columns = [(form, bits) for form in Form for bits in WIDTHS]
    lines = [
        "| runtime | files of `--runtime` |" + "".join(f" {form} {bits} |" for form, bits in columns),
        "|---" * (len(columns) + 2) + "|",
    ]
    for (name, target), cells in results.items():
        lines.append(f"| {name} | {target} |" + "".join(f" {summary(cells.get(f'{form}-{bits}', []))} |" for form, bits in columns))
    return "\n".join(lines)


def summary(verdicts: list[str]) -> str:
    """The content of a cell, over all models."""
    if not verdicts:
        return ""
    for kind in ("WRONG", "broken", "refuses"):
        count = sum(verdict.startswith(kind) for verdict in verdicts)
        if count:
            return kind if count == len(verdicts) else f"{kind} {count} of {len(verdicts)}"
    return "right"


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also run runtimes without a promise")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table")
    args = parser.parse_args()
    entries = [entry for entry in ENTRIES if entry.promised or args.all]
    results: dict[tuple[str, Runtime], dict[str, list[str]]] = {}
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        cases = write_cases(folder, {target for entry in entries for target in entry.targets})
        print(f"{len(cases)} files written in {time.perf_counter() - started:.0f} s", flush=True)
        for entry in entries:
            started = time.perf_counter()
            verdicts = run(entry, cases, folder)
            wrong = {stem: verdict for stem, verdict in verdicts.items() if verdict not in ("right", "broken")}
            bad += len(wrong) if entry.promised else 0
            print(
                f"{entry.name}: {len(verdicts) - len(wrong)} of {len(verdicts)} right, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            for stem, verdict in wrong.items():
                print(f"    {stem}: {verdict}")
            for case in cases:
                if case.path.stem in verdicts:
                    cell = results.setdefault((entry.name, case.target), {}).setdefault(f"{case.form}-{case.bits}", [])
                    cell.append(verdicts[case.path.stem])
    skipped = [entry.name for entry in ENTRIES if entry not in entries]
    print(table(results))
    print(f"not run: {', '.join(skipped)} (--all)" if skipped else "")
    if args.write:
        args.write.write_text(page(results))
    return 1 if bad else 0


def page(results: dict[tuple[str, Runtime], dict[str, list[str]]]) -> str:
    """The matrix as a page."""
    return f"""# Files in other runtimes

Made on {date.today():%Y-%m-%d} by `tools/check_runtimes --all --write tools/runtimes.md`.

The files are a ResNet-20 and a MobileNet for CIFAR-10 and a network of mixed operators, in every form at 8, 4, 3 and 2 bits
(the last also at 2.33 and 1.6 bits), converted for the `--runtime` of the second column. Their answers are compared with those of
ONNX Runtime {onnxruntime.__version__}: the root
mean square of the difference is at most {TOLERANCE[Form.FOLDED]:g} of that of the scores. In the int8 form it is at most
{TOLERANCE[Form.INT8]:g}, because runtimes round activations to 8 bits in different ways.

{table(results)}

- *right*: all three models give the right answers.
- *refuses*: the runtime reports an error and gives no answer.
- *broken*: ONNX Runtime 1.23 and 1.24 compute QLinearConv incorrectly on CPUs with AMX
  ([issue 26324](https://github.com/microsoft/onnxruntime/issues/26324), fixed in 1.25).

Not tested: onnxruntime-web on WebGPU, because the tests have no GPU, and TensorRT, whose rules `tests/test_runtimes.py` checks
without TensorRT.
"""


if __name__ == "__main__":
    sys.exit(main())
