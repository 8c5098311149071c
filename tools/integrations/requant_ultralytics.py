"""Quantize the ONNX exports of Ultralytics (https://github.com/ultralytics/ultralytics).

    from ultralytics import YOLO
    from requant_ultralytics import on_export_end

    model = YOLO("yolo11n.pt")
    model.add_callback("on_export_end", on_export_end)
    model.export(format="onnx")              # yolo11n.onnx, and next to it yolo11n_requant.onnx
    YOLO("yolo11n_requant.onnx").predict("bus.jpg")

Copy this file to the directory of your script, or call quantize_exported("yolo11n.onnx") after an export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from requant_onnx.cli.main import main as requant

PIXELS = ("--mean", "0", "--std", "1")
"""The models take pixels of 0 .. 1."""


def quantize_exported(path: str | Path, *options: str) -> Path | None:
    """Write NAME_requant.onnx next to NAME.onnx, and return its path; if nothing was written, print why and return None.

    options: of requant convert, instead of --for web; for instance "--bits", "8", or "--calibrate", "images:photos", "--fit".
    """
    source = Path(path)
    output = source.with_name(f"{source.stem}_requant.onnx")
    wanted = options or ("--for", "web")
    code = requant(["convert", str(source), str(output), "--force", "--quiet", *PIXELS, *wanted])
    print(f"requant: {output}" if code == 0 else f"requant: '{source}' was not converted (exit code {code})")
    return output if code == 0 else None


def on_export_end(exporter: Any) -> None:
    """The callback.  The exporter has the path of the model, which all its files are named after, and the format."""
    if exporter.args.format == "onnx":
        quantize_exported(Path(exporter.file).with_suffix(".onnx"))
