"""What tests need beside the package: the team's sample checkpoints next to the checkout, transformers, fixed seeds in CI, and the same
surroundings whoever starts them: what a runner sets, blocks or forbids must decide no test."""

import locale
import os
import signal

for name in list(os.environ):  # before anything reads them: the Hub's library does so when it is imported
    if (name != "PYTHONPATH" and name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON", "GLOO_", "NCCL_", "MASTER_", "TORCHELASTIC_"))) or name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "HTTP_PROXY", "HTTPS_PROXY",
        "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    ):  # fmt: skip
        del os.environ[name]

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"

# In CI the same cases run every time; elsewhere each run draws its own, and `--hypothesis-seed N` repeats one. How fast the machine is decides nothing.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_sessionstart(session):
    # Whoever starts the tests may ignore or block signals (a script's background jobs, some CI runners); their children would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
        if signal.getsignal(each) == signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.umask(0o022)
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        pytest.exit("the tests write names and texts that are no ASCII: set PYTHONUTF8=1, or a UTF-8 locale", returncode=3)
    if os.environ.get("CI") and not SAMPLES.is_dir():
        pytest.exit(f"CI needs the sample checkpoints in {SAMPLES}", returncode=3)


def pytest_runtest_setup(item):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
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
