"""A Hub on loopback for the real huggingface_hub client: two origins, a request log, and faults on demand. Standard library only.

    with Hub(folder) as hub:            hub.url is HF_ENDPOINT; hub.cdn, another origin, serves the bytes of large files
        hub.add("org/name", {"config.json": b"…", "model.safetensors": path})
        hub.fault(Fault(host="cdn", status=503, headers={"Retry-After": "0"}))
        hub.log                         every request: who asked for what, what was sent, and whether a token came along

Endpoints are those of the Hub's API that the client calls to create, list, resolve, upload (LFS, Xet) and commit. For Xet the
token route names a ``local://`` store, which the client's own hf_xet reads and writes; only to read such a store back does
this server need hf_xet too.
"""

import base64
import hashlib
import itertools
import json
import re
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}  # users; ada may do everything, bob is a stranger
_LARGE = re.compile(r".*\.(safetensors|bin|pt|pth|model)|tokenizer\.json")


@dataclass
class Request:
    """One line of the log. `sent` counts bytes of the body that were written to the socket."""

    host: str
    method: str
    path: str
    range: str | None = None
    status: int = 0
    sent: int = 0
    received: int = 0
    token: str | None = None


@dataclass
class Fault:
    """Something to go wrong with the next `times` requests on `host` whose method and path fit."""

    host: str = "cdn"
    path: str = ".*"
    method: str = "GET|HEAD|POST|PUT"
    times: int = 1
    status: int = 0  # answer this
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # send so many bytes of the body, then close
    ignore_range: bool = False  # 200 and all of it
    corrupt: bool = False  # flip a bit
    delay: float = 0  # seconds, before the answer
    lose: bool = False  # do what is asked, then close without an answer
    body: bytes | None = None  # answer 200, or `status`, with this
    change: dict[str, str] = field(default_factory=dict)  # headers of the true answer that are replaced, or added
    drip: float = 0  # seconds between one byte of the body and the next
    act: object = None  # called, with the hub, before the answer
    skip: int = 0  # let so many fitting requests pass first


@dataclass(frozen=True)
class File:
    size: int
    oid: str  # sha256 of a large file, git's sha1 of another
    large: bool
    xet: str | None = None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    pulls: int = 0


