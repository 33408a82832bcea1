"""Few descriptors, no flock: a conversion gets along with what the system gives."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

import reshard
from reshard.cli import main
from reshard.demo import CONFIG, make_model


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("limit", [64, 1024])
def test_more_ranks_than_files_may_be_open(tmp_path, limit):
    """defects.md M7, A13: outputs as well as sources"""
    ranks = 1100 if limit == 1024 else 150
    make_model(tmp_path / "hf", {**CONFIG, "num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40})
    shell = f"ulimit -n {limit}; exec {sys.executable} -m reshard convert"
    subprocess.run(["bash", "-c", f"{shell} hf out --to tp --tp {ranks}"], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", f"{shell} out back --to hf"], cwd=tmp_path, check=True)
    assert reshard.diff(tmp_path / "hf", tmp_path / "back")


def no_flock(handle, how):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_flock_a_lock_file_keeps_runs_apart(model, tmp_path, monkeypatch):
    """defects.md M8"""
    monkeypatch.setattr(fcntl, "flock", no_flock)
    inside = []

    def progress(size):
        if not inside:
            inside.append(True)
            with pytest.raises(reshard.DestinationError, match="another run is writing") as error:
                reshard.convert(model, tmp_path / "out", format="hf")
            assert str(tmp_path / ".out.reshard.lock") in error.value.hint and str(os.getpid()) in error.value.hint

    report = reshard.convert(model, tmp_path / "out", format="hf", progress=progress)
    assert inside and reshard.diff(model, tmp_path / "out")
    assert [note for note in report.notes if "no locks (flock)" in note and f"{tmp_path} has" in note and ".out.reshard.lock" in note]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("host", "pid", "taken"), [(None, 2**22 - 1, False), ("elsewhere", 1, True), (None, 1, True), (None, "x", True)])
def test_lock_file_of_a_dead_process_of_this_host_is_removed(model, tmp_path, monkeypatch, host, pid, taken):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    lock = tmp_path / ".out.reshard.lock"
    lock.write_text(json.dumps({"host": host or os.uname().nodename, "pid": pid}))
    if taken:
        with pytest.raises(reshard.DestinationError, match="another run"):
            reshard.convert(model, tmp_path / "out", format="hf")
        assert lock.exists()
    else:
        reshard.convert(model, tmp_path / "out", format="hf")
        assert not lock.exists() and reshard.diff(model, tmp_path / "out")


@pytest.mark.parametrize("kind", ["bytes that are no text", "a gigabyte", "a named pipe", "a terminal's commands"])
def test_lock_file_of_anybody_is_told_and_not_believed(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    lock = tmp_path / ".out.reshard.lock"
    if kind == "a named pipe":
        os.mkfifo(lock)
    elif kind == "a gigabyte":
        with open(lock, "wb") as file:
            file.truncate(1 << 30)
    else:
        lock.write_bytes(b"\xff\xfe\x00" if kind == "bytes that are no text" else b"\x1b[2J")
    with pytest.raises(reshard.DestinationError, match="another run") as caught:
        reshard.convert(model, tmp_path / "out", format="hf")
    assert "wait for it to end" in caught.value.hint and len(caught.value.hint) < 500 and caught.value.hint.isprintable()


def test_a_lock_of_the_kernel_needs_no_word(model, tmp_path, monkeypatch, capsys):
    """The other way about: with flock the report says nothing; without it the command line does."""
    assert reshard.convert(model, tmp_path / "with", format="hf").notes == []
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(SystemExit):
        main(["convert", str(model), str(tmp_path / "out"), "--to", "hf"])
    assert "no locks (flock)" in capsys.readouterr().err


def test_only_a_lock_that_is_held_means_another_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: (_ for _ in ()).throw(BlockingIOError(errno.EWOULDBLOCK, "busy")))
    with pytest.raises(reshard.DestinationError, match="another run"):
        reshard.convert(model, tmp_path / "out", format="hf")
