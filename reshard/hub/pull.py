"""Fetch a repository's folder as it is: into a folder that appears whole or not at all, and goes on where it was killed.

Beside the destination NAME, ``.NAME.reshard`` holds a journal, which begins with what is fetched (repository, commit, folder,
files), and ``files/``, which gets the destination's name when every file is there and has the Hub's checksum. A conversion to
the same destination uses the same journal, so that two runs, of either kind, keep each other out.
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
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import DestinationError, HubError
from reshard.execute import Workspace, in_threads
from reshard.hub.answers import Entry
from reshard.hub.destination import check_destination, nearest_folder, put_in_place, resolved
from reshard.hub.folder import HubPath, open_folder
from reshard.journal import NAME as JOURNAL
from reshard.journal import Done, Journal, opened
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
    skipped = _SKIPPED
    if any(name.endswith(".safetensors") for name in names):
        skipped += (".bin", ".bin.index.json", ".pth")
    return {name: size for name, size in names.items() if not name.endswith(skipped) and not any(part.startswith(".") for part in name.split("/"))}


def left_out(folder: HubPath) -> dict[str, int]:
    """The folder's other files, and their sizes."""
    start = folder.path + "/" if folder.path else ""
    every = {path[len(start) :]: entry.size for path, entry in folder.repository.entries.items() if path.startswith(start)}
    return {name: every[name] for name in sorted(every.keys() - wanted(folder).keys())}


def pull(source: str, destination: str | Path, *, overwrite: bool = False, cache: bool = False, progress: Callable[[int], None] = lambda size: None) -> Pulled:
    """Download `source`, hf://ORG/NAME[@REV][/SUBDIR], into the folder `destination`, which appears whole or not at all.

    What an interrupted pull of the very same files fetched is not fetched again. Raises HubError; DestinationError before
    the first byte where the destination is no folder, a mount point, not empty (without `overwrite`) or no checkpoint (with
    it), holds another unfinished run, or lacks the space.
    """
    began = time.monotonic()
    folder = source if isinstance(source, HubPath) else open_folder(str(source), cache)
    destination = resolved(destination)
    names = dict(sorted(wanted(folder).items()))
    if not names:
        raise HubError(f"{folder.repository.location} holds no file of a model at {folder.revision[:12]}", f"it holds {some(sorted(left_out(folder))) or 'nothing'}")
    work = Work(folder, names, destination.parent / f".{destination.name}.reshard")
    if not work.published(destination):
        check_destination(destination, overwrite)
        _fetch(work, destination, overwrite, progress)
    else:
        with opened(work.partial):
            _tidy(work.partial)
        progress(sum(names.values()))
    return Pulled(destination, folder.revision, list(names), sum(names.values()), time.monotonic() - began)


class Work:
    """One pull: what it fetches, and the folder `partial` in which it does."""

    def __init__(self, folder: HubPath, names: dict[str, int], partial: Path):
        self.folder, self.names, self.partial = folder, names, partial
        self.files, self.old = partial / "files", partial / "old"
        numbers = iter(range(1 << 62))
        self.chunks = [Chunk(next(numbers), name, at, min(at + CHUNK, size)) for name, size in names.items() for at in range(0, size, CHUNK)]

    def path(self, name: str) -> str:
        """The file's path in the repository."""
        return (self.folder / name).path

    def entry(self, name: str) -> Entry:
        return self.folder.repository.entries[self.path(name)]

    @property
    def first(self) -> dict:
        """The journal's first line: continued by the same pull only."""
        rows = [(name, entry.size, entry.sha256, entry.blob) for name in self.names for entry in [self.entry(name)]]
        digest = hashlib.sha256(json.dumps(["pull", CHUNK, self.folder.pinned, rows]).encode()).hexdigest()
        return {"fingerprint": digest, "pull": self.folder.pinned}

    def published(self, destination: Path) -> bool:
        """Whether this very pull was killed after its folder got its name, with nothing left to do but tidy up."""
        try:
            lines = [json.loads(line) for line in (self.partial / JOURNAL).read_bytes().splitlines()]
        except (OSError, ValueError, RecursionError):
            return False
        return bool(lines) and isinstance(lines[0], dict) and lines[0].get("fingerprint") == self.first["fingerprint"] and _has_name(lines, destination)