class Hub:
    def __init__(self, folder: Path, xet: bool = False, rate: float = 0):
        self.folder, self.xet, self.rate = Path(folder), xet, rate  # rate: bytes of content per second, in all; 0 no limit
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self._free = 0.0  # when the line is free again
        self._gate = threading.Condition()
        self._content, self._stop_at = 0, float("inf")  # bytes of content in either direction so far; where they stop until `resume`
        self._waiting = self._active = 0  # requests that wait there, and all that are being answered
        self.links = 0  # raised by expire(): older links are refused
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._numbers = itertools.count()
        (self.folder / "blobs").mkdir(parents=True)
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self, "host": host})) for host in ("hub", "cdn")
        ]
        for server in self._servers:
            server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"http://localhost:{self._servers[1].server_port}"

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.resume()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, fault: Fault) -> None:
        self.faults.append(fault)

    def expire(self) -> None:
        self.links += 1

    def throttle(self, size: int) -> None:
        """Wait until `size` bytes have gone through a line of `rate`."""
        if self.rate:
            with self._lock:
                self._free = max(self._free, time.monotonic()) + size / self.rate
                wait = self._free - time.monotonic()
            time.sleep(max(0.0, wait))

    def pause_after(self, size: int) -> None:
        """Content, in either direction, stops after `size` more bytes until ``resume``."""
        with self._gate:
            self._stop_at = self._content + size

    def paused(self, process: subprocess.Popen, seconds: float = 120) -> None:
        """Wait until a request waits there. Raises AssertionError where the client's process ends before."""
        until = time.monotonic() + seconds
        with self._gate:
            while not self._gate.wait_for(lambda: self._waiting, 0.1):
                assert process.poll() is None, f"the client ended with {process.returncode}"
                assert time.monotonic() < until, f"{self._content} bytes went through, fewer than {self._stop_at}"

    def resume(self) -> None:
        with self._gate:
            self._stop_at = float("inf")
            self._gate.notify_all()

    def idle(self, seconds: float = 120) -> None:
        """Wait until no request is being answered: the log then tells all that went out."""
        with self._gate:
            assert self._gate.wait_for(lambda: not self._active, seconds), f"{self._active} requests are still being answered"

    def pass_gate(self, size: int) -> None:
        """`size` bytes of content want to go through."""
        with self._gate:
            if self._content >= self._stop_at:
                self._waiting += 1
                self._gate.notify_all()
                self._gate.wait_for(lambda: self._content < self._stop_at)
                self._waiting -= 1
            self._content += size

    @contextmanager
    def answering(self) -> Iterator[None]:
        with self._gate:
            self._active += 1
        try:
            yield
        finally:
            with self._gate:
                self._active -= 1
                self._gate.notify_all()

    def clear(self) -> None:
        self.log.clear()

    def requests(self, host: str = ".*", method: str = ".*", path: str = "") -> list[Request]:
        return [r for r in self.log if re.fullmatch(host, r.host) and re.fullmatch(method, r.method) and re.search(path, r.path)]

    def sent(self) -> int:
        """Bytes of files' content that went out, from either origin."""
        return sum(r.sent for r in self.log if r.method == "GET" and ("/resolve/" in r.path or r.host == "cdn"))

    # content

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def store(self, content: bytes | Path, large: bool) -> File:
        """Keep `content`; a path is linked to, not copied."""
        if isinstance(content, Path):
            with open(content, "rb") as file:
                oid, size = hashlib.file_digest(file, "sha256").hexdigest(), content.stat().st_size
            if not large:
                return self.store(content.read_bytes(), large)
            if not self.blob(oid).exists():
                self.blob(oid).symlink_to(content.resolve())
            return File(size, oid, True)
        oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blob(oid).write_bytes(content)
        return File(len(content), oid, large)

    def add(self, name: str, files: dict[str, bytes | Path], branch: str = "main", **kind) -> str:
        """Commit `files` to a repository, made if need be, without the client. Returns the commit."""
        repo = self.repos.setdefault(name, Repo(**kind))
        tree = dict(repo.commits.get(repo.refs.get(branch, ""), {}))
        for path, content in files.items():
            tree[path] = self.store(content, bool(_LARGE.fullmatch(Path(path).name)))
        return self.commit(repo, branch, tree)

    def add_folder(self, name: str, folder: Path, **kind) -> str:
        return self.add(name, {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}, **kind)

    def commit(self, repo: Repo, branch: str, tree: dict[str, File]) -> str:
        oid = hashlib.sha1(repr((next(self._numbers), branch, sorted(tree.items(), key=lambda i: i[0]))).encode()).hexdigest()
        repo.commits[oid] = tree
        repo.refs[branch] = oid
        return oid

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: self.content(file).read_bytes() for path, file in repo.commits[repo.refs[branch]].items()}

    def content(self, file: File) -> Path:
        with self._one_at_a_time:
            if not self.blob(file.oid).exists():
                self._from_xet(file)
        return self.blob(file.oid)

    # Xet

    def cas(self, write: bool) -> str:
        """A store for one client: a copy of all that was written so far, since a store is locked by the process that opens it."""
        with self._lock:
            number = next(self._numbers)
            target = self.folder / f"cas-{number}"
            latest = getattr(self, "_written", None)
            shutil.copytree(latest, target) if latest else target.mkdir()
            if write:
                self._written = target
            return f"local://{target}"

    def xet_bytes(self) -> int:
        """Bytes of chunks in the newest store."""
        latest = getattr(self, "_written", None)
        return sum(p.stat().st_size for p in latest.rglob("*") if p.is_file() and "xorb" in p.parent.name) if latest else 0

    def xet_hash(self, sha256: str) -> str | None:
        """The hash under which the store has the file with this sha256, from its shards (records of 48 bytes after a head of 48)."""
        for path in getattr(self, "_written", Path("/nowhere")).rglob("*.mdb"):
            raw, at = path.read_bytes(), 48
            while at + 48 <= len(raw) and raw[at : at + 32] != b"\xff" * 32:
                name, flags, count = raw[at : at + 32], *struct.unpack_from("<2I", raw, at + 32)
                at += 48 * (1 + count * (2 if flags & 1 << 31 else 1))
                if flags & 1 << 30:
                    if sha256 in (raw[at : at + 32].hex(), _hex(raw[at : at + 32])):
                        return _hex(name)
                    at += 48
        return None

    def _from_xet(self, file: File) -> None:
        import hf_xet

        session = hf_xet.XetSession()
        with session.new_file_download_group(
            endpoint=self.cas(write=False), token="x", token_expiry_unix_secs=int(time.time()) + 86400
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(file.xet, file.size), f"{self.blob(file.oid)}.part")
        Path(f"{self.blob(file.oid)}.part").rename(self.blob(file.oid))


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class _Answer(Exception):
    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None, file: Path | None = None):
        self.status, self.body, self.headers, self.file = status, body, headers or {}, file


