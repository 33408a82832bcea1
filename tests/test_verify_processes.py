"""Ranks as processes: the one that died first is named, none outlives the command, nothing of the caller's is changed."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from reshard.errors import FormatError
from reshard.verify.launch import run_processes
from reshard.verify.request import Request
from reshard.verify.watch import Stopped, Watch

pytest.importorskip("transformers")

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
MODEL = SAMPLES / "vllm/llama-tp2", SAMPLES / "vllm/hf/llama"

#: a rank that does `ACTION` when it is about to run the shards
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from reshard.verify import verify
if __name__ == "__main__":
    try:
        print(verify(Path({shards!r}), reference=Path({reference!r}), device="cpu").passed)
    except Exception as error:
        print(type(error).__name__, error, "| hint:", error.hint)
    print("GLOO", os.environ.get("GLOO_SOCKET_IFNAME"))
"""


@pytest.fixture
def script(tmp_path):
    """Start verify in a process of its own, whose ranks behave as `behaviour`, code that a sitecustomize of theirs runs."""

    def start(behaviour: str = "", **popen) -> subprocess.Popen:
        (tmp_path / "sitecustomize.py").write_text(behaviour)
        (tmp_path / "main.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent), shards=str(MODEL[0]), reference=str(MODEL[1])))
        environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **popen
        )

    return start


#: rank 1 does something in the middle of the work: the module that all ranks are forked with is changed as it is imported
IN_RANK_1 = """
import importlib.util, os, signal, sys, time

def changed(module):
    original = module.replay
    def replay(m, inputs):
        import torch.distributed as dist
        if dist.get_rank() == 1:
            {action}
        else:
            {other}
        return original(m, inputs)
    module.replay = replay

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "reshard.verify.run":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), changed(module))
        return spec

sys.meta_path.insert(0, Finder())
"""


def behave(action: str, other: str = "pass") -> str:
    return IN_RANK_1.format(action=action, other=other)


@pytest.mark.models
def test_a_killed_rank_is_named_and_not_the_one_that_lost_it(script):
    """defects.md D12: "rank 0 stopped: Connection reset" """
    out, err = script(behave("os.kill(os.getpid(), signal.SIGKILL)")).communicate(timeout=280)
    assert "ReshardError rank 1 was killed by SIGKILL | hint: the system kills what takes too much memory" in out, (out, err)


@pytest.mark.models
def test_the_rank_that_raised_first_is_named_with_what_it_said(script):
    """defects.md D12 and E10: as on a device that is full"""
    started = time.monotonic()
    out, err = script(behave("raise MemoryError('CUDA out of memory. Tried to allocate 2 GiB')")).communicate(timeout=280)
    assert "rank 1 stopped: MemoryError: CUDA out of memory. Tried to allocate 2 GiB" in out, (out, err)
    assert time.monotonic() - started < 280


@pytest.mark.models
def test_the_callers_environment_is_left_alone(script):
    """defects.md A12: GLOO_SOCKET_IFNAME=lo would break the next multi-node job of the same process"""
    out, err = script().communicate(timeout=280)
    assert out.splitlines()[-2:] == ["True", "GLOO None"], (out, err)


def _descendants(tmp: Path) -> list[int]:
    """Processes of this run that are alive, by their TMPDIR."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                f"TMPDIR={tmp}".encode() in (path / "environ").read_bytes()
                and "Z" not in (path / "stat").read_text().rpartition(")")[2].split()[0]
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.models
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_process_that_started_it(end, script, tmp_path):
    """defects.md, robustness: after SIGTERM two ranks went on"""
    ready = tmp_path / "ready"
    wait = f"open({str(ready)!r}, 'a').write('x'); time.sleep(300)"
    process = script(behave(wait, wait))
    deadline = time.monotonic() + 280
    while not (ready.exists() and len(ready.read_text()) == 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.1)
    assert len(_descendants(tmp_path)) >= 3
    process.send_signal(end)
    process.communicate(timeout=100)
    deadline = time.monotonic() + 280
    while _descendants(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _descendants(tmp_path) == []


@pytest.mark.models
def test_the_command_leaves_no_folder_behind_when_it_is_terminated(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "reshard", "verify", str(MODEL[0]), "--reference", str(MODEL[1]), "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 280
    while not list(tmp_path.glob("reshard-verify-*/*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=280)
    assert process.returncode == 143 and not list(tmp_path.glob("reshard-verify-*")) and _descendants(tmp_path) == []


def test_a_rank_that_cannot_start_says_why_and_those_that_did_are_ended(monkeypatch):
    """With no more processes to be had, all it said was "'NoneType' object has no attribute 'kill'" """
    did: list[str] = []

    class Process(multiprocessing.process.BaseProcess):
        """As Python's own: what never started can be neither killed nor joined."""

        def start(self):
            if self.name == "rank 1":
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            self._popen = SimpleNamespace(
                kill=lambda: did.append(f"{self.name} killed"), wait=lambda timeout: did.append(f"{self.name} joined")
            )

    with pytest.raises(AttributeError):
        Process().kill()
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    with pytest.raises(BlockingIOError, match="Resource temporarily unavailable"):
        run_processes(Request(*MODEL), 3)
    assert did == ["rank 0 killed", "rank 0 joined"]


