"""What an earlier run left: whether it is this very job's, what of it counts, and what is left to do."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.conversion.destination import Place
from reshard.conversion.job import Job
from reshard.conversion.journal import NAME as JOURNAL
from reshard.conversion.journal import Done, Journal, Note
from reshard.dtypes import DTYPE_SIZE
from reshard.errors import BadBytes, DestinationError, HubError, ReshardError
from reshard.planner.batches import Batch
from reshard.planner.tiles import Portion


@dataclass(frozen=True)
class Work:
    """What is to be done of a job. `done` was done by an earlier run, which moved `resumed` bytes of the source; `left` are the other portions, numbered."""

    portions: Sequence[Batch | Portion]
    done: Done
    left: list[tuple[int, Batch | Portion]]
    resumed: int


def check_leftover(notes: list[Note], first: Note, job: Job, place: Place, overwrite: bool) -> list[str]:
    """What to tell the user of an unfinished run's leftover, whose journal is `notes`. Raises DestinationError where it is other work."""
    earlier = notes[0] if notes else {}
    if not earlier or earlier["fingerprint"] == first["fingerprint"]:
        return []
    if all(earlier.get(key) == first[key] for key in ("source", "options", "state")):
        return [f"an unfinished run was started over: since it began, the layout or reshard's version changed ({place.partial})"]
    if overwrite or not any(path.name != JOURNAL and path.is_file() for path in place.partial.rglob("*")):
        return []
    name, mine = str(earlier.get("source")), first["source"]
    throw_away = f"to throw it away, use --overwrite or delete {place.partial}"
    if job.source.remote and name != mine and name.partition("@")[0] == mine.partition("@")[0]:
        raise DestinationError(f"{place.partial} holds an unfinished conversion of {name}; {job.source.path} is at {str(job.source.revision)[:12]} now",
                               f"convert {name} to finish it; {throw_away}")  # fmt: skip
    if name == mine and earlier.get("options") == first["options"]:
        raise DestinationError(f"{place.partial} holds an unfinished conversion of {name}, whose files have changed since", throw_away)
    was = _options_text(earlier.get("options", {}))
    raise DestinationError(
        f"{place.partial} holds an unfinished conversion of {'the same source' if name == mine else name} with {was}",
        f"run that command again to finish it; {throw_away}",
    )


def _options_text(chosen: Mapping[str, object]) -> str:
    """Options as the command line spells them."""
    words = {"format": "to"}
    usual = (None, 0, 1)
    given = [
        f"--{words.get(key, key).replace('_', '-')}{'' if value is True else f' {value}'}"
        for key, value in chosen.items()
        if value is True or value not in usual or (key == "rank" and value is not None)
    ]
    return " ".join(given)[:200] or "other options"


def resume(journal: Journal, job: Job, partial: Path, first: Note) -> Work:
    """What is left to do after an interrupted run of the very same job. Removes what is not of it; starts the journal where there is none."""
    same = journal.first.get("fingerprint") == first["fingerprint"]
    if not same:
        _clean(partial, set())  # before the journal that tells whose it is
    done = journal.begin(first, afresh=not same)
    sizes = {file.path: file.image.size for file in job.folder.files}
    whole = {name for name in sizes if (at := partial / name).is_file() and not at.is_symlink() and at.stat().st_size == sizes[name]}
    done.files &= whole
    work = job.portions()
    done.batches &= set(range(len(work)))
    if done.batches and not {file for file, size in written_by(job, work, done.batches).items() if size} <= whole:
        journal.forget()
        done.batches = set()
    _clean(partial, whole if done.batches else done.files)
    left = list(enumerate(work))
    if done.files or done.batches:
        left = [(number, portion.without(done.files)) for number, portion in left if number not in done.batches]
        left = [(number, portion) for number, portion in left if portion.tiles]
        return Work(work, done, left, job.bytes_read - sum(portion.size for _, portion in left))
    return Work(work, done, left, 0)


def _clean(partial: Path, keep: set[str]) -> None:
    """Remove all files but the journal and `keep`, all links, and folders in which nothing is left."""
    for folder, inner, files in os.walk(partial, topdown=False):
        for name in files + [name for name in inner if os.path.islink(os.path.join(folder, name))]:
            path = Path(folder, name)
            relative = str(path.relative_to(partial))
            if path.is_symlink() or relative not in keep | {JOURNAL}:
                os.unlink(path)
        if Path(folder) != partial and not os.listdir(folder):
            os.rmdir(folder)


def written_by(job: Job, portions: Sequence[Batch | Portion], batches: set[int]) -> dict[str, int]:
    """How many bytes of each output file those portions write."""
    size = {file.path: 0 for file in job.folder.files}
    for number in batches:
        for tile in portions[number].tiles:
            for copy in tile.copies:
                size[copy.dst.file] += copy.move.size * DTYPE_SIZE[copy.dst.dtype]
            for each in tile.computed:
                for stored, block in each.takers:
                    size[stored.file] += block.size * DTYPE_SIZE[stored.dtype]
    return size


def give_up(job: Job, work: Work, journal: Journal, place: Place, error: ReshardError) -> None:
    """Keep of a run whose source turned out to be wrong what is good: all that is made of files of the Hub's that were found right; else nothing."""
    files = error.source_files if isinstance(error, BadBytes) else frozenset()
    if not files and isinstance(error, HubError):  # a small file of the Hub's came wrong: nothing was made of it
        return
    if not job.source.remote or not files:
        shutil.rmtree(place.partial)
        return
    made = {
        n: {into for tile in portion.tiles for source, into in tile.flows if source in files} for n, portion in enumerate(work.portions)
    }
    journal.redo(sorted(set().union(*made.values())), [n for n, outputs in made.items() if outputs])
