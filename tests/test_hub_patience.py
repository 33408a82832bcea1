"""How long, how often and how slow: the Hub is waited for within bounds."""

# ruff: noqa: F811  pytest hands fixtures over by name

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hubcases import hub, large, model  # noqa: F401  fixtures among them
from hubserver import Fault

import reshard
from reshard.hub import patience
from reshard.hub.patience import LONGEST_WAIT, Slow, steadily, wait_for


def date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(("headers", "low", "high"), [
    ({}, 4, 4), ({"Retry-After": "7"}, 7, 7), ({"Retry-After": " 0 "}, 0, 0), ({"Retry-After": "99999999"}, LONGEST_WAIT, LONGEST_WAIT),
    ({"Retry-After": "9" * 25}, LONGEST_WAIT, LONGEST_WAIT), ({"Retry-After": "9" * 5000}, LONGEST_WAIT, LONGEST_WAIT), ({"Retry-After": "²"}, 4, 4),
    ({"Retry-After": "٣"}, 4, 4), ({"Retry-After": "-5"}, 4, 4), ({"Retry-After": "1.5"}, 4, 4), ({"Retry-After": "soon"}, 4, 4), ({"Retry-After": "1e9"}, 4, 4),
    ({"Retry-After": "inf"}, 4, 4), ({"Retry-After": "nan"}, 4, 4), ({"Retry-After": ""}, 4, 4), ({"Retry-After": lambda: date(250)}, 240, 250), ({"Retry-After": lambda: date(-60)}, 0, 0),
    ({"Retry-After": lambda: date(10**9)}, LONGEST_WAIT, LONGEST_WAIT), ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, LONGEST_WAIT, LONGEST_WAIT),
    ({"Retry-After": "Wed, 99 Foo 2015 07:28:00 GMT"}, 4, 4), ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}, 0, 0),
    ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 +9999999999"}, 0, LONGEST_WAIT),
    ({"RateLimit": '"api";r=0;t=55'}, 56, 56), ({"RateLimit": '"api";r=0;t=99999999'}, LONGEST_WAIT, LONGEST_WAIT), ({"RateLimit": '"api";r=0;t=' + "9" * 30}, 4, 4),
    ({"RateLimit": '"api";r=5;t=55'}, 4, 4), ({"RateLimit": "nonsense"}, 4, 4), ({"RateLimit": '"api";r=²;t=³'}, 4, 4),
])  # fmt: skip
def test_pauses_that_a_server_asks_for(headers, low, high):
    """defects.md M10: three years, 25 digits, ². Dates are made when the test runs, not when it is collected."""
    now = {name: value() if callable(value) else value for name, value in headers.items()}
    assert low <= wait_for(now, 3) <= high


def test_no_wait_is_longer_than_the_hubs_own_windows(hub, model, monkeypatch):
    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    hub.add_folder("org/name", model)
    for header in ("99999999", "9" * 25, "²".encode().decode("latin1")):
        hub.fault(Fault(host="hub", status=429, headers={"Retry-After": header}))
    assert reshard.open("hf://org/name").format == "hf"
    assert 2 * LONGEST_WAIT <= sum(slept) and max(slept) <= LONGEST_WAIT


def test_the_clients_own_waiting_is_bounded_too(hub, model, monkeypatch):
    """The client obeys any Retry-After while it uploads."""
    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)  # the client's, too
    hub.fault(Fault(host="hub", path="/preupload/", status=503, headers={"Retry-After": "99999999"}, times=2))
    hub.fault(Fault(host="hub", path="/preupload/", status=429, headers={"RateLimit": '"api";r=0;t=99999999'}))
    assert reshard.push(model, "hf://ada/name").committed
    assert slept and max(slept) <= LONGEST_WAIT + 2


class Clock:
    def __init__(self):
        self.now = 0.0

    def chunks(self, count: int, size: int, seconds: float):
        for _ in range(count):
            self.now += seconds
            yield bytes(size)


def test_a_byte_a_second_is_given_up():
    """defects.md M10"""
    clock = Clock()
    with pytest.raises(Slow, match="only 3. bytes came in 3. s"):
        list(steadily(clock.chunks(10**9, 1, 1.0), lambda: clock.now))
    assert clock.now < 40


@pytest.mark.parametrize(("size", "seconds"), [(1 << 20, 20), (40_000, 25), (100, 0.01), (2000, 1)])
def test_slow_lines_are_not(size, seconds):
    clock = Clock()
    assert sum(map(len, steadily(clock.chunks(1000, size, seconds), lambda: clock.now))) == 1000 * size


@pytest.mark.parametrize("path", ["/blob/", "/tree/", "/api/models/org/name$", "/resolve/.*config.json"])
def test_dripping_server_ends_in_an_error(hub, model, tmp_path, monkeypatch, path):
    """defects.md M10: one that never stops, in every place that is read"""
    monkeypatch.setattr(patience, "WINDOW", 0.3)
    monkeypatch.setattr(patience, "TRIES", 2)
    hub.add_folder("org/name", model)
    hub.fault(Fault(host="cdn" if path == "/blob/" else "hub", path=path, drip=0.02, times=99))
    began = time.monotonic()
    with pytest.raises(reshard.HubError, match="only [0-9]+ bytes came in"):
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    assert time.monotonic() - began < 60  # dripping to its end, a file takes more than an hour


def test_server_that_was_slow_for_a_while(hub, large, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "WINDOW", 1.0)
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    hub.fault(Fault(drip=0.02, times=2))
    from reshard.conversion.transaction import convert

    assert convert(job, tmp_path / "out").checked_files == 2 and reshard.diff(large, tmp_path / "out")
