"""Run models in a runtime, for runtime_matrix.py; needs NumPy and the runtime.

    python run_models.py RUNTIME CASES.json     [{model, input, dims, output}]

Writes the first output of each model as float32, or the error to output + ".error".  Cases whose output exists are skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Runner = Callable[[str, np.ndarray], np.ndarray]


def onnxruntime(model: str, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort  # noqa: PLC0415

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def reference(model: str, x: np.ndarray) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    evaluator = ReferenceEvaluator(model)
    found: list[np.ndarray] = evaluator.run(None, {evaluator.input_names[0]: x})  # type: ignore[assignment]
    return np.asarray(found[0])


def openvino(model: str, x: np.ndarray) -> np.ndarray:
    """Run in OpenVINO.  Fails if a decode of an int8 form remains, because then a layer does not run on integers."""
    import openvino as ov  # noqa: PLC0415

    core = ov.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if "int8" in Path(model).name:
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
        if "Gather" in kinds:
            raise RuntimeError("the decodes are not folded, so layers do not run on integers")
    return np.asarray(next(iter(compiled(x).values())))


def opencv(model: str, x: np.ndarray) -> np.ndarray:
    import cv2  # noqa: PLC0415

    net = cv2.dnn.readNetFromONNX(model)
    net.setInput(x)
    return np.asarray(net.forward())


def tract(model: str, x: np.ndarray) -> np.ndarray:
    import tract as tr  # noqa: PLC0415

    net = tr.onnx().load(model)
    net.set_input_fact(0, ",".join([*map(str, x.shape), "f32"]))
    return np.asarray(net.into_model().into_runnable().run([x])[0].to_numpy())


def mnn(model: str, x: np.ndarray) -> np.ndarray:
    import _tools  # noqa: PLC0415  (a part of MNN; its command mnnconvert installs packages when it runs)
    import MNN  # noqa: PLC0415

    converted = f"{model}.mnn"
    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", model, "--MNNModel", converted, "--bizCode", "x"])
    if not Path(converted).exists():
        raise RuntimeError("the converter writes nothing")
    net = MNN.nn.load_module_from_file(converted, [], [])
    given = MNN.expr.const(x, list(x.shape), MNN.expr.NCHW)
    result = MNN.expr.convert(net.forward(MNN.expr.convert(given, MNN.expr.NC4HW4)), MNN.expr.NCHW)
    return np.asarray(result.read())


def tvm(model: str, x: np.ndarray) -> np.ndarray:
    import onnx  # noqa: PLC0415
    from tvm import relax, runtime  # noqa: PLC0415
    from tvm.relax.frontend.onnx import from_onnx  # noqa: PLC0415

    loaded = onnx.load(model)
    module = from_onnx(loaded, shape_dict={loaded.graph.input[0].name: list(x.shape)})
    machine = relax.VirtualMachine(relax.build(module, "llvm"), runtime.cpu())
    found = machine["main"](runtime.tensor(x))
    return np.asarray((found if hasattr(found, "numpy") else found[0]).numpy())


RUNNERS: dict[str, Runner] = {
    "onnxruntime": onnxruntime,
    "reference": reference,
    "openvino": openvino,
    "opencv": opencv,
    "tract": tract,
    "mnn": mnn,
    "tvm": tvm,
}


def main() -> None:
    run = RUNNERS[sys.argv[1]]
    for case in json.loads(Path(sys.argv[2]).read_text()):
        output = Path(case["output"])
        failure = Path(f"{output}.error")
        if output.exists() or failure.exists():
            continue
        failure.write_text("crashes")  # deleted if the run returns
        x = np.fromfile(case["input"], np.float32).reshape(case["dims"])
        try:
            np.asarray(run(case["model"], x), np.float32).tofile(output)
            failure.unlink()
        except Exception as error:
            failure.write_text(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main()
