"""Pull: what it leaves when it is killed, refused or raced, and whose folders it may touch."""

# ruff: noqa: F811  pytest hands fixtures over by name

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from hubcases import command, environment, files_of, hub, large, model  # noqa: F401  fixtures among them
from hubserver import Fault

import reshard
from reshard.demo import make_model


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with other names of files than `large`."""
    folder = tmp_path_factory.mktemp("other") / "hf"
    make_model(folder)
    return folder


def killed_pull(hub, tmp_path, source="hf://org/a", *more, after=40_000_000, sign=signal.SIGKILL):
    """Run ``pull`` into dst and kill it when so many bytes have gone out: more than its 8 threads ask for at first (4 MiB each),
    so that one of them at least has written what it got, and asks again."""
    hub.pause_after(after)
    args = [sys.executable, "-m", "reshard", "pull", source, "dst", *more]
    process = subprocess.Popen(
        args, cwd=tmp_path, env={**os.environ, **environment(hub, tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    hub.paused(process)
    process.send_signal(sign)
    process.communicate(timeout=120)
    hub.resume()
    hub.idle()


def test_pull_after_a_killed_pull_of_another_model_never_serves_that_one(hub, large, other, tmp_path):
    """defects.md H1"""
    hub.add_folder("org/a", large)
    hub.add_folder("org/b", other)
    killed_pull(hub, tmp_path)
    with pytest.raises(
        reshard.DestinationError, match="holds an unfinished pull of hf://org/a@[0-9a-f]{40}, and this is hf://org/b@"
    ) as caught:
        reshard.pull("hf://org/b", tmp_path / "dst")
    assert "pull hf://org/a@" in caught.value.hint and not (tmp_path / "dst").exists()
    reshard.pull("hf://org/b", tmp_path / "dst", overwrite=True)
    assert files_of(tmp_path / "dst") == files_of(other) and not (tmp_path / ".dst.reshard").exists()


def test_killed_pull_goes_on_inside_files(hub, large, tmp_path):
    hub.add_folder("org/a", large)
    killed_pull(hub, tmp_path)
    came = hub.sent()
    hub.clear()
    reshard.pull("hf://org/a", tmp_path / "dst")
    assert files_of(tmp_path / "dst") == files_of(large)
    assert (
        hub.sent() <= sum(path.stat().st_size for path in large.iterdir()) - came + 9 * (4 << 20)
        and os.listdir(tmp_path).count(".dst.reshard") == 0
    )


def test_pull_of_another_commit_is_not_a_continuation(hub, large, tmp_path):
    first = hub.add_folder("org/a", large)
    killed_pull(hub, tmp_path)
    hub.add("org/a", {"config.json": b"{}"})
    with pytest.raises(reshard.DestinationError, match=f"unfinished pull of hf://org/a@{first}"):
        reshard.pull("hf://org/a", tmp_path / "dst")
    reshard.pull(f"hf://org/a@{first}", tmp_path / "dst")
    assert files_of(tmp_path / "dst") == files_of(large)


def test_convert_and_pull_keep_each_other_out(hub, large, tmp_path):
    hub.add_folder("org/a", large)
    killed_pull(hub, tmp_path)
    with pytest.raises(reshard.DestinationError, match="holds an unfinished"):
        reshard.convert("hf://org/a", tmp_path / "dst", format="tp", tp=2)
    reshard.pull("hf://org/a", tmp_path / "dst")
    assert files_of(tmp_path / "dst") == files_of(large)


def test_two_pulls_at_once(hub, large, tmp_path):
    """defects.md A11"""
    hub.add_folder("org/a", large)
    hub.pause_after(5_000_000)
    args = [sys.executable, "-m", "reshard", "pull", "hf://org/a", "dst"]
    process = subprocess.Popen(
        args, cwd=tmp_path, env={**os.environ, **environment(hub, tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    hub.paused(process)
    with pytest.raises(reshard.DestinationError, match="another run is writing"):
        reshard.pull("hf://org/a", tmp_path / "dst")
    hub.resume()
    assert process.wait(timeout=120) == 0 and files_of(tmp_path / "dst") == files_of(large)


@pytest.mark.parametrize("kind", ["file", "link to a file", "file above", "not empty", "no checkpoint", "foreign partial", "read-only"])
def test_destinations_that_can_not_be_written_are_refused_before_the_download(hub, model, tmp_path, monkeypatch, kind):
    """defects.md A11, Low: pull onto a file or link failed after the download"""
    hub.add_folder("org/a", model)
    place, precious = tmp_path / "in" / "dst", tmp_path / "precious"
    place.parent.mkdir()
    precious.write_text("thesis")
    if kind == "file":
        shutil.copy(precious, place)
    elif kind == "link to a file":
        place.symlink_to(precious)
    elif kind == "file above":
        place = precious / "dst"
    elif kind in ("not empty", "no checkpoint"):
        place.mkdir()
        shutil.copy(precious, place)
    elif kind == "foreign partial":
        (place.parent / ".dst.reshard").symlink_to(tmp_path)
    else:  # root may write everywhere
        monkeypatch.setattr("os.access", lambda path, mode: path != place.parent)
    before = sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts and "hub" not in path.parts)
    with pytest.raises((reshard.DestinationError, NotADirectoryError)):
        reshard.pull("hf://org/a", place, overwrite=kind == "no checkpoint")
    assert sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts and "hub" not in path.parts) == before
    assert precious.read_text() == "thesis" and not hub.requests(path="/resolve/")


def test_mount_point_is_refused_before_the_download(hub, model, tmp_path, monkeypatch):
    """defects.md Low: a mount point can't be renamed onto"""
    hub.add_folder("org/a", model)
    (tmp_path / "dst").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "dst"))
    with pytest.raises(reshard.DestinationError, match="mount point") as caught:
        reshard.pull("hf://org/a", tmp_path / "dst")
    assert str(tmp_path / "dst" / "NAME") in caught.value.hint and not hub.requests(path="/resolve/")


