"""A conversion is a transaction: whole or not at all, and a killed one goes on with the same bytes."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import reshard
from reshard.demo import make_model

OPTIONS = {"format": "tp", "tp": 2, "max_file": 100_000}  # several files per rank, so that some finish before others


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_after(model: Path, out: Path, size: int) -> None:
    """Run the conversion in a process that kills itself, as kill -9 would, once `size` bytes were read."""
    program = f"""
import os, reshard
done = 0
def progress(n):
    global done
    done += n
    if done >= {size}:
        os.kill(os.getpid(), 9)
reshard.convert({str(model)!r}, {str(out)!r}, progress=progress, jobs=1, **{OPTIONS!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9


@pytest.mark.parametrize("size", [1, 200_000, 500_000, 800_000])
def test_killed_run_continues_with_the_same_bytes(model, tmp_path, size):
    reshard.convert(model, tmp_path / "whole", **OPTIONS)
    killed_after(model, tmp_path / "out", size)
    assert not (tmp_path / "out").exists()
    seen = []
    report = reshard.convert(model, tmp_path / "out", progress=seen.append, **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    total = reshard.plan(model, **OPTIONS).bytes_read
    assert sum(seen) == total
    if size >= 500_000:
        assert report.resumed_bytes > 0 and report.bytes_read == total - report.resumed_bytes  # what was moved is not moved again


def test_file_that_lost_bytes_after_the_kill_is_made_again(model, tmp_path):
    killed_after(model, tmp_path / "out", 800_000)
    finished = [p for p in (tmp_path / ".out.reshard").glob("shard-*") if p.stat().st_size]
    os.truncate(finished[0], finished[0].stat().st_size - 1)
    reshard.convert(model, tmp_path / "out", **OPTIONS)
    assert reshard.diff(model, tmp_path / "out")


def test_run_killed_while_the_folder_gets_its_name_is_tidied_up(model, tmp_path):
    program = f"""
import os, pathlib, reshard
pathlib.Path.unlink = lambda self, **k: os.kill(os.getpid(), 9)  # the last step: the journal goes
reshard.convert({str(model)!r}, {str(tmp_path / "out")!r}, **{OPTIONS!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    report = reshard.convert(model, tmp_path / "out", **OPTIONS)
    assert report.bytes_written == 0 and report.resumed_files == len(report.files)
    assert "journal.jsonl" not in files_of(tmp_path / "out") and reshard.diff(model, tmp_path / "out")


def test_changed_source_or_options_refuse_to_continue(model, tmp_path):
    killed_after(model, tmp_path / "out", 500_000)
    with pytest.raises(reshard.DestinationError, match="unfinished conversion"):
        reshard.convert(model, tmp_path / "out", **{**OPTIONS, "tp": 3})
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x01")
    with pytest.raises(reshard.DestinationError, match="unfinished conversion"):
        reshard.convert(model, tmp_path / "out", **OPTIONS)
    reshard.convert(model, tmp_path / "out", overwrite=True, **OPTIONS)
    assert reshard.diff(model, tmp_path / "out")


def test_source_swapped_for_one_of_the_same_size_and_time_refuses(model, tmp_path):
    killed_after(model, tmp_path / "out", 500_000)
    weights = model / "model.safetensors"
    times = weights.stat()
    content = weights.read_bytes()
    weights.unlink()
    (model / "filler").write_bytes(b"x")  # so that the new file gets another inode
    weights.write_bytes(content[:-2] + b"\x00\x01")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(reshard.DestinationError, match="unfinished conversion"):
        reshard.convert(model, tmp_path / "out", **OPTIONS)


def test_two_runs_on_one_destination_keep_apart(model, tmp_path):
    inside = []

    def progress(size):
        if not inside:
            inside.append(True)
            with pytest.raises(reshard.DestinationError, match="another run"):
                reshard.convert(model, tmp_path / "out", **OPTIONS)

    reshard.convert(model, tmp_path / "out", progress=progress, **OPTIONS)
    assert inside and reshard.diff(model, tmp_path / "out")


def test_full_destination_is_refused_and_overwritten_only_on_demand(model, tmp_path):
    out = tmp_path / "out"
    reshard.convert(model, out, format="hf")
    (out / "mine.txt").write_text("precious")
    with pytest.raises(reshard.DestinationError, match="not empty") as error:
        reshard.convert(model, out, **OPTIONS)
    assert "--overwrite" in error.value.hint and (out / "mine.txt").read_text() == "precious"
    reshard.convert(model, out, overwrite=True, **OPTIONS)
    assert not (out / "mine.txt").exists() and reshard.diff(model, out)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_no_space_is_found_before_the_first_byte(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(reshard.DestinationError, match=r"4,096 bytes free, the conversion writes \d"):
        reshard.convert(model, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_destination_in_the_source_is_refused(model, where):
    with pytest.raises(reshard.DestinationError, match="same folder"):
        reshard.convert(model, model / where, overwrite=True, **OPTIONS)
    assert (model / "model.safetensors").exists()


def test_disk_error_in_the_middle_leaves_no_destination(model, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def failing(handle, data, offset):
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(reshard.DestinationError, match="No space left") as error:
        reshard.convert(model, tmp_path / "out", **OPTIONS)
    assert "same command" in error.value.hint and not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", real)
    reshard.convert(model, tmp_path / "out", **OPTIONS)
    assert reshard.diff(model, tmp_path / "out")


def test_bytes_counted_equal_bytes_planned(model, tmp_path):
    for step, options in enumerate(
        ({"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3}, {"format": "tp", "tp": 2}, {"format": "rank-pt", "tp": 3})
    ):
        planned = reshard.plan(model, **options)
        report = reshard.convert(model, tmp_path / str(step), **options)
        assert report.bytes_read == planned.bytes_read
        assert report.bytes_written == planned.bytes_written == sum((tmp_path / str(step) / f).stat().st_size for f in report.files)


def test_write_back_begins_early_and_changes_nothing(model, tmp_path, monkeypatch):
    """Large files are handed to the disk while they are written; here small ones count as large."""
    from reshard.conversion import output

    asked = []
    monkeypatch.setattr(output, "_FLUSH", 1 << 12)
    monkeypatch.setattr(output, "start_writeback", lambda handle, real=output.start_writeback: asked.append(real(handle)))
    reshard.convert(model, tmp_path / "early", format="vllm", tp=3)
    reshard.convert(model, tmp_path / "late", format="vllm", tp=3, fsync=False)
    assert len(asked) > 3
    names = [path.name for path in (tmp_path / "late").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "early", tmp_path / "late", names, shallow=False)[1:] == ([], [])


def test_threads_and_buffers_do_not_change_a_byte(model, tmp_path):
    reshard.convert(model, tmp_path / "a", format="vllm", tp=3, jobs=1)
    reshard.convert(model, tmp_path / "b", format="vllm", tp=3, jobs=7, buffer=1 << 20)
    _, mismatch, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", [p.name for p in (tmp_path / "a").iterdir()], shallow=False)
    assert not mismatch and not errors
