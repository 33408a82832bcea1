"""The campaign of kills, in small: it finds nothing, and it can find something."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import campaign_kills
import campaigns

from reshard.conversion import transaction
from reshard.executor import run as execute


def room() -> str | None:
    """Memory, where there is enough of it: waiting for the disk takes most of the time."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 1_000_000_000 else None


@pytest.fixture
def folder(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory(prefix="reshard-kills-", dir=room()) as name:
        yield Path(name)


def test_killed_runs_and_failing_calls_lose_nothing(folder, capsys):
    lab = campaign_kills.Lab(folder, seed=3)
    campaign_kills.random_kills(lab, 22)
    campaign_kills.every_call(lab, 0.03)
    assert lab.violations == []
    assert "hf → vllm tp4" in capsys.readouterr().out


def test_the_campaign_finds_a_journal_that_notes_too_early(folder, monkeypatch, capsys):
    def early(numbered, *args, moved, **more):
        def first(item):
            moved(item[0])
            return item

        execute.run_portions([first(item) for item in numbered], *args, **more)

    monkeypatch.setattr(transaction, "run_portions", early)
    lab = campaign_kills.Lab(folder, seed=3)
    campaign_kills.random_kills(lab, 16)
    assert any("other bytes" in text for text in lab.violations)


def test_the_campaign_finds_a_destination_that_is_not_whole(folder):
    (folder / "a").mkdir()
    (folder / "a" / "x").write_bytes(b"1")
    (folder / "b").mkdir()
    assert campaigns.state_of(folder / "a", None, folder / "b") == "OTHER"
    assert not campaigns.same(folder / "a", folder / "b")
