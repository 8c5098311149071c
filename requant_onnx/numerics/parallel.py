"""Threads for work that is always divided in the same way, so that results do not depend on the number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

_limit: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def thread_limit(count: int | None) -> Iterator[None]:
    """Limit the number of threads in a block; None: one per processor."""
    token = _limit.set(count)
    try:
        yield
    finally:
        _limit.reset(token)


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run all tasks, which are independent.  Raises what a task raises."""
    count = min(len(tasks), _limit.get() or os.cpu_count() or 1)
    if count <= 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(count) as executor:
        for future in [executor.submit(task) for task in tasks]:
            future.result()


def slices(size: int, each: int) -> list[slice]:
    """The range 0 .. size in pieces.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + each, size)) for start in range(0, size, each)]
