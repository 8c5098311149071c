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
from requant_onnx.inputs.images import CIFAR_MEAN_STD, load_cifar

FILES = sorted(path for path in (ROOT / "models").iterdir() if path.suffix in (".onnx", ".npz"))
MODELS = [path for path in FILES if path.suffix == ".onnx"]
TABLE = (ROOT / "models" / "README.md").read_text()
SOME = 1000  # number of images
HERE = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_those_of_the_readme(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert re.search(rf"^\| `{path.name}` \|.*\| {path.stat().st_size:,} \| `{digest}` \|$", TABLE, re.M)
    assert path.stat().st_size < 5_000_000


@HERE
@pytest.mark.parametrize("config", [QuantConfig(8), QuantConfig(4, transform=Transform(0.5), form=Form.FOLDED)], ids=["8", "4"])
def test_all_weights_are_converted_and_the_oracle_holds(path: Path, config: QuantConfig) -> None:
    report = check(onnx.load(path), config)
    assert not skipped_weights(report)


@pytest.mark.slow
@HERE
def test_accuracy_is_that_of_the_readme(path: Path) -> None:
    """On some of the test images, it is within three standard errors of the README's figure for all of them."""
    dataset = path.stem.rpartition("_")[2]
    folder = find_cifar(dataset)
    if folder is None:
        missing(f"{dataset} is neither in $CIFAR_DIR nor in the cache")
    told = re.search(rf"`{path.name}` \|[^|]*\| (\d\d\.\d\d) %", TABLE)
    assert told is not None
    share = float(told[1]) / 100
    images = load_cifar(dataset, folder, "test").first(SOME)
    found = top1(path, images, Normalization(*CIFAR_MEAN_STD[dataset]))
    assert found == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / SOME))
