"""Outputs that are selected, such as lists of boxes, are judged by what they are selected from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import laplace, parse

from requant_onnx import Budget, Calibration, Form, ImageSet, QuantConfig, quantize_model
from requant_onnx.graph.selections import compared_tensors
from requant_onnx.inputs.synthetic import noise_images
from requant_onnx.numerics.arrays import AnyArray
from requant_onnx.runtime import sensitivity
from requant_onnx.runtime.sensitivity import names_to_compare

SIDE, BOXES, KEPT, CLASSES = 16, 16, 6, 5
HEAD = """
    d = Relu (c)  e = Conv <pads = [1, 1, 1, 1]> (d, v)  f = Relu (e)  h = Conv (f, head)
    r = Reshape (h, rows)  t = Transpose <perm = [0, 2, 1]> (r)
    boxes, logits = Split <axis = 2> (t, parts)  scores = Sigmoid (logits)
"""
DETECTOR = f"""
    net (float[1, 3, {SIDE}, {SIDE}] x) => (float[1, {KEPT}, 4] found, float[1, {KEPT}] best, int64[1, {KEPT}] label) {{
        c = Conv <strides = [4, 4], pads = [1, 1, 1, 1]> (x, w)
        {HEAD}
        most = ReduceMax <axes = [2], keepdims = 0> (scores)  classes = ArgMax <axis = 2, keepdims = 0> (scores)
        best, index = TopK <axis = 1> (most, kept)
        at = Unsqueeze (index, last)  wide = Expand (at, four)
        found = GatherElements <axis = 1> (boxes, wide)  label = GatherElements <axis = 1> (classes, index)
    }}
