"""The benchmark subjects have their documented sizes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from architectures import resnet
from onnxruntime import InferenceSession


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_164_352), pytest.param(50, 23_467_712, marks=pytest.mark.slow)])
def test_resnets_have_the_published_size_and_run(depth: int, parameters: int) -> None:
    """The parameters are convolution and linear weights for 10 classes and a 3x3 stem."""
    model = resnet(depth)
    onnx.checker.check_model(model, full_check=True)
    assert sum(np.prod(item.dims) for item in model.graph.initializer if len(item.dims) > 1) == parameters
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"x": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)})[0]
    assert np.asarray(scores).shape == (2, 10)
    assert 0.01 < np.abs(scores).max() < 100  # activations keep their magnitude


def test_the_verdicts_on_the_paper_are_counted() -> None:
    from reproduce import summary_of  # noqa: PLC0415

    lines = [
        "- net_cifar10, 4 bits: refuted (-2.00 points)",
        "- net_cifar10, 3 bits: confirmed (+3 points)",
        "- a, 2 bits: undecided ()",
    ]
    assert summary_of(lines) == "confirmed in 1 of 3 cases, refuted in 1, and undecided in 1"
