"""The families' data are what transformers writes today: made anew and compared (scripts/family_shapes.py)."""

import json
import sys
from pathlib import Path

import pytest
from family_checkpoints import DATA, FAMILIES

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
family_shapes = pytest.importorskip("family_shapes")


def test_every_family_has_data():
    assert sorted([*family_shapes.FAMILIES, *family_shapes.READ]) == FAMILIES


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(family_shapes.READ)))
def test_data_are_what_transformers_writes(name):
    kept = json.loads((DATA / f"{name}.json").read_text())
    made = family_shapes.shapes(name)
    assert made["tensors"] == {key: list(value) for key, value in kept["tensors"].items()}
    assert made["config"] == kept["config"]
