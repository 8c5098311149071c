"""Repeat REQuant's experiments (arXiv 2510.04044) on given models, alongside the figures of the paper, as Markdown.

    python tools/reproduce.py --data DIR                                  # the models in models/, in tools/results.md
    python tools/reproduce.py --data DIR resnet18_cifar10.onnx other_cifar100.onnx=imagenet

Weights have 8, 6, 4, 3 and 2 bits and one scale per tensor, also in the first and last layers, which have no transform;
activations are float.  The table compares the full range, the searched range alone, the square root alone, and both, which is the
method of the paper.  It also has ONNX Runtime's own quantizer with its usual settings (8 and 4 bits, one scale per channel, 8-bit
activations), the default of this tool, refined on 256 train images, its int8 form, and its downloads.  Top-1 accuracy is measured
on all test images.
The name of a file gives its network and its data set: resnet18_cifar10.onnx.  The rows of a model replace its earlier rows; those
of other models remain.  Results are stored in the user's cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from accuracy_table import NORMALIZATIONS
from bench_forms import Subject, quantize_with_onnxruntime
from cifar import find_or_fetch

from requant_onnx import Calibration, Form, ImageSet, Int8Speed, Normalization, QuantConfig, quantize_model
from requant_onnx.choices import OptimizeFor
from requant_onnx.evaluate.cache import Cache, default_folder, key_of
from requant_onnx.evaluate.jobs import open_executor, run_all
from requant_onnx.evaluate.recipes import Trial, compare, score_item
from requant_onnx.files.compressed import compress
from requant_onnx.inputs.images import CIFAR_MEAN_STD, load_cifar

ROOT = Path(__file__).parents[1]
BITS = (8, 6, 4, 3, 2)
RECIPES = ("max", "range", "transform", "paper", "best")
OWN_KINDS = {8: "QInt8", 4: "QInt4"}  # the widths of ONNX Runtime's quantizer
HEAD = ("model", "weights", "float", "*paper: float*", "full range", "*paper: full range*", "range searched", "square root",
        "both (REQuant)", "*paper: both*", "ONNX Runtime", "our default, refined", "our int8 form", "our download")  # fmt: skip
FORMS = {
    "int8": QuantConfig(form=Form.INT8, int8_speed=Int8Speed.ALL),
    "download": QuantConfig(form=Form.FOLDED, optimize_for=OptimizeFor.BROTLI),
}
DOWNLOADS = (4, 3, 2)  # bits of a weight, compressed
PUBLISHED: dict[tuple[str, str], dict[tuple[str, int], float]] = {
    ("resnet18", "cifar10"): {("max", 4): 89.09, ("paper", 4): 94.67},
    ("resnet50", "cifar10"): {("float", 32): 95.24, ("paper", 6): 95.21, ("paper", 4): 94.47},
    ("resnet50", "cifar100"): {("paper", 4): 76.84},
}
"""The top-1 in percent published in the paper, for its own training runs."""

START, END = "<!-- reproduce: written by python tools/reproduce.py, from here -->", "<!-- reproduce: to here -->"
PAPER_NETWORKS = ("resnet18", "resnet50", "inception_v3")  # at any width
SECTION = """Measured network by network, on the date and with the versions in the row, by
`python tools/reproduce.py --data DIR NETWORK_DATASET.onnx`.

Top-1 accuracy in percent on the 10,000 test images. *Figures in italics, and only these, are from the paper (arXiv 2510.04044),
from its own training runs of the same network, so only changes can be compared with it; all others were measured here.* The
first columns have one scale per tensor and float activations, and the first and last layers have the same bits without the
transform. ONNX Runtime's quantizer (`quantize_static`, QDQ, 256 images of the train split) has one scale per channel, and also
quantizes activations to 8 bits; it has only 8 and 4 bits. The default of this tool has one scale per channel and 8 bits in the
first and last layers, and is refined on 256 images of the train split. Its int8 form also quantizes activations to 8 bits, in all
layers. Its download (`--optimize-for download`) has about this many bits per weight after compression by brotli; kB are those of
the whole compressed file.

{table}

### Do range and transform together beat either alone?

The paper's ablation claims it. A case is decided if the difference exceeds two standard errors, which are upper bounds, from the
share of answers that differ from those of the float model. The claim is {summary}.

