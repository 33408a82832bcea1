"""Where a conversion goes: what may stand there, and how a finished folder gets its name in one step.

Beside the destination ``NAME`` lie, while a run goes on, ``.NAME.reshard`` (what it writes; ``.NAME.reshard-rank3`` for one rank),
``.NAME.reshard-old`` (for a moment: what is being replaced) and ``.NAME.reshard-lock``. A link is followed: these lie beside
the real folder. The steps, under the lock, and what a run that died between them leaves:

    the journal says ``publish``, with the folder's inode     partial complete; the same command publishes it
    rename partial → NAME, or exchange the two, in one step    NAME is new and has our journal: ``heal`` tidies up
    partial (the replaced folder) → old, and remove it
    let the lock go; remove NAME's journal                     done

Where the file system can't exchange two folders, NAME → old and partial → NAME are two steps; a death between them leaves no
NAME, and ``heal`` restores it from old.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reshard import formats
from reshard.conversion.job import Job
from reshard.conversion.journal import NAME as JOURNAL
from reshard.conversion.journal import Journal, Note, notes_in
from reshard.conversion.lock import locked
from reshard.errors import DestinationError, ReshardError
from reshard.formats.manifest import NAME as MANIFEST
from reshard.stores.files import AnyPath
from reshard.text import some


@dataclass(frozen=True)
class Place:
    """A destination: as it was `given`, and the real `path`, which is no link; `rank` where one rank alone is written."""

    given: Path
    path: Path
    rank: int | None = None

    @classmethod
    def of(cls, destination: str | Path, rank: int | None = None) -> "Place":
        """Raises DestinationError where no folder can be put: a link that leads nowhere, a file, a mount point, the folder one is in."""
        given = Path(os.path.abspath(destination))
        if given.is_symlink() and not given.exists():
            raise DestinationError(
                f"{given} is a link to {os.readlink(given)}, which does not exist", "make that folder, or remove the link"
            )
        place = cls(given, Path(os.path.realpath(given)), rank)
        if place.path.exists() and not place.path.is_dir():
            raise DestinationError(f"{given} is a file", "choose another destination")
        mount = next((at for at in mounts() if at == place.path or place.path in at.parents), None)
        if mount == place.path or os.path.ismount(place.path):
            raise DestinationError(f"{given} is a mount point, whose folder can't be replaced in one step", f"use {given / 'NAME'}")
        if mount:
            raise DestinationError(f"{mount}, inside {given}, is a mount point: the folder can't be replaced", "choose another destination")
        if place.path == Path(os.path.realpath(os.getcwd())):
            raise DestinationError(
                f"{given} is the folder you are in: it would be replaced under you", "go one folder up, or use a folder in it: ./NAME"
            )
        return place

    @property
    def partial(self) -> Path:
        return self._beside("" if self.rank is None else f"-rank{self.rank}")

    @property
    def old(self) -> Path:
        return self._beside("-old")

    @property
    def lock(self) -> Path:
        return self._beside("-lock")

    def _beside(self, end: str) -> Path:
        return self.path.parent / f".{self.path.name}.reshard{end}"

    @property
    def taken(self) -> bool:
        """Whether there is anything at all in the destination."""
        return self.path.is_dir() and any(self.path.iterdir())

    def check_source(self, job: Job) -> None:
        """The source must neither be, hold or lie in what is written or replaced, nor have files there."""
        folder = job.source.path
        if not isinstance(folder, Path):
            return
        source = Path(os.path.realpath(folder))
        for target in (self.path, self.partial, self.old):
            if source == target or target in source.parents or source in target.parents:
                word = self.given if target == self.path else target
                raise DestinationError(
                    f"{word} and the source {job.source.path} are the same folder, or one lies in the other",
                    "choose another destination, or rename the source",
                )
        used = f".{self.path.name}.reshard"
        if any(at.parent == self.path.parent and at.name.startswith(used) for at in (source, *source.parents)):
            raise DestinationError(
                f"the source {job.source.path} has a name that reshard uses while it writes {self.given}",
                "choose another destination, or rename the source",
            )
        companions = [path for path in job.companions.values() if isinstance(path, Path)]  # beside a config.json on the Hub others are
        for path in [*(folder / file for file in job.source.files), *companions]:
            real = Path(os.path.realpath(path))
            if any(target in real.parents for target in (self.path, self.partial, self.old)):
                how = "lies in the destination" if real == path else f"is a link to {real}"
                raise DestinationError(f"{path}, of the source, {how}, which would be replaced", "choose another destination")

    def check_free(self, overwrite: bool, note: str = "") -> None:
        """What stands there may only be replaced on demand, and only when it is a checkpoint."""
        if not self.taken:
            return
        names = sorted(path.name for path in self.path.iterdir())
        if not overwrite:
            raise DestinationError(
                f"{self.given} is not empty ({len(names)} entries{note})", "use --overwrite to replace it, or choose another destination"
            )
        if os.path.lexists(self.old):
            raise DestinationError(f"{self.old} is in the way: it is what an interrupted run replaced, or your own", "move or delete it")
        if not _is_checkpoint(self.path):
            raise DestinationError(f"{self.given} is no checkpoint; --overwrite would delete what it holds: {some(names)}",
                                   f"if that is meant, delete it yourself (rm -r {self.path}); or choose another destination")  # fmt: skip

    def heal(self, notes: list[str]) -> Note | None:
        """Finish what a run that died while its folder got its name left. Returns the beginning of that run's journal, if it was published."""
        first = self._published()
        restorable = not os.path.lexists(self.path) and self.old.is_dir() and not self.old.is_symlink()
        if first is None and not restorable:
            return None
        with self.locked():
            first = self._published()
            if first is not None:
                left = self.path.parent / first["from"]
                if left.is_dir() and not left.is_symlink() and not notes_in(left):  # what was exchanged with it
                    os.rename(left, self.old)
                if self.old.is_dir() and not self.old.is_symlink():
                    shutil.rmtree(self.old)
            elif not os.path.lexists(self.path) and self.old.is_dir():
                os.rename(self.old, self.path)
                notes.append(f"{self.given} was missing: an interrupted run had moved it to {self.old.name}, from where it was restored")
        if first is not None:
            self.tidy()
        return first

    def _published(self) -> Note | None:
        """The first note of the journal in the destination, where that says that this very folder was being published."""
        notes = notes_in(self.path)
        last = next((note for note in reversed(notes) if "publish" in note), None)
        if last is None or last["publish"] != self.path.stat().st_ino or not last.get("from", "").startswith(f".{self.path.name}.reshard"):
            return None
        return {**notes[0], "from": Path(last["from"]).name}

    def make_partial(self, mode: int) -> None:
        if self.partial.is_symlink():
            raise DestinationError(f"{self.partial}, where reshard would write, is a link", "remove it")
        if self.partial.exists() and not self.partial.is_dir():
            raise DestinationError(f"{self.partial}, where reshard would write, is a file", "move or delete it")
        names = {path.name for path in self.partial.iterdir()} - {JOURNAL} if self.partial.is_dir() else set()
        if names and not notes_in(self.partial):
            raise DestinationError(
                f"{self.partial}, where reshard would write, holds what no run of it left: {some(sorted(names))}",
                "move or delete that folder",
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(mode=mode, exist_ok=True)
        except OSError as error:
            raise DestinationError(
                f"{self.partial} can't be made: {error.strerror}", "choose a destination in a folder that you may write to"
            ) from None

    def check_still_free(self, journal: Journal, overwrite: bool) -> None:
        """As ``check_free``, once the journal is ours: a run that had it until now may have taken the name.

        Raises DestinationError; a partial folder in which nothing was begun is removed.
        """
        try:
            self.check_free(overwrite)
        except DestinationError:
            if not journal.notes and [path.name for path in self.partial.iterdir()] == [JOURNAL]:
                (self.partial / JOURNAL).unlink()
                self.partial.rmdir()
            raise

    def publish(self, journal: Journal, overwrite: bool, fsync: bool) -> None:
        """Give the finished folder its name, in one step. To be called under the lock (``locked``).

        Raises DestinationError, and keeps what was written, where something stands there by now and may not be replaced.
        """
        self.check_free(overwrite)
        if self.path.is_dir():
            _keep_access(self.path, self.partial)
        journal.publish(self.partial.stat().st_ino, self.partial.name)
        replaces = self.taken
        try:
            if not replaces:
                os.rename(self.partial, self.path)
            elif exchange(self.partial, self.path):
                os.rename(self.partial, self.old)
            else:
                os.rename(self.path, self.old)
                os.rename(self.partial, self.path)
        except OSError as error:
            text = f"{self.given} can't be replaced: {error.strerror}; what was written is kept in {self.partial}"
            raise DestinationError(text, "see what stands there, then run the same command again") from None
        if fsync:
            sync_folder(self.path.parent)
        if replaces:
            shutil.rmtree(self.old, ignore_errors=True)

    def tidy(self) -> None:
        """The last step, when the lock is let go: a folder without our journal is a checkpoint like any other."""
        with contextlib.suppress(FileNotFoundError):  # another run came and healed it meanwhile
            (self.path / JOURNAL).unlink()

    def add(self, names: Iterable[str], manifest: bytes, fsync: bool) -> None:
        """Move one rank's finished files to those of other ranks; the manifest, replaced last and in one step, makes them count."""
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.partial / name, self.path / name)
        new = self.partial / MANIFEST
        with open(new, "wb") as out:
            out.write(manifest)
            if fsync:
                out.flush()
                os.fsync(out.fileno())
        if fsync:
            for folder in sorted({(self.path / name).parent for name in names}):
                sync_folder(folder)
        os.replace(new, self.path / MANIFEST)
        if fsync:
            sync_folder(self.path)
        shutil.rmtree(self.partial)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else gives this destination, or takes from it, its name meanwhile; the lock is waited for."""
        with locked(self.lock, str(self.given), wait=True):
            try:
                yield
            finally:
                self._unlock()

    def _unlock(self) -> None:
        """Remove the lock file, which is held: whoever waits for it looks for the next one of its name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.lock)


def _is_checkpoint(folder: Path) -> bool:
    if (folder / MANIFEST).is_file():
        return True
    try:
        formats.recognise(folder, None)
    except ReshardError:
        return False
    return True


def mounts() -> list[Path]:
    """Where something is mounted, on Linux; bind mounts of the same file system are known by this alone."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    return [Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin1"))) for line in lines if len(line.split()) > 4]


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders' names in one step; False where the system or the file system can't."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(swap)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _keep_access(there: Path, new: Path) -> None:
    """The folder that takes another's place has its permissions and group."""
    status = there.stat()
    with contextlib.suppress(OSError):
        os.chown(new, -1, status.st_gid)
    with contextlib.suppress(OSError):
        os.chmod(new, status.st_mode & 0o7777)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def modes(paths: Iterable[AnyPath]) -> tuple[int, int]:
    """Permissions for files and folders made from these, before the umask: nobody may read what he could not read at the source."""
    file, folder = 0o666, 0o777
    for path in paths:
        mode = path.stat().st_mode
        file, folder = file & mode, folder & (path.parent.stat().st_mode)
    return file | 0o600, folder | 0o700
