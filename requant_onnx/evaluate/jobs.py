"""Executors of work items: this process, processes of this machine, or a Dask cluster.

All are those of concurrent.futures.  https://docs.python.org/3/library/concurrent.futures.html,
https://distributed.dask.org/en/stable/api.html#distributed.Client.get_executor
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from requant_onnx.errors import ConfigError, RequantError
from requant_onnx.text import first_line

K = TypeVar("K")
PATIENCE = "20s"  # time limit for a scheduler to answer


@contextlib.contextmanager
def open_executor(jobs: int | None = None, dask: str | None = None) -> Iterator[Executor]:
    """An executor; if its block raises, items that have not begun are canceled.

    jobs: processes on this machine; 1: only this one; None: one per core.  dask: address of a scheduler, tcp://HOST:PORT.
    Raises ConfigError when there is no such scheduler, or distributed is not installed.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more, not {jobs}")
    with _given_up(_dask_executor(dask) if dask is not None else _local_executor(jobs or os.cpu_count() or 1)) as executor:
        yield executor


@contextlib.contextmanager
def _given_up(executor: Executor) -> Iterator[Executor]:
    """Shut an executor down after its block; if the block raises, items that have not begun are canceled."""
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def run_all(
    executor: Executor, items: Mapping[K, tuple[Callable[..., Any], tuple[Any, ...]]], done: Callable[[K, Any], None]
) -> dict[K, Any]:
    """The result of each item (function and arguments); `done` is called with each key and result as soon as it is available.

    Raises what an item raises; RequantError when a process dies.
    """
    results = {}
    try:
        futures: dict[Future[Any], K] = {executor.submit(function, *arguments): key for key, (function, arguments) in items.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done(futures[future], future.result())
    except BrokenProcessPool:
        raise RequantError("a worker process was killed, perhaps for lack of memory; use fewer --jobs") from None
    return results


def run_each(
    jobs: int | None,
    dask: str | None,
    items: Mapping[K, tuple[Callable[..., Any], tuple[Any, ...]]],
    done: Callable[[K, Any], None],
) -> None:
    """Run all items in processes; an exception stops no other item.  `done` is called with each key and its result or exception.

    jobs, dask: as for open_executor.  An item whose process dies gets a RequantError; items that ran alongside it are run again.
    """
    left = dict(items)

    def take(executor: Executor, keys: Iterable[K]) -> None:
        futures: dict[Future[Any], K] = {executor.submit(left[key][0], *left[key][1]): key for key in keys}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            del left[futures[future]]
            done(futures[future], future.result() if error is None else error)

    count = min(jobs or os.cpu_count() or 1, max(1, len(left)))
    with contextlib.suppress(BrokenProcessPool), open_executor(jobs, dask) if dask else _given_up(_processes(count)) as executor:
        take(executor, list(left))
    for key in list(left):
        try:
            with _given_up(_processes(1)) as executor:
                take(executor, [key])
        except BrokenProcessPool:  # noqa: PERF203
            done(key, RequantError("its worker process crashed or was killed, perhaps for lack of memory; use fewer --jobs"))


def _local_executor(jobs: int) -> Executor:
    return ThreadPoolExecutor(1) if jobs == 1 else _processes(jobs)


def _processes(jobs: int) -> Executor:
    context = multiprocessing.get_context("spawn")  # ONNX Runtime's threads do not survive a fork
    resource_tracker.ensure_running()  # started first, because its start unblocks interrupts
    with _interrupts_held():  # a half-built executor leaks a semaphore, which the tracker reports
        executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_on_interrupt)
        wait([executor.submit(_nothing) for _ in range(jobs)])  # each starts a process
    return executor


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, and in processes started in it to `_end_on_interrupt`: it would print tracebacks.

    Processes inherit the mask of this thread; in this process, another thread may receive the signal, hence the handler too.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if not ours or not hasattr(signal, "pthread_sigmask"):  # Windows has no pthread_sigmask
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _end_on_interrupt() -> None:
    """Let Ctrl-C end a worker process silently: the process that the user started reports the interruption."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # SIG_IGN: in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _nothing() -> None:
    pass


class _DaskExecutor(Executor):
    """The executor of a Dask client, which closes the client too."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()


def _dask_executor(address: str) -> Executor:
    try:
        from distributed import Client  # noqa: PLC0415
    except ImportError:
        raise ConfigError("--dask needs dask.distributed; install it with: pip install 'requant_onnx[distributed]'") from None
    if not re.fullmatch(r"\w+://.+:\d+", address):
        raise ConfigError(f"'{address}' is not the address of a Dask scheduler; write it as tcp://HOST:PORT")
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at '{address}' ({first_line(error)}); start one with: dask scheduler"
        ) from None
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        client.close()
        raise ConfigError(f"the Dask scheduler at '{address}' has no worker; start one with: dask worker {address}") from None
    return _DaskExecutor(client)
