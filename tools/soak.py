"""Convert random CNNs with random options, and compare each one with the oracle.  Needs: pip install '.[test]'

    python tools/soak.py --count 1000              # about 5 minutes on 2 cores; a failure prints its seed
    python tools/soak.py --seed 417 --count 1      # repeat one model

Each model is converted without refinement, and must return the outputs of the float model with the decoded weights in place of its
weights.  In the int8 form, which also quantizes activations, and in a third of the other cases, which are refined on calibration
inputs, the outputs must be close to those of the float model.  The same conversion with another number of threads must produce
the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnx
from oracle import ROUNDING, check, feeds_for, run
from random_models import random_model

from requant_onnx import Calibration, Form, Granularity, Int8Speed, QuantConfig, QuantReport, Transform, quantize_model

HALF_ROUNDING = 4e-3  # relative to the largest output: a few units in the last place of float16
INT8_SQNR_DB = 12.0
"""The least output SQNR with 8-bit weights and activations in a random network of up to 20 layers; 4 bits have no bound."""


def random_config(seed: int) -> QuantConfig:
    random = np.random.default_rng([seed, 1])
    form = (Form.QDQ, Form.FOLDED, Form.INT8)[random.integers(3)]
    bits = int(random.integers(2, 9))
    transforms = (Transform(None), Transform(1.0), Transform(0.5), Transform(0.75))
    return QuantConfig(
        bits=bits,
        granularity=(Granularity.PER_CHANNEL, Granularity.PER_TENSOR)[random.integers(2)],
        transform=transforms[random.integers(4)],
        form=form,
        int8_speed=(Int8Speed.ALL, Int8Speed.AUTO)[random.integers(2)],
    )


def soak(seed: int) -> QuantReport:
    """Convert one model.  Raises AssertionError, or what the conversion raises, on failure."""
    model, config = random_model(seed), random_config(seed)
    calibrated = config.form is Form.INT8 or seed % 3 == 0
    report = near(model, config) if calibrated else check(model, config, rounding=HALF_ROUNDING if in_half(model) else ROUNDING)
    assert all(item.reason for item in report.skipped)
    again = [converted(model, config, threads, calibrated) for threads in (1, 2)]
    assert again[0] == again[1], "two runs gave different bytes"
    return report


def converted(model: onnx.ModelProto, config: QuantConfig, threads: int, calibrated: bool) -> bytes:
    made, _ = quantize_model(model, config, calibration=inputs_of(model, 8) if calibrated else None, threads=threads)
    return bytes(made.SerializeToString(deterministic=True))


def in_half(model: onnx.ModelProto) -> bool:
    """Whether anything is computed in float16."""
    casts = [item.i for node in model.graph.node if node.op_type == "Cast" for item in node.attribute if item.name == "to"]
    return onnx.TensorProto.FLOAT16 in casts


def inputs_of(model: onnx.ModelProto, count: int) -> Calibration:
    return Calibration.from_feeds([feeds_for(model, seed=k, free=4) for k in range(count)])


def near(model: onnx.ModelProto, config: QuantConfig) -> QuantReport:
    """Convert with calibration; the result must run, and with 8-bit weights be close to the float model."""
    feeds = feeds_for(model)
    made, report = quantize_model(model, config, calibration=inputs_of(model, 16))
    expected, found = run(model, feeds)[0], run(made, feeds)[0]
    assert np.isfinite(found).all()
    noise = float(np.mean((found - expected) ** 2))
    if config.bits == 8 and noise:
        sqnr = 10 * np.log10(float(np.mean(expected**2)) / noise)
        assert sqnr > INT8_SQNR_DB, f"output SQNR {sqnr:.1f} dB"
    return report


def attempt(seed: int) -> tuple[int, str, int, int]:
    """Run `soak`; return (seed, failure, bytes converted, bytes of weights)."""
    try:
        report = soak(seed)
    except Exception:
        return seed, traceback.format_exc(), 0, 0
    done = sum(weight.bytes_before for weight in report.converted)
    return seed, "", done, done + sum(item.bytes for item in report.skipped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first model")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    failures: Counter[str] = Counter()
    sums = np.zeros(2, np.int64)
    with ProcessPoolExecutor(args.jobs) as pool:
        for seed, wrong, done, whole in pool.map(attempt, range(args.seed, args.seed + args.count), chunksize=4):
            sums += (done, whole)
            if wrong:
                failures[wrong.strip().splitlines()[-1][:100]] += 1
                print(f"seed {seed}: {random_config(seed)}\n{wrong}", flush=True)
    print(f"{args.count} models, {failures.total()} failures; {100 * sums[0] / max(sums[1], 1):.1f} % of weight bytes converted")
    for text, count in failures.most_common():
        print(f"{count} x {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
