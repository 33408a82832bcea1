"""The journal of an unfinished run: which output files and which portions of the work are finished.

One JSON object a line, only ever appended to. What each line is worth, and when it is written:

- the first, ``fingerprint`` and what it is of: on the disk before any other file of the run is made;
- ``boot``: which boot of the machine wrote the lines after it;
- ``file``: that output file is complete and on the disk (fsync came first). True after a loss of power too;
- ``batch``: a portion's bytes were handed to the kernel. True after the death of the process, not after the machine's: after
  another boot, or where boots can't be told apart, it does not count;
- ``mark`` and ``durable``: all portions noted before that mark are on the disk (fsync came first): they count after a loss of power;
- ``doubt``: the disk refused to store something: only what is durable counts;
- ``redo``: these files and portions hold bytes that turned out to be wrong; ``forget``: no portion counts;
- ``publish``: the folder is complete and may get its name from now on; its inode, and the name it had until then.

A line that is torn or makes no sense ends the journal: nothing after it counts. Portions are noted by number; which is which
depends on the plan alone, not on threads or buffers.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from reshard.conversion.lock import Lock, locked
from reshard.foreign import LIMIT, parse

NAME = "journal.jsonl"
Note = dict[str, Any]  # one line


@dataclass
class Done:
    """What earlier runs have finished: output files by name, portions by number."""

    files: set[str] = field(default_factory=set)
    batches: set[int] = field(default_factory=set)


class Journal:
    """An open journal, locked for this run alone."""

    def __init__(self, handle: int, lock: Lock, notes: list[Note], size: int, first: int):
        """`size` bytes are `notes`, `first` of them the first."""
        self._handle, self.lock, self.notes, self._size, self._first = handle, lock, notes, size, first
        self._turn = threading.Lock()
        self._marks = max((note.get("mark", 0) for note in notes), default=0)

    @property
    def first(self) -> Note:
        return self.notes[0] if self.notes else {}

    def begin(self, first: Note, afresh: bool) -> Done:
        """What is done, by the notes; `afresh` starts a new journal that begins with `first`."""
        if afresh:
            self._cut(0)
            self.notes = []
            self._write([first])
            self._first = self._size
        done = replay(self.notes, boot())
        self._write([{"boot": boot()}])
        return done

    def file(self, path: str) -> None:
        self._write([{"file": path}])

    def batch(self, number: int) -> None:
        self._write([{"batch": number}], sync=False)

    def mark(self) -> int:
        """A number for the notes so far."""
        self._marks += 1
        self._write([{"mark": self._marks}], sync=False)
        return self._marks

    def durable(self, mark: int) -> None:
        """All portions noted before `mark` are on the disk."""
        self._write([{"durable": mark}])

    def forget(self) -> None:
        """No portion noted so far counts any more."""
        self._write([{"forget": True}])

    def redo(self, files: list[str], batches: list[int]) -> None:
        """These were made of wrong bytes."""
        self._write([{"redo": {"files": files, "batches": batches}}])

    def doubt(self) -> None:
        """The disk failed: what was only handed to it may be lost. Where not even that can be noted, nothing counts any more."""
        try:
            self._write([{"doubt": True}])
        except OSError:
            self._cut(self._first)

    def publish(self, inode: int, name: str) -> None:
        self._write([{"publish": inode, "from": name}])

    def _write(self, notes: list[Note], sync: bool = True) -> None:
        data = b"".join(json.dumps(note).encode() + b"\n" for note in notes)
        with self._turn:
            try:
                left = memoryview(data)
                while left:
                    written = os.write(self._handle, left)
                    if not written:
                        raise OSError(5, "the disk took no byte of the journal")
                    left = left[written:]
            except OSError:
                self._cut(self._size)  # no line may follow a torn one
                raise
            self._size += len(data)
        if sync:
            os.fsync(self._handle)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._handle, size)
        self._size = size


def replay(notes: list[Note], now: str | None) -> Done:
    """What `notes` say is done, on a machine whose boot is `now`."""
    done, last = Done(), None
    durable: set[int] = set()
    marks: dict[int, set[int]] = {}
    for note in [*notes, {"boot": now}]:
        if "boot" in note:
            if note["boot"] is None or note["boot"] != last:
                done.batches = set(durable)
            last = note["boot"]
        elif "file" in note:
            done.files.add(note["file"])
        elif "batch" in note:
            done.batches.add(note["batch"])
        elif "mark" in note:
            marks[note["mark"]] = set(done.batches)
        elif "durable" in note:
            durable = durable | marks.get(note["durable"], set())
        elif "doubt" in note:
            done.batches = set(durable)
        elif "forget" in note:
            done.batches, durable, marks = set(), set(), {}
        elif "redo" in note:
            done.files -= set(note["redo"]["files"])
            wrong = set(note["redo"]["batches"])
            done.batches, durable = done.batches - wrong, durable - wrong
            marks = {mark: batches - wrong for mark, batches in marks.items()}
    return done


_KINDS = {
    "boot": (str, type(None)),
    "file": (str,),
    "batch": (int,),
    "mark": (int,),
    "durable": (int,),
    "doubt": (bool,),
    "forget": (bool,),
    "publish": (int,),
}


def _sound(note: object, is_first: bool) -> TypeGuard[Note]:
    """Whether a line is one that a run writes."""
    if not isinstance(note, dict) or not note:
        return False
    if is_first:
        return (
            isinstance(note.get("fingerprint"), str)
            and isinstance(note.get("source", ""), str)
            and isinstance(note.get("options", {}), dict)
        )
    if "redo" in note:
        redo = note["redo"]
        return isinstance(redo, dict) and all(
            isinstance(redo.get(key), list) and all(type(item) is kind for item in redo[key])
            for key, kind in (("files", str), ("batches", int))
        )
    return any(key in note and type(note[key]) in kinds for key, kinds in _KINDS.items()) and isinstance(note.get("from", ""), str)


def read_notes(raw: bytes) -> tuple[list[Note], int]:
    """The notes of a journal, and the bytes that they take: a line that is torn, or is not a journal's, ends it."""
    notes: list[Note] = []
    good = 0
    for line in raw.splitlines(keepends=True):
        try:
            note = parse(line)
        except ValueError:
            break
        if not (_sound(note, not notes) and line.endswith(b"\n")):
            break  # it was being written when the run died, or it is another's
        notes.append(note)
        good += len(line)
    return notes, good


def notes_in(folder: Path) -> list[Note]:
    """The notes of the journal in `folder`; none where there is none, or a file of that name that is another's."""
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LIMIT:
            return []
        return read_notes(path.read_bytes())[0]
    except OSError:
        return []


def boot() -> str | None:
    """What tells this boot of the machine from others; None where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextmanager
def opened(partial: Path, what: str, make: Callable[[], None]) -> Iterator[Journal]:
    """The journal in folder `partial`, which `make()` makes. Raises DestinationError when another run has it."""
    with locked(partial / NAME, what, make=make) as (handle, lock):
        size = os.fstat(handle).st_size
        raw = b""
        while len(raw) < size <= LIMIT:
            part = os.pread(handle, size - len(raw), len(raw))
            if not part:
                break
            raw += part
        notes, good = read_notes(raw)
        os.ftruncate(handle, good)
        yield Journal(handle, lock, notes, good, raw.find(b"\n", 0, good) + 1)
