"""What torch.cuda is asked for, by whom and in which order: a stub of it that notes each call stands for the driver."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from reshard.executor.devices import Cuda
from reshard.sync.device import Devices


class Stream:
    def __init__(self, log, device=None):
        self.log, self.device = log, device
        self.name = f"side of {device}"

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


class Event:
    def __init__(self, log, blocking=False):
        self.log, self.blocking = log, blocking

    def record(self, stream):
        self.stream = stream
        self.log.append(f"event on {stream.name}")


class Callers(Stream):
    def __init__(self, log, device):
        super().__init__(log, device)
        self.name = f"caller's of {device}"


@pytest.fixture
def log(monkeypatch):
    """What the stub was asked, in order."""
    asked: list[str] = []
    now: dict[str, Stream] = {}

    @contextmanager
    def stream(own):
        before = now.get(str(own.device))
        now[str(own.device)] = own
        asked.append(f"into {own.name}")
        yield
        now[str(own.device)] = before or Callers(asked, own.device)
        asked.append(f"out of {own.name}")

    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: 1, "stream": stream,
        "Stream": lambda device=None: Stream(asked, device), "Event": lambda **options: Event(asked, **options),
        "current_stream": lambda device=None: now.get(str(device)) or Callers(asked, device),
        "synchronize": lambda device=None: asked.append(f"host waits for all of {device}"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


class Rows:
    def __init__(self, log):
        self.log = log

    def copy_(self, value, non_blocking=False):
        self.log.append(f"copy of {value}, {'queued' if non_blocking else 'waited for'}")


def test_loading_copies_on_a_stream_of_its_own_behind_what_made_the_tensors(log):
    gpu = Cuda(torch.device("cuda"))
    assert gpu.device == torch.device("cuda", 1), "the current one"
    gpu.begin()
    gpu.copy(Rows(log), "a buffer")
    event = gpu.mark()
    gpu.finish()
    own = "side of cuda:1"
    assert log == [f"{own} waits for caller's of cuda:1", f"into {own}", "copy of a buffer, queued", f"out of {own}", f"event on {own}",
                   f"host waits for {own}"]  # fmt: skip
    assert event.blocking, "a thread that waits leaves its core to those that read"


def test_a_device_of_another_number_than_there_are_is_refused(log):
    from reshard.errors import ReshardError

    with pytest.raises(ReshardError, match="sees 2 GPUs") as error:
        Cuda(torch.device("cuda", 2))
    assert "cuda:1" in error.value.hint


def test_a_sync_makes_one_side_stream_for_each_device_and_waits_for_that_alone(log):
    devices, both = Devices(), [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    for _ in range(2):
        with devices.side_streams(both):
            devices.settle(both)
            devices.event(both[0])
    once = [f"into side of {both[0]}", f"into side of {both[1]}", f"host waits for side of {both[0]}", f"host waits for side of {both[1]}",
            f"event on side of {both[0]}", f"out of side of {both[1]}", f"out of side of {both[0]}"]  # fmt: skip
    assert log == once * 2 and len(devices._streams) == 2
    del log[:]
    devices.synchronize(both)
    assert log == [f"host waits for all of {both[0]}", f"host waits for all of {both[1]}"], "whatever stream the trainer used"


def test_a_device_is_found_by_its_uuid_whatever_its_number(log, monkeypatch):
    """defects.md E7"""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{'ab'[device.index]}"))
    devices = Devices()
    assert devices.identity(torch.device("cuda", 1)) == "GPU-b" and [devices.index(f"GPU-{x}") for x in "abc"] == [0, 1, None]
