"""An example of user code, which uses the public names under mypy --strict and in a real run.  tools/check_package runs it.

python user_script.py MODEL.onnx IMAGES.npz OUTPUT.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx

from requant_onnx import (
    Budget,
    Calibration,
    ConfigError,
    ConvertedError,
    Explanation,
    Form,
    ImageSet,
    Normalization,
    QuantConfig,
    QuantReport,
    RequantError,
    Runtime,
    ValidationReport,
    WeightReport,
    __version__,
    explain,
    inspect_model,
    load_images,
    load_session,
    quantize_model,
    restore_model,
    save_model,
    validate,
)

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def convert(source: Path, output: Path, images: ImageSet) -> QuantReport:
    """Convert at four bits, calibrated on 32 images."""
    config = QuantConfig(bits=4, form=Form.FOLDED, runtime=Runtime.WEB, transform="sqrt", rounding="weight")
    model: onnx.ModelProto
    model, report = quantize_model(source, config, calibration=Calibration(images=images, normalization=CIFAR, count=32))
    save_model(model, output)
    return report


def widest(report: QuantReport) -> WeightReport:
    return max(report.converted, key=lambda weight: weight.bits)


def main(source: Path, data: Path, output: Path) -> int:
    images: ImageSet = load_images(str(data))
    report = convert(source, output, images)
    size: int = output.stat().st_size
    explanation: Explanation = explain(output)
    compared: ValidationReport = validate(source, output, images, CIFAR, latency_batch=None)
    restored, _ = restore_model(output)
    session = load_session(restored)
    print(f"requant_onnx {__version__}: {len(report.converted)} weights, {size:,} bytes, widest {widest(report).bits} bits")
    print(len(inspect_model(source).weights), len(explanation.weights), len(session.get_inputs()), compared.agreement)
    try:
        quantize_model(output)
    except ConvertedError as error:
        print(f"refused: {error}")
    try:
        QuantConfig(Budget(size=0))
    except ConfigError as error:
        refusal: RequantError = error
        print(f"refused: {refusal}")
    return 0


def wrong() -> None:
    """Make calls that the types must reject: under --strict, an ignore without an error is an error."""
    import requant_onnx  # noqa: PLC0415

    requant_onnx.quantise_model("net.onnx")  # type: ignore[attr-defined]
    QuantConfig(bits="four")  # type: ignore[arg-type]
    QuantConfig(form=4)  # type: ignore[arg-type]
    quantize_model(3)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(*(Path(name) for name in sys.argv[1:])))
