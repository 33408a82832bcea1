"""A short run of the campaign that kills reshard while it works with the Hub; the long one is run by hand."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "campaign_hub.py"


def test_killed_runs_leave_old_or_new_and_finish_when_repeated(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--runs", "4", "--seed", "3", "--folder", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == 0 and json.loads(done.stdout)["runs"] == 4
