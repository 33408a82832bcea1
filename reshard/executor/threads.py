"""Work on several threads: the first failure ends all, and nobody goes on behind the caller's back."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from reshard.executor.sources import Workspace

Item = TypeVar("Item")


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Ctrl-C is heard once: until the block has come to its end, further ones add nothing. Files must not be closed while a thread writes
    to them, and a second KeyboardInterrupt may come between any two steps of the way out. A handler of the caller's own stays in force.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard: list[bool] = []

    def once(number: int, frame: object) -> None:
        if not heard:
            heard.append(True)
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is once:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@one_interrupt()
def in_threads(
    jobs: int,
    take: Callable[[int], Item],
    work: Callable[[Item, Workspace, threading.Event], None],
    stopped: Callable[[], None] = lambda: None,
) -> None:
    """`work` on whatever `take(worker)` gives, on `jobs` threads, until it raises IndexError; the first failure ends all, after `stopped()`."""
    go, stop = threading.Event(), threading.Event()  # a thread that starts while Ctrl-C comes is in nobody's list: it must not begin
    failures: list[BaseException] = []  # the first is the cause; others may be of its making

    def worker(number: int) -> None:
        space = Workspace()
        go.wait()
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

    with ThreadPoolExecutor(jobs) as pool:  # which waits for the threads, at its end
        try:
            futures = [pool.submit(worker, i) for i in range(jobs)]
            go.set()
            while wait(futures, timeout=1).not_done:  # a signal that comes to another thread, or just before the waiting, does not end it
                pass
        except BaseException:
            stop.set()
            go.set()
            stopped()
            raise
    if failures:
        raise failures[0]
