"""Write a folder as a transaction: it appears whole or not at all, and a killed run goes on where it was.

Everything is written into a folder beside the destination (``destination.py``), with a journal (``journal.py``) of what is finished:
files, and portions of the work inside files. The journal begins with a fingerprint (``fingerprint.py``) of all that decides the
output's bytes, so that a changed source, another layout or other options never continue old work. At the end, when the
source is still what it was, the folder gets its name in one step. One mechanism serves local sources and those on the Hub.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.conversion.destination import Place, modes, sync_folder
from reshard.conversion.fingerprint import conversion, first_note
from reshard.conversion.job import Job, default_jobs
from reshard.conversion.journal import Journal, Note, notes_in, opened
from reshard.conversion.lock import told
from reshard.conversion.output import Output
from reshard.conversion.resume import Work, check_leftover, give_up, resume, written_by
from reshard.errors import CastError, DestinationError, FormatError
from reshard.executor.run import casts_judged, run_batches, run_portions
from reshard.executor.sources import Source
from reshard.executor.threads import one_interrupt
from reshard.formats.manifest import NAME as MANIFEST
from reshard.formats.manifest import merged, of_conversion, read_incomplete
from reshard.planner.batches import Batch
from reshard.planner.tiles import BUFFER, Portion, tile_limit
from reshard.stores.files import AnyPath, failed
from reshard.stores.identity import changed
from reshard.text import human

_DURABLE_EVERY = 30  # seconds: how much of the work a loss of power may cost


@dataclass(frozen=True)
class Report:
    """What a conversion did. Bytes are counted where they are read and written, not taken from the plan."""

    path: Path
    files: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_files: int = 0
    checked_files: int = 0  # of a remote source: whose sha256 was found to be the Hub's
    bytes_received: int = 0  # over the network, small files and repeats among them
    resumed_bytes: int = 0  # of the source, that an earlier run had moved
    notes: list[str] = field(default_factory=list)  # what the user should know besides, as sentences


@one_interrupt()
def convert(
    job: Job,
    destination: str | Path,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    jobs: int | None = None,
    buffer: int = BUFFER,
    progress: Callable[[int], None] = lambda size: None,
) -> Report:
    """Run `job` into folder `destination`. `progress` is told bytes read, as they are read.

    Raises DestinationError when the destination can't be replaced or may not (it is not empty, without `overwrite`; no
    checkpoint; a mount point), another run holds it, an unfinished run of other work is in the way, or the disk is too small:
    all before a byte is written. Raises FormatError when the source was changed since it was opened: nothing appears then.
    """
    began = time.monotonic()
    place = Place.of(destination, job.rank)
    place.check_source(job)
    notes: list[str] = []
    healed = place.heal(notes)
    first = first_note(job)
    names = [file.path for file in job.folder.files]
    if _finished(job, place, first["fingerprint"], healed):
        progress(job.bytes_read)
        return Report(place.given, names, 0, 0, time.monotonic() - began, len(names), resumed_bytes=job.bytes_read, notes=notes)
    if _ranks_there(job, place) is None:
        other = read_incomplete(place.path) if job.rank is not None and not overwrite else None
        if other:
            held = ", ".join(map(str, other["ranks"]["held"]))
            raise DestinationError(
                f"{place.given} holds rank {held} of another conversion: other source files, layout or options",
                "choose another destination, or use --overwrite to replace it",
            )
        place.check_free(overwrite, "".join(f"; {note}" for note in notes))
    check_leftover(notes_in(place.partial), first, job, place, overwrite)
    _check_space(job, place)
    jobs = jobs or default_jobs(job.source)
    files_mode, folders_mode = modes(job.source.path / file for file in job.source.files) if not job.source.remote else (0o666, 0o777)
    with opened(place.partial, str(place.given), lambda: place.make_partial(folders_mode)) as journal:
        if _ranks_there(job, place) is None:
            place.check_still_free(journal, overwrite)
        notes += told(journal.lock) + check_leftover(journal.notes, first, job, place, overwrite)
        work = resume(journal, job, place.partial, first)
        source = job.source.source(job.batches or () if not work.resumed else (), jobs)
        left = [file for file in job.folder.files if file.path not in work.done.files]
        written = written_by(job, work.portions, work.done.batches) if work.done.batches else {}
        output = Output(
            place.partial,
            left,
            journal.file if fsync else None,
            written,
            job.plan.padding,
            files_mode,
            folders_mode,
        )
        source.casts = job.casts
        try:
            _move(job, work, source, output, journal, jobs=jobs, buffer=buffer, progress=progress)
            output.finish()
            source.check_unchanged()
            _check_companions(job)
            small = _small_files(job)
            for name, content in small.items():
                _write_small(content, place.partial / name, fsync, files_mode)
            if fsync:
                for folder in sorted({path.parent for path in place.partial.rglob("*")}):
                    sync_folder(folder)
        except (FormatError, CastError) as error:
            give_up(job, work, journal, place, error)
            raise
        finally:
            output.close()
            source.close()
            if output.doubtful:
                journal.doubt()
        with place.locked():
            there = _ranks_there(job, place)
            if there is not None:
                journal.publish(place.path.stat().st_ino, place.partial.name)
                place.add([*names, *(name for name in small if name != MANIFEST)], merged(there, small[MANIFEST]), fsync)
            else:
                place.publish(journal, overwrite, fsync)
        if there is None:
            place.tidy()
    return Report(place.given, names, source.bytes_read, output.bytes_written, time.monotonic() - began, len(work.done.files), source.checked,
                  job.source.received, work.resumed, notes)  # fmt: skip


def _move(
    job: Job, work: Work, source: Source, output: Output, journal: Journal, *, jobs: int, buffer: int, progress: Callable[[int], None]
) -> None:
    """Read and write what is not done yet, and note it."""
    progress(work.resumed)
    marked = [time.monotonic()]

    def moved(number: int) -> None:
        journal.batch(number)
        if time.monotonic() - marked[0] > _DURABLE_EVERY:
            marked[0], mark = time.monotonic(), journal.mark()
            output.sync(lambda: journal.durable(mark))

    with casts_judged(job.plan, source):
        if source.remote:
            batches = [(number, batch) for number, batch in work.left if isinstance(batch, Batch)]
            run_batches(batches, source, output.write, jobs=jobs, buffer=buffer, progress=progress, moved=moved)
        else:
            portions = [(number, portion) for number, portion in work.left if isinstance(portion, Portion)]
            run_portions(
                portions, source, output.write, limit=tile_limit(job.plan, jobs, buffer), jobs=jobs, progress=progress, moved=moved
            )


def _finished(job: Job, place: Place, fingerprint: str, healed: Note | None) -> bool:
    """Whether an earlier run of this very job did all: it was killed when its folder had its name, or its rank is in the folder."""
    if healed and healed["fingerprint"] == fingerprint:
        return _whole(job, place.path)
    if job.rank is None or not _whole(job, place.path):
        return False
    there = _ranks_there(job, place)
    left = [] if place.partial.is_symlink() else notes_in(place.partial)
    if there is None or job.rank not in there["ranks"]["held"]:
        # or it was the last: the folder is whole and says nothing of ranks any more, but what the run left does
        moved = bool(left) and left[0]["fingerprint"] == fingerprint and any("publish" in note for note in left)
        if not moved or read_incomplete(place.path) or any((place.partial / file.path).exists() for file in job.folder.files):
            return False
    if left:
        shutil.rmtree(place.partial)
    with place.locked():
        pass  # which removes a lock file that the run left
    return True


def _whole(job: Job, folder: Path) -> bool:
    """Whether `folder` holds all weight files of `job`, at their sizes."""
    return all((folder / file.path).is_file() and (folder / file.path).stat().st_size == file.image.size for file in job.folder.files)


def _ranks_there(job: Job, place: Place) -> dict[str, Any] | None:
    """The manifest of the destination, where that holds other ranks of the conversion that `job` is one rank of."""
    there = read_incomplete(place.path) if job.rank is not None else None
    return there if there and there["ranks"].get("conversion") == conversion(job) else None


def _check_companions(job: Job) -> None:
    for path, then in job.identities.items():
        how = changed(path, then)
        if how:
            raise FormatError(f"{path} was changed while the conversion ran: {how}", "run the same command again")


def _check_space(job: Job, place: Place) -> None:
    """Raises DestinationError when the disk lacks room. What an earlier run left counts as free: it is continued, or removed."""
    need = sum(file.image.size for file in job.folder.files) + sum(path.stat().st_size for path in job.companions.values())
    if place.partial.is_dir() and not place.partial.is_symlink():
        need -= sum(path.lstat().st_blocks * 512 for path in place.partial.rglob("*") if path.is_file() and not path.is_symlink())
    above = next(folder for folder in place.partial.parents if folder.is_dir())
    status = os.statvfs(above)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise DestinationError(
            f"{above} has {free:,} bytes free, the conversion writes {need:,}", "free some space, or write to another disk"
        )


def _small_files(job: Job) -> dict[str, bytes]:
    small = {name: _content(path) for name, path in job.companions.items()} | job.folder.small
    if job.rank is not None:
        small[MANIFEST] = of_conversion(small[MANIFEST], conversion(job))
    return small


def _content(path: AnyPath) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise failed(path, error) from None


def _write_small(content: bytes, path: Path, fsync: bool, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
        if fsync:
            os.fsync(handle)
    except OSError as error:
        raise DestinationError(
            f"{path} can't be written: {error.strerror}", "free some space, then run the same command: it goes on where it stopped"
        ) from None
    finally:
        os.close(handle)


def resumed(report: Report) -> str:
    """What of a job an earlier run had done, for people; nothing where there was none."""
    if not report.resumed_bytes:
        return ""
    return f"resumed: {human(report.resumed_bytes)} of the source and {report.resumed_files} of {len(report.files)} files were done; "
