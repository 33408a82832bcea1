"""Other people's folders: what a conversion may replace, and what it never touches."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import reshard
from reshard.conversion import destination
from reshard.demo import make_model

OPTIONS = {"format": "vllm", "tp": 3}


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_link_to_a_folder_is_written_through(model, tmp_path):
    """defects.md B3, M3"""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    for options in (OPTIONS, {"format": "tp", "tp": 2}):
        reshard.convert(model, tmp_path / "link", overwrite=True, **options)
        assert (tmp_path / "link").is_symlink() and not real.is_symlink()
        assert reshard.diff(model, real) and reshard.open(real).format == options["format"]
    assert leftovers(tmp_path) == leftovers(tmp_path / "disk") == []


def test_dangling_link_is_refused_first(model, tmp_path):
    """defects.md B4, M3"""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(reshard.DestinationError, match="link to .*nowhere, which does not exist"):
        reshard.convert(model, tmp_path / "link", **OPTIONS)
    assert leftovers(tmp_path) == [] and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("where", ["", "deep/er"])
def test_mount_point_is_refused_first(model, tmp_path, monkeypatch, where):
    """defects.md B4, M3"""
    out = tmp_path / "out"
    (out / where).mkdir(parents=True)
    monkeypatch.setattr(destination, "mounts", lambda: [Path("/"), Path("/proc"), out / where])
    with pytest.raises(reshard.DestinationError, match="is a mount point") as error:
        reshard.convert(model, out, overwrite=True, **OPTIONS)
    assert where or error.value.hint == f"use {out / 'NAME'}"
    assert leftovers(tmp_path) == []


def test_true_mount_points_are_known(model):
    assert Path("/proc") in destination.mounts()
    with pytest.raises(reshard.DestinationError, match="/proc is a mount point"):
        reshard.convert(model, "/proc", **OPTIONS)


def test_folder_one_is_in_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(reshard.DestinationError, match="the folder you are in") as error:
        reshard.convert(model, ".", **OPTIONS)
    assert "./NAME" in error.value.hint


@pytest.mark.parametrize("name", [".dst.reshard", ".dst.reshard-old", ".dst.reshard-rank0", ".dst.reshard-lock"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_source_under_a_name_that_reshard_uses_is_refused(model, tmp_path, name, overwrite):
    """defects.md H4"""
    source = tmp_path / name
    model.rename(source)
    before = files_of(source)
    with pytest.raises(reshard.DestinationError):
        reshard.convert(source, tmp_path / "dst", overwrite=overwrite, **OPTIONS)
    reached = tmp_path / "by-link"
    reached.symlink_to(source)
    with pytest.raises(reshard.DestinationError):
        reshard.convert(reached, tmp_path / "dst", overwrite=overwrite, **OPTIONS)
    assert files_of(source) == before and not (tmp_path / "dst").exists()


def test_source_of_links_into_the_destination_is_refused(model, tmp_path):
    """defects.md Low: links broken by --overwrite"""
    reshard.convert(model, tmp_path / "dst", format="hf")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(tmp_path / "dst" / path.name)
    with pytest.raises(reshard.DestinationError, match="is a link to .*dst"):
        reshard.convert(linked, tmp_path / "dst", overwrite=True, **OPTIONS)
    assert reshard.diff(model, linked)


def test_partial_folder_that_is_a_link_or_not_ours_is_refused(model, tmp_path):
    """defects.md H4"""
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("x")
    partial = tmp_path / ".dst.reshard"
    partial.symlink_to(home)
    for overwrite in (False, True):
        with pytest.raises(reshard.DestinationError, match="is a link"):
            reshard.convert(model, tmp_path / "dst", overwrite=overwrite, **OPTIONS)
    partial.unlink()
    home.rename(partial)
    for overwrite in (False, True):
        with pytest.raises(reshard.DestinationError, match="holds what no run of it left: precious"):
            reshard.convert(model, tmp_path / "dst", overwrite=overwrite, **OPTIONS)
    assert files_of(partial) == {"precious": b"x"}


def test_old_folder_of_others_is_not_deleted(model, tmp_path):
    reshard.convert(model, tmp_path / "dst", format="hf")
    (tmp_path / ".dst.reshard-old").mkdir()
    (tmp_path / ".dst.reshard-old" / "precious").write_text("x")
    with pytest.raises(reshard.DestinationError, match="reshard-old is in the way"):
        reshard.convert(model, tmp_path / "dst", overwrite=True, **OPTIONS)
    assert (tmp_path / ".dst.reshard-old" / "precious").exists() and reshard.open(tmp_path / "dst").format == "hf"


def test_overwriting_what_is_no_checkpoint_is_refused(model, tmp_path):
    """defects.md B11"""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(reshard.DestinationError, match="is no checkpoint; --overwrite would delete what it holds: thesis.txt") as error:
        reshard.convert(model, tmp_path / "precious", overwrite=True, **OPTIONS)
    assert "rm -r" in error.value.hint and (tmp_path / "precious" / "thesis.txt").exists() and leftovers(tmp_path) == []


def test_folder_that_appears_during_the_run_is_not_replaced(model, tmp_path):
    """defects.md A2, H3"""
    out = tmp_path / "dst"

    def appear(size):
        if not out.exists():
            out.mkdir()
            (out / "precious").write_text("x")

    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.convert(model, out, progress=appear, **OPTIONS)
    assert files_of(out) == {"precious": b"x"} and (tmp_path / ".dst.reshard").is_dir()
    shutil.rmtree(out)
    report = reshard.convert(model, out, **OPTIONS)
    assert report.resumed_files == 3 and report.bytes_read == 0 and reshard.diff(model, out)


def test_folder_that_appears_at_the_last_moment_is_not_replaced(model, tmp_path, monkeypatch):
    """defects.md H3: after every check, the rename itself refuses"""
    out = tmp_path / "dst"
    real = os.rename

    def late(a, b):
        if Path(b) == out:
            out.mkdir()
            (out / "precious").write_text("x")
        return real(a, b)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(reshard.DestinationError, match="can't be replaced"):
        reshard.convert(model, out, **OPTIONS)
    assert files_of(out) == {"precious": b"x"} and (tmp_path / ".dst.reshard").is_dir()


def test_two_runs_that_finish_together_lose_nothing(model, tmp_path):
    """defects.md A2: one of them wins, the other gets an error"""
    results = []

    def run():
        try:
            results.append(reshard.convert(model, tmp_path / "dst", **OPTIONS))
        except reshard.DestinationError as error:
            results.append(error)

    for _ in range(5):
        results.clear()
        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reports = [r for r in results if not isinstance(r, Exception)]
        assert len(results) == 6 and len(reports) == 1
        assert reshard.diff(model, tmp_path / "dst") and leftovers(tmp_path) == []
        shutil.rmtree(tmp_path / "dst")


def test_a_run_that_ends_between_looking_and_beginning(model, tmp_path, monkeypatch):
    """One that had looked before the other took the name leaves nothing behind, and begins nothing."""
    real, calls = destination.Place.make_partial, []

    def make(place, mode):
        calls.append(place)
        if len(calls) == 1:
            reshard.convert(model, tmp_path / "dst", **OPTIONS)
        real(place, mode)

    monkeypatch.setattr(destination.Place, "make_partial", make)
    with pytest.raises(reshard.DestinationError, match="not empty|exists|holds"):
        reshard.convert(model, tmp_path / "dst", **OPTIONS)
    assert len(calls) > 1 and reshard.diff(model, tmp_path / "dst") and leftovers(tmp_path) == []


@pytest.mark.parametrize("swap", [True, False])
def test_replacing_takes_one_step_where_the_system_can(model, tmp_path, monkeypatch, swap):
    """defects.md M1"""
    out, absent = tmp_path / "dst", []
    reshard.convert(model, out, format="hf")
    if not swap:
        monkeypatch.setattr(destination, "exchange", lambda a, b: False)
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (real(a, b), absent.append(not out.exists()))[0])
    reshard.convert(model, out, overwrite=True, **OPTIONS)
    assert any(absent) is not swap
    assert reshard.open(out).format == "vllm" and leftovers(tmp_path) == []


DIE = """
import os, reshard
from reshard import destination
{patch}
real, calls = os.rename, []
def rename(a, b):
    calls.append(b)
    if len(calls) == {at}:
        if {after}:
            real(a, b)
        os.kill(os.getpid(), 9)
    return real(a, b)
