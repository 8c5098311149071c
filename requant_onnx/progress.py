"""How long-running functions report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is under way, how many steps are done, and how many there are."""
