"""One repository of the Hub at one commit: its files, what was fetched of their beginnings, and what of them was checked.

A branch is resolved to a commit once, and everything after that asks for the commit. Ranges of files are ``ranges.py``'s.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import try_to_load_from_cache

from reshard.errors import BadBytes, FormatError
from reshard.foreign import LIMIT
from reshard.hub.answers import Entry, info, listing
from reshard.hub.client import hub_api
from reshard.hub.failures import asked, told
from reshard.hub.location import Location
from reshard.hub.patience import passing
from reshard.hub.ranges import Ranges

HEAD = 100_001  # bytes fetched from the start of a weight file: nearly every header is shorter
_SMALL = (
    16 << 20
)  # bytes: a file that is not LFS is smaller, and served by the Hub itself: taken whole, with one request; larger ones are not kept
_IN_FLIGHT = 8


class Repository:
    """Files of `location`'s repository."""

    def __init__(self, location: Location):
        self.location, self.api = location, hub_api()
        self._heads: dict[str, bytes] = {}
        self._checked: set[str] = set()
        with told(location):
            self.commit = self._pin()
            self.entries = self._list()
        self._turn = {path: threading.Lock() for path in self.entries}  # one at a time for each file: its head is fetched once
        self.ranges = Ranges(location, self.api, self.commit)

    def _pin(self) -> str:
        """The commit that the revision is now; where the Hub can't be asked, that of the last time."""
        repo, revision = self.location.repo, self.location.revision
        if revision and self.location.is_commit:
            return revision
        try:
            return info(self.api, repo, revision).commit
        except (hub_errors.HTTPError, OSError) as error:
            if not (passing(error) or isinstance(error, hub_errors.OfflineModeIsEnabled)):
                raise
            try:
                return self.api.resolve_revision(repo, revision=revision, local_files_only=True).resolved
            except hub_errors.RevisionResolutionError:
                raise error from None

    def _list(self) -> dict[str, Entry]:
        try:
            return listing(self.api, self.location.repo, self.commit)
        except (hub_errors.HTTPError, ConnectionError) as error:
            if isinstance(error, hub_errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            return self._cached(error)

    def _cached(self, error: BaseException) -> dict[str, Entry]:
        """The files that the cache holds of this commit, where the Hub can't be asked."""
        try:
            folder = Path(self.api.snapshot_download(self.location.repo, revision=self.commit, local_files_only=True))
        except hub_errors.IncompleteSnapshotError as incomplete:
            folder = Path(incomplete.snapshot_path)
        except hub_errors.LocalEntryNotFoundError:
            raise error from None
        return {path.relative_to(folder).as_posix(): Entry(path.stat().st_size, None, None) for path in folder.rglob("*") if path.is_file()}

    def fill_cache(self, patterns: list[str]) -> None:
        """Have the client download files into the Hub's cache, where others find them too."""
        with told(self.location):
            repo = self.location.repo
            asked(f"/{repo}", lambda: self.api.resolve_revision(repo, revision=self.location.revision))  # notes the branch's commit there
            asked(f"/{repo}", lambda: self.api.snapshot_download(repo, revision=self.commit, allow_patterns=patterns))

    def local(self, path: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        found = try_to_load_from_cache(self.location.repo, path, revision=self.commit)
        if isinstance(found, str) and Path(found).stat().st_size == self.entries[path].size:
            return Path(found)
        return None

    def content(self, path: str) -> bytes:
        """All of a small file (config, tokenizer, index), checked against what the Hub lists."""
        cached, entry = self.local(path), self.entries[path]
        if entry.size > LIMIT:
            raise FormatError(f"{self.location}: {path} has {entry.size} bytes, more than the {LIMIT} of any small file")
        if cached:
            return cached.read_bytes()
        with self._turn[path]:
            content = self._heads.get(path, b"")
            if len(content) < entry.size:
                content = self._fetch(path, 0, entry.size)
            if path not in self._checked:
                digest, wanted = entry.digest()
                if digest:
                    digest.update(content)
                    self.compare(path, digest.hexdigest(), wanted)
                if entry.size <= _SMALL:
                    self._heads[path] = content
            return content

    def compare(self, path: str, got: str, wanted: str) -> None:
        """Whether what came of a whole file is what the Hub lists. Raises BadBytes."""
        if got != wanted:
            kind = "sha256" if len(wanted) == 64 else "git's sha1"
            raise BadBytes(f"{self.location}: {path}: {kind} of the bytes that came is {got}, the Hub lists {wanted}",
                           "run the same command again: it fetches that file again, and keeps what is sound", file=path)  # fmt: skip
        self._checked.add(path)

    def head(self, path: str, upto: int = 0) -> bytes:
        """The first bytes of a file, `upto` at least (as far as it has them), fetched once and kept."""
        size, large = self.entries[path].size, self.entries[path].sha256
        with self._turn[path]:
            head = self._heads.get(path, b"")
            upto = min(size, max(upto, HEAD if large else _SMALL))
            if len(head) < upto:
                head += self._fetch(path, len(head), upto)
                self._heads[path] = head
            return head

    def kept(self, path: str) -> bytes:
        """What was fetched of the file's beginning so far."""
        return self._heads.get(path, b"")

    def heads(self, paths: list[str]) -> None:
        """``head`` of many files, side by side."""
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            for _ in pool.map(self.head, [path for path in paths if not self.local(path)]):
                pass

    def _fetch(self, path: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read(path, start, memoryview(buffer))
        return bytes(buffer)

    def read(self, path: str, start: int, into: memoryview, tell: Callable[[int], None] = lambda size: None) -> None:
        """Fill `into` with the file's bytes from `start` on; `tell` is told bytes as they arrive. Raises HubError."""
        self.ranges.read(path, self.entries[path], start, into, tell)

    @property
    def received(self) -> int:
        """Bytes of content that came over the network."""
        return self.ranges.received

    @property
    def unchecked(self) -> list[str]:
        """Files of which bytes came over the network that no checksum of the Hub's was compared with: ranges only, not the whole."""
        return sorted(self.ranges.touched - self._checked)

    def stop(self) -> None:
        """Have all reads given up; ``start`` allows them again."""
        self.ranges.stopped.set()

    def start(self) -> None:
        self.ranges.stopped.clear()
