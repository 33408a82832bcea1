"""Files that others wrote, opened and read so that none of them can stall us, exhaust memory, or end in a traceback."""

import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, Self

from reshard.errors import FormatError, ReshardError, SourceError
from reshard.foreign import LIMIT, parse, quote
from reshard.stores.identity import note

_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip
#: what Python raises where a reader's assumption about a file's content does not hold
_SURPRISES = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
)


def failed(what: object, error: OSError, where: str = "") -> SourceError:
    """What a failure of the disk or share that a source lies on is to the user: nothing is known of what the file holds."""
    return SourceError(
        f"{what} can't be read{where and ' ' + where}: {error.strerror or error}",
        "see to the disk or share that it lies on, then run the same command again: an interrupted run goes on where it stopped",
    )


class AnyPath(Protocol):
    """A file or folder of a checkpoint: ``pathlib.Path`` on this machine, ``hub.folder.HubPath`` on the Hub. What readers ask of either."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> Self: ...
    def __truediv__(self, name: str, /) -> Self: ...
    def __lt__(self, other: Self, /) -> bool: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def exists(self) -> bool: ...
    def iterdir(self) -> Iterable[Self]: ...
    def glob(self, pattern: str, /) -> Iterable[Self]: ...
    def stat(self) -> Any: ...
    def read_bytes(self) -> bytes: ...
    def open(self, mode: Literal["rb"], buffering: int = -1, /) -> Any: ...


@contextmanager
def reading(what: object, error: type[ReshardError] = FormatError) -> Iterator[None]:
    """The one boundary between readers and the rest: a surprise inside becomes an `error` that names `what`.

    Only for code that interprets bytes from outside. Readers check what they read and say what is wrong with it; this is
    for what they did not think of. The cause stays attached (``--verbose`` shows it). The planning core has no such
    boundary: a surprise there is a defect of ours, and must look like one.
    """
    try:
        yield
    except ReshardError:
        raise
    except OSError as failure:
        raise failed(what, failure) from None
    except _SURPRISES as surprise:
        text = quote(surprise) or "no reason given"
        raise error(f"{what} can't be read: its content is malformed ({type(surprise).__name__}: {text})",
                    "it is damaged, or not what it seems; copy it again") from surprise  # fmt: skip


def safe_join(folder: AnyPath, name: str) -> AnyPath:
    """`folder`/`name`, refusing a name from a file that would lead out of the folder."""
    if not name or name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\x00" in name:
        raise FormatError(f"{folder}: file name {quote(repr(name))} leads out of the folder")
    return folder / name


def open_file(path: AnyPath, buffering: int = -1) -> BinaryIO:
    """`path` opened for reading, if it is a plain file: a named pipe would block for ever, a device may have no end.

    Raises FormatError for anything else, and for a file that can't be opened.
    """
    if not isinstance(path, Path):  # on the Hub there are only files
        file: BinaryIO = path.open("rb", buffering)
        return file
    try:
        _plain(path, path.stat().st_mode)
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            _plain(path, os.fstat(handle).st_mode)
            file = os.fdopen(handle, "rb", buffering)
            note(path, file)
            return file
        except BaseException:
            os.close(handle)
            raise
    except (OSError, ValueError) as error:
        if isinstance(error, ReshardError):
            raise
        raise FormatError(f"{path} can't be opened: {getattr(error, 'strerror', None) or error}") from None


def _plain(path: AnyPath, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS.items() if test(mode)), "something else")
        raise FormatError(f"{path} is {kind}, not a file", "put the file itself there")


def read_small(path: AnyPath, limit: int = LIMIT) -> bytes:
    """The whole of a file that can't be large. Raises FormatError where it is."""
    if not isinstance(path, Path):
        _check_size(path, path.stat().st_size, limit)
        return path.read_bytes()
    with open_file(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, limit)
        try:
            return file.read(limit)
        except OSError as error:
            raise failed(path, error) from None


def _check_size(path: AnyPath, size: int, limit: int) -> None:
    if size > limit:
        raise FormatError(f"{path} has {size} bytes, more than the {limit} that such a file may have")


def read_json(path: AnyPath) -> object:
    """The JSON in `path`, parsed strictly. Raises FormatError."""
    raw = read_small(path)
    try:
        return parse(raw)
    except ValueError as error:
        hint = "it is a Git LFS pointer: fetch the file itself with `git lfs pull`" if is_lfs_pointer(raw) else "download it again"
        raise FormatError(f"{path} is not JSON: {error}", hint) from None


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so is what git leaves in the place of a large file that was not fetched."""
    return start.startswith(b"version https://git-lfs.github.com/spec/")
