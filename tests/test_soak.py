"""Random CNNs with random options satisfy the oracle (tools/soak.py with a fixed seed; 1,000 are run before a release)."""

from __future__ import annotations

import pytest
from soak import soak


# The fast checks run some of them, because all 30 together are slow.
@pytest.mark.parametrize("seed", [pytest.param(k, marks=pytest.mark.slow if k >= 15 else ()) for k in range(30)])
def test_random_models_hold_the_oracle(seed: int) -> None:
    soak(seed)
