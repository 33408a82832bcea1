"""A killed run goes on inside files; what it may trust, and what not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.conversion import journal, output, transaction
from reshard.conversion.journal import notes_in, read_notes, replay
from reshard.demo import CONFIG, make_model

BIG = {
    **CONFIG,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
VLLM = {"format": "vllm", "tp": 4}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model of about 88 MB."""
    folder = tmp_path_factory.mktemp("big") / "hf"
    make_model(folder, BIG)
    return folder


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_at(model: Path, out: Path, size: int, options: dict, **more) -> None:
    program = f"""
import os, reshard
done = 0
def progress(n):
    global done
    done += n
    if done >= {size}:
        os.kill(os.getpid(), 9)
reshard.convert({str(model)!r}, {str(out)!r}, progress=progress, **{options!r}, **{more!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9


@pytest.mark.parametrize("share", [0.5, 0.92, 0.98])
@pytest.mark.parametrize("fsync", [True, False])
def test_run_over_tensor_parallel_files_killed_late_keeps_what_it_moved(big, tmp_path, share, fsync):
    """defects.md B5: all files of a tensor-parallel mesh finish together, so whole files were never kept"""
    total = reshard.plan(big, **VLLM).bytes_read
    killed_at(big, tmp_path / "out", int(share * total), VLLM, fsync=fsync)
    seen = []
    report = reshard.convert(big, tmp_path / "out", progress=seen.append, fsync=fsync, **VLLM)
    unsaid = 2 * (4 << 20) + (4 << 20)  # what two threads had begun
    assert report.resumed_bytes >= share * total - unsaid
    assert report.bytes_read == total - report.resumed_bytes and sum(seen) == total
    assert report.bytes_written < report.bytes_read + 100_000
    assert reshard.diff(big, tmp_path / "out")
    reshard.convert(big, tmp_path / "whole", fsync=False, **VLLM)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_resuming_with_other_threads_and_buffers_is_the_same(big, tmp_path):
    options = {"format": "megatron", "tp": 2, "pp": 2}
    killed_at(big, tmp_path / "out", 40_000_000, options, jobs=1, buffer=1 << 20)
    report = reshard.convert(big, tmp_path / "out", jobs=3, **options)
    assert report.resumed_bytes > 20_000_000
    reshard.convert(big, tmp_path / "whole", fsync=False, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_after_a_loss_of_power_only_what_was_durable_counts(big, tmp_path, monkeypatch):
    """Bytes that the kernel had are gone after another boot; those noted as durable, by fsync before the note, are not."""
    total = reshard.plan(big, **VLLM).bytes_read
    killed_at(big, tmp_path / "out", int(0.9 * total), VLLM)
    monkeypatch.setattr(journal, "boot", lambda: "another")
    assert reshard.convert(big, tmp_path / "out", **VLLM).resumed_bytes == 0
    assert reshard.diff(big, tmp_path / "out")


def test_durable_portions_are_noted_after_their_fsync(big, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(transaction, "_DURABLE_EVERY", 0)
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (real(handle), order.append(os.readlink(f"/proc/self/fd/{handle}")))[0])
    monkeypatch.setattr(
        journal.Journal, "durable", lambda self, mark, real=journal.Journal.durable: (order.append("durable"), real(self, mark))[0]
    )
    reshard.convert(big, tmp_path / "out", **VLLM)
    first = order.index("durable")
    assert any(name.endswith(".safetensors") for name in order[:first])
    assert order[first + 1 :][0].endswith((".safetensors", "journal.jsonl"))


SWAPPED = '[vllm]\ngate_up = { name = ".gate_up_proj.weight", of = "up gate" }\n'


def test_corrected_layout_starts_over_and_says_so(model, tmp_path):
    """defects.md A1"""
    text = 'extends = "llama"\narchitectures = ["LlamaForCausalLM"]\n'
    layout = tmp_path / "mine.toml"
    layout.write_text(text + SWAPPED)
    program = f"""
