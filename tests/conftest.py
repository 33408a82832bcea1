"""What tests need beside the package: the team's sample checkpoints next to the checkout, transformers, fixed seeds in CI."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"

# In CI the same cases run every time; elsewhere each run draws its own, and `--hypothesis-seed N` repeats one.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_sessionstart(session):
    # Whoever starts the tests may ignore or block SIGINT (a script's background jobs, some CI runners); their children would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})
    if os.environ.get("CI") and not SAMPLES.is_dir():
        pytest.exit(f"CI needs the sample checkpoints in {SAMPLES}", returncode=3)


def pytest_runtest_setup(item):
    if item.get_closest_marker("samples") and not SAMPLES.is_dir():
        pytest.skip(f"needs the sample checkpoints in {SAMPLES}")
    if item.get_closest_marker("models") and not (find_spec("transformers") and find_spec("accelerate")):
        pytest.skip("needs transformers and accelerate: pip install -e '.[models]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where all that tests need is installed (RESHARD_NO_SKIPS=1, as CI's last step), a skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("RESHARD_NO_SKIPS"):
        report.outcome = "failed"
    return report
