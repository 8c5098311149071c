"""The ablation of a user's own model: it is converted with every recipe and number of bits, and compared with the float model.

A work item is one conversion, or one model on one shard of the images.  Its result depends only on its arguments, so the table is
the same wherever the items run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import onnx

from requant_onnx.choices import Form, Granularity, RangeMode, Refinement, Runtime, Transform
from requant_onnx.config import QuantConfig
from requant_onnx.convert.pipeline import quantize_model
from requant_onnx.convert.report import as_json, sqnr_db
from requant_onnx.errors import ConfigError, DataError, ModelError
from requant_onnx.evaluate.cache import Cache, key_of
from requant_onnx.evaluate.jobs import run_all
from requant_onnx.evaluate.validate import validate
from requant_onnx.files.compressed import download_sizes
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.feeds import FeedSet
from requant_onnx.inputs.images import ImageSet, Normalization, batches, for_channels
from requant_onnx.numerics.arrays import Float32Array, Int64Array
from requant_onnx.progress import Progress
from requant_onnx.runtime.classifier import open_classifier
from requant_onnx.runtime.feeds import open_fed
from requant_onnx.runtime.sessions import fingerprint, quiet_options

SHARD = 500  # images per work item
BATCH = 100

Case: TypeAlias = "tuple[str, float]"
FLOAT: Case = ("float", 32)


def _one_scale(bits: float, exponent: float, mode: RangeMode) -> QuantConfig:
    return replace(QuantConfig.paper(bits), transform=Transform(exponent), range_mode=mode)


RECIPES: dict[str, Callable[[float], QuantConfig]] = {
    "max": lambda bits: _one_scale(bits, 1.0, RangeMode.MAX),
    "range": lambda bits: _one_scale(bits, 1.0, RangeMode.SEARCH),
    "transform": lambda bits: _one_scale(bits, 0.5, RangeMode.MAX),
    "paper": QuantConfig.paper,
    "channel": lambda bits: QuantConfig(bits, Granularity.PER_CHANNEL, refinement=Refinement.NONE),
    "best": lambda bits: QuantConfig(bits, refinement=Refinement.DESCENT),
}
"""The configurations by name, for a number of bits.

max: one scale per tensor over the full range; range: with a searched range; transform: with the square root over the full range;
paper: with both (REQuant); channel: one searched scale per channel, with 8 bits in the first and last layers; best: the same,
refined on calibration inputs.
"""


@dataclass(frozen=True)
class Trial:
    """One line of the table: the result of a recipe at a number of bits.

    bytes: size of the file.  ratio: size of the float file, relative to it.
    top1, change: accuracy, 0..1, and its difference to the float model; None without labels.
    agreement: share of answers (agreement_of) that agree with the float model; None if the outputs are not answers.
    sqnr_db: SQNR of the first output that is a tensor of numbers, in dB; None if there is none, NaN if values are not finite.
    downloads: compressed sizes of the file in bytes, by compressor (files/compressed.py).
    """

    recipe: str
    bits: float
    bytes: int
    ratio: float
    top1: float | None
    change: float | None
    agreement: float | None
    sqnr_db: float | None
    agreement_of: str = "top-1"
    downloads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All trials of one model.  top1: accuracy of the float model, None without labels.  bytes: size of its file."""

    bytes: int
    top1: float | None
    images: int
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {key: as_json(value) for key, value in asdict(self).items()}