{verdicts}
"""


class Task:
    """A model, its images and their normalization.  Raises SystemExit if the file name does not identify them."""

    def __init__(self, text: str, data: Path | None) -> None:
        name, _, kind = text.partition("=")
        self.path = Path(name)
        found = re.match(r"(.+)_(cifar100?)(_|$)", self.path.stem)
        if found is None:
            sys.exit(f"the name of '{name}' does not say its network and images, as resnet18_cifar10.onnx does")
        self.network, self.dataset = found[1], found[2]
        folder = find_or_fetch(self.dataset, data)
        self.test, self.train = (load_cifar(self.dataset, folder, split) for split in ("test", "train"))
        self.normalization = NORMALIZATIONS[kind] if kind else Normalization(*CIFAR_MEAN_STD[self.dataset])


def rows(task: Task, executor: Executor, cache: Cache) -> Iterator[str]:
    """The table lines of a model, and the verdict on the paper's claim."""
    model, how = task.path.read_bytes(), task.normalization
    images = Calibration(task.train, how)  # for the last recipe
    found = compare(model, BITS, RECIPES, task.test, how, images, executor, form=Form.FOLDED, cache=cache)
    trials = {(trial.recipe, trial.bits): trial for trial in found.trials}
    done = _other_forms(task, executor, cache)
    published = PUBLISHED.get((task.network, task.dataset), {})

    def theirs(recipe: str, bits: int) -> str:
        return f"*{published[recipe, bits]:.2f}*" if (recipe, bits) in published else ""

    today = datetime.datetime.now(datetime.timezone.utc).date()
    versions = f"requant_onnx {version('requant_onnx')}, ONNX Runtime {onnxruntime.__version__}"
    yield _row(f"{task.path.stem} ({today}, {versions})", "float", _percent(found.top1), theirs("float", 32), *[""] * 10)
    for bits in BITS:
        full, searched, root, both, best = (_percent(trials[recipe, bits].top1) for recipe in RECIPES)
        usual = _percent(done["onnxruntime", bits]) if bits in OWN_KINDS else ""
        int8, small = _percent(done["int8", bits][0]), done.get(("download", bits))
        download = "" if small is None else f"{_percent(small[0])}, {small[1] / 1000:,.1f} kB"
        found_ones = (full, theirs("max", bits), searched, root, both, theirs("paper", bits), usual, best, int8, download)
        yield _row("", f"{bits} bits", "", "", *found_ones)
    for bits in BITS:
        alone = (trials["range", bits], trials["transform", bits])
        yield f"- {task.path.stem}, {bits} bits: {verdict(*alone, trials['paper', bits], len(task.test))}"