os.rename = rename
reshard.convert({model!r}, {out!r}, overwrite=True, format="vllm", tp=3)
"""


@pytest.mark.parametrize("patch", ["", "destination.exchange = lambda a, b: False"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_death_while_a_folder_is_replaced_heals(model, tmp_path, patch, at, after):
    """defects.md M1: the old or the new folder is there, or is restored and told, whatever is run next"""
    out = tmp_path / "dst"
    reshard.convert(model, out, format="hf")
    program = DIE.format(patch=patch, at=at, after=after, model=str(model), out=str(out))
    code = subprocess.run([sys.executable, "-c", program], check=False).returncode
    if code == 0:
        assert at == 2 and not patch  # one rename is enough there
        return
    assert out.exists() or patch
    missing = not out.exists()
    with pytest.raises(reshard.DestinationError, match="not empty") as error:
        reshard.convert(model, out, format="tp", tp=2)
    assert ("was restored" in str(error.value)) is missing
    assert reshard.diff(model, out)
    report = reshard.convert(model, out, overwrite=True, **OPTIONS)
    assert reshard.open(out).format == "vllm" and reshard.diff(model, out) and leftovers(tmp_path) == []
    assert report.path == out


@pytest.mark.parametrize(
    ("source", "umask", "file", "folder"),
    [(0o600, 0o022, 0o600, 0o700), (0o644, 0o022, 0o644, 0o755), (0o664, 0o002, 0o664, 0o775), (0o444, 0o022, 0o644, 0o755)],
)
def test_nobody_may_read_what_he_could_not_at_the_source(model, tmp_path, source, umask, file, folder):
    """defects.md Low: 0600/0700 became 0644/0755, and weights 0644 under umask 002"""
    for path in model.iterdir():
        path.chmod(source)
    model.chmod(0o700 if source == 0o600 else 0o775)
    before = os.umask(umask)
    try:
        reshard.convert(model, tmp_path / "out", format="megatron", tp=3)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder


@pytest.mark.parametrize("full", [False, True])
def test_existing_folder_keeps_its_permissions_and_group(model, tmp_path, full):
    out = tmp_path / "out"
    out.mkdir()
    if full:
        reshard.convert(model, out, format="hf")
    out.chmod(0o2750)
    with contextlib.suppress(PermissionError):  # only root may, and not in every container
        os.chown(out, -1, 12345)
    group = out.stat().st_gid
    out.chmod(0o2750)
    reshard.convert(model, out, overwrite=full, **OPTIONS)
    assert out.stat().st_mode & 0o7777 == 0o2750 and out.stat().st_gid == group


def test_destination_below_a_file_is_said_so(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(reshard.DestinationError, match="out.reshard can't be made: "):
        reshard.convert(model, tmp_path / "file" / "out", **OPTIONS)


def test_exchange_that_fails_keeps_both(model, tmp_path, monkeypatch):
    reshard.convert(model, tmp_path / "dst", format="hf")

    def busy(a, b):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(destination, "exchange", busy)
    with pytest.raises(reshard.DestinationError, match="busy; what was written is kept"):
        reshard.convert(model, tmp_path / "dst", overwrite=True, **OPTIONS)
    monkeypatch.undo()
    assert reshard.open(tmp_path / "dst").format == "hf"
    assert reshard.convert(model, tmp_path / "dst", overwrite=True, **OPTIONS).resumed_files == 3
