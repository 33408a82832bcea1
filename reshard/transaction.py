"""Write a folder as a transaction: it appears whole or not at all, and a killed run goes on where it was.

Everything is written into ``.NAME.reshard`` beside the destination; each file is made durable and then noted in the
journal there; at the end the folder is renamed. The journal begins with a fingerprint of source, options and output, so that
a changed source or other options never continue old work. A lock on the journal keeps two runs apart.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reshard import __version__
from reshard.errors import DestinationError, ReshardError
from reshard.execute import Source, run
from reshard.job import Job
from reshard.join import Plan
from reshard.output import Output
from reshard.tiles import BUFFER

_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Report:
    """What a conversion did. Bytes are counted where they are read and written, not taken from the plan."""

    path: Path
    files: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_files: int = 0


def convert(
    job: Job,
    destination: str | Path,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    jobs: int = 2,
    buffer: int = BUFFER,
    progress: Callable[[int], None] = lambda size: None,
) -> Report:
    """Run `job` into folder `destination`. `progress` is told bytes read, as they are read.

    Raises DestinationError when the destination is not empty (without `overwrite`), another run holds it, what an
    unfinished run left there belongs to other options, or the disk is too small: all before a byte is written.
    """
    began = time.monotonic()
    destination = Path(os.path.abspath(destination))
    names = [file.path for file in job.folder.files]
    if _finished(job, destination):
        progress(job.bytes_read)
        return Report(destination, names, 0, 0, time.monotonic() - began, len(names))
    _check_destination(job, destination, overwrite)
    partial = destination.parent / f".{destination.name}.reshard"
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial) as journal:
        done = _resume(journal, job, partial, destination, overwrite)
        _check_space(job, partial, done)
        output = Output(partial, [file for file in job.folder.files if file.path not in done], (lambda path: _note(journal, {"file": path})) if fsync else None)
        source = Source(job.source.path)
        try:
            todo = _unfinished(job, done)
            progress(job.bytes_read - todo.bytes_read)
            run(todo, source, output.write, jobs=jobs, buffer=buffer, progress=progress)
            output.finish()
        except ReshardError:  # the source is not what it should be: no later run could go on from here
            shutil.rmtree(partial)
            raise
        finally:
            output.close()
            source.close()
        for name, path in job.companions.items():
            _copy_small(path.read_bytes(), partial / name, fsync)
        for name, content in job.folder.small.items():
            _copy_small(content, partial / name, fsync)
        _publish(partial, destination, fsync)
    return Report(destination, names, source.bytes_read, output.bytes_written, time.monotonic() - began, len(done))


def _check_destination(job: Job, destination: Path, overwrite: bool) -> None:
    source = Path(os.path.realpath(job.source.path))
    target = Path(os.path.realpath(destination))
    if source == target or target in source.parents or source in target.parents:
        raise DestinationError(f"{destination} and the source {job.source.path} are the same folder, or one lies in the other", "choose another destination")
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"{destination} is a file", "choose another destination")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        count = sum(1 for _ in destination.iterdir())
        raise DestinationError(f"{destination} is not empty ({count} entries)", "use --overwrite to replace it, or choose another destination")


def _finished(job: Job, destination: Path) -> bool:
    """Whether this very job was killed after its folder got its name, with nothing left to do but tidy up."""
    journal = destination / _JOURNAL
    try:
        first = json.loads(journal.read_bytes().split(b"\n")[0])
    except (OSError, ValueError):
        return False
    if first.get("fingerprint") != fingerprint(job):
        return False
    shutil.rmtree(_old(destination), ignore_errors=True)
    journal.unlink()
    return True


@contextlib.contextmanager
def _locked(partial: Path):
    """The journal, opened and locked for this run alone."""
    journal = open(partial / _JOURNAL, "a+b")  # noqa: SIM115  closed below, after the lock
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        journal.close()
        raise DestinationError(f"another run is writing to {partial.name[1:-8]}", "wait for it to end") from None
    try:
        yield journal
    finally:
        journal.close()


def _resume(journal, job: Job, partial: Path, destination: Path, overwrite: bool) -> set[str]:
    """Files that an earlier, interrupted run of the very same job has finished. Starts the journal where there is none."""
    mark = fingerprint(job)
    journal.seek(0)
    lines = journal.read().split(b"\n")[:-1]  # a line without its end was being written when the run died
    notes = []
    for line in lines:
        try:
            notes.append(json.loads(line))
        except ValueError:
            break
    if notes and notes[0].get("fingerprint") != mark:
        if not overwrite:
            raise DestinationError(
                f"{partial} holds an unfinished conversion of another source or with other options",
                "run that command again to finish it, or use --overwrite to throw it away",
            )
        notes = []
    sizes = {file.path: file.image.size for file in job.folder.files}
    done = {note["file"] for note in notes[1:] if (partial / note["file"]).is_file() and (partial / note["file"]).stat().st_size == sizes.get(note["file"])}
    for path in sorted(partial.rglob("*"), reverse=True):
        name = str(path.relative_to(partial))
        if path.is_file() and name != _JOURNAL and name not in done:
            path.unlink()
    journal.seek(0)
    journal.truncate()
    _note(journal, {"fingerprint": mark, "reshard": __version__})
    for name in sorted(done):
        _note(journal, {"file": name})
    return done


def _note(journal, table: dict) -> None:
    journal.write(json.dumps(table).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def fingerprint(job: Job) -> str:
    """A digest of what decides the output's bytes: source files as they are, options, and the output's own shape."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(json.dumps(values, default=str).encode())

    add(__version__, job.format, vars_of(job.mesh), job.dtype, job.engine_version, os.path.realpath(job.source.path))
    for file in job.source.files:
        status = (job.source.path / file).stat()
        add(file, status.st_size, status.st_mtime_ns, status.st_ino)
    for file in job.folder.files:
        add(file.path, file.image.size, hashlib.sha256(file.image.segments[0][1]).hexdigest())
    return digest.hexdigest()


