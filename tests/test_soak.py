"""Random CNNs with random options hold the oracle (tools/soak.py, here with a fixed seed; 1,000 are run before a release)."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.parametrize("seed", range(50))
def test_random_models_hold_the_oracle(seed: int) -> None:
    soak(seed)
