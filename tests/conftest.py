"""Tests that need what is not here are skipped: the team's sample checkpoints beside the checkout; transformers."""

from importlib.util import find_spec
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


def pytest_runtest_setup(item):
    if item.get_closest_marker("models") and not (find_spec("transformers") and find_spec("accelerate")):
        pytest.skip("needs transformers and accelerate: pip install -e '.[models]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        if not SAMPLES.is_dir() and str(SAMPLES) in str(error):
            pytest.skip(f"needs the sample checkpoints in {SAMPLES}")
        raise
