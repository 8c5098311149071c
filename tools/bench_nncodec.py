"""Measure NNCodec, an implementation of the MPEG standard ISO/IEC 15938-17, on the weights of ONNX models, as Markdown tables.

    python tools/bench_nncodec.py models/resnet20_cifar10.onnx other.onnx=imagenet --data cifar10:DIR
    python tools/bench_nncodec.py models/resnet20_cifar10.onnx --data cifar10:DIR --opt-qp --qp -40 -36 -32
    python tools/bench_nncodec.py mobilenetv2_imagenet.onnx=imagenet --data FILE.npz

A suffix gives the normalization with which a model was trained, `=cifar` (default) or `=imagenet`.  The initializers that Conv,
Gemm and MatMul read are coded: those of two and more dimensions are weights, with the step of --qp; biases have that of
--nonweight-qp.  The decoded values are written into a copy of the model, in the type that they had, and the copy is run on all
images.  NNCodec works without data here, with dependent quantization, as it does by default: nothing is fine-tuned.

The download is the bit stream and the rest of the file, without these values, with brotli.  Reading it needs NNCodec's decoder.
Bits per weight count the bit stream only.  The points of one model form a curve, from which the reader chooses.

Needs: pip install nncodec '.[download]'
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import onnx
from accuracy_table import NORMALIZATIONS
from onnx import numpy_helper

from requant_onnx import ImageSet, Normalization, load_images
from requant_onnx.choices import OptimizeFor
from requant_onnx.convert.report import sqnr_db
from requant_onnx.errors import ConfigError, RequantError
from requant_onnx.files.compressed import compress
from requant_onnx.graph.slim import slim
from requant_onnx.inputs.images import batches
from requant_onnx.runtime.classifier import open_classifier

READERS = ("Conv", "Gemm", "MatMul")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
QPS = tuple(range(-36, -19, 2))  # four steps double the distance of two levels; it is 1/256 at -32
NONWEIGHT_QP = -75  # NNCodec's own default
BATCH = 50

Arrays = dict[str, npt.NDArray[np.float32]]
Settings = dict[str, object]


@dataclass(frozen=True)
class Point:
    """One bit stream.  stream, download: bytes.  top1, agreement: 0..1."""

    qp: int
    stream: int
    download: int
    bits: float
    top1: float
    agreement: float
    sqnr_db: float

    def row(self, exact: float) -> str:
        """exact: top-1 of the float model."""
        sizes = f"{self.stream:,} | {self.bits:.2f} | {self.download:,}"
        change = 100 * (self.top1 - exact)
        return f"| {self.qp} | {sizes} | {self.top1:.2%} ({change:+.2f}) | {self.agreement:.2%} | {self.sqnr_db:.1f} dB |"


def codec() -> ModuleType:
    """The module nncodec.nn.  Raises ConfigError if it cannot be imported."""
    try:
        return importlib.import_module("nncodec.nn")
    except ImportError as error:
        raise ConfigError(f"NNCodec cannot be imported ({error}); install it with: pip install nncodec") from None


def parameters(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The float initializers that a reader has as an input, directly or behind a Cast, by name."""
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    read = {casts.get(name, name) for node in model.graph.node if node.op_type in READERS for name in node.input}
    found = {t.name: t for t in model.graph.initializer if t.name in read and t.data_type in FLOATS and t.dims}
    if not found:
        raise ConfigError(f"the model has no float initializers that {', '.join(READERS)} read; give another model")
    return found


def coded(nncodec: ModuleType, values: Arrays, settings: Settings) -> tuple[int, Arrays]:
    """The size of the bit stream in bytes, and the decoded values.  Tensors have numbers instead of names, to save bytes."""
    keys = {str(k): name for k, name in enumerate(values)}
    # NNCodec ignores sparsity in epoch 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = {**settings, "use_dq": True, "verbose": False, "results": folder}
        stream = nncodec.encode({key: values[name] for key, name in keys.items()}, options, epoch=1)
        found = nncodec.decode(stream)
    return len(stream), {name: found[key] for key, name in keys.items()}


def rest(model: onnx.ModelProto) -> int:
    """The brotli size of the file without the coded values, in bytes."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    slim(bare)
    for tensor in parameters(bare).values():
        tensor.CopyFrom(onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    return len(compress(bare.SerializeToString(), OptimizeFor.BROTLI))


def written(model: onnx.ModelProto, values: Arrays) -> onnx.ModelProto:
    """A copy of the model with these values."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for name, tensor in parameters(made).items():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(values[name].astype(dtype), name))
    return made


def scores(model: onnx.ModelProto, images: ImageSet, normalization: Normalization) -> npt.NDArray[np.float32]:
    """(n, classes)"""
    classifier = open_classifier(model, "the model")
    return np.concatenate([classifier.scores(x) for _, x in batches(images, normalization, BATCH, fixed=False)])


def points(
    nncodec: ModuleType,
    model: onnx.ModelProto,
    images: ImageSet,
    normalization: Normalization,
    exact: npt.NDArray[np.float32],
    sweep: list[Settings],
) -> Iterator[Point]:
    """One point for each setting of the sweep.  exact: scores of the float model, (n, classes)."""
    values: Arrays = {name: numpy_helper.to_array(t).astype(np.float32) for name, t in parameters(model).items()}
    weights = sum(value.size for value in values.values() if value.ndim > 1)
    around, tops = rest(model), exact.argmax(1)
    for settings in sweep:
        size, decoded = coded(nncodec, values, settings)
        found = scores(written(model, decoded), images, normalization)
        sqnr = sqnr_db(float(np.square(exact).sum()), float(np.square(exact - found).sum()))
        top1, agreement = (float((found.argmax(1) == wanted).mean()) for wanted in (images.y, tops))
        qp = settings["qp"]
        assert isinstance(qp, int)
        yield Point(qp, size, size + around, 8 * size / weights, top1, agreement, sqnr)


def tables(nncodec: ModuleType, args: argparse.Namespace) -> Iterator[str]:
    """The lines of all models."""
    images = load_images(args.data).first(args.limit)
    if images.y is None:
        raise ConfigError(f"the images of '{args.data}' have no labels; give images with labels")
    base = {"opt_qp": args.opt_qp, "sparsity": args.sparsity, "struct_spars_factor": 0.0, "nonweight_qp": args.nonweight_qp}
    for text in args.models:
        path, _, name = text.partition("=")
        model, normalization = onnx.load(path), NORMALIZATIONS[name or "cifar"]
        exact = scores(model, images, normalization)
        top1 = float((exact.argmax(1) == images.y).mean())
        yield f"\n{Path(path).stem}, float {top1:.2%} of {len(images):,} images, {Path(path).stat().st_size:,} bytes\n"
        yield "| qp | bit stream | bits a weight | download | top-1 (change) | agreement | output SQNR |"
        yield "|---|---|---|---|---|---|---|"
        for point in points(nncodec, model, images, normalization, exact, [{**base, "qp": qp} for qp in args.qp]):
            yield point.row(top1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[=NORMALIZATION]")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="test images: cifar10:DIR or FILE.npz")
    parser.add_argument("--qp", type=int, nargs="+", default=QPS, help=f"the steps of weights (default: {' '.join(map(str, QPS))})")
    parser.add_argument("--nonweight-qp", type=int, default=NONWEIGHT_QP, help="the step of biases (default: %(default)s)")
    parser.add_argument("--opt-qp", action="store_true", help="a larger step for layers with many weights")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of weights that become 0 (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first N images")
    args = parser.parse_args()
    try:
        for line in tables(codec(), args):
            print(line, flush=True)
    except RequantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
