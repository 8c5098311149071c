"""What the compiled loops share: the decorator and the array types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """numba.njit without the GIL, cached on disk where Numba finds a place to write."""
    try:
        return cast("F", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # "no locator available": nothing is writable, so it is compiled in every process
        return cast("F", numba.njit(nogil=True)(function))
