"""Answers that no Hub gives: each ends in one error that names what was asked for, at once, with nothing written and no token sent elsewhere."""

# ruff: noqa: F811  pytest hands fixtures over by name

import json
import socket
import threading

import pytest
from hubcases import environment, files_of, model  # noqa: F401  fixtures among them
from hubserver import Fault, Hub

import reshard
from reshard import cli

RAW = [
    b"",
    b"null",
    b"true",
    b"7",
    b'"text"',
    b"{",
    b"<html>",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"sha": 1, "sha": 2}',
    b'{"a":' * 50_000,
    b'["\\ud800"]',
    b"NaN",
    b"1" * 5000,
]
PATHS = [7, None, "", "/etc/passwd", "../x", "a/../x", "a/..", "..", ".", "./x", "a//b", "a/", "a\0b", "\x1b[31mred", "a\nb", "a\\b", "\u202ereversed", "x" * 300, "y/" * 900 + "z",
         "é" * 200, ["a"], {"a": 1}, True, 1.5, "C:\\x", "\ud800"]  # fmt: skip
SIZES = [-1, "12", None, 1.5, True, 1 << 63, 10**40, [], {}, "-1", ""]
OIDS = [5, None, "", "x", "G" * 40, "a" * 39, "a" * 41, ["a"], True]
LFS = [
    5,
    "x",
    [],
    {},
    True,
    {"oid": 5, "size": 9},
    {"oid": "a" * 64},
    {"oid": "a" * 64, "size": 8},
    {"oid": "a" * 64, "size": "9"},
    {"oid": "a" * 63, "size": 9},
    {"oid": None, "size": 9},
]
SHAS = [None, 5, "", "main", "G" * 40, "a" * 39, ["a"], {}, True, "../../x", "\x1b[2J"]
LINKS = ["http://evil.example/next", "https://127.0.0.1:1/x", "http://hub@evil.example/x", "//evil.example/x", "http://[::1", "http://evil.example:99999/", "file:///etc/passwd", "x:y",
         "http://127.0.0.1.evil.example/x", "http://127.0.0.1:0x50/"]  # fmt: skip
RANGES = [
    "",
    "bytes */9",
    "bytes 0-1/2",
    "bytes 5-1/9",
    "bytes a-b/c",
    "\x1b[31mbytes",
    "bytes 0-99999999999/99999999999999",
    "items 0-1/2",
    "bytes 0-0",
]
PLACES = [
    "file:///etc/passwd",
    "ftp://x/y",
    "javascript:alert(1)",
    "http://",
    "data:,x",
    "gopher://x",
    "\x1b[31m",
    "http://[::1",
    "hf_secret_token_place",
]
MODES = [[], {}, {"files": 5}, {"files": [5]}, {"files": [{}]}, {"files": []}, {"files": [{"path": 7, "uploadMode": "lfs"}]}, {"files": [{"path": "x", "uploadMode": "other"}]},
         {"files": [{"path": "config.json", "uploadMode": "regular"}]}, {"files": None}]  # fmt: skip
COMMITS = [[], {}, {"commitUrl": 5, "commitOid": "a" * 40}, {"commitUrl": "u", "commitOid": 5}, {"commitUrl": "u"}, {"commitOid": "a" * 40}, {"commitUrl": None, "commitOid": None},
           {"commitUrl": "http://x/a/b/commit/1", "commitOid": "\x1b[2J"}]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory, model):
    """One server for all cases; org/name holds the model."""
    with Hub(tmp_path_factory.mktemp("hostile") / "hub") as server:
        server.add_folder("org/name", model)
        yield server


