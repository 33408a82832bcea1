"""scripts/gpu_check.py in a reduced form on the CPU: no misspelt name may cost time on a GPU."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def arguments(work: Path) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", work=str(work), layers=None)


def test_the_quick_parts_run_and_fill_the_table(tmp_path):
    parts = ["env", "foreach", "fp8", "model", "load", "pack"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--only", ",".join(parts), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "gpu_check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert sorted(one["part"] for one in found["parts"]) == sorted(parts) and not any(one["trouble"] for one in found["parts"]), log
    assert {row["part"] for row in found["rows"]} == set(parts)
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in done.stdout and "| load | vllm: bits | equal to the CPU's | equal | met |" in table and "0 not" in table


def test_the_sync_runs_between_processes_and_finds_no_element_of_another_step(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--only", "model,sync,ipc", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu_check.log").read_text()
    found = {row["case"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["rows"] if row["part"] == "sync"}
    assert "0 elements of another step in 3 steps" in found["auto, 1 to 1, gloo"]["value"]
    assert "bits equal" in found["p2p, 2 to 2, gloo, sums compared: large"]["value"]


def test_a_part_that_hangs_is_ended_and_costs_no_other(gpu_check, tmp_path, monkeypatch):
    """Also what it started: a rank that hangs on a GPU would keep its memory from the next part."""
    script = (
        "import subprocess, sys, time\nchild = subprocess.Popen(['sleep', '77'])\nprint('started', child.pid, flush=True)\ntime.sleep(77)\n"
    )
    (tmp_path / "gpu_parts.py").write_text(script)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)

    class Impatient(subprocess.Popen):
        """Its time is up as soon as it has started what it starts."""

        def wait(self, timeout=None):
            while timeout is not None:
                if "started" in (tmp_path / "log").read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait()

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Impatient)
    done = gpu_check.run("env", 5, arguments(tmp_path), tmp_path / "rows", tmp_path / "log")
    assert done.trouble == "not done after 5 s"
    child = int((tmp_path / "log").read_text().split("started ")[1])
    until = time.monotonic() + 100
    while running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(child), "what the part started lives on"


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc/self/stat").exists() else "R"
    except (OSError, IndexError):
        return False
    return state != "Z"  # nobody has asked for its exit code yet


def test_a_part_that_fails_says_why_and_the_table_names_it(gpu_check, tmp_path, monkeypatch):
    (tmp_path / "gpu_parts.py").write_text("raise SystemExit('no such luck')\n")
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    done = gpu_check.run("env", 20, arguments(tmp_path), tmp_path / "rows", tmp_path / "log")
    assert done.trouble == "ended with exit code 1: no such luck"
    row = {"part": "load", "case": "a|b", "value": "x", "goal": "y", "ok": False}
    text = gpu_check.table([row], [done])
    assert "| load | a/b | x | y | **NOT MET** |" in text and "| env | the whole part | ended with exit code 1: no such luck |" in text
    assert "0 goals met, 1 not; 1 parts did not end well" in text


def test_a_part_that_cannot_run_here_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "env,fp8", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert (tmp_path / "gpu_check.md").read_text().count("sees no GPU here") == 2


def test_an_unknown_part_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "lod", "--out", str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no part lod; parts: env" in done.stderr and not (tmp_path / "x").exists()


PART = """import json, sys
part, rows = sys.argv[1], sys.argv[sys.argv.index("--rows") + 1]
with open(rows, "a") as out:
    out.write(json.dumps({"part": part, "case": "c", "value": "v", "goal": "g", "ok": True}) + chr(10))
sys.exit("broken on purpose" if part in ("foreach", "sync") else 0)
"""


def test_parts_that_fail_cost_no_other_and_halves_make_one_table(gpu_check, tmp_path, monkeypatch, capsys):
    """Side by side or one after another: each has its row, and a second run keeps what the first one found."""
    (tmp_path / "gpu_parts.py").write_text(PART)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    out = tmp_path / "out"
    halves = ["env,foreach,model,fp8,load,pack,ipc", "verify,sync,tests,nccl"]
    for half in halves:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(out), "--only", half])
        assert gpu_check.main() == 1
    found = json.loads((out / "gpu_check.json").read_text())
    assert [row["part"] for row in found["rows"]] == [one["part"] for one in found["parts"]] == list(gpu_check.PARTS)
    assert {one["part"] for one in found["parts"] if one["trouble"]} == {"foreach", "sync"}
    text = (out / "gpu_check.md").read_text()
    assert "11 goals met, 0 not; 2 parts did not end well" in text and text in capsys.readouterr().out
    log = (out / "gpu_check.log").read_text()
    assert all(f"===== {part}" in log for part in gpu_check.PARTS) and log.count("broken on purpose") == 2


def test_a_half_made_anew_replaces_its_rows_and_finds_what_the_other_left(gpu_check, tmp_path, monkeypatch):
    """With the same --out and --work, in any order: one row a part, and the model that the first half made is there"""
    made = "import pathlib\nat = pathlib.Path(sys.argv[sys.argv.index('--work') + 1]) / 'model'\nassert at.exists() or part == 'model'\nat.touch()\n"
    (tmp_path / "gpu_parts.py").write_text(PART.replace("with open", made + "with open", 1))
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    out, work = tmp_path / "out", tmp_path / "work"
    for half in ("model", "load,pack", "load"):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(out), "--work", str(work), "--only", half])
        assert gpu_check.main() == 0
    found = json.loads((out / "gpu_check.json").read_text())
    assert [row["part"] for row in found["rows"]] == [one["part"] for one in found["parts"]] == ["model", "load", "pack"]
    assert "3 goals met, 0 not; 0 parts did not end well. model" in (out / "gpu_check.md").read_text()


def test_all_parts_together_have_less_than_their_limits_and_the_script_ends_in_time(gpu_check, tmp_path, monkeypatch):
    """Ten minutes is what a borrowed machine gives: what does not come to its turn says so."""
    (tmp_path / "gpu_parts.py").write_text(PART)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0.1"])
    assert gpu_check.main() == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [one["trouble"] for one in parts] == ["not run: no time was left"] * len(gpu_check.PARTS)


def test_models_and_cases_side_by_side_fit_the_device(monkeypatch):
    """From a card of 12 GB to one of 141: nobody should have to know which options make the script fit"""
    import torch

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_common

    sizes = {}
    for memory in (12e9, 16e9, 24e9, 48e9, 141e9):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, memory=memory: argparse.Namespace(total_memory=memory))
        b = gpu_common.Bench(argparse.Namespace(device="cuda", work="w", rows="r", part="p", layers=None))
        per_layer, ends = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 11008, 2 * 31872 * 4096
        fp32 = 4 * (b.config["num_hidden_layers"] * per_layer + ends)
        assert fp32 * 1.4 + 4 * (768 << 20) < memory * 0.95  # what verify asks for of one GPU: the shards, and each process
        sizes[memory] = b.config["num_hidden_layers"], b.at_once(3, 14e9)
    assert sizes == {12e9: (1, 1), 16e9: (2, 1), 24e9: (2, 1), 48e9: (8, 2), 141e9: (8, 3)}
