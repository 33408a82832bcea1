"""The first rank that stops is told to all, and none waits for it.

A rank that fails leaves the others in a collective that will never end: on NCCL no connection closes under them. So the rank
writes what happened into the rendezvous' store before anything else, and every rank has a thread that looks there.
"""

import json
import os
import re
import sys
import threading
from typing import Self

from reshard.errors import ReshardError

#: seconds between looks, until communicators are aborted, and until the process itself ends
EVERY, ABORT, END = 0.5, 5.0, 30.0
_KEY = "stopped"
#: what gloo and NCCL say when the process at the other end is gone
_LOST = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe|remote process exited|ncclRemoteError")


class Stopped(ReshardError):
    """Another rank stopped, and this one cannot go on."""


class Watch:
    """Rank `number`'s eye on `store`, while ``with`` lasts. `abort` frees this rank's communicators."""

    def __init__(self, store, number: int, abort=lambda: None, end=os._exit):
        self.store, self.number, self.abort, self.end = store, number, abort, end
        self.heard: tuple[int, str] | None = None  # who stopped first, and why
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="reshard-verify-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()

    def tell(self, error: BaseException) -> None:
        """Let the others know, unless one of them has stopped already. First thing of all: what follows may block."""
        text = f"{type(error).__name__}: {error}"
        try:
            first = self.store.compare_set(_KEY, "", json.dumps([self.number, text]))
            self.heard = tuple(json.loads(first))
        except (RuntimeError, ValueError):  # the store went with the rank that held it
            self.heard = self.heard or (self.number, text)

    def translated(self, error: Exception) -> Exception:
        """`error`, or where another rank stopped first, what that said; of one that was killed nobody knows more than that."""
        if self.heard and self.heard[0] != self.number:
            return Stopped(f"rank {self.heard[0]} stopped: {first_line(self.heard[1])}")
        if _LOST.search(str(error)):
            return Stopped(f"rank {self.number} lost another rank, which ended without a word: {first_line(str(error))}")
        return error

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            try:
                if not self.store.check([_KEY]):
                    continue
                self.heard = tuple(json.loads(self.store.get(_KEY)))
            except Exception:  # noqa: BLE001  the store is gone: so is the run, and the collectives say it
                return
            break
        else:
            return
        if self.heard[0] == self.number:
            return
        if self._done.wait(ABORT):
            return
        self.abort()
        if self._done.wait(END):
            return
        print(f"Error: rank {self.heard[0]} stopped: {first_line(self.heard[1])}", file=sys.stderr, flush=True)
        self.end(1)


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["(it said nothing)"])[0]


def die_with(lifeline) -> None:
    """End this process when the other end of the pipe `lifeline` closes: when the process that started it is no more."""

    def wait() -> None:
        try:
            lifeline.poll(None)
        except OSError:
            pass
        os._exit(1)

    threading.Thread(target=wait, name="reshard-verify-lifeline", daemon=True).start()