def _other_forms(task: Task, executor: Executor, cache: Cache) -> dict[tuple[str, int], Any]:
    """By form and bits: the result of `_by_us`, and for the form "onnxruntime" that of `_by_onnxruntime`."""
    items: dict[tuple[str, int], tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for form, widths in (("download", DOWNLOADS), ("int8", BITS)):
        items |= {(form, bits): (_by_us, (task, form, bits, cache)) for bits in sorted(widths)}  # the slowest first
    items |= {("onnxruntime", bits): (_by_onnxruntime, (task, kind, cache)) for bits, kind in OWN_KINDS.items()}
    return run_all(executor, items, lambda key, _: print(f"{task.path.stem}: {key[0]}, {key[1]} bits", file=sys.stderr))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def verdict(range_only: Trial, transform_only: Trial, both: Trial, images: int) -> str:
    """The verdict on whether both together beat the better of the two alone, by more than two standard errors of the difference.

    Answers that differ are at most those in which either differs from float; the variance of the difference is at most their
    share divided by the number of images.
    """
    best = max((range_only, transform_only), key=lambda trial: trial.top1 or 0.0)
    gain = (both.top1 or 0.0) - (best.top1 or 0.0)
    assert both.agreement is not None
    assert best.agreement is not None
    error = sqrt((1 - both.agreement + 1 - best.agreement) / images)
    name = {"range": "the searched range", "transform": "the square root"}[best.recipe]
    word = "confirmed" if gain > 2 * error else "refuted" if gain < -2 * error else "undecided"
    return f"{word} ({gain * 100:+.2f} points against {name} alone, standard error at most {error * 100:.2f})"


def _by_us(task: Task, form: str, bits: int, cache: Cache) -> tuple[float, int]:
    """Top-1 of the model in one of FORMS, with 256 images of the train split, and the compressed bytes of the file."""
    config = replace(FORMS[form], bits=bits)
    settings = repr((version("requant_onnx"), config.to_dict(), task.normalization))
    key = key_of("reproduce", settings, onnxruntime.__version__, task.path.read_bytes(), task.test.fingerprint())
    kept = cache.get(key)
    if kept is None:
        images = Calibration(task.train, task.normalization)
        model = quantize_model(task.path, config, calibration=images, threads=1, check=False)[0]
        top1 = float(np.mean(_answers(model, task.normalization, task.test) == task.test.y))
        kept = json.dumps([top1, len(compress(model.SerializeToString(), OptimizeFor.BROTLI))]).encode()
        cache.put(key, kept)
    top1, size = json.loads(kept)
    return float(top1), int(size)


def _by_onnxruntime(task: Task, kind: str, cache: Cache) -> float:
    """The top-1 of the model quantized by onnxruntime.quantization.quantize_static, with 256 images of the train split."""
    key = key_of(
        "reproduce", onnxruntime.__version__, kind, task.path.read_bytes(), task.test.fingerprint(), repr(task.normalization)
    )
    kept = cache.get(key)
    if kept is None:
        kept = repr(_made_by_onnxruntime(task, kind)).encode()
        cache.put(key, kept)
    return float(kept)


def _made_by_onnxruntime(task: Task, kind: str) -> float:
    return float(np.mean(_answers(by_onnxruntime(task, kind), task.normalization, task.test) == task.test.y))


def by_onnxruntime(task: Task, kind: str) -> onnx.ModelProto:
    """The model quantized by onnxruntime.quantization.quantize_static, with 256 train images.  kind: member of QuantType."""
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer recommends steps already taken
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        options = onnxruntime.SessionOptions()  # fold constants first, as its manual recommends
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(source)
        onnxruntime.InferenceSession(task.path, options, providers=["CPUExecutionProvider"])
        subject = Subject(task.path.stem, onnx.load(source), task.normalization, labeled=True)
        quantize_with_onnxruntime(subject, task.train.first(256), source, output, kind)
        return onnx.load(output)


def _answers(model: onnx.ModelProto, how: Normalization, images: ImageSet) -> np.ndarray:
    return np.asarray(score_item(model.SerializeToString(), images, how).argmax(1))


def _percent(top1: float | None) -> str:
    assert top1 is not None
    return f"{top1 * 100:.2f}"


def merged(page: str, lines: list[str]) -> str:
    """The page with the given lines in its section, in place of earlier lines of the same models; models in alphabetical order."""
    before, start, rest = page.partition(START)
    earlier, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"the page lacks the lines '{START}' and '{END}'")
    by_model = _by_model(earlier.splitlines()) | _by_model(lines)
    ordered = [line for name in sorted(by_model) for line in by_model[name]]
    table = [_row(*HEAD), "|---" * len(HEAD) + "|", *(line for line in ordered if line[0] == "|")]
    verdicts = [line for line in ordered if line[0] == "-"]
    section = SECTION.format(table="\n".join(table), summary=summary_of(verdicts), verdicts="\n".join(verdicts))
    return f"{before}{START}\n{section.strip()}\n{END}{after}"


def _by_model(lines: list[str]) -> dict[str, list[str]]:
    """The rows and verdicts of each model in a section."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if row := re.match(r"\| (?:(\S+_cifar\S*) \(.*?\))? +\|", line):
            name = row[1] or name
            found.setdefault(name, []).append(line)
        elif verdict_line := re.match(r"- (\S+_cifar\S*), \d+ bits: ", line):
            found.setdefault(verdict_line[1], []).append(line)
    return found


def summary_of(verdicts: list[str]) -> str:
    """The number of verdicts of each kind, over all networks and over those of the paper."""
    theirs = [line for line in verdicts if line.startswith(tuple(f"- {name}" for name in PAPER_NETWORKS))]
    networks = "the paper's networks, ResNet-18, ResNet-50 and Inception-v3, at any width"
    return f"{_counted(verdicts)}. For {networks}, it is {_counted(theirs)}"


def _counted(verdicts: list[str]) -> str:
    words = Counter(line.partition(": ")[2].partition(" ")[0] for line in verdicts)
    confirmed, refuted, undecided = (words[word] for word in ("confirmed", "refuted", "undecided"))
    return f"confirmed in {confirmed} of {len(verdicts)} cases, refuted in {refuted}, and undecided in {undecided}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NETWORK_DATASET.onnx[=NORMALIZATION]", help="default: those in models/")
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 and CIFAR-100 (default: the cache, or a download)")
    parser.add_argument("--limit", type=int, help="use only the first N test images")
    parser.add_argument("--jobs", type=int, help="number of processes (default: one per core)")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results.md", help="page whose section is replaced")
    args = parser.parse_args()
    models = args.models or sorted(str(path) for path in (ROOT / "models").glob("*.onnx"))
    cache, lines = Cache(default_folder()), []
    with open_executor(args.jobs) as executor:
        for text in models:
            task = Task(text, args.data)
            task.test = task.test.first(args.limit)
            for line in rows(task, executor, cache):
                print(line, flush=True)
                lines.append(line)
    args.out.write_text(merged(args.out.read_text("utf-8"), lines), "utf-8")


if __name__ == "__main__":
    main()
