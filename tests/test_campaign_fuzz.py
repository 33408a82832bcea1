"""A short run of ``scripts/campaign_fuzz.py``, always the same inputs; the long one is started by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from bad.inputs import READERS, Reader
from campaign_fuzz import campaign, table


def test_no_mutant_is_read_wrongly_or_ends_in_anything_but_one_error():
    """defects.md C, M5, M6, L1: tracebacks, stalls and wrong reads over all readers."""
    counts, violations = campaign(1500, seed=20261121, jobs=2)
    assert not violations, violations
    for name, outcomes in counts.items():  # control: the mutants are neither all harmless nor all nonsense
        assert outcomes["right"] and (outcomes["refused"] or name == "journal"), table(counts)  # a torn journal is read up to the tear


@pytest.mark.parametrize(
    ("read", "judge", "kind"),
    [
        (lambda folder: 1 / 0, None, "traceback"),
        (lambda folder: None, lambda folder, found: "other bytes", "wrong"),
        (lambda folder: (_ for _ in ()).throw(ValueError("reshard knows no such thing")), None, "traceback"),
    ],
)
def test_the_campaign_notices(monkeypatch, read, judge, kind):
    """Control: a reader that fails, and one whose result is wrong."""
    monkeypatch.setitem(READERS, "zip", Reader(READERS["zip"].prepare, READERS["zip"].make, read, judge or (lambda folder, found: None)))
    counts, violations = campaign(3, seed=1, only="zip")
    assert [v[2] for v in violations] == [kind] * 3 and counts["zip"][kind] == 3
