"""The models in the repository match their README, and all their weights are converted."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import onnx
import pytest
from cifar import find_cifar
from conftest import ROOT, missing, skipped_weights, top1
from oracle import check

from requant_onnx import Form, Normalization, QuantConfig, Transform
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.inputs.images import CIFAR_MEAN_STD, load_cifar

FILES = sorted(path for path in (ROOT / "models").rglob("*") if path.suffix in (".onnx", ".npz"))
MODELS = [path for path in FILES if path.suffix == ".onnx"]
CONVERTED = [path for path in MODELS if path.parent.name == "converted"]  # whose float models are too large for the repository
TABLE = (ROOT / "models" / "README.md").read_text()
SOME = 1000  # number of images


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "models").as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


@each(FILES)
def test_files_are_those_of_the_readme(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert re.search(rf"^\| `{name_of(path)}` \|.*\| {path.stat().st_size:,} \| `{digest}` \|$", TABLE, re.M)
    assert path.stat().st_size < 5_000_000


@each([path for path in MODELS if path not in CONVERTED])
@pytest.mark.parametrize("config", [QuantConfig(8), QuantConfig(4, transform=Transform(0.5), form=Form.FOLDED)], ids=["8", "4"])
def test_all_weights_are_converted_and_the_oracle_holds(path: Path, config: QuantConfig) -> None:
    report = check(onnx.load(path), config)
    assert not skipped_weights(report)


@each(CONVERTED)
def test_converted_models_are_converted(path: Path) -> None:
    assert settings_of(onnx.load(path)) is not None


@pytest.mark.slow
@each(MODELS)
def test_accuracy_is_that_of_the_readme(path: Path) -> None:
    """On some of the test images, it is within three standard errors of the README's figure for all of them."""
    dataset = path.stem.rpartition("_")[2]
    folder = find_cifar(dataset)
    if folder is None:
        missing(f"{dataset} is neither in $CIFAR_DIR nor in the cache")
    told = re.search(rf"`{name_of(path)}` \|[^|]*\| (\d\d\.\d\d) %", TABLE)
    assert told is not None
    share = float(told[1]) / 100
    images = load_cifar(dataset, folder, "test").first(SOME)
    found = top1(path, images, Normalization(*CIFAR_MEAN_STD[dataset]))
    assert found == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / SOME))
