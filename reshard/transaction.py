"""Write a folder as a transaction: it appears whole or not at all, and a killed run goes on where it was.

Everything is written into ``.NAME.reshard`` beside the destination; each file is made durable and then noted in the
journal there; at the end the folder is renamed. The journal (``journal.py``) begins with a fingerprint of source, options and output, so that
a changed source or other options never continue old work. A lock on the journal keeps two runs apart.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reshard import __version__
from reshard.checkpoint import Checkpoint
from reshard.errors import DestinationError, HubError, ReshardError
from reshard.execute import Source, run, run_batches
from reshard.fetch import BATCH, GAP
from reshard.formats import OutFile
from reshard.job import Job, default_jobs
from reshard.join import Plan
from reshard.journal import NAME as JOURNAL
from reshard.journal import Done, Journal, opened
from reshard.output import Output
from reshard.stores import DTYPE_SIZE
from reshard.tiles import BUFFER

_DURABLE_EVERY = 30  # seconds: how much of a remote source's work a loss of power may cost


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
    jobs = jobs or default_jobs(job.source)
    with opened(partial) as journal:
        done = _resume(journal, job, partial, overwrite)
        _check_space(job, partial, done)
        source, output = job.source.source(job.batches if not done.batches | done.files else (), jobs), _output(job, partial, done, journal, fsync)
        try:
            _move(job, done, source, output, journal, jobs=jobs, buffer=buffer, progress=progress)
            output.finish()
        except HubError:
            raise
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
    return Report(destination, names, source.bytes_read, output.bytes_written, time.monotonic() - began, len(done.files), source.checked, received(job.source))


def _output(job: Job, partial: Path, done: Done, journal: Journal, fsync: bool) -> Output:
    left = [file for file in job.folder.files if file.path not in done.files]
    return Output(partial, left, journal.file if fsync else None, written_by(job, done.batches) if done.batches else {})


def _move(job: Job, done: Done, source: Source, output: Output, journal: Journal, *, jobs: int, buffer: int, progress: Callable[[int], None]) -> None:
    """Read and write what is not done yet."""
    if job.batches is None:
        todo = only(job.plan, [file for file in job.folder.files if file.path not in done.files]) if done.files else job.plan
        progress(job.bytes_read - todo.bytes_read)
        run(todo, source, output.write, jobs=jobs, buffer=buffer, progress=progress)
        return
    finished = {id(s) for file in job.folder.files if file.path in done.files for s in file.tensors.values()}
    left = [(number, batch.without(finished)) for number, batch in enumerate(job.batches) if number not in done.batches]
    left = [(number, batch) for number, batch in left if batch.tiles]
    progress(job.bytes_read - sum(batch.size for _, batch in left))
    marked = [time.monotonic()]

    def moved(number: int) -> None:
        journal.batch(number)
        if time.monotonic() - marked[0] > _DURABLE_EVERY:
            marked[0], mark = time.monotonic(), journal.mark()
            output.sync(lambda: journal.durable(mark))

    run_batches(left, source, output.write, jobs=jobs, buffer=buffer, progress=progress, moved=moved)


def received(source: Checkpoint) -> int:
    """Bytes of content that came over the network for `source` so far."""
    return source.path.repository.received if source.remote else 0


def _check_destination(job: Job, destination: Path, overwrite: bool) -> None:
    if not job.source.remote:
        source = Path(os.path.realpath(job.source.path))
        target = Path(os.path.realpath(destination))
        if source == target or target in source.parents or source in target.parents:
            raise DestinationError(f"{destination} and the source {job.source.path} are the same folder, or one lies in the other", "choose another destination")
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"{destination} is a file", "choose another destination")
    if not overwrite:
        refuse_filled(destination)


def refuse_filled(destination: Path) -> None:
    """Raise DestinationError where the folder holds anything."""
    if destination.is_dir() and (count := sum(1 for _ in destination.iterdir())):
        raise DestinationError(f"{destination} is not empty ({count} entries)", "use --overwrite to replace it, or choose another destination")


def _finished(job: Job, destination: Path) -> bool:
    """Whether this very job was killed after its folder got its name, with nothing left to do but tidy up."""
    journal = destination / JOURNAL
    try:
        first = json.loads(journal.read_bytes().split(b"\n")[0])
    except (OSError, ValueError):
        return False
    if first.get("fingerprint") != fingerprint(job):
        return False
    shutil.rmtree(_old(destination), ignore_errors=True)
    journal.unlink()
    return True


def _resume(journal: Journal, job: Job, partial: Path, overwrite: bool) -> Done:
    """What an earlier, interrupted run of the very same job has finished. Starts the journal where there is none."""
    first = {"fingerprint": fingerprint(job), "reshard": __version__, "source": job.source.name}
    same = journal.first.get("fingerprint") == first["fingerprint"]
    if journal.first and not same and not overwrite:
        earlier = journal.first.get("source")
        if job.source.remote and earlier != first["source"] and str(earlier).partition("@")[0] == first["source"].partition("@")[0]:
            raise DestinationError(f"{partial} holds an unfinished conversion of {earlier}; {job.source.path} is at {job.source.revision[:12]} now",
                                   f"convert {earlier} to finish it, or use --overwrite to throw it away")  # fmt: skip
        raise DestinationError(
            f"{partial} holds an unfinished conversion of another source or with other options",
            "run that command again to finish it, or use --overwrite to throw it away",
        )
    done = journal.begin(first, afresh=not same)
    sizes = {file.path: file.image.size for file in job.folder.files}
    whole = {name for name in sizes if (partial / name).is_file() and (partial / name).stat().st_size == sizes[name]}
    done.files &= whole
    if done.batches and not {file for file, size in written_by(job, done.batches).items() if size} <= whole:
        journal.forget()
        done.batches = set()
    keep = whole if done.batches else done.files
    for path in sorted(partial.rglob("*"), reverse=True):
        name = str(path.relative_to(partial))
        if path.is_file() and name != JOURNAL and name not in keep:
            path.unlink()
    return done


def written_by(job: Job, batches: set[int]) -> dict[str, int]:
    """How many bytes of each output file those batches write."""
    file_of = {id(stored): file.path for file in job.folder.files for stored in file.tensors.values()}
    size = dict.fromkeys(file_of.values(), 0)
    for number in batches:
        for tile in job.batches[number].tiles:
            for copy in tile.copies:
                size[file_of[id(copy.dst)]] += copy.move.size * DTYPE_SIZE[copy.dst.dtype]
    return size


def fingerprint(job: Job) -> str:
    """A digest of what decides the output's bytes: source files as they are, options, and the output's own shape."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(json.dumps(values, default=str).encode())

    add(__version__, job.format, vars_of(job.mesh), job.dtype, job.engine_version, job.source.name)
    for file in job.source.files if job.batches is None else ():  # a commit's files never change
        status = (job.source.path / file).stat()
        add(file, status.st_size, status.st_mtime_ns, status.st_ino)
    if job.batches is not None:
        add(GAP, BATCH, [batch.size for batch in job.batches])
    for file in job.folder.files:
        add(file.path, file.image.size, hashlib.sha256(file.image.segments[0][1]).hexdigest())
    return digest.hexdigest()


def vars_of(mesh) -> list[int]:
    return [mesh.tp, mesh.pp, mesh.ep, mesh.etp]


def _check_space(job: Job, partial: Path, done: Done) -> None:
    left = [file for file in job.folder.files if file.path not in done.files]
    need = sum(file.image.size for file in left) - sum((partial / f.path).stat().st_blocks * 512 for f in left if (partial / f.path).is_file())
    need += sum(path.stat().st_size for path in job.companions.values())
    status = os.statvfs(partial)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise DestinationError(f"{partial.parent} has {free:,} bytes free, the conversion writes {need:,}", "free some space, or write to another disk")


def only(plan: Plan, files: list[OutFile]) -> Plan:
    """What of `plan` fills `files`."""
    wanted = {id(s) for file in files for s in file.tensors.values()}
    left = [copy for copy in plan.copies if id(copy.dst) in wanted]
    keys = {copy.key for copy in left}
    return Plan([s for s in plan.destinations if id(s) in wanted], left, [c for c in plan.checks if c.key in keys])


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
    (destination / JOURNAL).unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
