"""What the Hub says of a repository: its commit, whether it is private, its files. Every answer is checked before it is believed.

Asked here and not by the client, which follows a listing's next page to any host, token in hand, and neither bounds nor
checks what comes.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import quote as url_quote
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from reshard import __version__
from reshard.errors import FormatError, HubError
from reshard.foreign import parse, quote
from reshard.hub.client import same_origin, session
from reshard.hub.failures import asked, unexpected
from reshard.hub.patience import steadily

if TYPE_CHECKING:
    import httpx

MOST_FILES = 200_000  # of a repository
_PAGE = 64 << 20  # bytes of an answer
_ERROR = 64 << 10  # bytes of an error's text
_PAGES = 4096
_HOPS = 8
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as the Hub lists it. `sha256` is that of its content for large files (LFS, Xet), `blob` git's id for the others."""

    size: int
    sha256: str | None
    blob: str | None

    def digest(self) -> "tuple[hashlib._Hash | None, str]":
        """A hash to be fed the file's content, and what it should come to; (None, "") where the Hub says nothing."""
        if self.sha256:
            return hashlib.sha256(), self.sha256
        if self.blob:
            return hashlib.sha1(b"blob %d\0" % self.size), self.blob
        return None, ""


@dataclass(frozen=True)
class Info:
    """A repository at one of its revisions: the commit, whole."""

    commit: str
    private: bool | None  # None where it is not said


def is_commit(text: object) -> TypeGuard[str]:
    return isinstance(text, str) and bool(_COMMIT.fullmatch(text))


def headers_for(api: HfApi) -> dict[str, str]:
    """Those of a request to the Hub itself, the token among them."""
    return build_hf_headers(token=api.token, library_name="reshard", library_version=__version__)


def info(api: HfApi, repo: str, revision: str | None = None) -> Info:
    path = f"/api/models/{repo}" + (f"/revision/{url_quote(revision, safe='')}" if revision else "")
    answer, _ = get(api, path)
    if not isinstance(answer, dict):
        raise unexpected(path, f"a {type(answer).__name__}, not an object")
    commit, private = answer.get("sha"), answer.get("private")
    if not is_commit(commit):
        raise unexpected(path, f"sha is {quote(repr(commit))}, expected 40 hexadecimal digits")
    if private is not None and not isinstance(private, bool):
        raise unexpected(path, f"private is {quote(repr(private))}, expected true or false")
    return Info(commit, private)


def pull_requests(api: HfApi, repo: str) -> dict[str, str]:
    """Open and closed pull requests: refs/pr/N → its commit."""
    path = f"/api/models/{repo}/refs"
    answer, _ = get(api, path, "?include_prs=1")
    rows = answer.get("pullRequests", []) if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise unexpected(path, "no list of pull requests")
    out = {}
    for row in rows:
        ref, commit = (row.get("ref"), row.get("targetCommit")) if isinstance(row, dict) else (None, None)
        if not (isinstance(ref, str) and re.fullmatch(r"refs/pr/[0-9]{1,9}", ref) and is_commit(commit)):
            raise unexpected(path, f"a pull request {quote(repr(row))}")
        out[ref] = commit
    return out


def listing(api: HfApi, repo: str, commit: str) -> dict[str, Entry]:
    """All files of the repository at `commit`, by path; every path leads into the folder, and every size is a size."""
    path = f"/api/models/{repo}/tree/{commit}"
    out: dict[str, Entry] = {}
    for row in _rows(api, path):
        name, entry = _entry(path, row)
        if entry is None:
            continue
        if name in out:
            raise unexpected(path, f"{quote(repr(name))} is listed twice")
        out[name] = entry
        if len(out) > MOST_FILES:
            raise HubError(f"{repo} at {commit[:12]} has more than {MOST_FILES} files: no model's repository has")
    folders = {name[:at] for name in out for at in _slashes(name)}
    if both := sorted(folders & out.keys()):
        raise unexpected(path, f"{quote(repr(both[0]))} is a file and a folder")
    return out


def _slashes(name: str) -> list[int]:
    return [at for at, c in enumerate(name) if c == "/"]


def _rows(api: HfApi, path: str) -> Iterator[object]:
    query: str | None = "?recursive=true&expand=false"
    seen: set[str] = set()
    while query is not None:
        if query in seen or len(seen) > _PAGES:
            raise unexpected(path, "its pages have no end")
        seen.add(query)
        rows, query = get(api, path, query)
        if not isinstance(rows, list):
            raise unexpected(path, f"a {type(rows).__name__}, not a list")
        yield from rows


