"""One repository of the Hub at one commit: its files, where each one's bytes are served, and ranges of them.

A branch is resolved to a commit once, and everything after that asks for the commit. A file is resolved once; the place
that answer names (often another host, with a signature that expires) serves all its ranges. That host never gets the token.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from reshard import __version__
from reshard.errors import FormatError, HubError
from reshard.hub.client import hub_api
from reshard.hub.failures import PASSING, TRIES, passing, patiently, pause, safe, told, wait_for
from reshard.hub.location import Location
from reshard.stores.foreign import LIMIT, quote

HEAD = 100_001  # bytes fetched from the start of a weight file: nearly every header is shorter
_SMALL = 16 << 20  # bytes: a file that is not LFS is smaller, and served by the Hub itself: taken whole, with one request
_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as the Hub lists it. `sha256` is that of its content for large files (LFS, Xet), `blob` git's id for the others."""

    size: int
    sha256: str | None
    blob: str | None

    def digest(self):
        """A hash to be fed the file's content, and what it should come to; (None, "") where the Hub says nothing."""
        if self.sha256:
            return hashlib.sha256(), self.sha256
        if self.blob:
            return hashlib.sha1(b"blob %d\0" % self.size), self.blob
        return None, ""


class Repository:
    """Files of `location`'s repository. `received` counts all bytes of content that came over the network."""

    def __init__(self, location: Location):
        self.location, self.api = location, hub_api()
        self.received = 0
        self._count = threading.Lock()
        self._turn: dict[str, threading.Lock] = {}  # one at a time for each file: resolved once, its head fetched once
        self._places: dict[str, str] = {}
        self._heads: dict[str, bytes] = {}
        self._stopped = threading.Event()
        with told(location):
            self.commit = self._pin()
            self.entries = self._list()
        for path in self.entries:
            self._turn[path] = threading.Lock()

    def _pin(self) -> str:
        """The commit that the revision is now; where the Hub can't be asked, that of the last time."""
        repo, revision = self.location.repo, self.location.revision
        if self.location.is_commit:
            return revision
        try:
            return patiently(lambda: self.api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)).sha
        except (hub_errors.HTTPError, OSError) as error:
            if not (passing(error) or isinstance(error, hub_errors.OfflineModeIsEnabled)):
                raise
            try:
                return self.api.resolve_revision(repo, revision=revision, local_files_only=True).resolved
            except hub_errors.RevisionResolutionError:
                raise error from None

    def _list(self) -> dict[str, Entry]:
        try:
            tree = patiently(lambda: list(self.api.list_repo_tree(self.location.repo, recursive=True, revision=self.commit)))
        except (hub_errors.HTTPError, ConnectionError) as error:
            if isinstance(error, hub_errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            return self._cached(error)
        files = [item for item in tree if isinstance(item, RepoFile)]
        outside = next((f.path for f in files if f.path.startswith("/") or ".." in f.path.split("/") or "\\" in f.path), None)
        if outside is not None:
            raise FormatError(f"{self.location}: file name {quote(repr(outside))} leads out of the folder")
        return {f.path: Entry(f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id) for f in files}

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
            self.api.resolve_revision(self.location.repo, revision=self.location.revision)  # notes the branch's commit there
            self.api.snapshot_download(self.location.repo, revision=self.commit, allow_patterns=patterns)

    def local(self, path: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        found = try_to_load_from_cache(self.location.repo, path, revision=self.commit)
        if isinstance(found, str) and Path(found).stat().st_size == self.entries[path].size:
            return Path(found)
        return None

    def content(self, path: str) -> bytes:
        """All of a small file (config, tokenizer, index), checked against what the Hub lists."""
        cached, entry = self.local(path), self.entries[path]
        if cached:
            return cached.read_bytes()
        if entry.size > LIMIT:
            raise FormatError(f"{self.location}: {path} has {entry.size} bytes, more than the {LIMIT} of any small file")
        with self._turn[path]:
            if path not in self._heads or len(self._heads[path]) < entry.size:
                self._heads[path] = self._fetch(path, 0, entry.size)
                digest, wanted = entry.digest()
                if digest:
                    digest.update(self._heads[path])
                    self.compare(path, digest.hexdigest(), wanted)
            return self._heads[path]

    def compare(self, path: str, got: str, wanted: str) -> None:
        if got != wanted:
            kind = "sha256" if len(wanted) == 64 else "git's sha1"
            raise FormatError(f"{self.location}: {path}: {kind} of the bytes that came is {got}, the Hub lists {wanted}", "run the same command again")

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
        """Fill `into` with the file's bytes from `start` on; `tell` is told bytes as they arrive.

        A connection that breaks is taken up where it broke; 408, 429 and 5xx are waited for, as long as the server asks; a
        link that has expired is asked for again. Raises HubError.
        """
        with told(self.location, path):
            got = tries = 0
            renewed: set[str] = set()
            while got < len(into):
                if self._stopped.is_set():
                    raise HubError(f"{self.location}: {path}: given up")
                url = self._place(path)
                before = got
                try:
                    for chunk in self._stream(path, url, start + got, start + len(into)):
                        into[got : got + len(chunk)] = chunk
                        got += len(chunk)
                        tell(len(chunk))
                        with self._count:
                            self.received += len(chunk)
                    why, headers = f"{_host(url)} ended {len(into) - got} bytes early", {}
                except _Expired as error:
                    if url in renewed or len(renewed) > 1:
                        raise HubError(f"{self.location}: {path}: {_host(url)} answers {error.status}, with a fresh link too",
                                       "check the network: something between here and there refuses") from None  # fmt: skip
                    renewed.add(url)
                    self._forget(path, url)
                    renewed.add(self._place(path))
                    continue
                except _Busy as error:
                    why, headers = f"{_host(url)} answers {error.status}", error.headers
                except (hub_errors.HTTPError, ConnectionError, TimeoutError) as error:
                    if not passing(error):
                        raise
                    why, headers = safe(error) or type(error).__name__, {}
                if got == len(into):
                    return
                tries = 1 if got > before else tries + 1
                if tries > TRIES:
                    raise HubError(f"{self.location}: {path}: bytes {start + got} to {start + len(into)}: {why} ({TRIES} tries)",
                                   "run the same command again later: it goes on from here")  # fmt: skip
                if got == before or headers:
                    pause(wait_for(headers, tries), why, self._sleep)

    def _stream(self, path: str, url: str, start: int, stop: int):
        """Chunks of bytes [start, stop), no more than were asked for."""
        size = self.entries[path].size
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if self._is_hub(url):  # a small file that the Hub itself serves
            headers |= build_hf_headers(token=self.api.token, library_name="reshard", library_version=__version__)
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            status = response.status_code
            if status in PASSING:
                raise _Busy(status, response.headers)
            if status in (401, 403):
                if self._is_hub(url):
                    response.read()
                    hf_raise_for_status(response)
                raise _Expired(status)
            where = response.headers.get("Content-Range", "")
            whole = status == 200 and start == 0 and stop == size
            if response.headers.get("Content-Encoding", "identity") != "identity" or not (whole or (status == 206 and where == f"bytes {start}-{stop - 1}/{size}")):
                said = f"{status}" + (f" with {where}" if where else "")
                if status == 200:
                    said = "200: it sends the whole file, whatever range is asked for"
                raise HubError(f"{self.location}: {path}: asked for bytes {start} to {stop - 1} of {size}, {_host(url)} answers {said}",
                               "`reshard pull`, or --cache, fetches whole files")  # fmt: skip
            left = stop - start
            for chunk in response.iter_raw():
                if len(chunk) > left:
                    raise HubError(f"{self.location}: {path}: {_host(url)} sends more than the {stop - start} bytes asked for")
                left -= len(chunk)
                yield chunk

    def _place(self, path: str) -> str:
        """The URL that serves the file's bytes, asked for once."""
        if path not in self._places:
            with self._count:
                lock = self._turn.setdefault(f"{path}\0place", threading.Lock())
            with lock:
                if path not in self._places:
                    self._places[path] = self._resolve(path)
        return self._places[path]

    def _resolve(self, path: str) -> str:
        entry = self.entries[path]
        url = hf_hub_url(self.location.repo, path, revision=self.commit, endpoint=self.api.endpoint)
        if entry.sha256 is None:  # small, so served where it is asked for
            return url
        token = self.api.token

        def ask():
            return get_hf_file_metadata(url, token=token, endpoint=self.api.endpoint, library_name="reshard", library_version=__version__)

        found = patiently(ask, self._sleep)
        if (found.size, found.etag) != (entry.size, entry.sha256):
            raise HubError(f"{self.location}: {path}: the Hub lists {entry.size} bytes, sha256 {entry.sha256}, and serves {found.size}, {safe(found.etag)}")
        return found.location

    def _forget(self, path: str, url: str) -> None:
        """Ask again where the file is, unless another worker has done so."""
        with self._count:
            if self._places.get(path) == url:
                del self._places[path]

    def _is_hub(self, url: str) -> bool:
        """Whether `url` is of the Hub's own origin, the only one that may see the token."""
        here, hub = urlsplit(url), urlsplit(self.api.endpoint)
        return (here.scheme, here.netloc) == (hub.scheme, hub.netloc)

    def stop(self) -> None:
        """Have all reads given up; ``start`` allows them again."""
        self._stopped.set()

    def start(self) -> None:
        self._stopped.clear()

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)


class _Expired(Exception):
    def __init__(self, status: int):
        self.status = status


class _Busy(Exception):
    def __init__(self, status: int, headers):
        self.status, self.headers = status, headers


def _host(url: str) -> str:
    """Host and port: all of a URL that may be printed."""
    return urlsplit(url).netloc.rpartition("@")[2]
