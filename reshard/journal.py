"""The journal of an unfinished run: which output files are finished, and of a remote source which batches are written.

One JSON object a line, only ever appended to, beginning with the fingerprint of the work. A file is noted once it is on the
disk. A batch is noted as soon as it is written, which a killed process survives but a machine that loses power may not: so
the journal knows the machine's boot, and after another boot only batches noted as durable count.
"""

import contextlib
import fcntl
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from reshard.errors import DestinationError

NAME = "journal.jsonl"


@dataclass
class Done:
    """What earlier runs have finished: output files by name, batches by number."""

    files: set[str] = field(default_factory=set)
    batches: set[int] = field(default_factory=set)


class Journal:
    """An open journal, locked for this run alone."""

    def __init__(self, handle, notes: list[dict]):
        self._handle, self.notes = handle, notes
        self._turn = threading.Lock()
        self._marks = max((note.get("mark", 0) for note in notes), default=0)

    @property
    def first(self) -> dict:
        return self.notes[0] if self.notes else {}

    def begin(self, first: dict, afresh: bool) -> Done:
        """What is done, by the notes; `afresh` starts a new journal that begins with `first`."""
        if afresh:
            self._handle.truncate(0)
            self.notes = []
            self._write([first])
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
        """All batches noted before `mark` are on the disk."""
        self._write([{"durable": mark}])

    def forget(self) -> None:
        """No batch noted so far counts any more."""
        self._write([{"forget": True}])

    def _write(self, notes: list[dict], sync: bool = True) -> None:
        with self._turn:
            self._handle.write(b"".join(json.dumps(note).encode() + b"\n" for note in notes))
            self._handle.flush()
        if sync:
            os.fsync(self._handle.fileno())


def replay(notes: list[dict], now: str | None) -> Done:
    """What `notes` say is done, on a machine whose boot is `now`."""
    done, durable, marks, last = Done(), set(), {}, None
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
            durable = marks.get(note["durable"], durable)
        elif "forget" in note:
            done.batches, durable, marks = set(), set(), {}
    return done


def boot() -> str | None:
    """What tells this boot of the machine from others; None where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextlib.contextmanager
def opened(partial: Path):
    """The journal in folder `partial`. Raises DestinationError when another run has it."""
    handle = open(partial / NAME, "a+b")  # noqa: SIM115  closed below, after the lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise DestinationError(f"another run is writing to {partial.name[1:-8]}", "wait for it to end") from None
    try:
        handle.seek(0)
        notes, good = [], 0
        for line in handle.read().splitlines(keepends=True):
            try:
                note = json.loads(line)
            except ValueError:
                break
            if not (isinstance(note, dict) and line.endswith(b"\n")):
                break  # it was being written when the run died
            notes.append(note)
            good += len(line)
        handle.truncate(good)
        yield Journal(handle, notes)
    finally:
        handle.close()
