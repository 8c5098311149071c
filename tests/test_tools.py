"""The benchmark subjects have their documented sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import resnet
from conftest import small_cnn
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
        "- resnet18_cifar10, 3 bits: confirmed (+3 points)",
        "- a_cifar10, 2 bits: undecided ()",
    ]
    theirs = "For the paper's networks, ResNet-18, ResNet-50 and Inception-v3, at any width, it is"
    assert summary_of(lines) == (
        f"confirmed in 1 of 3 cases, refuted in 1, and undecided in 1. {theirs} confirmed in 1 of 1 cases, refuted in 0, and "
        "undecided in 0"
    )


def test_rows_of_other_networks_remain() -> None:
    from reproduce import END, START, merged  # noqa: PLC0415

    def rows(name: str, top1: str) -> list[str]:
        return [f"| {name} (2026-11-30, ONNX Runtime 1.32.0) | float | {top1} |", f"|  | 4 bits | {top1} |"]

    def lines(name: str, top1: str) -> list[str]:
        return [*rows(name, top1), f"- {name}, 4 bits: undecided ({top1})"]

    page = f"before\n{START}\n{END}\nafter\n"
    for name, top1 in (("b_cifar10", "1.00"), ("a_cifar100", "2.00"), ("b_cifar10", "3.00")):
        page = merged(page, lines(name, top1))
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "\n".join([*rows("a_cifar100", "2.00"), *rows("b_cifar10", "3.00")]) in page
    assert "\n".join(lines(*each)[-1] for each in (("a_cifar100", "2.00"), ("b_cifar10", "3.00"))) in page
    assert "1.00" not in page
    with pytest.raises(SystemExit, match="lacks the lines"):
        merged("", [])


def test_only_the_first_and_last_layers_are_exchanged(tmp_path: Path) -> None:
    from edge_layers import decoded, with_weights_of  # noqa: PLC0415

    onnx.save(small_cnn(), tmp_path / "a.onnx")
    (root, edges), (both, same) = (decoded(tmp_path / "a.onnx", recipe, 3) for recipe in ("transform", "paper"))
    assert edges == same == {"w1", "w4"}
    made, before, other = (
        {item.name: onnx.numpy_helper.to_array(item).tolist() for item in model.graph.initializer}
        for model in (with_weights_of(root, both, edges), root, both)
    )
    assert all(made[name] == (other if name in edges else before)[name] for name in before)
    assert {name for name in before if made[name] != before[name]} == edges
