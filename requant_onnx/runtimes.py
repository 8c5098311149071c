"""The runtimes, and the permitted contents of files for each of them."""

from __future__ import annotations

from dataclasses import dataclass

from requant_onnx.choices import LEVELS, Form, Runtime


@dataclass(frozen=True)
class RuntimeRow:
    """The permitted contents of a file for one runtime.

    title: name of the runtime for users.  forms: supported forms, the default first.  bits: supported widths of codes.
    native4: whether codes of 4 bits are stored as UINT4 (or INT4), which DequantizeLinear reads.
    signed: whether DequantizeLinear reads INT8 and INT4 codes, not UINT8 and UINT4.
    symmetric: whether all zero points are 0, including those of activations.
    half: whether scales and biases may be stored as float16.
    grouped: whether weights are decoded together and then split.
    paired: whether each reader of an integer activation has its own DequantizeLinear, including pools and reshapes.
    int32_biases: whether biases of integer kernels are stored as integers.
    checked: whether the conversion verifies that ONNX Runtime treats each weight as the form promises.
    """

    title: str
    forms: tuple[Form, ...] = (Form.QDQ, Form.FOLDED, Form.INT8)
    bits: tuple[float, ...] = tuple(LEVELS)
    native4: bool = False
    signed: bool = False
    symmetric: bool = False
    half: bool = True
    grouped: bool = True
    paired: bool = False
    int32_biases: bool = True
    checked: bool = True


RUNTIMES: dict[Runtime, RuntimeRow] = {
    Runtime.ORT: RuntimeRow("ONNX Runtime from 1.20 on", native4=True),
    Runtime.PORTABLE: RuntimeRow("any runtime", signed=True, half=False, grouped=False, paired=True),
    Runtime.OPENVINO: RuntimeRow("OpenVINO", signed=True, paired=True),
    Runtime.TENSORRT: RuntimeRow(
        "TensorRT",
        forms=(Form.QDQ, Form.INT8),
        bits=(4, 8),
        native4=True,
        signed=True,
        symmetric=True,
        half=False,
        grouped=False,
        paired=True,
        int32_biases=False,
        checked=False,
    ),
    Runtime.WEB: RuntimeRow("onnxruntime-web", forms=(Form.FOLDED, Form.INT8, Form.QDQ)),
    Runtime.MOBILE: RuntimeRow("ONNX Runtime's .ort files", forms=(Form.QDQ, Form.INT8), signed=True),
}
"""The permitted contents of files, by runtime."""