"""


TABLES = {"e": laplace(9, 64), "anchors": laplace(9, 4), "square": laplace(9, 9), "five": np.array(5)}


def detector() -> onnx.ModelProto:
    """A detector that returns its strongest boxes."""
    return parse(
        DETECTOR,
        opset=17,
        w=laplace(32, 3, 4, 4),
        v=laplace(32, 32, 3, 3, seed=2),
        head=laplace(4 + CLASSES, 32, 1, 1, seed=1),
        rows=np.array([1, 4 + CLASSES, -1]),
        parts=np.array([4, CLASSES]),
        kept=np.array([KEPT]),
        last=np.array([2]),
        four=np.array([1, KEPT, 4]),
    )


def noise(count: int, seed: int) -> Calibration:
    return Calibration(ImageSet(noise_images(count, 3, SIDE, SIDE, seed), None), count=count)


def test_lists_are_selected_from_all_boxes() -> None:
    assert set(compared_tensors(detector())) == {"boxes", "best", "scores", "most"}


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("(float[n, 48] x) => (int64[n] y) { s = MatMul (x, w)  y = ArgMax <axis = 1, keepdims = 0> (s) }", ["s"]),
        ("(float[n, 48] x) => (float[n, 9] s, int64[n] y) { s = MatMul (x, w)  y = ArgMax <axis = 1, keepdims = 0> (s) }", ["s"]),
        # the experts of a layer, whose results another weight reads
        ("(float[n, 48] x) => (float[n, 64] y) { s = MatMul (x, w)  a, b = TopK (s, k)  y = MatMul (a, v) }", ["y"]),
        # nothing was computed before the selection, or the outputs do not depend on it
        ("(float[n, 48] x) => (float[n, 1] y) { y, b = TopK (x, k) }", ["y"]),
        ("(float[n, 48] x) => (float[n, 9] y) { s = Shape (x)  a = ArgMax (s)  y = MatMul (x, w) }", ["y"]),
        # thresholds, also behind other operators
        ("(float[n, 48] x) => (int64[2, m] y) { s = MatMul (x, w)  b = Greater (s, t)  y = NonZero (b) }", ["s"]),
        (
            "(float[n, 48] x) => (int64[2, m] y) { s = MatMul (x, w)  b = Greater (s, t)  i = Cast <to = 6> (b)  j = Identity (i)"
            "  y = NonZero (j) }",
            ["s"],
        ),
        # a mask
        (
            "(float[n, 48] x, bool[n, 9] seen) => (int64[n, 1] y) { s = MatMul (x, w)  m = Where (seen, t, s)"
            "  a, y = TopK (m, k) }",
            ["s"],
        ),
        # the values of TopK are no selection
        ("(float[n, 48] x) => (float[n, 1] y) { s = MatMul (x, w)  y, b = TopK (s, k) }", ["y"]),
        # a place that depends only on the inputs
        (
            "(float[1, 48] x, int64[1, 5] ids) => (float[9] y) { s = MatMul (x, w)  a = ArgMax <axis = 1, keepdims = 0> (ids)"
            "  p = Mul (a, zero)  y = GatherND (s, p) }",
            ["y"],
        ),
        # embeddings and other weights behind the selection
        (
            "(float[n, 48] x) => (float[n, 64] y) { s = MatMul (x, w)  a = ArgMax <axis = 1, keepdims = 0> (s)"
            "  y = Gather (e, a) }",
            ["y"],
        ),
        (
            "(float[n, 48] x) => (float[n, 4] y) { s = MatMul (x, w)  a = ArgMax <axis = 1, keepdims = 0> (s)"
            "  y = Gather (anchors, a) }",
            ["s"],
        ),
        # a decoder, whose weights are in its body
        (
            "(float[1, 48] x) => (float[1, 9] h, int64[5, 1] y) { s = MatMul (x, w)  h, y = Loop (five, , s) <"
            "body = b (int64 i, bool go, float[1, 9] p) => (bool on, float[1, 9] q, int64[1] t) {"
            " on = Identity (go)  r = MatMul (p, square)  q = Tanh (r)  t = ArgMax <axis = 1, keepdims = 0> (q) }> }",
            ["h", "y"],
        ),
        (
            "(float[n, 48] x, bool c) => (int64[m] y) { s = MatMul (x, w)  y = If (c) <"
            "then_branch = a () => (int64[m] p) { z = NonZero (s)  p = Squeeze (z) },"
            "else_branch = b () => (int64[m] q) { q = Identity (k) }> }",
            ["s"],
        ),
    ],
)
def test_what_is_compared(graph: str, expected: list[str]) -> None:
    model = parse(
        f"net {graph}", w=laplace(48, 9), v=laplace(1, 64), k=np.array([1]), t=np.zeros(1, np.float32), zero=np.array([0]), **TABLES
    )
    assert compared_tensors(model) == expected


def test_very_large_sources_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of all classes of a mask take many times the memory of the mask."""
    chunks: list[dict[str, AnyArray]] = [{"x": np.zeros((1, 3, SIDE, SIDE), np.float32)}] * 2
    assert "boxes" in names_to_compare(detector(), chunks)
    size = 8 * (BOXES * (4 + CLASSES + 1) + KEPT)  # of the float64 values for an input
    monkeypatch.setattr(sensitivity, "MOST_BYTES", 2 * size - 1)
    assert names_to_compare(detector(), chunks) == ["found", "best", "label"]
    monkeypatch.setattr(sensitivity, "MOST_BYTES", 2 * size)
    assert "boxes" in names_to_compare(detector(), chunks)


@pytest.mark.parametrize("form", [Form.QDQ, Form.FOLDED, Form.INT8])
def test_the_self_check_of_a_detector_that_selects_is_not_alarmed(form: Form) -> None:
    """The list itself has less than 10 dB, because the strongest boxes of noise are nearly the same."""
    report = quantize_model(detector(), QuantConfig(8, form=form), calibration=noise(16, 0))[1]
    assert report.check is not None
    assert report.check.sqnr_db is not None
    assert report.check.sqnr_db > 25
    assert "found" not in {each.name for each in report.check.outputs}


def test_a_target_is_reached_for_what_a_detector_selects_from() -> None:
    budget = QuantConfig(Budget(sqnr_db=25.0), form=Form.FOLDED)
    model, report = quantize_model(detector(), budget, calibration=noise(16, 0))
    assert report.check is not None
    assert report.check.sqnr_db is not None
    assert 22 < report.check.sqnr_db < 32
    assert [item.name for item in model.graph.output] == ["found", "best", "label"]