# --- the watch, with a store and no ranks ---


def test_the_first_error_is_told_to_all_and_kept():
    """defects.md E10: before anything that may block"""
    store = dist.HashStore()
    one, other = Watch(store, 1), Watch(store, 2)
    one.tell(RuntimeError("out of memory"))
    other.tell(RuntimeError("NCCL: aborted"))
    assert one.heard == other.heard == (1, "RuntimeError: out of memory")
    error = other.translated(RuntimeError("NCCL: aborted"))
    assert isinstance(error, Stopped) and str(error) == "rank 1 stopped: RuntimeError: out of memory"
    own = RuntimeError("out of memory")
    assert one.translated(own) is own


def test_a_rank_that_waits_in_a_collective_is_freed_and_ended(monkeypatch, capsys):
    """defects.md E10: NCCL closes no connection; the communicator is aborted, and if that frees nothing, the process ends"""
    monkeypatch.setattr("reshard.verify.watch.EVERY", 0.02)
    monkeypatch.setattr("reshard.verify.watch.ABORT", 0.05)
    monkeypatch.setattr("reshard.verify.watch.END", 0.05)
    store, order, ended = dist.HashStore(), [], threading.Event()

    def end(code: int) -> None:
        order.append(f"end {code}")
        ended.set()

    with Watch(store, 0, lambda: order.append("abort"), end):
        time.sleep(0.1)
        assert order == [], "nothing happened yet"
        Watch(store, 3).tell(MemoryError("2 GiB"))
        assert ended.wait(10)
    assert order == ["abort", "end 1"]
    assert "Error: rank 3 stopped: MemoryError: 2 GiB" in capsys.readouterr().err


def test_a_rank_that_leaves_in_time_is_left_alone(monkeypatch):
    monkeypatch.setattr("reshard.verify.watch.EVERY", 0.02)
    store = dist.HashStore()
    ended: list[int] = []
    with Watch(store, 0, lambda: ended.append(0), ended.append):
        Watch(store, 1).tell(ValueError("x"))
        time.sleep(0.1)
    time.sleep(0.2)
    assert ended == []


def test_what_every_rank_raises_is_no_reason_to_abort():
    from reshard.verify.group import agreed, is_agreed

    assert is_agreed(agreed(FormatError("x"))) and not is_agreed(FormatError("x")) and not is_agreed(RuntimeError("x"))


def test_a_lost_connection_blames_nobody_by_name():
    store = dist.HashStore()
    watch = Watch(store, 0)
    watch.tell(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert re.match(
        "rank 0 lost another rank, which ended without a word", str(watch.translated(RuntimeError("Connection closed by peer")))
    )


@pytest.mark.models
def test_under_torchrun_an_error_on_one_rank_ends_all_and_is_told(script, tmp_path):
    """defects.md E10, D12: no rank waits, and one of them says who stopped"""
    process = script(behave("raise MemoryError('full')"))  # writes the files that follow
    process.communicate(timeout=280)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reshard", "verify", str(MODEL[0]),
               "--reference", str(MODEL[1]), "--device", "cpu", "-q"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode != 0
    assert re.search("full|rank 1 stopped|lost another rank", done.stderr), done.stderr
