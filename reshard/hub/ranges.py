"""Ranges of bytes of a repository's files, over the network.

A file is resolved once; the place that answer names (often another host, with a signature that expires) serves all its
ranges. That host never gets the token. What answers is taken for a range only if it says so and has its length.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub import errors as hub_errors

from reshard.errors import HubError
from reshard.hub import patience
from reshard.hub.answers import Entry, headers_for, raise_for, served
from reshard.hub.client import same_origin, session
from reshard.hub.failures import asked, told
from reshard.hub.location import Location
from reshard.hub.patience import Slow, passing, pause, steadily, wait_for
from reshard.hub.wording import safe

_WORTH = 64 << 10  # bytes: a try that brings fewer has failed, however politely it ended


class Ranges:
    """Reads of the files of `location`'s repository at `commit`. `received` counts bytes, `touched` the files they are of."""

    def __init__(self, location: Location, api: HfApi, commit: str):
        self.location, self.commit, self._api = location, commit, api
        self.received = 0
        self.touched: set[str] = set()
        self.stopped = threading.Event()
        self._count = threading.Lock()
        self._turn: dict[str, threading.Lock] = {}  # each file is resolved once
        self._places: dict[str, str] = {}

    def read(self, path: str, entry: Entry, start: int, into: memoryview, tell: Callable[[int], None] = lambda size: None) -> None:
        """Fill `into` with the file's bytes from `start` on; `tell` is told bytes as they arrive.

        A connection that breaks, or gets too slow, is taken up where it ended; 408, 429 and 5xx are waited for, as long as the
        server asks, within bounds; a link that has expired is asked for again. Raises HubError.
        """
        with told(self.location, path):
            got = tries = before = 0
            renewed: set[str] = set()
            while got < len(into):
                if self.stopped.is_set():
                    raise HubError(f"{self.location}: {path}: given up")
                url = self._place(path, entry)
                fresh = got
                headers: Mapping[str, str] = {}
                try:
                    for chunk in self._stream(path, entry, url, start + got, start + len(into)):
                        into[got : got + len(chunk)] = chunk
                        got += len(chunk)
                        tell(len(chunk))
                        self._note(path, len(chunk))
                    why = f"{_host(url)} ended {len(into) - got} bytes early"
                except _Expired as error:
                    if url in renewed or len(renewed) > 1:
                        raise HubError(f"{self.location}: {path}: {_host(url)} answers {error.status}, with a fresh link too",
                                       "check the network: something between here and there refuses") from None  # fmt: skip
                    renewed.add(url)
                    self._forget(path, url)
                    renewed.add(self._place(path, entry))
                    continue
                except _Busy as error:
                    why, headers = f"{_host(url)} answers {error.status}", error.headers
                except Slow as error:
                    why = f"{_host(url)}: {error}"
                except (hub_errors.HTTPError, ConnectionError, TimeoutError) as error:
                    if not passing(error):
                        raise
                    why = safe(error) or type(error).__name__
                if got == len(into):
                    return
                if got - before >= min(_WORTH, len(into) // 2):
                    tries, before = 0, got
                tries += 1
                if tries > patience.TRIES:
                    raise HubError(f"{self.location}: {path}: bytes {start + got} to {start + len(into)}: {why} ({patience.TRIES} tries)",
                                   "run the same command again later: it goes on from here")  # fmt: skip
                if got == fresh or headers:
                    pause(wait_for(headers, tries), why, self._sleep)

    def _note(self, path: str, size: int) -> None:
        with self._count:
            self.received += size
            self.touched.add(path)

    def _stream(self, path: str, entry: Entry, url: str, start: int, stop: int) -> Iterator[bytes]:
        """Chunks of bytes [start, stop), no more than were asked for."""
        size = entry.size
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if self._is_hub(url):  # a small file that the Hub itself serves
            headers |= headers_for(self._api)
        with session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            status = response.status_code
            if status in patience.PASSING:
                raise _Busy(status, response.headers)
            if status in (401, 403):
                if self._is_hub(url):
                    raise_for(response)
                raise _Expired(status)
            where = response.headers.get("Content-Range", "")
            whole = status == 200 and start == 0 and stop == size
            if response.headers.get("Content-Encoding", "identity") != "identity" or not (
                whole or (status == 206 and where == f"bytes {start}-{stop - 1}/{size}")
            ):
                said = f"{status}" + (f" with {safe(where)}" if where else "")
                if status == 200:
                    said = "200: it sends the whole file, whatever range is asked for"
                raise HubError(f"{self.location}: {path}: asked for bytes {start} to {stop - 1} of {size}, {_host(url)} answers {said}",
                               "`reshard pull`, or --cache, fetches whole files")  # fmt: skip
            left = stop - start
            for chunk in steadily(response.iter_raw()):
                if len(chunk) > left:
                    raise HubError(f"{self.location}: {path}: {_host(url)} sends more than the {stop - start} bytes asked for")
                left -= len(chunk)
                yield chunk

    def _place(self, path: str, entry: Entry) -> str:
        """The URL that serves the file's bytes, asked for once."""
        if path not in self._places:
            with self._count:
                lock = self._turn.setdefault(path, threading.Lock())
            with lock:
                if path not in self._places:
                    self._places[path] = self._resolve(path, entry)
        return self._places[path]

    def _resolve(self, path: str, entry: Entry) -> str:
        api = self._api
        url = hf_hub_url(self.location.repo, path, revision=self.commit, endpoint=api.endpoint)
        if entry.sha256 is None:  # small, so served where it is asked for
            return url

        found = asked(url, lambda: served(api, url), self._sleep)
        if (found.size, found.etag) != (str(entry.size), entry.sha256):
            raise HubError(
                f"{self.location}: {path}: the Hub lists {entry.size} bytes, sha256 {entry.sha256}, and serves {safe(found.size)}, {safe(found.etag)}"
            )
        parts = urlsplit(found.url)
        if not parts.hostname or parts.scheme != "https" and (parts.scheme != "http" or api.endpoint.startswith("https:")):
            raise HubError(f"{self.location}: {path}: the Hub sends it from {safe(found.url)}, which is no https address")
        return found.url

    def _forget(self, path: str, url: str) -> None:
        """Ask again where the file is, unless another worker has done so."""
        with self._count:
            if self._places.get(path) == url:
                del self._places[path]

    def _is_hub(self, url: str) -> bool:
        return same_origin(url, self._api.endpoint)

    def _sleep(self, seconds: float) -> None:
        self.stopped.wait(seconds)


class _Expired(Exception):
    def __init__(self, status: int):
        self.status = status


class _Busy(Exception):
    def __init__(self, status: int, headers: Mapping[str, str]):
        self.status, self.headers = status, headers


def _host(url: str) -> str:
    """Host and port: all of a URL that may be printed."""
    return safe(urlsplit(url).netloc.rpartition("@")[2])