def compare(
    model: bytes,
    bits: Sequence[float],
    recipes: Sequence[str],
    images: ImageSet | FeedSet,
    normalization: Normalization | None,
    calibration: Calibration | None,
    executor: Executor,
    *,
    form: Form = Form.QDQ,
    runtime: Runtime = Runtime.ORT,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Convert with every recipe at every width, and compare with the float model on the images.

    model: a whole ONNX file.  calibration: for `best`, and for every recipe in the int8 form; None if there is no such recipe.
    The trials are sorted by bits, then by output SQNR, best first.
    Raises ConfigError for an unknown recipe, one that lacks its calibration, or files that the runtime does not read; ModelError,
    DataError as quantize_model and validate.
    """
    _check(recipes)
    cases = [(recipe, width) for width in dict.fromkeys(bits) for recipe in dict.fromkeys(recipes)]
    wanted = {case: _settings(case, form, runtime, calibration) for case in cases}
    has_scores = _probe(model, images, normalization)
    shards = [(start, images.part(start, start + SHARD)) for start in range(0, len(images), SHARD)]
    parts = len(shards) * (len(cases) + 1) if has_scores else len(cases)
    work = _Work(executor, cache or Cache(None), len(cases) + parts, progress)
    made = work.conversions(model, wanted)
    if not has_scores:
        judged = work.judgments(model, made, images, normalization)
        trials = [replace(judged[case], recipe=case[0], bits=case[1]) for case in cases]
        labeled = next(((trial.top1, trial.change) for trial in trials if trial.top1 is not None), None)
        top1 = None if labeled is None or labeled[1] is None else labeled[0] - labeled[1]
        return Comparison(len(model), top1, len(images), _sorted(trials, made))
    scores = work.scores({FLOAT: model, **made}, shards, normalization)
    exact = scores[FLOAT]
    hits = _hits(exact, images)
    trials = [_trial(case, len(model), len(made[case]), exact, scores[case], images, hits) for case in cases]
    return Comparison(len(model), hits, len(images), _sorted(trials, made))


def _sorted(trials: Sequence[Trial], made: Mapping[Case, bytes]) -> tuple[Trial, ...]:
    """The trials with their compressed sizes, sorted by bits, then by output SQNR, or agreement for outputs without one."""
    complete = [replace(trial, downloads=download_sizes(made[trial.recipe, trial.bits])) for trial in trials]

    def rank(trial: Trial) -> tuple[float, bool, float, float]:
        sqnr = trial.sqnr_db
        is_odd = sqnr is None or math.isnan(sqnr)
        return -trial.bits, is_odd, 0.0 if sqnr is None or is_odd else -sqnr, -(trial.agreement or 0.0)

    return tuple(sorted(complete, key=rank))


def _check(recipes: Sequence[str]) -> None:
    if not recipes or "" in recipes:
        raise ConfigError(f"the list of recipes is empty or has an empty name; choose from {', '.join(RECIPES)}")
    unknown = [recipe for recipe in recipes if recipe not in RECIPES]
    if unknown:
        raise ConfigError(f"the recipe '{', '.join(unknown)}' is unknown; choose from {', '.join(RECIPES)}")


def _settings(case: Case, form: Form, runtime: Runtime, calibration: Calibration | None) -> tuple[QuantConfig, Calibration | None]:
    """The settings of a conversion, and the calibration if it needs one.

    Raises ConfigError if the calibration is missing, or the runtime does not read such a file.
    """
    recipe, bits = case
    needs = recipe == "best" or FORMS[form].on_integers
    if needs and calibration is None:
        what, other = (
            (f"the {form} form", "another --form") if FORMS[form].on_integers else (f"the recipe '{recipe}'", "other --recipes")
        )
        raise ConfigError(f"{what} needs calibration inputs; give --calibrate, or {other}")
    return replace(RECIPES[recipe](bits), form=form, runtime=runtime), calibration if needs else None


def _probe(model: bytes, images: ImageSet | FeedSet, normalization: Normalization | None) -> bool:
    """Run the model once, before any work, and return whether its first output is a row of scores per image.

    Raises DataError, ModelError if the model and the data, or the labels, do not fit together.
    """
    proto = onnx.ModelProto.FromString(model)
    found = validate(proto, proto, images.first(1), normalization, latency_batch=None).outputs
    has_scores = bool(found) and found[0].kind == "scores"
    if has_scores and images.y is not None:
        least, largest, classes = images.y.min(), images.y.max(), math.prod(found[0].shape[1:])
        if least < 0 or largest >= classes:
            raise DataError(
                f"the labels are {least} to {largest}, but the model gives {classes} scores; give labels of the same classes"
            )
    return has_scores


@dataclass
class _Work:
    """The work items in progress.  total: number of items.  done: number of finished items."""

    executor: Executor
    cache: Cache
    total: int
    progress: Progress | None
    done: int = 0

    def conversions(self, model: bytes, wanted: Mapping[Case, tuple[QuantConfig, Calibration | None]]) -> dict[Case, bytes]:
        keys = {case: _conversion_key(model, *asked) for case, asked in wanted.items()}
        cached = {case: data for case, key in keys.items() if (data := self._known(key, f"{case[0]} {case[1]}")) is not None}
        items = {case: (convert_item, (model, *asked)) for case, asked in wanted.items() if case not in cached}

        def done(case: Case, data: bytes) -> None:
            self.cache.put(keys[case], data)
            self._step(f"{case[0]} {case[1]}")

        return {**cached, **run_all(self.executor, items, done)}

    def judgments(
        self,
        model: bytes,
        made: Mapping[Case, bytes],
        images: ImageSet | FeedSet,
        normalization: Normalization | None,
    ) -> dict[Case, Trial]:
        """A trial for each converted model, compared on all outputs; recipe and bits are not filled in."""
        digest = _digest(images, normalization)
        keys = {case: key_of("judgment", version("requant_onnx"), model, data, digest) for case, data in made.items()}
        known = {case: data for case, key in keys.items() if (data := self._known(key, "validating")) is not None}
        items = {case: (judge_item, (model, data, images, normalization)) for case, data in made.items() if case not in known}

        def done(case: Case, data: bytes) -> None:
            self.cache.put(keys[case], data)
            self._step("validating")

        known.update(run_all(self.executor, items, done))
        return {case: Trial("", 0, *json.loads(data)) for case, data in known.items()}

    def scores(
        self,
        models: Mapping[Case, bytes],
        shards: Sequence[tuple[int, ImageSet | FeedSet]],
        normalization: Normalization | None,
    ) -> dict[Case, Float32Array]:
        digests = {start: _digest(shard, normalization) for start, shard in shards}
        keys = {(case, start): key_of("scores", data, digests[start]) for case, data in models.items() for start, _ in shards}
        scores = {}
        for key, name in keys.items():
            data = self._known(name, "validating")
            if data is not None:
                scores[key] = np.load(io.BytesIO(data), allow_pickle=False)
        items = {
            (case, start): (score_item, (data, shard, normalization))
            for start, shard in shards
            for case, data in models.items()
            if (case, start) not in scores
        }

        def done(key: tuple[Case, int], values: Float32Array) -> None:
            stored = io.BytesIO()
            np.save(stored, values)
            self.cache.put(keys[key], stored.getvalue())
            self._step("validating")

        scores.update(run_all(self.executor, items, done))
        return {case: np.concatenate([scores[case, start] for start, _ in shards]) for case in models}

    def _known(self, key: str, what: str) -> bytes | None:
        data = self.cache.get(key)
        if data is not None:
            self._step(what)
        return data

    def _step(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(what, self.done, self.total)


def convert_item(model: bytes, config: QuantConfig, calibration: Calibration | None) -> bytes:
    """Work item: convert a model; return the file."""
    made, _ = quantize_model(model, config, calibration=calibration, threads=1, check=False)
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def score_item(model: bytes, images: ImageSet | FeedSet, normalization: Normalization | None) -> Float32Array:
    """Work item: the scores of some images, (n, classes), on one thread, because the order of sums changes results."""
    options = quiet_options()
    options.intra_op_num_threads = 1
    if isinstance(images, FeedSet):
        fed = open_fed(onnx.ModelProto.FromString(model), "the model", options)
        rows = [fed.scores(feed) for feed in images.rows]
        if len({row.shape for row in rows}) > 1:
            raise DataError(
                "the size of the first output depends on the input, so recipes cannot be compared; give inputs of one size"
            )
        return np.concatenate(rows)
    classifier = open_classifier(onnx.ModelProto.FromString(model), "the model", options)
    fixed = classifier.batch is not None
    images, how = for_channels(images, normalization or Normalization(), classifier.channels)
    how = classifier.normalization(how)
    parts = batches(images, how, classifier.batch or BATCH, fixed=fixed)
    return np.concatenate([classifier.scores(x)[: len(images) - start] for start, x in parts])


def judge_item(model: bytes, candidate: bytes, images: ImageSet | FeedSet, normalization: Normalization | None) -> bytes:
    """Work item: the fields of a Trial after recipe and bits, as JSON."""
    reference, made = (onnx.ModelProto.FromString(data) for data in (model, candidate))
    found = validate(reference, made, images, normalization, latency_batch=None)
    size = len(candidate)
    top1, change = (None, None) if found.top1 is None else (found.top1.candidate, found.top1.candidate - found.top1.reference)
    return json.dumps([size, len(model) / size, top1, change, found.agreement, found.sqnr_db, found.agreement_of]).encode()


def _conversion_key(model: bytes, config: QuantConfig, calibration: Calibration | None) -> str:
    how = b"" if calibration is None else _calibration_digest(calibration)
    return key_of("conversion", version("requant_onnx"), fingerprint(), json.dumps(config.to_dict()), how, model)


def _calibration_digest(calibration: Calibration) -> bytes:
    shown = repr(replace(calibration, images=None, feeds=()))
    inputs = [item for feed in calibration.feeds for item in feed.items()]
    feeds = [key_of(name, str(values.dtype), str(values.shape), values.tobytes()) for name, values in inputs]
    images = b"" if calibration.images is None else _digest(calibration.images.drawn(calibration.count, calibration.seed), None)
    return key_of(shown, *feeds, images).encode()


def _digest(images: ImageSet | FeedSet, normalization: Normalization | None) -> bytes:
    return key_of(fingerprint(), repr(normalization), images.fingerprint()).encode()


def _answers(scores: Float32Array) -> Int64Array:
    """The top class of each row; -1, which is no class, for a row with NaN."""
    return np.where(np.isnan(scores).any(1), -1, scores.argmax(1))


def _hits(scores: Float32Array, images: ImageSet | FeedSet) -> float | None:
    return None if images.y is None else float((_answers(scores) == images.y).mean())


def _trial(
    case: Case, before: int, after: int, exact: Float32Array, scores: Float32Array, images: ImageSet | FeedSet, top1: float | None
) -> Trial:
    if exact.shape != scores.shape:
        raise ModelError(f"the converted model gives scores of shape {scores.shape}, but the float model gives {exact.shape}")
    accuracy = _hits(scores, images)
    error = np.square(exact.astype(np.float64) - scores).sum()
    answers = _answers(scores)
    return Trial(
        recipe=case[0],
        bits=case[1],
        bytes=after,
        ratio=before / after,
        top1=accuracy,
        change=None if accuracy is None or top1 is None else accuracy - top1,
        agreement=float(((answers == _answers(exact)) & (answers >= 0)).mean()),
        sqnr_db=sqnr_db(float(np.square(exact, dtype=np.float64).sum()), float(error)),
    )