def vars_of(mesh) -> list[int]:
    return [mesh.tp, mesh.pp, mesh.ep, mesh.etp]


def _check_space(job: Job, partial: Path, done: set[str]) -> None:
    need = sum(file.image.size for file in job.folder.files if file.path not in done)
    need += sum(path.stat().st_size for path in job.companions.values())
    status = os.statvfs(partial)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise DestinationError(f"{partial.parent} has {free:,} bytes free, the conversion writes {need:,}", "free some space, or write to another disk")


def _unfinished(job: Job, done: set[str]) -> Plan:
    if not done:
        return job.plan
    finished = {id(s) for file in job.folder.files if file.path in done for s in file.tensors.values()}
    left = [copy for copy in job.plan.copies if id(copy.dst) not in finished]
    keys = {copy.key for copy in left}
    return Plan([s for s in job.plan.destinations if id(s) not in finished], left, [c for c in job.plan.checks if c.key in keys])


def _copy_small(content: bytes, path: Path, fsync: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.write(content)
        if fsync:
            out.flush()
            os.fsync(out.fileno())


def _old(destination: Path) -> Path:
    """Where a folder that is being replaced waits until its successor has its name."""
    return destination.parent / f".{destination.name}.reshard-old"


def _publish(partial: Path, destination: Path, fsync: bool) -> None:
    """Give the finished folder its name, in the place of what may be there."""
    if fsync:
        for folder in sorted({path.parent for path in partial.rglob("*")}):
            _sync_folder(folder)
    if destination.is_dir():
        shutil.rmtree(_old(destination), ignore_errors=True)
        os.rename(destination, _old(destination))
    os.rename(partial, destination)
    if fsync:
        _sync_folder(destination.parent)
    shutil.rmtree(_old(destination), ignore_errors=True)
    (destination / _JOURNAL).unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
