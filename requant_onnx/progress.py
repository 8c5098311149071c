"""The type of the callback to which long-running functions report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the item in progress, the number of finished steps, and the total number of steps."""
