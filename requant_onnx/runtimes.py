"""What a file for each runtime may contain."""

from __future__ import annotations

from dataclasses import dataclass

from requant_onnx.choices import LEVELS, Form, Runtime


@dataclass(frozen=True)
class RuntimeRow:
    """What a file for one runtime may contain.

    title: the runtime, for users.  forms: the possible ones, the default first.  bits: the possible widths of codes.
    native4: whether DequantizeLinear reads UINT4 (or INT4), for the codes of 4 bits.
    signed: whether codes that DequantizeLinear reads are INT8 and INT4, not UINT8 and UINT4.
    symmetric: whether zero points, also those of activations, are 0.
    half: whether scales and biases may be stored as float16.
    grouped: whether weights are decoded together and then split.
    paired: whether each reader of an activation on integers has a DequantizeLinear of its own, pools and reshapes too.
    int32_biases: whether biases of integer kernels are stored as integers.
    checked: whether ONNX Runtime is asked if it does with each weight what the form promises.
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
"""What a file for each runtime may contain."""
