"""Work on several threads: the first failure ends all, and nobody goes on behind the caller's back."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from reshard.executor.sources import Workspace


def in_threads(
    jobs: int,
    take: Callable[[int], object],
    work: Callable[[object, Workspace, threading.Event], None],
    stopped: Callable[[], None] = lambda: None,
) -> None:
    """`work` on whatever `take(worker)` gives, on `jobs` threads, until it raises IndexError; the first failure ends all, after `stopped()`."""
    stop = threading.Event()
    failures: list[BaseException] = []  # the first is the cause; others may be of its making

    def worker(number: int) -> None:
        space = Workspace()
        while not stop.is_set():
            try:
                item = take(number)
            except IndexError:
                return
            try:
                work(item, space, stop)
            except BaseException as error:  # noqa: BLE001  raised again, below
                failures.append(error)
                stop.set()
                stopped()
                return

    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(worker, i) for i in range(jobs)]
    try:
        wait(futures)
    except BaseException:
        stop.set()
        stopped()
        raise
    finally:
        _join(pool)
    if failures:
        raise failures[0]


def _join(pool: ThreadPoolExecutor) -> None:
    """Wait for the threads, through whatever further Ctrl-C: files must not be closed while somebody writes to them."""
    while True:
        try:
            return pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            continue
