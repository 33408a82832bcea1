"""The integers under everything, ``cut``, ``fuse``, ``slice_dim``, ``union_volume``, against a brute-force oracle."""

import geometry_oracle
from geometry_oracle import check, positions
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from reshard.geometry.block import Block, cut


@seed(20261121)
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.integers(0, 2**48))
def test_geometry_agrees_with_brute_force(number):
    """defects.md D1, and issue: nothing lost, 1. A million cases by hand: scripts/campaign_geometry.py."""
    check(number)


def test_a_range_that_begins_in_a_gap_and_ends_inside_the_next_position_loses_nothing():
    """defects.md D1: three rows of two elements, four apart; from the gap after row 0 into row 1, and into row 2."""
    block = Block(((0, 3), (0, 2)), 0, (4, 1))
    for low, high, wanted in ((2, 5, [4]), (1, 5, [1, 4]), (3, 10, [4, 5, 8, 9]), (1, 9, [1, 4, 5, 8]), (2, 4, []), (-3, 1, [0])):
        got = [int(at) for part in cut(block, (0, 1), low, high) for at in positions(part).reshape(-1)]
        assert got == wanted, (low, high)


def test_the_oracle_sees_a_cutter_that_loses_elements(monkeypatch):
    """A control: the same comparison must fail where `cut` drops, repeats or shifts a part."""
    broken = {
        "drops": lambda parts: parts[:-1],
        "repeats": lambda parts: parts + parts[:1],
        "shifts": lambda parts: [part.moved(1) for part in parts],
    }
    for how, spoil in broken.items():
        monkeypatch.setattr(geometry_oracle, "cut", lambda *at, spoil=spoil: spoil(cut(*at)))
        found = 0
        for number in range(200):
            try:
                check(number)
            except AssertionError:
                found += 1
        assert found > 40, how
