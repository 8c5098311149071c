"""Models and calibration inputs may be given in several ways; the result is the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import OWN_MODEL, laplace, parse, small_cnn
from onnxruntime.quantization import CalibrationDataReader

import requant_onnx
from requant_onnx import (
    Calibration,
    ConfigError,
    DataError,
    EdgeLayers,
    Form,
    ImageSet,
    Int8Speed,
    ModelError,
    QuantConfig,
    Transform,
    explain,
    inspect_model,
    quantize_model,
    validate,
)
from requant_onnx.inputs.calibration import SPARE

TWO_INPUTS = """two (float[n, 16] a, float[n, 16] b) => (float[n, 8] y) {
    h = MatMul(a, w0)
    g = MatMul(b, w1)
    s = Add(h, g)
    r = Relu(s)
    y = Gemm(r, w2, c)
}"""


def two_inputs() -> onnx.ModelProto:
    return parse(TWO_INPUTS, w0=laplace(16, 64), w1=laplace(16, 64, seed=1), w2=laplace(64, 8, seed=2), c=laplace(8, seed=3))


def feeds(count: int = 24) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{name: rng.normal(size=(4, 16)).astype(np.float32) for name in ("a", "b")} for _ in range(count)]


class DataReader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.rest = iter(feeds())

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def quantized(model: onnx.ModelProto, calibration: Calibration) -> bytes:
    made, _ = quantize_model(model, QuantConfig(bits=3, form=Form.FOLDED), calibration=calibration)
    serialized: bytes = made.SerializeToString(deterministic=True)
    return serialized


def test_a_model_is_a_path_bytes_a_proto_or_a_file(tmp_path: Path) -> None:
    model = small_cnn()
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    sources = (path, str(path), path.read_bytes(), model, io.BytesIO(path.read_bytes()))
    made = [quantize_model(source, QuantConfig(bits=4)) for source in sources]
    assert len({result.SerializeToString(deterministic=True) for result, _ in made}) == 1
    assert len({repr(report) for _, report in made}) == 1
    with path.open("rb") as file:
        assert inspect_model(file) == inspect_model(path)
    assert explain(path.read_bytes()).to_dict() == explain(path).to_dict()
    images = ImageSet(np.zeros((2, 3, 8, 8), np.uint8), None)
    report = validate(io.BytesIO(path.read_bytes()), made[0][0].SerializeToString(), images)
    assert report.images == 2


@pytest.mark.parametrize("source", [b"", b"\xff" * 100, io.BytesIO(b"no model"), io.StringIO("text"), 7, None])
def test_what_is_no_model_is_refused(source: object) -> None:
    with pytest.raises(ModelError, match=r"^[^\n]+$"):
        quantize_model(source, QuantConfig())  # type: ignore[arg-type]


def test_readers_iterators_and_lists_calibrate_alike() -> None:
    def generated() -> Iterator[dict[str, np.ndarray]]:
        yield from feeds()

    sources = (DataReader(), feeds(), generated(), tuple(feeds()))
    made = {quantized(two_inputs(), Calibration.from_feeds(source)) for source in sources}
    assert len(made) == 1
    assert made != {quantize_model(two_inputs(), QuantConfig(bits=3, form=Form.FOLDED))[0].SerializeToString(deterministic=True)}


def test_feeds_of_images_calibrate_as_the_images_do() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(32, 3, 8, 8)).astype(np.float32)
    by_image = [{"x": x[k : k + 8]} for k in range(0, 32, 8)]  # the chunks that 32 images are run in
    images = Calibration(ImageSet(x, None))
    assert quantized(small_cnn(), Calibration.from_feeds(by_image)) == quantized(small_cnn(), images)


def test_a_reader_without_end_is_read_to_the_count() -> None:
    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield from feeds()

    calibration = Calibration.from_feeds(endless(), count=30)
    assert calibration.count == 30
    assert len(calibration.feeds) == 30 + SPARE  # for the self-check


def test_the_int8_form_takes_feeds_of_several_inputs() -> None:
    config = QuantConfig(bits=8, form=Form.INT8, int8_speed=Int8Speed.ALL)
    _, report = quantize_model(two_inputs(), config, calibration=Calibration.from_feeds(feeds()))
    assert report.activations
    assert {weight.form for weight in report.converted} == {"int8"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no calibration inputs"),
        ([{}], "dictionaries"),
        ([np.zeros(3)], "dictionaries"),
        ([{"a": np.array([np.nan])}], "'a' contains NaN or infinity"),
        ([{"a": np.array([None])}], "an array of numbers or strings, not of object"),
    ],
)
def test_feeds_that_are_none_are_refused(source: list[dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Calibration.from_feeds(source)


def test_strings_may_be_objects() -> None:
    """As pandas and ONNX Runtime make them."""
    text = "net (string[n] s, float[n, 64] x) => (float[n, 8] y, string[n] t) { y = MatMul(x, w) t = Identity(s) }"
    rows = np.random.default_rng(0).normal(size=(20, 1, 64)).astype(np.float32)
    feeds = [{"s": np.array(["word"], dtype=object), "x": row} for row in rows]
    config = QuantConfig(4, edge_layers=EdgeLayers.PLAIN)
    _, report = quantize_model(parse(text, w=laplace(64, 8)), config, calibration=Calibration.from_feeds(feeds))
    assert len(report.converted[0].output_errors) > 1  # which only calibration compares


def test_feeds_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(DataError, match=r"given inputs are \['a'\], but the model takes \['a', 'b'\]"):
        quantized(two_inputs(), Calibration.from_feeds([{"a": np.zeros((4, 16), np.float32)}]))
    for values, said in (
        (np.zeros((4, 5), np.float32), "float32 and shape 4x5"),
        (np.full((4, 16), 1e300), "float64 and shape 4x16"),
    ):
        with pytest.raises(DataError, match=rf"the input '.' has type {said}, but the model takes float32 of shape \?x16"):
            quantized(two_inputs(), Calibration.from_feeds([dict.fromkeys("ab", values)]))


def test_what_is_no_model_is_an_error_of_ours(tmp_path: Path) -> None:
    closed = (tmp_path / "a").open("w+b")
    closed.close()
    models: tuple[Any, ...] = (None, {}, 3, np.zeros(3), [b""], closed)
    for model in models:
        with pytest.raises(ModelError):
            quantize_model(model)
    data = OWN_MODEL.read_bytes()
    made = [quantize_model(each)[0].SerializeToString() for each in (data, bytearray(data), memoryview(data))]  # type: ignore[arg-type]
    assert made[0] == made[1] == made[2]


def test_plain_texts_will_do_for_choices() -> None:
    plain = QuantConfig(4, form="folded", transform="sqrt", edge_layers="plain")
    assert plain == QuantConfig(4, form=Form.FOLDED, transform=Transform(0.5), edge_layers=EdgeLayers.PLAIN)
    with pytest.raises(ConfigError, match="form 'fast' is not one of"):
        QuantConfig(form="fast")


def test_reports_show_well() -> None:
    _, report = quantize_model(OWN_MODEL, QuantConfig(4))
    assert len(repr(report)) < 300
    assert "<table><tr><th>weights</th><td>20 converted" in report._repr_html_()
    found = validate(OWN_MODEL, OWN_MODEL, ImageSet(np.zeros((2, 3, 32, 32), np.uint8), None))
    assert "top-1 agreement 100.00%" in repr(found)
    assert found._repr_html_().startswith("<table>")
    assert len(repr(inspect_model(OWN_MODEL))) < 100
    assert requant_onnx.__version__ == version("requant_onnx")
