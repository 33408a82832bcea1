"""Threads end with their caller: after a failure, and after Ctrl-C at whatever moment."""

import os
import signal
import threading
import time

import pytest

from reshard.executor.threads import in_threads, one_interrupt


def send() -> None:
    """A Ctrl-C for this process, heard before the next step."""
    signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_adds_nothing_until_all_has_come_to_its_end():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with one_interrupt():
            try:
                send()
                steps.append("never")
            finally:
                send()
                steps.append("closed")
    assert steps == ["closed"]
    with pytest.raises(KeyboardInterrupt):  # and the next one is heard again
        send()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_it_the_way_out_is_cut_off():
    """The control."""
    steps = []
    with pytest.raises(KeyboardInterrupt):
        try:
            send()
        finally:
            send()
            steps.append("closed")
    assert steps == []


def test_a_handler_of_the_callers_own_stays_in_force():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with one_interrupt():
            send()
            send()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1, 1]


def test_it_is_nothing_in_another_thread():
    found = []

    def work() -> None:
        with one_interrupt():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.parametrize("jobs", [1, 4])
def test_no_thread_outlives_the_interrupted_call(jobs):
    """Ctrl-C comes while all workers are at work, again while they end."""
    begun, ended, told = threading.Barrier(jobs), [], threading.Event()

    def work(item: object, space: object, stop: threading.Event) -> None:
        if begun.wait(60) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(60) and told.wait(60)
        ended.append(item)

    def stopped() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        told.set()

    with pytest.raises(KeyboardInterrupt):
        in_threads(jobs, lambda number: number, work, stopped)
    assert sorted(ended) == list(range(jobs))


def test_an_interrupt_that_wakes_nobody_is_heard():
    """The kernel gave it to another thread, or it came just before the main one began to wait: that one sleeps on."""

    def work(item: object, space: object, stop: threading.Event) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert stop.wait(20)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_threads(1, lambda number: number, work)
    assert time.monotonic() - began < 20


def test_the_first_failure_is_the_one_that_is_raised():
    begun = threading.Barrier(3)

    def work(item: int, space: object, stop: threading.Event) -> None:
        begun.wait(60)
        if item:
            assert stop.wait(60)
        raise ValueError(item)

    with pytest.raises(ValueError, match="^0$"):
        in_threads(3, lambda number: number, work)
