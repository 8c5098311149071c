"""The decorator of the compiled loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile with numba.njit, without the GIL, cached on disk where Numba finds a writable directory."""
    try:
        return cast("F", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # "no locator available": no directory is writable, so the function is compiled in every process
        return cast("F", numba.njit(nogil=True)(function))
