"""The files that a conversion is writing, and how they become durable while it still runs."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import DestinationError
from reshard.executor.handles import Handles, allowed
from reshard.formats import OutFile
from reshard.geometry.block import Stored, end

#: bytes written at a time, ending at a multiple of it in the file: the page cache then takes whole large pages of memory.
#: Larger ones still are often not at hand, and looking for them takes several times as long as the copying.
_WRITE = 128 << 10
Argument = TypeVar("Argument")
_FLUSH = 32 << 20  # bytes written to a file before the kernel is asked to begin writing them back


class Output:
    """Each file knows how many of its bytes are still to come, and is closed when none are.

    `durable`, if given, is told the path of each file once it is complete and on the disk; threads of its own wait for
    the disk, so that those that write go on. `there` are the bytes of tensors that an earlier run left in files; `padded` are
    stored tensors with elements that no tensor of the model fills. `mode` and
    `folder_mode` are the permissions of files and folders, before the process's umask.
    A disk that fails raises DestinationError; `doubtful` tells whether bytes that it took before may be lost.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[OutFile],
        durable: Callable[[str], None] | None,
        there: Mapping[str, int] = {},
        padded: Iterable[Stored] = (),
        mode: int = 0o666,
        folder_mode: int = 0o777,
    ):
        self.bytes_written = 0
        self.doubtful = False
        self._folder, self._durable, self._mode, self._folder_mode = folder, durable, mode, folder_mode
        self._todo = {file.path: file for file in files}
        self._there = there
        self._padded: dict[str, list[Stored]] = {}
        for stored in padded:
            self._padded.setdefault(stored.file, []).append(stored)
        self._left = {path: file.image.size - there.get(path, 0) for path, file in self._todo.items()}
        self._dirty = dict.fromkeys(self._todo, 0)
        self._turn = {path: threading.Lock() for path in self._todo}
        self._handles = Handles(self._open, allowed(0.5))
        self._begun: set[str] = set()  # files that were opened, and hold all but their tensors
        self._synced: set[str] = set()
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(4) if durable else None
        self._waits: list[Future[None]] = []

    def write(self, stored: Stored, element: int, data: memoryview) -> None:
        """Store `data` from `element` on of a destination tensor."""
        self._put(stored.file, stored.start + element * DTYPE_SIZE[stored.dtype], data)

    def finish(self) -> None:
        """Write the files in which no tensor has any bytes, and wait for the disk; every file must be complete then."""
        for path, left in list(self._left.items()):
            if left and path not in self._begun:
                self._begin(path)
        short = {path: left for path, left in self._left.items() if left}
        assert not short, f"bytes never written: {short}"
        for wait in self._waits:
            wait.result()

    def sync(self, then: Callable[[], None]) -> None:
        """Have all that is written so far on the disk, then call `then`; the waiting is done elsewhere."""

        def work(paths: list[str]) -> None:
            for path in paths:
                self._fsync(path)
            then()

        if self._disk:
            with self._lock:
                paths = sorted(self._begun - self._synced)
            self._wait(self._disk, work, paths)

    def close(self) -> None:
        if self._disk:
            self._disk.shutdown(cancel_futures=True)
        self._handles.close()

    def _begin(self, path: str) -> None:
        """Make a file, as large as it will be, and write all of it that is no tensor's."""
        file = self._todo[path]
        with self._lock:
            if path in self._begun:
                return
            assert self._left[path], f"{path} is complete: nothing may be written to it any more"
            try:
                self._make_folder((self._folder / path).parent)
                handle = self._handles.take(path)
                try:
                    os.ftruncate(handle, file.image.size)
                finally:
                    self._handles.give(path)
            except OSError as error:
                raise self._failed(path, error) from None
            self._begun.add(path)
        for offset, content in file.image.segments:
            self._put(path, offset, memoryview(content))
        for stored in self._padded.get(path, ()):
            self._pad(stored)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(mode=self._folder_mode, exist_ok=True)

    def _open(self, path: str) -> int:
        new = 0 if path in self._begun else os.O_CREAT if self._there.get(path) else os.O_CREAT | os.O_TRUNC
        return os.open(self._folder / path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | new, self._mode)

    def _pad(self, stored: Stored) -> None:
        """Zero what no block covers: whole rows behind (and for a rank that holds nothing, all)."""
        width = DTYPE_SIZE[stored.dtype]
        last = max((end(b.offset, b.shape, b.strides) for _, b in stored.blocks), default=0)
        assert stored.size - last == stored.padding, f"{stored.name}: padding inside the tensor"
        zeros = memoryview(bytes(min(_FLUSH, stored.padding * width)))
        at, stop = stored.start + last * width, stored.start + stored.size * width
        while at < stop:
            part = zeros[: stop - at]
            self._put(stored.file, at, part)
            at += len(part)

    def _put(self, path: str, offset: int, data: memoryview) -> None:
        if path not in self._begun:
            self._begin(path)
        size = len(data)
        try:
            handle = self._handles.take(path)
            try:
                with self._turn[path]:  # the kernel lets one in at a time, and the others spin
                    while len(data):
                        n = os.pwrite(handle, data[: _WRITE - offset % _WRITE], offset)
                        if n == 0:
                            raise OSError(errno.EIO, "the disk took no byte")
                        data, offset = data[n:], offset + n
            finally:
                self._handles.give(path)
        except OSError as error:
            raise self._failed(path, error) from None
        with self._lock:
            self.bytes_written += size
            self._left[path] -= size
            self._dirty[path] += size
            complete = self._left[path] == 0
            full = self._dirty[path] >= _FLUSH
            if full:
                self._dirty[path] = 0
        if complete:
            self._wait(self._disk, self._complete, path) if self._disk else self._complete(path)
        elif full and self._disk:
            self._wait(self._disk, self._write_back, path)

    def _wait(self, disk: ThreadPoolExecutor, task: Callable[[Argument], None], argument: Argument) -> None:
        future = disk.submit(task, argument)
        with self._lock:
            self._waits.append(future)

    def _complete(self, path: str) -> None:
        if self._durable:
            self._fsync(path)
            self._durable(path)
        self._handles.drop(path)

    def _fsync(self, path: str) -> None:
        try:
            handle = self._handles.take(path)
            try:
                os.fsync(handle)
            finally:
                self._handles.give(path)
        except OSError as error:
            self.doubtful = True
            raise self._failed(path, error) from None
        with self._lock:
            if not self._left[path]:
                self._synced.add(path)

    def _write_back(self, path: str) -> None:
        if path in self._synced:
            return
        handle = self._handles.take(path)
        try:
            start_writeback(handle)
        finally:
            self._handles.give(path)

    def _failed(self, path: str, error: OSError) -> DestinationError:
        """What a failure of the disk is to the user. Nothing is thrown away: the run goes on when it is repeated."""
        self.doubtful = self.doubtful or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to the disk"
        text = f"{self._folder / path} can't be written: {error.strerror or error}"
        return DestinationError(text, f"{advice}, then run the same command: it goes on where it stopped")


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call of that name; None elsewhere."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def start_writeback(handle: int) -> None:
    """Ask the kernel to begin writing a file's dirty pages, without waiting: fsync then has less left to do."""
    call = _sync_file_range()
    if call is not None:
        call(handle, 0, 0, 2)  # SYNC_FILE_RANGE_WRITE, all of the file