def _entry(path: str, row: object) -> tuple[str, Entry | None]:
    if not isinstance(row, dict):
        raise unexpected(path, f"an entry {quote(repr(row))}")
    name, kind, size, blob, lfs = (row.get(key) for key in ("path", "type", "size", "oid", "lfs"))
    if not isinstance(name, str) or not isinstance(kind, str):
        raise unexpected(path, f"an entry without a path or type, {quote(repr(row))}")
    if kind != "file":  # a directory, or what is no business of ours
        return name, None
    if name.startswith("/") or "\\" in name or {"..", "."} & set(name.split("/")):
        raise FormatError(f"{path.split('/')[3]}/{path.split('/')[4]}: file name {quote(repr(name))} leads out of the folder")
    if not name.isprintable() or not all(0 < len(part.encode(errors="replace")) <= 255 for part in name.split("/")) or len(name) > 1024:
        raise unexpected(path, f"file name {quote(repr(name))}")
    if not _is_size(size):
        raise unexpected(path, f"{quote(name)} has a size of {quote(repr(size))}")
    if lfs is None:
        if not is_commit(blob):
            raise unexpected(path, f"{quote(name)} has the oid {quote(repr(blob))}")
        return name, Entry(size, None, blob)
    sha256, large = (lfs.get("oid"), lfs.get("size")) if isinstance(lfs, dict) else (None, None)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or large != size or isinstance(large, bool):
        raise unexpected(path, f"{quote(name)} has {size} bytes and is {quote(repr(lfs))} in LFS")
    return name, Entry(size, sha256, None)


def _is_size(size: object) -> TypeGuard[int]:
    return type(size) is int and 0 <= size < 1 << 63


def get(api: HfApi, path: str, query: str = "") -> tuple[object, str | None]:
    """The JSON at `path` of the Hub, and the query of its next page, if it has one. Raises the client's exceptions, and HubError."""
    url = f"{api.endpoint}{path}{query}"
    body, link = asked(path, lambda: _get(api, url))
    try:
        answer = parse(body)
    except ValueError as error:
        raise unexpected(path, f"it is not JSON: {error}") from None
    following = link.get("next", {}).get("url")
    if following is None:
        return answer, None
    try:
        following = urljoin(url, following)
        parts = urlsplit(following)
    except ValueError:
        raise unexpected(path, "its next page is no URL") from None
    if not same_origin(following, api.endpoint):
        raise unexpected(path, f"its next page is on another host, {quote(parts.netloc.rpartition('@')[2])}, which must not see the token")
    return answer, "?" + parts.query  # the path stays ours


def _get(api: HfApi, url: str) -> tuple[bytes, dict[Any, dict[str, str]]]:
    headers = {**headers_for(api), "Accept-Encoding": "identity"}
    with session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if not same_origin(str(response.url), api.endpoint):  # a redirect; the token did not go along
            raise HubError(f"{api.endpoint} sends requests on to {response.url.host}", "set HF_ENDPOINT to the Hub's own address")
        if response.status_code != 200:
            raise_for(response)
            raise HubError(f"{api.endpoint}: {urlsplit(url).path}: it answers {response.status_code}", "check HF_ENDPOINT")
        body = bytearray()
        for chunk in steadily(response.iter_bytes()):
            body += chunk
            if len(body) > _PAGE:
                raise HubError(f"{api.endpoint}: the answer for {urlsplit(url).path} has more than {_PAGE} bytes", "check HF_ENDPOINT")
        return bytes(body), response.links


@dataclass(frozen=True)
class Served:
    """What the Hub says of a large file when asked for it: size and sha256 as text from its headers, and the URL of its bytes."""

    size: str
    etag: str
    url: str


def served(api: HfApi, url: str) -> Served:
    """Ask for the file at `url` of the Hub; redirects are followed while they stay there and say nothing of the file. Raises the client's exceptions, and HubError."""
    path = urlsplit(url).path
    for _ in range(_HOPS):
        response = session().request(
            "HEAD",
            url,
            headers={**headers_for(api), "Accept-Encoding": "identity"},
            follow_redirects=False,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if response.status_code >= 400:
            raise_for(response)
        headers = response.headers
        size, etag = (
            headers.get("X-Linked-Size") or headers.get("Content-Length", ""),
            headers.get("X-Linked-Etag") or headers.get("ETag", ""),
        )
        if not 300 <= response.status_code < 400:
            return Served(size, etag.removeprefix("W/").strip('"'), url)
        url = urljoin(url, headers.get("Location", ""))
        if "X-Linked-Etag" in headers or not same_origin(url, api.endpoint):
            return Served(size, etag.removeprefix("W/").strip('"'), url)
    raise unexpected(path, f"more than {_HOPS} redirects")


def raise_for(response: "httpx.Response") -> None:
    """The client's exception for an error's status, from the beginning of its text."""
    text = b""
    try:
        for chunk in steadily(response.iter_bytes()):
            text += chunk
            if len(text) > _ERROR:
                break
    except hub_errors.HTTPError:
        text = b""
    headers = {
        name: value
        for name, value in response.headers.items()
        if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
    }
    short = type(response)(response.status_code, headers=headers, content=text[:_ERROR], request=response.request)
    hf_raise_for_status(short)
