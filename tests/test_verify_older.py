"""Families whose projections are fused or turned in their files, and that have no rotary positions: their ranks compute transformers' logits."""

import sys
from pathlib import Path

import pytest

import reshard

pytest.importorskip("transformers")
from ranks import verify

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from tiny_models import families, make  # noqa: E402

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name, defects", [("gpt2", 2), ("opt", 2), ("falcon_40b", 3)])
def test_ranks_compute_the_originals_logits(name, defects, tmp_path):
    """Without rotary positions the order of a head's rows is no defect, and none is planted."""
    make(families()[name]["config"], tmp_path / "hf")
    reshard.convert(tmp_path / "hf", tmp_path / "out", format="tp", tp=2, fsync=False)
    report = verify(tmp_path / "out", tmp_path / "hf")
    assert report.passed, report.describe(traced=True)
    assert len(report.controls) == defects and not report.missed
