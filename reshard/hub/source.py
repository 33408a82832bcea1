"""A checkpoint's bytes on the Hub, as the executor reads them: batch by batch, each fetched into a worker's buffer first."""

import mmap
from collections.abc import Callable, Iterable
from pathlib import Path

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import BadBytes
from reshard.executor.sources import InMemory, Source, Workspace
from reshard.geometry.block import Stored
from reshard.hub.checksum import Checksum
from reshard.hub.folder import HubPath
from reshard.planner.batches import AHEAD, BATCH, Batch, Range, by_file


class HubSource(Source):
    """Files of a folder on the Hub; those in the Hub's cache are read from there.

    `whole` are the batches of a run that fetches everything: files that they cover are checked against the Hub's sha256,
    and `checked` counts them.
    """

    remote = True

    def __init__(self, folder: HubPath, whole: Iterable[Batch] = (), jobs: int = 8):
        super().__init__(folder)
        self._hub = folder
        self._repository = folder.repository
        self._repository.start()
        self._cached: dict[str, Path | None] = {}
        self._checks: dict[str, Checksum] = {}  # of files that were not found right yet
        self._ended: set[str] = set()
        for file, ranges in by_file(whole).items():
            path, entry = self._path(file), self._repository.entries[self._path(file)]
            covered = ranges[0].start <= len(self._repository.kept(path)) and len(ranges) == 1 and ranges[0].stop == entry.size
            if entry.sha256 and covered and not self._in_cache(file):
                self._checks[file] = Checksum(entry.size, (AHEAD * jobs + 1) * BATCH)
                kept = self._repository.kept(path)
                self._offer(file, 0, memoryview(kept))

    def hold(self, ranges: list[Range], room: Workspace, tell: Callable[[int], None]) -> "Held":
        """Fetch `ranges` into `room`; `tell` is told bytes as they come."""
        held, at = [], 0
        block = room.take(sum(r.stop - r.start for r in ranges))
        for r in ranges:
            cached = self._in_cache(r.file)
            buffer = block[at : at + r.stop - r.start]
            at += len(buffer)
            if cached:
                self._read_at(r.file, r.start, buffer)
                tell(len(buffer))
            else:
                self._fetch(r, buffer, tell)
            held.append((r, buffer))
        self.count(sum(r.stop - r.start for r in ranges))
        return Held(held)

    def _fetch(self, r: Range, buffer: memoryview, tell: Callable[[int], None]) -> None:
        path = self._path(r.file)
        known = self._repository.kept(path)[r.start : r.stop]  # the header's first read brought more than the header
        buffer[: len(known)] = known
        if known:
            tell(len(known))
        if len(known) < len(buffer):
            self._repository.read(path, r.start + len(known), buffer[len(known) :], tell)
        self._offer(r.file, r.start, buffer)

    def _offer(self, file: str, start: int, data: memoryview) -> None:
        check = self._checks.get(file)
        if check is None:
            return
        check.offer(start, data)
        if check.result and self._is_first(file):
            path = self._path(file)
            try:
                self._repository.compare(path, check.result, self._repository.entries[path].sha256 or "")
            except BadBytes as error:
                error.source_files = frozenset((file, *self._checks))  # what is made of files that were found right is good
                raise
            del self._checks[file]  # only now: what others find out meanwhile must count it among those that nobody has checked
            self.count_checked()

    def _is_first(self, file: str) -> bool:
        """Whether nobody has come to the end of `file` before."""
        with self._lock:
            known = file in self._ended
            self._ended.add(file)
            return not known

    def count_checked(self) -> None:
        with self._lock:
            self.checked += 1

    def _path(self, file: str) -> str:
        return (self._hub / file).path

    def _in_cache(self, file: str) -> Path | None:
        if file not in self._cached:
            self._cached[file] = self._repository.local(self._path(file))
        return self._cached[file]

    def _place(self, file: str) -> Path:
        cached = self._in_cache(file)
        assert cached is not None, f"{file} is not in the cache"
        return cached

    def stop(self) -> None:
        self._repository.stop()


class Held(InMemory):
    """The bytes of one batch: as a Source for its tiles, in memory."""

    def __init__(self, held: list[tuple[Range, memoryview]]):
        self._held = held

    def read(self, stored: Stored, start: int, into: memoryview) -> None:
        """As ``Source.read``."""
        at = stored.start + start * DTYPE_SIZE[stored.dtype]
        held = self._slice(stored.file, at, at + len(into))
        assert held is not None, f"{stored.name}: bytes that no range of its batch holds"
        into[:] = held

    def map(self, stored: Stored, start: int, stop: int) -> memoryview:
        """As ``InMemory.map``: of what lies between the ranges that were fetched, the bytes mean nothing."""
        width = DTYPE_SIZE[stored.dtype]
        low, high = stored.start + start * width, stored.start + stop * width
        whole = self._slice(stored.file, low, high)
        if whole is not None:
            return whole
        view = memoryview(mmap.mmap(-1, high - low))  # pages that nothing is copied to take no memory
        for r, buffer in self._held:
            a, b = max(low, r.start), min(high, r.stop)
            if r.file == stored.file and a < b:
                view[a - low : b - low] = buffer[a - r.start : b - r.start]
        return view

    def _slice(self, file: str, low: int, high: int) -> memoryview | None:
        for r, buffer in self._held:
            if r.file == file and r.start <= low and high <= r.stop:
                return buffer[low - r.start : high - r.start]
        return None
