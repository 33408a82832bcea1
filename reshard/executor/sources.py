"""A checkpoint's files as they are read: by offset, in bounded memory, and only while they are what their headers said."""

import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.executor.handles import Handles, allowed
from reshard.geometry.block import Stored
from reshard.stores.files import AnyPath, failed
from reshard.stores.identity import Identity, changed, difference, identity

if TYPE_CHECKING:
    from reshard.executor.casts import Casts
    from reshard.planner.batches import Range

_AGAIN = "see that nothing writes to the source, then run the same command again"


class InMemory(ABC):
    """Bytes of a source that were fetched already. Tiles read from them as they read from a Source."""

    @abstractmethod
    def read(self, stored: Stored, start: int, into: memoryview) -> None:
        """As ``Source.read``."""

    @abstractmethod
    def map(self, stored: Stored, start: int, stop: int) -> memoryview:
        """The bytes of elements [start, stop) of a stored tensor."""

    def count(self, size: int) -> None:
        """Counted when it was fetched."""


class Source:
    """A checkpoint's files. `bytes_read` counts what tiles took from them."""

    remote = False  # True where bytes must be fetched, batch by batch, before tiles can have them
    checked = 0  # files whose checksum was compared with one that is known
    casts: "Casts | None" = None  # how casts of this run are judged; None: a value that does not fit is refused

    def __init__(self, folder: AnyPath, identities: Mapping[str, Identity] = {}):
        """`identities` are those that the files had when their headers were read: a file that has another is not read."""
        self.folder = folder
        self.bytes_read = 0
        self._identities = identities
        self._handles = Handles(self._open, allowed(0.25))
        self._lock = threading.Lock()

    def read(self, stored: Stored, start: int, into: memoryview) -> None:
        """Fill `into` with a stored tensor's bytes, from element `start` on. Raises SourceError where the disk does not give them."""
        self._read_at(stored.file, stored.start + start * DTYPE_SIZE[stored.dtype], into, stored.name)

    def _read_at(self, file: str, at: int, into: memoryview, name: str = "a tensor") -> None:
        handle = self._handles.take(file)
        try:
            while len(into):
                n = os.preadv(handle, [into], at)
                if n == 0:
                    raise FormatError(f"{self._place(file)} ends inside {name}: it became shorter while it was read", _AGAIN)
                into, at = into[n:], at + n
        except OSError as error:
            raise failed(self._place(file), error, f"at byte {at:,}, inside {name}") from None
        finally:
            self._handles.give(file)

    def count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def hold(self, ranges: list["Range"], room: "Workspace", tell: Callable[[int], None]) -> "Source | InMemory":
        """What a batch's tiles read from; `ranges` of a remote source are fetched into `room` first."""
        return self

    def stop(self) -> None:
        """Give up whatever waits; the run has failed or was interrupted."""

    def close(self) -> None:
        self._handles.close()

    def check_unchanged(self) -> None:
        """Raises FormatError when a file is not what it was when its header was read: what was read is then a mixture."""
        for path, then in self._identities.items():
            how = changed(path, then)
            if how:
                raise _changed(path, how)

    def _open(self, file: str) -> int:
        place = self._place(file)
        try:
            handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise failed(place, error) from None
        then = self._identities.get(str(place))
        how = then and difference(then, identity(os.fstat(handle)))
        if how:
            os.close(handle)
            raise _changed(place, how)
        return handle

    def _place(self, file: str) -> Path:
        assert isinstance(self.folder, Path)
        return self.folder / file


def _changed(path: str | Path, how: str) -> FormatError:
    return FormatError(f"{path} was changed after its header was read: {how}", _AGAIN)


class Workspace:
    """One worker's buffers, allocated once: fresh memory for every tile would cost a page fault for each 4 KiB."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._used = 0

    def take(self, size: int) -> memoryview:
        """`size` bytes, free until ``reset``."""
        if self._used + size > len(self._memory):
            self._memory = mmap.mmap(-1, max(2 * len(self._memory), self._used + size + mmap.PAGESIZE))
            self._used = 0
        start = self._used
        self._used += -(-size // 64) * 64
        return memoryview(self._memory)[start : start + size]

    def mark(self) -> int:
        return self._used

    def reset(self, mark: int = 0) -> None:
        self._used = mark
