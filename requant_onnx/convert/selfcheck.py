"""The check at the end of a conversion: what the outputs lost, on inputs that were not used for it."""

from __future__ import annotations

from dataclasses import replace

import onnx

from requant_onnx.convert.report import SelfCheck
from requant_onnx.errors import DataError, ModelError
from requant_onnx.files.load import is_large, whole
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.numerics.outputs import OutputTally, images_in
from requant_onnx.runtime.feeds import calibration_chunks
from requant_onnx.runtime.sessions import load_session, open_session, run_session

COUNT = 32  # inputs of a check
OTHER_SEED = 104729  # added to that of the calibration, for noise, and images, that it has not seen


def self_check(source: onnx.ModelProto, made: onnx.ModelProto, calibration: Calibration | None) -> SelfCheck | str:
    """Compare a converted model with its source on inputs that were not used for it; why it was not done, where it was not.

    calibration: that of the conversion; None: noise is tried.
    """
    if is_large(source) or is_large(made):
        return "it is larger than 2 GB"
    unseen, words = _unseen(calibration)
    reference = whole(source)
    try:
        chunks = calibration_chunks(reference, unseen)
        session = open_session(reference, "the model")
        names = [item.name for item in session.get_outputs()]
        exact = [run_session(session, "the model", names, chunk) for chunk in chunks]
    except (DataError, ModelError) as error:
        return f"there are no inputs for it ({error})"
    try:
        candidate = load_session(whole(made))
        if {item.name for item in candidate.get_outputs()} != set(names):
            return "its outputs have other names"
        tallies = [OutputTally(name) for name in names]
        for chunk, expected in zip(chunks, exact, strict=True):
            found = run_session(candidate, "the converted model", names, chunk)
            for tally, one, other in zip(tallies, expected, found, strict=True):
                tally.add(one, other, *images_in(chunk.values()))
    except ModelError as error:
        return f"ONNX Runtime runs the model and not what was made of it: {error}"
    return SelfCheck(words, tuple(tally.report() for tally in tallies))


def _unseen(calibration: Calibration | None) -> tuple[Calibration, str]:
    """Inputs that a calibration does not use, where there are any, and what they are."""
    if calibration is None or calibration.is_noise:
        given = calibration or Calibration()
        return replace(given, count=COUNT, seed=given.seed + OTHER_SEED), f"{COUNT} images of noise not used in the conversion"
    if calibration.feeds:
        rest = calibration.feeds[calibration.count :][:COUNT]
        feeds = rest or calibration.feeds[-COUNT:]
        used = "not used in the conversion" if rest else "used in the conversion too"
        return replace(calibration, feeds=feeds, count=len(feeds)), f"{len(feeds)} inputs {used}"
    assert calibration.images is not None
    rest_of_images = calibration.images.not_drawn(calibration.count, calibration.seed)
    images = rest_of_images if len(rest_of_images) else calibration.images.drawn(calibration.count, calibration.seed)
    count = min(COUNT, len(images))
    used = "not used in the conversion" if len(rest_of_images) else "used in the conversion too"
    seed = calibration.seed + OTHER_SEED
    return replace(calibration, images=images, count=count, seed=seed), f"{count} images {used}"