@pytest.fixture
def hub(shared, tmp_path, monkeypatch):
    for name, value in environment(shared, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("reshard.hub.patience.TRIES", 1)
    monkeypatch.chdir(tmp_path)
    shared.faults.clear()
    shared.clear()
    yield shared
    shared.faults.clear()


def refused(hub, capsys, *args: str, names: str = "") -> str:
    """Run a command, which must fail with one printable error about `names`; returns it."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    out, err = capsys.readouterr()
    text = err.replace("\n", " ")
    assert exit_.value.code == 1 and not out, err
    assert text.isprintable() and "Traceback" not in err and "hf_ada" not in err and err.startswith("Error: "), repr(err)
    assert names in err and len(err) < 3000, err
    return err


def row(**change) -> bytes:
    """A listing of one file, changed."""
    entry = {"type": "file", "path": "config.json", "size": 9, "oid": "a" * 40} | change
    return json.dumps([{key: value for key, value in entry.items() if value != "absent"}]).encode()


@pytest.mark.parametrize("body", RAW, ids=lambda body: repr(body[:12]))
@pytest.mark.parametrize("path", ["/api/models/org/name$", "/tree/"], ids=["info", "listing"])
def test_bodies(hub, capsys, path, body):
    hub.fault(Fault(host="hub", path=path, body=body, times=9))
    refused(hub, capsys, "inspect", "hf://org/name", names="/api/models/org/name")


@pytest.mark.parametrize("sha", SHAS, ids=repr)
def test_commits_of_a_revision(hub, capsys, sha):
    hub.fault(Fault(host="hub", path="/api/models/org/name$", body=json.dumps({"sha": sha, "private": False}).encode()))
    refused(hub, capsys, "pull", "hf://org/name", "out", names="/api/models/org/name")


@pytest.mark.parametrize(("field", "value"), [("path", v) for v in PATHS] + [("size", v) for v in SIZES] + [("oid", v) for v in OIDS] + [("lfs", v) for v in LFS]
                         + [("type", v) for v in (None, 5, ["file"])] + [(field, "absent") for field in ("path", "size", "oid", "type")], ids=lambda v: repr(v)[:20])  # fmt: skip
@pytest.mark.parametrize("command", [["inspect", "hf://org/name"], ["pull", "hf://org/name", "out"]], ids=["inspect", "pull"])
def test_listings(hub, capsys, tmp_path, command, field, value):
    """defects.md Low: size -1, "12", null; path 7; sha 5; \\0 in a name"""
    hub.fault(Fault(host="hub", path="/tree/", body=row(**{field: value})))
    refused(hub, capsys, *command)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.reshard").exists()


@pytest.mark.parametrize("rows", [[5], [None], ["x"], [[]], [{}], {"0": {}}, "x", [{"type": "file", "path": "a", "size": 1, "oid": "a" * 40}] * 2,
                                  [{"type": "file", "path": path, "size": 1, "oid": "a" * 40} for path in ("a", "a/b")]], ids=lambda v: repr(v)[:20])  # fmt: skip
def test_listings_as_a_whole(hub, capsys, rows):
    hub.fault(Fault(host="hub", path="/tree/", body=json.dumps(rows).encode()))
    refused(hub, capsys, "inspect", "hf://org/name", names="/api/models/org/name/tree/")


@pytest.mark.parametrize("link", LINKS)
def test_next_page_elsewhere_never_gets_the_token(hub, capsys, link):
    """defects.md M10"""
    hub.fault(Fault(host="hub", path="/tree/", change={"Link": f'<{link}>; rel="next"'}))
    refused(hub, capsys, "pull", "hf://org/name", "out", names="/tree/")


def test_next_page_on_a_listening_host_never_gets_the_token(hub, capsys, tmp_path):
    """defects.md M10: pull, push, and the client's own listing for --cache"""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [heard.append(server.accept()[0].recv(9999))], daemon=True).start()
        link = {"Link": f'<http://localhost:{server.getsockname()[1]}/next>; rel="next"'}
        for args, skip in ((["pull", "hf://org/name", "out"], 0), (["inspect", "hf://org/name"], 0), (["push", str(tmp_path / "hf"), "hf://org/name", "--public"], 0),
                           (["pull", "hf://org/name", "out", "--cache"], 1)):  # fmt: skip
            hub.faults.clear()
            if args[0] == "push":
                (tmp_path / "hf").mkdir(exist_ok=True)
                for name, path in hub.repos["org/name"].commits[hub.repos["org/name"].refs["main"]].items():
                    (tmp_path / "hf" / name).write_bytes(hub.content(path).read_bytes())
            hub.fault(Fault(host="hub", path="/tree/", change=link, times=9, skip=skip))
            err = refused(hub, capsys, *args)
            assert "must not see the token" in err
    assert not heard


def test_pages_without_end(hub, capsys):
    hub.fault(
        Fault(
            host="hub",
            path="/tree/",
            change={"Link": f'<{hub.url}/api/models/org/name/tree/main?recursive=true&expand=false>; rel="next"'},
            times=99,
        )
    )
    refused(hub, capsys, "inspect", "hf://org/name", names="its pages have no end")


def test_answer_of_any_length_is_not_held(hub, capsys, monkeypatch):
    monkeypatch.setattr("reshard.hub.answers._PAGE", 100_000)
    hub.fault(Fault(host="hub", path="/tree/", body=b"[" + b"1," * 200_000 + b"1]"))
    refused(hub, capsys, "inspect", "hf://org/name", names="more than 100000 bytes")
    monkeypatch.setattr("reshard.hub.answers.MOST_FILES", 10)
    rows = [{"type": "file", "path": f"f{i}", "size": 1, "oid": "a" * 40} for i in range(20)]
    hub.fault(Fault(host="hub", path="/tree/", body=json.dumps(rows).encode()))
    refused(hub, capsys, "inspect", "hf://org/name", names="more than 10 files")


@pytest.mark.parametrize(
    "body",
    [b'"text"', b"[]", b'{"error": 5}', b'{"error": "\\u001b[31m hf_ada"}', b"\xff" * 99, b"x" * 300_000, b'{"error": {"a": []}}'],
    ids=lambda b: repr(b[:14]),
)
@pytest.mark.parametrize("status", [400, 404, 418, 500, 599])
def test_texts_of_errors(hub, capsys, body, status):
    hub.fault(Fault(host="hub", path="/api/models/org/name$", body=body, status=status))
    refused(hub, capsys, "inspect", "hf://org/name", names="org/name")


@pytest.mark.parametrize("place", PLACES)
def test_places_of_files(hub, capsys, place):
    hub.fault(Fault(host="hub", path="/resolve/.*safetensors", change={"Location": place}, times=9))
    refused(hub, capsys, "inspect", "hf://org/name", names="safetensors")


@pytest.mark.parametrize(("name", "value"), [("X-Linked-Size", v) for v in ("-1", "x", "", "9" * 40, "1.5", "²".encode().decode("latin1"))]
                         + [("X-Linked-Etag", v) for v in ("", '"x"', "\x1b[31m", "a" * 64)], ids=repr)  # fmt: skip
def test_what_is_said_of_a_file(hub, capsys, name, value):
    hub.fault(Fault(host="hub", path="/resolve/.*safetensors", change={name: value}, times=9))
    refused(hub, capsys, "pull", "hf://org/name", "out", names="safetensors")


@pytest.mark.parametrize("where", RANGES)
def test_ranges(hub, capsys, where):
    """defects.md Low: Content-Range was printed raw"""
    hub.fault(Fault(path="/blob/", change={"Content-Range": where}, times=99))
    refused(hub, capsys, "pull", "hf://org/name", "out", names="asked for bytes")


@pytest.mark.parametrize("path", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("fault", [{"ignore_range": True, "corrupt": True}, {"cut": 0}, {"change": {"Content-Encoding": "gzip"}}, {"status": 302, "headers": {"Location": "file:///etc/passwd"}},
                                   {"body": b"{}"}, {"status": 416}, {"change": {"Content-Length": "3"}}], ids=lambda f: repr(f)[:30])  # fmt: skip
def test_small_files(hub, capsys, path, fault):
    hub.fault(Fault(host="hub", path=f"/resolve/.*{path}$", times=99, **fault))
    refused(hub, capsys, "inspect", "hf://org/name", names=path)


@pytest.mark.parametrize("answer", MODES, ids=lambda v: json.dumps(v)[:40])
def test_preupload_answers(hub, model, capsys, answer):
    hub.repos.pop("ada/name", None)
    hub.fault(Fault(host="hub", path="/preupload/", body=json.dumps(answer).encode(), times=9))
    refused(hub, capsys, "push", str(model), "hf://ada/name", names="ada/name")
    assert not hub.requests(path="/commit/")


@pytest.mark.parametrize("answer", COMMITS, ids=lambda v: json.dumps(v)[:40])
def test_commit_answers(hub, model, capsys, answer):
    hub.repos.pop("ada/name", None)
    hub.fault(Fault(host="hub", path="/commit/", body=json.dumps(answer).encode(), times=9))
    refused(hub, capsys, "push", str(model), "hf://ada/name", names="no commit was made")
    assert set(hub.files("ada/name")) == {".gitattributes"}


@pytest.mark.parametrize("body", [b"[]", b"{}", b"5", b'{"objects": 5}', b'{"objects": [5]}', b'{"objects": [{"oid": 5}]}', b'{"objects": [{"oid": "x", "size": "y", "actions": 5}]}', b"<"],
                         ids=lambda b: repr(b[:30]))  # fmt: skip
def test_upload_answers(hub, tmp_path, model, capsys, body):
    hub.repos.pop("ada/name", None)
    reshard.convert(model, tmp_path / "new", format="tp", tp=2)
    hub.fault(Fault(host="hub", path="objects/batch", body=body, times=9))
    for path in (tmp_path / "new").glob("*.safetensors"):
        hub.blob(hub.store(path, True).oid).unlink()
    refused(hub, capsys, "push", str(tmp_path / "new"), "hf://ada/name", names="ada/name")
    assert not hub.requests(path="/commit/")


@pytest.mark.parametrize("private", [None, 5, "yes", "absent"])
def test_repository_that_may_be_public(hub, model, capsys, private):
    info = {"sha": "a" * 40, "private": private}
    hub.fault(
        Fault(host="hub", path="/api/models/org/name$", body=json.dumps({k: v for k, v in info.items() if v != "absent"}).encode(), times=9)
    )
    refused(hub, capsys, "push", str(model), "hf://org/name", names="/api/models/org/name")
    assert not hub.requests(path="/commit/|/preupload/")


def test_small_files_that_are_not_small_are_not_read(hub, model, capsys):
    """defects.md M6: config.json of any size was read"""
    rows = [{"type": "file", "path": "config.json", "size": 3 << 30, "oid": "a" * 40}]
    hub.fault(Fault(host="hub", path="/tree/", body=json.dumps(rows).encode()))
    refused(hub, capsys, "inspect", "hf://org/name", "--from", "hf", names="config.json has 3221225472 bytes")
    assert not hub.requests(path="/resolve/")


def test_the_server_is_sound_without_faults(hub, model, tmp_path):
    reshard.pull("hf://org/name", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(model)
