"""Convert a model above 2 GB with external data, and check that the peak memory is at most 1.5 x its largest tensor + 1 GB.

    python tools/check_large.py                                  # REQuant's recipe at 4 bits: about a minute
    python tools/check_large.py --options "--bits 8" "--bits 4 --form folded --external-data"

Needs 5 GB of disk space in the directory for temporary files.  The model has nine products with matrices of 8192x8192.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

COUNT, SIZE = 9, 8192
TENSOR = SIZE * SIZE * 4
BOUND = 1.5 * TENSOR + 1e9


def write_model(folder: Path) -> Path:
    """Write the model; the weights are generated and written one by one."""
    rows = helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["n", SIZE])
    end = helper.make_tensor_value_info(f"t{COUNT}", TensorProto.FLOAT, ["n", SIZE])
    nodes = [helper.make_node("MatMul", [f"t{k}", f"w{k}"], [f"t{k + 1}"]) for k in range(COUNT)]
    model = helper.make_model(helper.make_graph(nodes, "large", [rows], [end]), opset_imports=[helper.make_opsetid("", 18)])
    with open(folder / "large.bin", "wb") as file:
        for k in range(COUNT):
            tensor = model.graph.initializer.add(name=f"w{k}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "large.bin"), ("offset", k * TENSOR), ("length", TENSOR)):
                tensor.external_data.add(key=key, value=str(value))
            random = np.random.default_rng(k)
            for _ in range(8):
                (random.standard_normal(SIZE * SIZE // 8, np.float32) * 0.01).tofile(file)
    onnx.save(model, folder / "large.onnx")
    return folder / "large.onnx"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="*", default=["--recipe paper --bits 4"], help="options of requant convert for each run")
    args = parser.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder))
        for options in args.options:
            started = time.monotonic()
            output = Path(folder) / "out.onnx"
            command = [sys.executable, "-m", "requant_onnx", "convert", str(source), str(output), "--force", *options.split()]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            worst = max(worst, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
            files = sum(path.stat().st_size for path in Path(folder).glob("out.onnx*"))
            print(f"{options}: {files:,} bytes, {time.monotonic() - started:.0f} s, so far at most {worst:,} bytes of memory")
    print(f"bound: {BOUND:,.0f}")
    return 1 if worst > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
