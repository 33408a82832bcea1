"""A folder on the Hub as formats see folders: the few questions they ask a pathlib.Path, answered from a listing and by ranged reads."""

import io
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO

from reshard.errors import FormatError, HubError
from reshard.hub.location import parse
from reshard.hub.repository import Repository
from reshard.stores.beside import is_side_file

_AT_LEAST = 4096  # bytes fetched for a small read somewhere in a file


class HubPath:
    """A file or folder at `path` of a repository; `path` is "" for its root."""

    def __init__(self, repository: Repository, path: str = ""):
        self.repository, self.path = repository, path

    def __str__(self) -> str:
        base = str(self.repository.location)
        inside = PurePosixPath(self.path).relative_to(self.repository.location.folder or ".").as_posix() if self.path else "."
        return base if inside == "." else f"{base}/{inside}"

    def __truediv__(self, name: str) -> "HubPath":
        return HubPath(self.repository, f"{self.path}/{name}" if self.path else str(name))

    def __lt__(self, other: "HubPath") -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "HubPath":
        return HubPath(self.repository, self.path.rpartition("/")[0])

    @property
    def revision(self) -> str:
        """The commit, whole."""
        return self.repository.commit

    @property
    def pinned(self) -> str:
        """The same place with its commit in it: what it names never changes."""
        location = self.repository.location
        return f"hf://{location.repo}@{self.repository.commit}" + (f"/{self.path}" if self.path else "")

    def is_file(self) -> bool:
        return self.path in self.repository.entries

    def is_dir(self) -> bool:
        return not self.path or any(path.startswith(self.path + "/") for path in self.repository.entries)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def relative_to(self, folder: "HubPath") -> PurePosixPath:
        return PurePosixPath(self.path).relative_to(folder.path)

    def iterdir(self) -> Iterator["HubPath"]:
        start = len(self.path) + 1 if self.path else 0
        names = {path[start:].partition("/")[0] for path in self.repository.entries if not start or path.startswith(self.path + "/")}
        return (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["HubPath"]:
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.repository.entries[self.path].size)

    def read_bytes(self) -> bytes:
        return self.repository.content(self.path)

    def read_text(self, errors: str = "strict") -> str:
        return self.read_bytes().decode(errors=errors)

    def open(self, mode: str = "rb", buffering: int = -1) -> "IO[bytes] | io.RawIOBase":
        """The file, read by ranges; the heads of all files named like it are fetched with its own."""
        cached = self.repository.local(self.path)
        if cached:
            return cached.open(mode, buffering)
        if not self.repository.kept(self.path):
            alike = re.compile(re.sub(r"\d+", r"\\d+", re.escape(self.name)))
            paths = [path.path for path in self.parent.iterdir() if alike.fullmatch(path.name) and path.is_file()]
            self.repository.heads([p for p in paths if self.name.endswith(".safetensors") or p == self.path])
        return _RemoteFile(self.repository, self.path)


class _RemoteFile(io.RawIOBase):
    def __init__(self, repository: Repository, path: str):
        self._repository, self._path, self._at = repository, path, 0
        self._size = repository.entries[path].size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._at + size)
        start, self._at = self._at, max(stop, self._at)
        if stop <= start:
            return b""
        kept = self._repository.kept(self._path)
        if start <= len(kept) < stop:  # a header longer than the head
            kept = self._repository.head(self._path, stop)
        if stop <= len(kept):
            return kept[start:stop]
        wide = min(self._size, max(stop, start + _AT_LEAST))
        buffer = bytearray(wide - start)
        self._repository.read(self._path, start, memoryview(buffer))
        return bytes(buffer[: stop - start])


def open_folder(text: str, cache: bool = False) -> HubPath:
    """The folder that `text` names, pinned to the commit its revision is now. Raises HubError.

    `cache` has the client download its files into the Hub's cache first.
    """
    location = parse(str(text))
    repository = Repository(location)
    folder = HubPath(repository, location.folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        there = sorted({path.partition("/")[0] for path in repository.entries if "/" in path})
        raise HubError(f"{location}: {location.folder} {what} in {location.repo} at {repository.commit[:12]}",
                       f"folders there: {', '.join(there[:8])}" if there else f"leave /{location.folder} out")  # fmt: skip
    if not repository.entries:
        raise FormatError(f"{location} is empty at {repository.commit[:12]}")
    if cache:
        names = {path.path for path in folder.iterdir() if path.is_file()}
        plain = [name for name in names if name.endswith((".safetensors", ".json")) or is_side_file(Path(name).name)]
        if not any(name.endswith(".safetensors") for name in plain):
            plain += [name for name in names if name.endswith((".bin", ".pt"))]
        repository.fill_cache([glob_safe(name) for name in plain])
    return folder


def glob_safe(name: str) -> str:
    """A pattern that is `name` and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
