"""What a sync asks of the machine's accelerators, in one place: synchronise, streams, identity, pinned memory.

``Sync`` is given a ``Devices``; a test gives it another one, which records what is asked and when, and needs no GPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


class Devices:
    """The devices of this process, by torch.cuda. Devices that are no accelerator need nothing: each call passes them over."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def accelerated(self, device: torch.device) -> bool:
        """Whether work on `device` is queued, and done later than the call that asks for it."""
        return device.type == "cuda"

    def current(self) -> torch.device:
        """The device that the process has chosen (``torch.cuda.set_device``)."""
        return torch.device("cuda", torch.cuda.current_device())

    def synchronize(self, devices: Iterable[torch.device]) -> None:
        """Wait until all that was queued on `devices`, on any stream, is done."""
        for device in devices:
            if self.accelerated(device):
                torch.cuda.synchronize(device)

    @contextmanager
    def side_streams(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Queue copies beside the stream of the trainer or engine: one stream per device, made once."""
        with ExitStack() as stack:
            for device in devices:
                if self.accelerated(device):
                    if device not in self._streams:
                        self._streams[device] = torch.cuda.Stream(device)
                    stack.enter_context(torch.cuda.stream(self._streams[device]))
            yield

    def settle(self, devices: Iterable[torch.device]) -> None:
        """Wait for what was queued on the current streams of `devices` alone; messages under way are not waited for."""
        for device in devices:
            if self.accelerated(device):
                torch.cuda.current_stream(device).synchronize()

    def event(self, device: torch.device):
        """An event recorded on the current stream of `device`: ``query()`` is true when that has come so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def identity(self, device: torch.device) -> str:
        """The same in every process, whatever CUDA_VISIBLE_DEVICES hides: the device's uuid."""
        return str(torch.cuda.get_device_properties(device).uuid)

    def index(self, identity: str) -> int | None:
        """This process's number for the device of that identity; None where it does not see it."""
        for number in range(torch.cuda.device_count()):
            if self.identity(torch.device("cuda", number)) == identity:
                return number
        return None

    def pinned(self, size: int) -> torch.Tensor:
        """`size` bytes of host memory that a device copies to and from without the host's help."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
