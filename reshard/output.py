"""The files that a conversion is writing, and how they become durable while it still runs."""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from reshard.block import Stored, end
from reshard.formats import OutFile
from reshard.stores import DTYPE_SIZE

#: bytes written at a time, ending at a multiple of it in the file: the page cache then takes whole large pages of memory.
#: Larger ones still are often not at hand, and looking for them takes several times as long as the copying.
_WRITE = 128 << 10
_FLUSH = 32 << 20  # bytes written to a file before the kernel is asked to begin writing them back


class Output:
    """Each file knows how many of its bytes are still to come, and is closed when none are.

    `durable`, if given, is told the path of each file once it is complete and on the disk; threads of its own wait for
    the disk, so that those that write go on. `there` are the bytes of tensors that an earlier run left in files.
    """

    def __init__(self, folder: Path, files: Iterable[OutFile], durable: Callable[[str], None] | None, there: Mapping[str, int] = {}):
        self.bytes_written = 0
        self._folder, self._durable = folder, durable
        self._todo = {file.path: file for file in files}
        self._place = {
            id(stored): (file.path, file.image.tensors[name].offset, DTYPE_SIZE[stored.dtype])
            for file in self._todo.values() for name, stored in file.tensors.items()
        }  # fmt: skip
        self._there = there
        self._left = {path: file.image.size - there.get(path, 0) for path, file in self._todo.items()}
        self._dirty = dict.fromkeys(self._todo, 0)
        self._turn = {path: threading.Lock() for path in self._todo}
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(4) if durable else None
        self._waits: list[Future] = []

    def write(self, stored: Stored, element: int, data: memoryview) -> None:
        """Store `data` from `element` on of a destination tensor."""
        path, start, width = self._place[id(stored)]
        self._put(path, start + element * width, data)

    def finish(self) -> None:
        """Write the files in which no tensor has any bytes, and wait for the disk; every file must be complete then."""
        for path, left in list(self._left.items()):
            if left and path not in self._handles:
                self._open(path)
        short = {path: left for path, left in self._left.items() if left}
        assert not short, f"bytes never written: {short}"
        for wait in self._waits:
            wait.result()

    def sync(self, then: Callable[[], None]) -> None:
        """Have all that is written so far on the disk, then call `then`; the waiting is done elsewhere."""
        def work(handles: list[int]) -> None:
            for handle in handles:
                os.fsync(handle)
                os.close(handle)
            then()

        if self._disk:
            with self._lock:
                handles = [os.dup(handle) for handle in self._handles.values()]
            self._wait(work, handles)

    def close(self) -> None:
        if self._disk:
            self._disk.shutdown(cancel_futures=True)
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, path: str) -> int:
        file = self._todo[path]
        with self._lock:
            if path in self._handles:
                return self._handles[path]
            assert self._left[path], f"{path} is complete: nothing may be written to it any more"
            target = self._folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target, os.O_RDWR | os.O_CREAT | (0 if self._there.get(path) else os.O_TRUNC), 0o644)
            self._handles[path] = handle
            os.ftruncate(handle, file.image.size)
        for offset, content in file.image.segments:
            self._put(path, offset, memoryview(content))
        for name, content in file.constants.items():
            self._put(path, file.image.tensors[name].offset, memoryview(content))
        for name, stored in file.tensors.items():
            self._pad(file, name, stored)
        return handle

    def _pad(self, file: OutFile, name: str, stored: Stored) -> None:
        """Zero what no block covers: whole rows behind (and for a rank that holds nothing, all)."""
        if not stored.padding:
            return
        width = DTYPE_SIZE[stored.dtype]
        offset = file.image.tensors[name].offset
        last = max((end(b.offset, b.shape, b.strides) for _, b in stored.blocks), default=0)
        assert stored.size - last == stored.padding, f"{stored.name}: padding inside the tensor"
        zeros = memoryview(bytes(min(_FLUSH, stored.padding * width)))
        at, stop = offset + last * width, offset + stored.size * width
        while at < stop:
            part = zeros[: stop - at]
            self._put(file.path, at, part)
            at += len(part)

    def _put(self, path: str, offset: int, data: memoryview) -> None:
        handle = self._handles.get(path)
        if handle is None:
            handle = self._open(path)
        size = len(data)
        with self._turn[path]:  # the kernel lets one in at a time, and the others spin
            while len(data):
                n = os.pwrite(handle, data[: _WRITE - offset % _WRITE], offset)
                data, offset = data[n:], offset + n
        with self._lock:
            self.bytes_written += size
            self._left[path] -= size
            self._dirty[path] += size
            complete = self._left[path] == 0
            full = self._dirty[path] >= _FLUSH
            if full:
                self._dirty[path] = 0
        if complete:
            self._wait(self._complete, path) if self._disk else self._complete(path)
        elif full and self._disk:
            self._wait(start_writeback, handle)

    def _wait(self, task: Callable, argument: object) -> None:
        future = self._disk.submit(task, argument)
        with self._lock:
            self._waits.append(future)

    def _complete(self, path: str) -> None:
        if self._durable:
            os.fsync(self._handles[path])
        with self._lock:
            if self._durable:
                self._durable(path)
            os.close(self._handles.pop(path))


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
