"""One run at a time: a lock on a file, given back by the kernel when its process dies.

``flock`` does that. Where a file system has none (some Lustre and NFS mounts), a file that only one process can create
takes its place: it names host and process, so that one left by a dead process of this host is recognised and removed.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import DestinationError, ReshardError
from reshard.foreign import quote
from reshard.stores.files import read_small

_WAIT = 600  # seconds: how long a run waits for another that gives its folder its name
_BUSY = (11, 13)  # EAGAIN (EWOULDBLOCK), and EACCES, which some systems say instead


@dataclass(frozen=True)
class Lock:
    """A lock that is held. `stand_in` is the file that takes the place of ``flock`` where the file system has none."""

    release: Callable[[], None]
    stand_in: Path | None = None


@contextlib.contextmanager
def locked(path: Path, what: str, wait: bool = False, make: Callable[[], None] = lambda: None) -> Iterator[tuple[int, Lock]]:
    """`path`, made if need be, opened for appending and locked; yields its descriptor and the lock. `make` is called before each attempt to open it.

    Raises DestinationError where another run has `what` (after a while only, if `wait`). The file stays the one of that name:
    one that was renamed or removed while it was being locked is let go, and the next one tried.
    """
    held = None
    until = time.monotonic() + _WAIT
    while True:
        make()
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
            continue  # its folder got another name just now
        try:
            held = _lock(handle, path)
            if held and _is(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if held is None and not (wait and time.monotonic() < until):
            raise DestinationError(f"another run is writing to {what}", _whose(path))
        if held:
            held.release()
        time.sleep(0.01)
    try:
        yield handle, held
    finally:
        held.release()
        os.close(handle)


def _lock(handle: int, path: Path) -> Lock | None:
    """Lock; None where another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _BUSY else _create(_beside(path))
    return Lock(lambda: None)  # closing the file gives it back


def _beside(path: Path) -> Path:
    """The lock file that stands for `path`: beside it, or for a journal beside its folder, which may get another name meanwhile."""
    locked_file = path if path.name.startswith(".") else path.parent
    return locked_file.with_name(f"{locked_file.name}.lock")


def _create(path: Path) -> Lock | None:
    mine = json.dumps({"host": os.uname().nodename, "pid": os.getpid()}).encode()
    for _ in range(2):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not _dead(path):
                return None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            continue
        os.write(handle, mine)
        os.close(handle)

        def release() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

        return Lock(release, path)
    return None


def told(lock: Lock) -> list[str]:
    """What the user should know of how runs are kept apart: nothing, where the kernel does it."""
    if lock.stand_in is None:
        return []
    return [
        f"the file system of {lock.stand_in.parent} has no locks (flock): while this ran, the file {lock.stand_in.name} kept other runs away; "
        "one that a machine leaves when it dies must be deleted by hand"
    ]


def _dead(path: Path) -> bool:
    """Whether the process that made lock file `path` ran on this host and has ended."""
    try:
        owner = json.loads(_owner(path))
        if owner["host"] != os.uname().nodename:
            return False
        if owner["pid"] == os.getpid():
            return False
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return False
    return False


def _whose(path: Path) -> str:
    owner = quote(_owner(_beside(path)).decode(errors="replace"))
    return f"wait for it to end; if {owner} has ended, delete {_beside(path)}" if owner else "wait for it to end"


def _owner(path: Path) -> bytes:
    """What lock file `path` says; nothing where it is none of ours."""
    try:
        return read_small(path, 1000)
    except ReshardError:
        return b""


def _is(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
