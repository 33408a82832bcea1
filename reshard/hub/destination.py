"""Where a pull may write, and how its folder gets its name: all at once, and never over what nobody said to replace."""

import ctypes
import errno
import os
from pathlib import Path

from reshard.errors import DestinationError, FormatError
from reshard.formats import recognise
from reshard.formats.manifest import NAME as MANIFEST
from reshard.text import some

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def resolved(destination: str | Path) -> Path:
    """The folder that `destination` names, links followed: what is written lands where the link leads."""
    return Path(os.path.realpath(destination))


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises DestinationError where `destination`, a resolved path, can't or mustn't be written; nothing is touched."""
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"{destination} is a file", "choose another destination")
    if destination.is_dir() and os.path.ismount(destination):
        raise DestinationError(f"{destination} is a mount point, which can't be given a new folder at once", f"write to {destination}/NAME")
    parent = nearest_folder(destination.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DestinationError(f"{parent} can't be written to", "choose another destination")
    if destination.is_dir():
        check_contents(destination, overwrite)


def check_contents(destination: Path, overwrite: bool) -> None:
    """Whether the folder that is there may go: it is empty, or a checkpoint that `overwrite` says to replace."""
    held = sorted(path.name for path in destination.iterdir())
    if not held:
        return
    if not overwrite:
        raise DestinationError(f"{destination} is not empty ({len(held)} entries)", "use --overwrite to replace it, or choose another destination")
    if (destination / MANIFEST).is_file():
        return
    try:
        recognise(destination)
    except FormatError:
        raise DestinationError(f"{destination} holds no checkpoint that --overwrite could replace; it would delete {some(held)}",
                               "delete the folder yourself if that is meant, or choose another destination") from None  # fmt: skip


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where this system or file system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(a), None, str(b))


def put_in_place(made: Path, destination: Path, old: Path, overwrite: bool) -> None:
    """Give the folder `made` the name `destination`; what was there becomes `made` or `old`. Raises DestinationError, then nothing has moved."""
    if destination.is_dir():
        check_contents(destination, overwrite)  # someone may have filled it meanwhile
        if any(destination.iterdir()):
            if not exchange(made, destination):
                os.rename(destination, old)
                os.rename(made, destination)
            return
    try:
        os.rename(made, destination)  # onto nothing, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise DestinationError(f"{destination} was filled by someone else meanwhile", "choose another destination, or use --overwrite") from None
