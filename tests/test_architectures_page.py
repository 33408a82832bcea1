"""docs/architectures.md is what the checks' files say: no tick without a run that was equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import architectures_page  # noqa: E402
from engines_common import differences  # noqa: E402
from tiny_models import exchangeable, families  # noqa: E402

torch = pytest.importorskip("torch")


def test_the_page_is_current():
    done = subprocess.run([sys.executable, SCRIPTS / "architectures_page.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_only_what_was_equal_is_ticked(tmp_path, monkeypatch):
    rows = [{"family": "a", "mesh": mesh, "status": status, "detail": ["why | so"], "engine": "vLLM 9"} for mesh, status in (
        ("tp1", "equal"), ("tp2", "differs"), ("tp4", "not built"), ("pp2", "control missed"))]  # fmt: skip
    (tmp_path / "vllm.json").write_text(json.dumps(rows))
    monkeypatch.setattr(architectures_page, "FOLDER", tmp_path)
    line = next(line for line in architectures_page.page().splitlines() if line.startswith("| a "))
    assert line == "| a |  | ● tp1; **differs**: tp2; **not built**: tp4; **control missed**: pp2 |  |  |  |  |"
    assert "- a tp2 : differs: why \\| so" in architectures_page.page()


def test_a_difference_of_one_bit_is_a_line():
    engine = {"w": torch.arange(6.0).view(2, 3), "s": torch.tensor(1.0), "n": torch.tensor([float("nan")])}
    assert differences(engine, {name: t.clone() for name, t in engine.items()}) == []
    files = {"w": engine["w"].clone(), "s": torch.tensor(-1.0), "extra": torch.ones(1)}
    files["w"][1, 2] = torch.nextafter(files["w"][1, 2], torch.tensor(9.0))
    lines = differences(engine, files, before=engine)
    assert lines == ["extra [1]: only in the files", "n [1]: only in the engine", "s: 1 of 1 elements differ, which the engine did not load",
                     "w: 1 of 6 elements differ, which the engine did not load"]  # fmt: skip
    assert differences({"w": engine["w"]}, {"w": engine["w"].bfloat16()}) == ["w: torch.float32 in the engine, torch.bfloat16 in the files"]


def test_what_both_compute_may_differ_in_its_last_bit_alone():
    one = torch.tensor([-1.5, -2.25])
    near, far = torch.nextafter(one, one - 1), torch.nextafter(torch.nextafter(one, one - 1), one - 1)
    assert differences({"A": one}, {"A": near}, computed={"A"}) == []
    assert differences({"A": one}, {"A": near}) == differences({"A": one}, {"A": far}, computed={"A"}) == ["A: 2 of 2 elements differ"]


def test_a_family_says_what_to_exchange():
    a, b = torch.ones(4, 2), torch.zeros(4, 2)
    assert exchangeable({"x.k_proj.weight": a, "x.v_proj.weight": b, "x.q_proj.weight": b}) == ("x.k_proj.weight", "x.v_proj.weight")
    assert exchangeable({"one": a, "same": a.clone(), "other": b}) == ("one", "other")
    assert exchangeable({"one": a, "short": b[:2]}) is None
    assert all(family["config"]["model_type"] for family in families().values())