import os, reshard
seen = []
reshard.convert({str(model)!r}, {str(tmp_path / "out")!r}, layout={str(layout)!r}, format="vllm", tp=3, max_file=100_000, jobs=1,
                progress=lambda n: (seen.append(n), sum(seen) > 600_000 and os.kill(os.getpid(), 9)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    layout.write_text(text)
    report = reshard.convert(model, tmp_path / "out", layout=layout, format="vllm", tp=3, max_file=100_000)
    assert report.resumed_bytes == 0 and report.resumed_files == 0 and "started over" in report.notes[0]
    reshard.convert(model, tmp_path / "whole", layout=layout, format="vllm", tp=3, max_file=100_000)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_layout_of_equal_sizes_has_another_fingerprint(model, tmp_path):
    from reshard.conversion.fingerprint import fingerprint

    text = 'extends = "llama"\narchitectures = ["LlamaForCausalLM"]\n'
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text(text + SWAPPED)
    one, same, other = (
        fingerprint(reshard.plan(model, layout=tmp_path / name, format="vllm", tp=3)) for name in ("a.toml", "a.toml", "b.toml")
    )
    assert one == same != other


def test_refused_run_leaves_nothing_in_the_way(model, tmp_path, monkeypatch):
    """defects.md B7"""
    monkeypatch.setattr(os, "statvfs", lambda path: type("Free", (), {"f_bavail": 1, "f_frsize": 4096}))
    with pytest.raises(reshard.DestinationError, match="bytes free"):
        reshard.convert(model, tmp_path / "out", format="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    monkeypatch.undo()
    reshard.convert(model, tmp_path / "out", format="tp", tp=2)


def test_leftover_of_other_work_is_named_with_what_to_do(big, tmp_path):
    killed_at(big, tmp_path / "out", 60_000_000, VLLM)
    with pytest.raises(reshard.DestinationError, match="--to vllm --tp 4") as error:
        reshard.convert(big, tmp_path / "out", format="tp", tp=2)
    assert str(tmp_path / ".out.reshard") in str(error.value) and f"delete {tmp_path / '.out.reshard'}" in error.value.hint


def test_folders_of_an_earlier_mesh_are_removed(model, tmp_path):
    """defects.md M2"""
    killed_at(model, tmp_path / "out", 700_000, {"format": "megatron", "tp": 3}, jobs=1)
    reshard.convert(model, tmp_path / "out", format="megatron", tp=1, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out" / "release").iterdir()) == ["mp_rank_00"]
    assert reshard.diff(model, tmp_path / "out")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_that_fails_is_not_trusted_for_what_it_had_taken(big, tmp_path, monkeypatch, call):
    """After an input/output error only bytes known to be on the disk are kept; the same command goes on."""
    real, calls = getattr(os, call), []

    def failing(handle, *rest):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".safetensors"):
            calls.append(name)
            if len(calls) > (300 if call == "pwrite" else 1):
                raise OSError(5, "Input/output error")
        return real(handle, *rest)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(reshard.DestinationError, match=r"model-rank-\d-part-\d.safetensors can't be written: Input/output error"):
        reshard.convert(big, tmp_path / "out", **VLLM)
    monkeypatch.undo()
    notes = notes_in(tmp_path / ".out.reshard")
    assert any("batch" in note for note in notes) and replay(notes, journal.boot()).batches == set()
    reshard.convert(big, tmp_path / "out", **VLLM)
    assert reshard.diff(big, tmp_path / "out")


def test_disk_that_takes_no_byte_is_an_error_and_no_endless_loop(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)
    with pytest.raises(reshard.DestinationError, match="took no byte"):
        reshard.convert(model, tmp_path / "out", format="hf")


def test_short_writes_and_reads_are_continued(model, tmp_path, monkeypatch):
    reshard.convert(model, tmp_path / "whole", format="vllm", tp=3)
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at, real=os.pwrite: real(handle, data[: max(1, len(data) // 3)], at))
    monkeypatch.setattr(os, "preadv", lambda handle, into, at, real=os.preadv: real(handle, [into[0][: max(1, len(into[0]) // 2)]], at))
    monkeypatch.setattr(os, "write", lambda handle, data, real=os.write: real(handle, data[: max(1, len(data) // 2)]))
    reshard.convert(model, tmp_path / "out", format="vllm", tp=3)
    monkeypatch.undo()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_full_disk_for_the_journal_leaves_no_torn_line(big, tmp_path, monkeypatch):
    real, count = os.write, []

    def full(handle, data):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("journal.jsonl"):
            count.append(1)
            if len(count) == 8:
                return real(handle, data[:5])
            if len(count) == 9:
                raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises((reshard.DestinationError, OSError), match="No space left"):
        reshard.convert(big, tmp_path / "out", **VLLM)
    monkeypatch.undo()
    raw = (tmp_path / ".out.reshard" / "journal.jsonl").read_bytes()
    assert read_notes(raw)[1] == len(raw)
    assert reshard.convert(big, tmp_path / "out", **VLLM).resumed_bytes > 0
    assert reshard.diff(big, tmp_path / "out")


HOSTILE = [b"[1]\n", b"[" * 100_000, b'{"fingerprint": 7}\n', b"\xff\xfe\n", b'{"a": 1}\n', b"null\n"]


@pytest.mark.parametrize("line", HOSTILE)
def test_destination_with_a_journal_of_another_kind_is_an_ordinary_folder(model, tmp_path, line):
    """defects.md L1, transaction.py:148"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").write_bytes(line)
    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.convert(model, tmp_path / "out", **VLLM | {"tp": 3})
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == line


@pytest.mark.parametrize("line", [b'{"batch": [1]}', b'{"batch": "x"}', b'{"batch": 99999999}', b'{"batch": -1}', b'{"file": ["x"]}', b'{"mark": {}}', b'{"durable": null}',
                                  b'{"boot": 3}', b'{"redo": 5}', b'{"redo": {"files": [1], "batches": ["x"]}}', b'{"publish": "x"}', b"[]", b'{"file": "/etc/passwd"}', b'{"fil'])  # fmt: skip
def test_hostile_lines_of_a_journal_change_no_byte(big, tmp_path, line):
    """defects.md L1, journal.py"""
    killed_at(big, tmp_path / "out", 60_000_000, VLLM, fsync=False)
    path = tmp_path / ".out.reshard" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + line + b"\n" + b"".join(lines[3:]))
    reshard.convert(big, tmp_path / "out", fsync=False, **VLLM)
    assert reshard.diff(big, tmp_path / "out")


def test_files_of_the_destination_cut_short_after_the_kill_are_not_finished(model, tmp_path):
    """defects.md Low: `_finished` trusted the journal"""
    program = f"""
import os, pathlib, reshard
pathlib.Path.unlink = lambda self, **k: os.kill(os.getpid(), 9)
reshard.convert({str(model)!r}, {str(tmp_path / "out")!r}, **{VLLM | {"tp": 3}!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    file = tmp_path / "out" / "model-rank-1-part-0.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.convert(model, tmp_path / "out", **VLLM | {"tp": 3})
    reshard.convert(model, tmp_path / "out", overwrite=True, **VLLM | {"tp": 3})
    assert reshard.diff(model, tmp_path / "out")


def test_link_in_the_partial_folder_is_removed_and_not_followed(big, tmp_path):
    killed_at(big, tmp_path / "out", 40_000_000, VLLM)
    (tmp_path / "victim").write_text("precious")
    file = tmp_path / ".out.reshard" / "model-rank-0-part-0.safetensors"
    file.unlink(missing_ok=True)
    file.symlink_to(tmp_path / "victim")
    (tmp_path / ".out.reshard" / "sub").symlink_to(tmp_path)
    reshard.convert(big, tmp_path / "out", **VLLM)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "out" / "sub").exists()
    assert reshard.diff(big, tmp_path / "out")


def test_report_of_a_resumed_run_on_the_command_line(big, tmp_path):
    killed_at(big, tmp_path / "out", 60_000_000, VLLM)
    args = [sys.executable, "-m", "reshard", "convert", str(big), str(tmp_path / "out"), "--to", "vllm", "--tp", "4", "--json"]
    result = json.loads(subprocess.run(args, capture_output=True, check=True, text=True).stdout)
    assert result["resumed_bytes"] + result["bytes_read"] == reshard.plan(big, **VLLM).bytes_read and result["resumed_bytes"] > 40_000_000
    assert np.isfinite(result["seconds"]) and output._WRITE


#: the command line, whose worker stops in the middle of its writing until it is told to go on; a byte of descriptor `told` for each Ctrl-C that came
INTERRUPTED = """
import os, signal, sys
real, writes = os.pwrite, []
def pwrite(handle, data, at):
    writes.append(at)
    if len(writes) == 300:
        print("writing", flush=True)
        sys.stdin.read(1)
    return real(handle, data, at)
os.pwrite = pwrite
told = int(sys.argv.pop())
os.set_blocking(told, False)
signal.set_wakeup_fd(told)
from reshard.cli import main
main()
"""


@pytest.mark.parametrize("times", [1, 5])
def test_ctrl_c_again_and_again_is_no_traceback(big, tmp_path, times):
    """defects.md Low: 2nd Ctrl-C. Further ones came between the steps of the way out, and closed files under a thread that wrote to them."""
    args = ["convert", str(big), str(tmp_path / "out"), "--to", "vllm", "--tp", "4", "-j1", "--buffer", "100kB"]
    heard, told = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, *args, str(told)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, pass_fds=[told])  # fmt: skip
    os.close(told)
    with os.fdopen(heard, "rb", buffering=0) as pipe:
        assert process.stdout.readline() == "writing\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            assert pipe.read(1) == bytes([signal.SIGINT])
        assert process.poll() is None  # it waits for its thread
        _, err = process.communicate("x")
    assert process.returncode == 130 and err.strip() == "interrupted; run the same command to go on where it stopped"
    report = reshard.convert(big, tmp_path / "out", **VLLM)
    assert reshard.diff(big, tmp_path / "out") and report.bytes_read < reshard.plan(big, **VLLM).bytes_read