def _has_name(notes: list, destination: Path) -> bool:
    """Whether `notes` are of a pull that gave `destination` its name: nothing of it is unfinished."""
    if not destination.is_dir():
        return False
    status = destination.stat()
    return any(isinstance(note, dict) and note.get("publish") == status.st_ino for note in notes)


def _fetch(work: Work, destination: Path, overwrite: bool, progress: Callable[[int], None]) -> None:
    partial = work.partial
    if partial.is_symlink() or (partial.is_dir() and any(partial.iterdir()) and not (partial / JOURNAL).is_file()) or partial.is_file():
        raise DestinationError(f"{partial}, where this would be gathered, is something else", "move it away, or choose another destination")
    partial.mkdir(parents=True, exist_ok=True)
    with opened(partial) as journal:
        if not (partial / JOURNAL).is_file():
            raise DestinationError(f"another run was writing to {destination} until now", "run the same command again if it is still needed")
        _restore(work, destination)
        try:
            done = _resume(journal, work, destination, overwrite)
            _check_space(work, destination)
        except DestinationError:
            if not journal.notes:  # nothing of anyone's is there: the next run finds nothing either
                _tidy(partial)
            raise
        _download(work, done, journal, progress)
        for path in [path for path in work.files.rglob("*") if path.is_file() and path.relative_to(work.files).as_posix() not in work.names]:
            path.unlink()
        for inside in [work.files, *(path for path in work.files.rglob("*") if path.is_dir())]:
            _sync(inside)
        if destination.is_dir():
            shutil.copymode(destination, work.files)
        status = work.files.stat()
        journal._write([{"publish": status.st_ino, "from": partial.name}])
        put_in_place(work.files, destination, work.old, overwrite)
        _sync(destination.parent)
        _tidy(partial)


def _tidy(partial: Path) -> None:
    """Remove what a pull worked in; the journal last, since without it nobody knows whose the rest is."""
    for path in partial.iterdir():
        if path.name != JOURNAL:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (partial / JOURNAL).unlink()
    partial.rmdir()


def _restore(work: Work, destination: Path) -> None:
    """After a death between two renames the old folder has no name: give it back."""
    if work.old.is_dir() and not destination.exists():
        os.rename(work.old, destination)


def _resume(journal: Journal, work: Work, destination: Path, overwrite: bool) -> Done:
    """What an earlier, interrupted pull of the very same files has fetched. Starts the journal where there is none."""
    first = work.first
    same = journal.first.get("fingerprint") == first["fingerprint"]
    if journal.first and not same and not overwrite and not _has_name(journal.notes, destination):
        earlier = journal.first.get("pull")
        what = f"pull of {earlier}" if isinstance(earlier, str) else "conversion"
        hint = f"pull {earlier} to finish it" if isinstance(earlier, str) else "run that command again to finish it"
        raise DestinationError(f"{work.partial} holds an unfinished {what}, and this is {work.folder.pinned}", f"{hint}, or use --overwrite to throw it away")
    if not same:
        for path in work.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(work.old, ignore_errors=True)
    done = journal.begin(first, afresh=not same)
    work.files.mkdir(exist_ok=True)
    sizes = {name: (work.files / name).stat().st_size for name in work.names if (work.files / name).is_file()}
    done.files = {name for name in done.files if sizes.get(name) == work.names.get(name)}
    done.batches = {chunk.number for chunk in work.chunks if chunk.number in done.batches and sizes.get(chunk.name) == work.names[chunk.name]}
    return done


def _check_space(work: Work, destination: Path) -> None:
    there = sum((work.files / name).stat().st_blocks * 512 for name in work.names if (work.files / name).is_file())
    free, need = shutil.disk_usage(nearest_folder(work.partial)).free, sum(work.names.values())
    if need - there > free:
        raise DestinationError(f"{destination.parent} has {free:,} bytes free, the files have {need:,}", "free some space, or write to another disk")


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
        _write(work.files / item.name, item.start, buffer, work.names[item.name])
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
    path, entry = work.files / name, work.entry(name)
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


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
