"""Which file it was whose header was read: a file that is changed or exchanged afterwards must not be read by that header.

Readers of headers call ``note`` with the open file; ``noting`` collects what they note. The identity is taken from the very
descriptor that the header comes from, so nothing can happen in between.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

#: device, inode, bytes, time of the last change of content in nanoseconds
Identity = tuple[int, int, int, int]

_noted: ContextVar[dict[str, Identity] | None] = ContextVar("noted", default=None)


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def noting() -> Iterator[dict[str, Identity]]:
    """The identities, by path, of all files whose headers are read inside the ``with``."""
    found: dict[str, Identity] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(path: object, file: BinaryIO) -> None:
    """`path`'s header is about to be read from `file`, an open file. What lies on the Hub never changes and is not noted."""
    found = _noted.get()
    if found is not None and isinstance(path, Path):
        found[str(path)] = identity(os.fstat(file.fileno()))


def changed(path: str | Path, then: Identity) -> str | None:
    """How the file at `path` differs from what it was `then`, in words; None where it is the same."""
    try:
        now = identity(os.stat(path))
    except OSError as error:
        return f"it can't be found any more ({error.strerror})"
    return difference(then, now)


def difference(then: Identity, now: Identity) -> str | None:
    if then == now:
        return None
    if then[:2] != now[:2]:
        return "another file has taken its place"
    if then[2] != now[2]:
        return f"it had {then[2]} bytes, now {now[2]}"
    return "it was written to"