def _error(status: int, message: str, code: str = "", **headers: str) -> _Answer:
    return _Answer(status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    host: str
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True

    def handle(self):
        try:
            super().handle()
        except ConnectionResetError:  # the client was killed
            pass

    def log_message(self, *args):
        """The hub's own log is the log."""

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.entry = Request(self.host, self.command, self.path, self.headers.get("Range"), token=token)
        with self.hub._lock:
            self.hub.log.append(self.entry)
            self.fault = next(
                (
                    f
                    for f in self.hub.faults
                    if f.times and f.host == self.host and re.fullmatch(f.method, self.command) and re.search(f.path, self.path)
                ),
                None,
            )
            if self.fault and self.fault.skip:
                self.fault.skip -= 1
                self.fault = None
            elif self.fault:
                self.fault.times -= 1
        try:
            with self.hub.answering():
                self.body = self._read_body()
                self.entry.received = len(self.body)
                self._route()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def _route(self) -> None:
        try:
            time.sleep(self.fault.delay if self.fault else 0)
            if self.fault and self.fault.act:
                self.fault.act(self.hub)
            if self.fault and self.fault.body is not None:
                raise _Answer(self.fault.status or 200, self.fault.body, dict(self.fault.headers))
            if self.fault and self.fault.status and not self.fault.lose:
                raise _Answer(self.fault.status, {"error": "fault"}, self.fault.headers)
            parts = urlsplit(self.path)
            (self._cdn if self.host == "cdn" else self._api)(unquote(parts.path), parts.path, parse_qs(parts.query, keep_blank_values=True))
            raise _Answer(404, {"error": "no such route"})
        except _Answer as raised:
            answer = raised
            if self.fault and self.fault.lose and self.fault.status:
                answer = _Answer(self.fault.status, {"error": "fault"}, self.fault.headers)
            elif self.fault and self.fault.lose:
                raise ConnectionResetError from None
            self._send(answer)
        except ConnectionResetError:
            raise
        except Exception as error:  # noqa: BLE001  5xx but 501 would be tried again for half a minute
            self._send(_Answer(501, {"error": repr(error)}))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        out, left = [], int(self.headers.get("Content-Length", 0))
        while left and (block := self.rfile.read(min(left, 1 << 16))):
            out.append(block)
            left -= len(block)
            self.hub.pass_gate(len(block))
            self.hub.throttle(len(block))
        if left:
            raise ConnectionResetError  # the client was killed
        return b"".join(out)

    def _send(self, answer: _Answer) -> None:
        fault, status, headers = self.fault, answer.status, dict(answer.headers)
        if answer.file is not None:
            size = answer.file.stat().st_size
            start, stop = 0, size
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked and not (fault and fault.ignore_range):
                first, last = asked.groups()
                start = int(first) if first else max(0, size - int(last))
                stop = min(size, int(last) + 1) if first and last else size
                status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
                if start >= size:
                    status, start, stop, headers["Content-Range"] = 416, 0, 0, f"bytes */{size}"
            headers |= {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
        else:
            raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode() if answer.body is not None else b""
            headers.setdefault("Content-Length", str(len(raw)))
            headers.setdefault("Content-Type", "application/json")
        if fault and fault.change:
            changed = {name.lower() for name in fault.change}
            headers = {name: value for name, value in headers.items() if name.lower() not in changed} | fault.change
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.file is None:
            self._drip(raw) if self.fault and self.fault.drip else self.wfile.write(raw)
            return
        if fault and fault.drip:
            self._drip(answer.file.read_bytes()[start:stop])
            return
        with open(answer.file, "rb") as file:
            file.seek(start)
            left = stop - start if not fault or fault.cut is None else min(fault.cut, stop - start)
            if fault and fault.corrupt and left:
                self.wfile.write(bytes([file.read(1)[0] ^ 1]))
                start, left, self.entry.sent = start + 1, left - 1, 1
            while left:
                size = min(left, 1 << (16 if self.hub.rate else 20))
                self.hub.pass_gate(size)
                sent = self.connection.sendfile(file, start, size)
                self.entry.sent += sent
                start, left = start + sent, left - sent
                self.hub.throttle(sent)
        if self.fault and self.fault.cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def _drip(self, raw: bytes) -> None:
        for at in range(len(raw)):
            self.wfile.write(raw[at : at + 1])
            self.entry.sent += 1
            time.sleep(self.fault.drip)

    # the other origin: content of large files, and where they are put

    def _cdn(self, path: str, raw: str, query: dict) -> None:
        kind, oid = path.strip("/").split("/")
        if kind == "blob":
            if query.get("X-Link") != [str(self.hub.links)]:
                raise _Answer(403, b"<Error>Request has expired</Error>", {"Content-Type": "application/xml"})
            raise _Answer(200, file=self.hub.blob(oid), headers={"ETag": f'"{oid}"'})
        if kind == "put" and self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _error(400, "sha256 differs")
            self.hub.blob(oid).write_bytes(self.body)
            raise _Answer(200, b"", {"ETag": f'"{oid}"'})

    # the Hub's own origin

    def _api(self, path: str, raw: str, query: dict) -> None:
        user = TOKENS.get(self.entry.token or "")
        if self.entry.token and user is None:
            raise _error(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            self._create(user)
        if path == "/api/validate-yaml":
            raise _Answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            raise _Answer(200, {"name": user, "type": "user", "orgs": []}) if user else _error(401, "Unauthorized")
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|xet-read-token|xet-write-token|auth-check|branch|refs)(?:/(.+))?)?",
            raw,
        ):
            name, verb, rest = unquote(found[1]), found[2] or "info", found[3] or ""
            repo = self._repo(name, user)
            revision, _, inside = rest.partition("/")
            getattr(self, "_" + verb.replace("-", "_"))(name, repo, unquote(revision) or "main", unquote(inside), query, user)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", raw):
            self._lfs(found[2], user)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            self._resolve(unquote(found[1]), unquote(found[2]), unquote(found[3]), user)

    def _repo(self, name: str, user: str | None) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != "ada"):
            raise _error(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def _create(self, user: str | None) -> None:
        if user is None:
            raise _error(401, "Unauthorized")
        want = json.loads(self.body)
        name = f"{want.get('organization') or user}/{want['name'].rpartition('/')[2]}"
        if user != "ada":
            raise _error(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        repo = self.hub.repos[name] = Repo(private=want.get("visibility") == "private" or bool(want.get("private")))
        self.hub.commit(repo, "main", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n", False)})
        raise _Answer(200, {"url": f"{self.hub.url}/{name}"})

    def _info(self, name, repo, revision, inside, query, user) -> None:
        oid, tree = self._tree_at(repo, revision)
        raise _Answer(200, {"_id": "0", "id": name, "sha": oid, "private": repo.private, "gated": "auto" if repo.gated else False, "tags": [],
                            "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
                            "siblings": [{"rfilename": path} for path in tree]})  # fmt: skip

    _revision = _info

    def _tree(self, name, repo, revision, inside, query, user) -> None:
        _, tree = self._tree_at(repo, revision)
        rows, folders = [], {str(parent) for path in tree for parent in Path(path).parents if str(parent) != "."}
        rows += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        for path, file in sorted(tree.items()):
            row = {"type": "file", "path": path, "size": file.size, "oid": file.oid[:40]}
            if file.large:
                row["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 134}
            if file.xet:
                row["xetHash"] = file.xet
            rows.append(row)
        at = int(query.get("cursor", ["0"])[0])
        more = (
            {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={at + 50}>; rel="next"'}
            if at + 50 < len(rows)
            else {}
        )
        raise _Answer(200, rows[at : at + 50], more)

    def _auth_check(self, name, repo, revision, inside, query, user) -> None:
        if revision == "write" and user != "ada":
            raise _error(403, "no right to write here")
        raise _Answer(200, {})

    def _branch(self, name, repo, revision, inside, query, user) -> None:
        if user != "ada":
            raise _error(403, "no right to write here")
        repo.refs[revision] = json.loads(self.body or b"{}").get("startingPoint") or repo.refs["main"]
        raise _Answer(200, {})

    def _refs(self, name, repo, revision, inside, query, user) -> None:
        rows = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in repo.refs.items()]
        raise _Answer(200, {"branches": [row for row in rows if not row["ref"].startswith("refs/pr/")], "tags": [], "converts": [],
                            "pullRequests": [row for row in rows if row["ref"].startswith("refs/pr/")]})  # fmt: skip

    def _preupload(self, name, repo, revision, inside, query, user) -> None:
        tree = repo.commits.get(repo.refs.get(revision, ""), {})
        files = json.loads(self.body)["files"]
        raise _Answer(200, {"files": [{"path": f["path"], "uploadMode": "lfs" if _LARGE.fullmatch(Path(f["path"]).name) else "regular", "shouldIgnore": False,
                                       "oid": tree[f["path"]].oid if f["path"] in tree else None} for f in files]})  # fmt: skip

    def _lfs(self, verb: str, user: str | None) -> None:
        if verb == "verify":
            raise _Answer(200, {})
        if user != "ada":
            raise _error(403, "no right to write here")
        objects = []
        for want in json.loads(self.body)["objects"]:
            row = {"oid": want["oid"], "size": want["size"]}
            if not self.hub.blob(want["oid"]).exists():
                row["actions"] = {"upload": {"href": f"{self.hub.cdn}/put/{want['oid']}", "header": {}}}
            objects.append(row)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _xet_token(self, write: bool) -> None:
        place, end = self.hub.cas(write), int(time.time()) + 86400
        raise _Answer(200, {"casUrl": place, "accessToken": "x", "exp": end},
                      {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(end)})  # fmt: skip

    def _xet_read_token(self, *args) -> None:
        self._xet_token(False)

    def _xet_write_token(self, name, repo, revision, inside, query, user) -> None:
        if user != "ada":
            raise _error(403, "no right to write here")
        self._xet_token(True)

    def _commit(self, name, repo, revision, inside, query, user) -> None:
        if user != "ada":
            raise _error(403, "no right to write here")
        if "create_pr" in query:
            repo.pulls += 1
            repo.refs[f"refs/pr/{repo.pulls}"] = repo.refs[revision]
            revision = f"refs/pr/{repo.pulls}"
        oid, tree = self._tree_at(repo, revision)
        tree = dict(tree)
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header" and value.get("parentCommit") not in (None, oid):
                raise _error(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                tree[value["path"]] = self.hub.store(base64.b64decode(value["content"]), False)
            if key == "lfsFile":
                xet = None if self.hub.blob(value["oid"]).exists() else self.hub.xet_hash(value["oid"])
                if xet is None and not self.hub.blob(value["oid"]).exists():
                    raise _error(400, f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = File(value["size"], value["oid"], True, xet)
            if key == "deletedFile":
                tree.pop(value["path"])
            if key == "deletedFolder":
                tree = {path: file for path, file in tree.items() if not path.startswith(value["path"])}
        new = self.hub.commit(repo, revision, tree)
        pull = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{repo.pulls}"} if "create_pr" in query else {}
        raise _Answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{new}", "commitOid": new, **pull})

    def _resolve(self, name: str, revision: str, path: str, user: str | None) -> None:
        repo = self._repo(name, user)
        oid, tree = self._tree_at(repo, revision)
        if repo.gated and user != "ada":
            raise _error(403, "Access to model is restricted", "GatedRepo")
        if path not in tree:
            raise _error(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        file, headers = tree[path], {"X-Repo-Commit": oid}
        if not file.large:
            raise _Answer(200, file=self.hub.blob(file.oid), headers=headers | {"ETag": f'"{file.oid}"'})
        self.hub.content(file)
        headers |= {"Location": f"{self.hub.cdn}/blob/{file.oid}?X-Link={self.hub.links}&X-Amz-Signature=secret", "X-Linked-Size": str(file.size),
                    "X-Linked-Etag": f'"{file.oid}"', "Accept-Ranges": "bytes"}  # fmt: skip
        if self.hub.xet and file.xet:
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{self.hub.url}/api/models/{name}/xet-read-token/{oid}>; rel="xet-auth"'}
        raise _Answer(302, b"", headers)
