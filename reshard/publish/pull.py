"""Fetch a repository's folder as it is: into a folder that appears whole or not at all, and goes on where it was killed.

Rules of the destination, lock, journal and the last step are those of a conversion (``conversion/destination.py``), so that two
runs of either kind keep each other out. The journal begins with what is fetched: repository, commit, folder, files. A file is
noted when it is on the disk and has the Hub's checksum.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reshard.conversion.destination import Place, sync_folder
from reshard.conversion.journal import NAME as JOURNAL
from reshard.conversion.journal import Done, Journal, Note, notes_in, opened
from reshard.conversion.lock import told
from reshard.errors import DestinationError, HubError
from reshard.executor.sources import Workspace
from reshard.executor.threads import in_threads, one_interrupt
from reshard.foreign import quote
from reshard.hub.answers import Entry
from reshard.hub.folder import HubPath, open_folder
from reshard.text import some

CHUNK = 4 << 20  # bytes of one request
_IN_FLIGHT = 8
_SKIPPED = (".py", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite")


@dataclass(frozen=True)
class Pulled:
    """What a pull did."""

    path: Path
    revision: str
    files: list[str]
    bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)  # what the user should know besides, as sentences


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, stop) of the file `name`; the journal knows it by its number."""

    number: int
    name: str
    start: int
    stop: int


def wanted(folder: HubPath) -> dict[str, int]:
    """Files of the folder that a model consists of, and their sizes: of two kinds of weights the safer; nothing hidden, no code, no other formats."""
    entries = folder.repository.entries
    start = folder.path + "/" if folder.path else ""
    names = {path[len(start) :]: entry.size for path, entry in entries.items() if path.startswith(start)}
    skipped: tuple[str, ...] = _SKIPPED
    if any(name.endswith(".safetensors") for name in names):
        skipped += (".bin", ".bin.index.json", ".pth")
    return {
        name: size
        for name, size in names.items()
        if not name.endswith(skipped) and not any(part.startswith(".") for part in name.split("/")) and name != JOURNAL
    }


def left_out(folder: HubPath) -> dict[str, int]:
    """The folder's other files, and their sizes."""
    start = folder.path + "/" if folder.path else ""
    every = {path[len(start) :]: entry.size for path, entry in folder.repository.entries.items() if path.startswith(start)}
    return {name: every[name] for name in sorted(every.keys() - wanted(folder).keys())}