def test_link_to_a_folder_is_followed(hub, model, tmp_path):
    """defects.md M3"""
    hub.add_folder("org/a", model)
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "dst").symlink_to(tmp_path / "disk" / "real")
    reshard.pull("hf://org/a", tmp_path / "dst")
    assert (tmp_path / "dst").is_symlink() and files_of(tmp_path / "disk" / "real") == files_of(model)
    reshard.pull("hf://org/a", tmp_path / "dst", overwrite=True)
    assert (tmp_path / "dst").is_symlink() and os.listdir(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("swap", [True, False])
def test_overwrite_replaces_a_checkpoint_at_once(hub, model, other, tmp_path, monkeypatch, swap):
    hub.add_folder("org/a", model)
    shutil.copytree(other, tmp_path / "dst")
    if not swap:
        monkeypatch.setattr("reshard.conversion.destination.exchange", lambda a, b: False)
    reshard.pull("hf://org/a", tmp_path / "dst", overwrite=True)
    assert files_of(tmp_path / "dst") == files_of(model) and not list(tmp_path.glob(".dst*"))


def test_folder_that_appears_meanwhile_is_not_replaced(hub, large, tmp_path):
    """defects.md H3"""
    hub.add_folder("org/a", large)

    def intrude(size: int) -> None:
        (tmp_path / "dst").mkdir(exist_ok=True)
        (tmp_path / "dst" / "precious").write_text("mine")

    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.pull("hf://org/a", tmp_path / "dst", progress=intrude)
    assert files_of(tmp_path / "dst") == {"precious": b"mine"}
    shutil.rmtree(tmp_path / "dst")
    hub.clear()
    reshard.pull("hf://org/a", tmp_path / "dst")  # all of it was kept
    assert files_of(tmp_path / "dst") == files_of(large) and not hub.requests(host="cdn")


@pytest.mark.parametrize("point", ["rename", "exchange", "rmtree", "unlink", "rmdir", "fsync"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_death_at_a_step_of_publishing_is_healed_by_the_same_command(hub, model, other, tmp_path, point, nth, when):
    """The destination is wholly old or wholly new at every moment; the same command finishes."""
    hub.add_folder("org/a", model)
    shutil.copytree(other, tmp_path / "dst")
    code = f"""
import os, shutil, sys
import reshard.conversion.destination as destination
import reshard.publish.pull
from reshard.cli import main
count = 0
def dying(call):
    def replaced(*args, **options):
        global count
        count += 1
        if count == {nth} and {when!r} == "before":
            os._exit(9)
        out = call(*args, **options)
        if count == {nth}:
            os._exit(9)
        return out
    return replaced
owner = {{"exchange": destination, "rmtree": shutil}}.get({point!r}, os)
if {point!r} == "rename":
    destination.exchange = lambda a, b: False
setattr(owner, {point!r}, dying(getattr(owner, {point!r})))
main(["pull", "hf://org/a", "dst", "--overwrite"])
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **environment(hub, tmp_path)}, capture_output=True, check=False
    )
    now = files_of(tmp_path / "dst") if (tmp_path / "dst").exists() else None
    now and now.pop("journal.jsonl", None)  # until the last step
    assert now in (files_of(model), files_of(other)) or (
        point == "rename" and now is None and files_of(tmp_path / ".dst.reshard-old") == files_of(other)
    )
    done = command(hub, tmp_path, "pull", "hf://org/a", "dst", "--overwrite")
    assert done.returncode == 0 and files_of(tmp_path / "dst") == files_of(model) and not list(tmp_path.glob(".dst*")), done.stderr


def test_what_is_not_fetched_is_told(hub, model, tmp_path):
    hub.add_folder("org/a", model)
    hub.add("org/a", {"modeling.py": b"x" * 10, ".hidden/secret": b"y", "old.bin": b"z" * 2000})
    done = command(hub, tmp_path, "pull", "hf://org/a", "dst")
    assert done.returncode == 0 and "left out: .hidden/secret (1 B), modeling.py (10 B), old.bin (2.00 kB)" in done.stderr
    assert files_of(tmp_path / "dst") == files_of(model)
    result = json.loads(command(hub, tmp_path, "pull", "hf://org/a", "again", "--json").stdout)
    assert [row["path"] for row in result["left_out"]] == [".hidden/secret", "modeling.py", "old.bin"]


def test_pull_reads_what_the_cache_has(hub, model, tmp_path):
    hub.add_folder("org/a", model)
    assert command(hub, tmp_path, "inspect", "hf://org/a").returncode == 0
    assert command(hub, tmp_path, "pull", "hf://org/a", "one", "--cache").returncode == 0
    hub.clear()
    assert command(hub, tmp_path, "pull", "hf://org/a", "two", HF_HUB_OFFLINE="1").returncode == 0
    assert files_of(tmp_path / "two") == files_of(model) and not hub.log


def test_file_that_changed_on_the_disk_meanwhile_is_found(hub, large, tmp_path):
    """The checksum is of what the disk holds, chunks of an earlier run among them."""
    hub.add_folder("org/a", large)
    hub.fault(Fault(path="/blob/", status=404, times=99, skip=5))
    with pytest.raises(reshard.HubError):
        reshard.pull("hf://org/a", tmp_path / "dst")
    hub.faults.clear()
    finished = (tmp_path / ".dst.reshard" / "journal.jsonl").read_text()
    for path in (tmp_path / ".dst.reshard").glob("*.safetensors"):
        if json.dumps({"file": path.name}) in finished:
            continue
        with open(path, "rb+") as file:
            file.seek(2_000_000)
            file.write(b"\xff" * 100)
    for _ in range(3):
        try:
            reshard.pull("hf://org/a", tmp_path / "dst")
            break
        except reshard.HubError as error:
            assert "has the checksum" in str(error)
    assert files_of(tmp_path / "dst") == files_of(large)