@one_interrupt()
def pull(
    source: str,
    destination: str | Path,
    *,
    overwrite: bool = False,
    cache: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> Pulled:
    """Download `source`, hf://ORG/NAME[@REV][/SUBDIR], into the folder `destination`, which appears whole or not at all.

    What an interrupted pull of the very same files fetched is not fetched again. Raises HubError; DestinationError before
    the first byte where the destination is no folder, a mount point, not empty (without `overwrite`) or no checkpoint (with
    it), holds another unfinished run, or lacks the space.
    """
    began = time.monotonic()
    folder = source if isinstance(source, HubPath) else open_folder(str(source), cache)
    names = dict(sorted(wanted(folder).items()))
    if not names:
        raise HubError(
            f"{folder.repository.location} holds no file of a model at {folder.revision[:12]}",
            f"it holds {some(sorted(left_out(folder))) or 'nothing'}",
        )
    place = Place.of(destination)
    notes: list[str] = []
    work = Work(folder, names, place)
    healed = place.heal(notes)
    if healed and healed["fingerprint"] == work.first["fingerprint"]:  # this very pull was killed after its folder got its name
        progress(sum(names.values()))
    else:
        place.check_free(overwrite, "".join(f"; {note}" for note in notes))
        _check_leftover(notes_in(place.partial), work, overwrite)
        _check_room(work)
        with opened(place.partial, str(place.given), lambda: place.make_partial(0o777)) as journal:
            place.check_still_free(journal, overwrite)
            notes += told(journal.lock)
            _check_leftover(journal.notes, work, overwrite)
            _download(work, _resume(journal, work), journal, progress)
            _clean(work, set(names))
            for inside in [place.partial, *(path for path in place.partial.rglob("*") if path.is_dir())]:
                sync_folder(inside)
            with place.locked():
                place.publish(journal, overwrite, True)
            place.tidy()
    return Pulled(place.given, folder.revision, list(names), sum(names.values()), time.monotonic() - began, notes)


class Work:
    """One pull: what it fetches, and where to."""

    def __init__(self, folder: HubPath, names: dict[str, int], place: Place):
        self.folder, self.names, self.place, self.partial = folder, names, place, place.partial
        numbers = iter(range(1 << 62))
        self.chunks = [
            Chunk(next(numbers), name, at, min(at + CHUNK, size)) for name, size in names.items() for at in range(0, size, CHUNK)
        ]

    def path(self, name: str) -> str:
        """The file's path in the repository."""
        return (self.folder / name).path

    def entry(self, name: str) -> Entry:
        return self.folder.repository.entries[self.path(name)]

    @property
    def first(self) -> Note:
        """The journal's first line: continued by the same pull only."""
        rows = [(name, entry.size, entry.sha256, entry.blob) for name in self.names for entry in [self.entry(name)]]
        digest = hashlib.sha256(json.dumps(["pull", CHUNK, self.folder.pinned, rows]).encode()).hexdigest()
        return {"fingerprint": digest, "source": self.folder.pinned, "pull": True}


def _check_leftover(notes: list[Note], work: Work, overwrite: bool) -> None:
    """Raises DestinationError where an unfinished run of something else is in the way."""
    earlier = notes[0] if notes else {}
    if (
        not earlier
        or overwrite
        or earlier["fingerprint"] == work.first["fingerprint"]
        or not any(path.name != JOURNAL for path in work.partial.iterdir())
    ):
        return
    source = quote(earlier.get("source"))
    what, hint = (
        (f"pull of {source}", f"pull {source} to finish it")
        if earlier.get("pull")
        else (f"conversion of {source}", "run that command again to finish it")
    )
    raise DestinationError(f"{work.partial} holds an unfinished {what}, and this is {work.folder.pinned}",
                           f"{hint}; to throw it away, use --overwrite or delete {work.partial}")  # fmt: skip


def _resume(journal: Journal, work: Work) -> Done:
    """What an earlier, interrupted pull of the very same files has fetched. Starts the journal where there is none."""
    same = journal.first.get("fingerprint") == work.first["fingerprint"]
    _clean(work, set(work.names) if same else set())
    done = journal.begin(work.first, afresh=not same)
    sizes = {name: path.stat().st_size for name in work.names if (path := work.partial / name).is_file()}
    done.files = {name for name in done.files if name in work.names and sizes.get(name) == work.names[name]}
    done.batches = {
        chunk.number for chunk in work.chunks if chunk.number in done.batches and sizes.get(chunk.name) == work.names[chunk.name]
    }
    return done


def _clean(work: Work, keep: set[str]) -> None:
    """Remove whatever lies in the partial folder but files named `keep`, links among it, and folders that hold nothing."""
    for path in sorted(work.partial.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif (
            path.is_symlink()
            or (path.name != JOURNAL or path.parent != work.partial)
            and path.relative_to(work.partial).as_posix() not in keep
        ):
            path.unlink()


def _check_room(work: Work) -> None:
    there = sum((work.partial / name).stat().st_blocks * 512 for name in work.names if (work.partial / name).is_file())
    folder = work.partial.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DestinationError(f"{folder} is no folder that can be written to", "choose another destination")
    free, need = shutil.disk_usage(folder).free, sum(work.names.values())
    if need - there > free:
        raise DestinationError(f"{folder} has {free:,} bytes free, the files have {need:,}", "free some space, or write to another disk")


def _download(work: Work, done: Done, journal: Journal, progress: Callable[[int], None]) -> None:
    """Fetch what is not there yet, and compare each file with the Hub's checksum when its last chunk has come."""
    repository = work.folder.repository
    repository.start()
    todo = deque(chunk for chunk in work.chunks if chunk.name not in done.files and chunk.number not in done.batches)
    left = {name: 0 for name in work.names if name not in done.files}
    for chunk in todo:
        left[chunk.name] += 1
    checks = deque(name for name in left if not left[name])  # empty, or whole but not checked when the run died
    lock = threading.Lock()
    progress(sum(work.names.values()) - sum(chunk.stop - chunk.start for chunk in todo))

    def tell(size: int) -> None:
        with lock:
            progress(size)

    def take(worker: int) -> Chunk | str:
        with contextlib.suppress(IndexError):
            return checks.popleft()
        return todo.popleft()

    def work_on(item: Chunk | str, space: Workspace, stop: threading.Event) -> None:
        if isinstance(item, str):
            _finish(work, item, journal)
            return
        buffer = space.take(item.stop - item.start)
        cached = repository.local(work.path(item.name))
        if cached:
            with open(cached, "rb") as file:
                file.seek(item.start)
                if file.readinto(buffer) != len(buffer):
                    raise HubError(f"{cached}, in the Hub's cache, became shorter while it was read", "run the same command again")
            tell(len(buffer))
        else:
            repository.read(work.path(item.name), item.start, buffer, tell)
        _write(work.partial / item.name, item.start, buffer, work.names[item.name])
        space.reset()
        journal.batch(item.number)
        with lock:
            left[item.name] -= 1
            last = not left[item.name]
        if last:
            _finish(work, item.name, journal)

    in_threads(_IN_FLIGHT, take, work_on, repository.stop)


def _write(path: Path, start: int, data: memoryview, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, size)
        while len(data):
            n = os.pwrite(handle, data, start)
            data, start = data[n:], start + n
    finally:
        os.close(handle)


def _finish(work: Work, name: str, journal: Journal) -> None:
    """The file as it is on the disk has the Hub's checksum, or else it goes."""
    path, entry = work.partial / name, work.entry(name)
    if not entry.size:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    digest, wanted_digest = entry.digest()
    with open(path, "rb+") as file:
        while digest and (block := file.read(1 << 20)):
            digest.update(block)
        if digest and digest.hexdigest() != wanted_digest:
            journal.forget()  # no chunk counts any more; finished files do
            path.unlink()
            raise HubError(f"{work.folder.repository.location}: {name} has the checksum {digest.hexdigest()}, the Hub lists {wanted_digest}",
                           "run the same command again: it fetches that file again")  # fmt: skip
        os.fsync(file.fileno())
    journal.file(name)
