"""What loading asks of a device: host buffers, queued copies, events. Tests put another in its place, and need no GPU."""

import warnings

import torch

from reshard.errors import ReshardError


class Device:
    """Where tensors are filled by way of host buffers. Copies of this one end before they return; ``Cuda``'s are queued."""

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """The tensors to be filled are made; copies follow."""

    def host(self, size: int) -> torch.Tensor:
        """A host buffer of `size` bytes, as uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, into: torch.Tensor, value: torch.Tensor) -> None:
        """Queue a copy of `value`, in a host buffer, to `into`, on the device."""
        into.copy_(value)

    def mark(self) -> "torch.cuda.Event | None":
        """An event that comes when all copies queued so far are done: it has ``query()`` and ``synchronize()``; None if they are."""

    def finish(self) -> None:
        """Wait for all copies."""


class Cuda(Device):
    """A GPU, with a stream of its own for the copies."""

    def __init__(self, device: torch.device):
        if not torch.cuda.is_available():
            raise ReshardError(f"device {str(device)!r}, but torch sees no GPU here", 'use device="cpu"')
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ReshardError(
                f"device {str(device)!r}, but torch sees {count} GPU{'s' * (count > 1)} here", f"use cuda:0 to cuda:{count - 1}"
            )
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        self._stream = torch.cuda.Stream(self.device)
        self._pins = True

    def begin(self) -> None:
        # what allocated and zeroed the tensors, and what last used their memory, is queued on the caller's stream
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def host(self, size: int) -> torch.Tensor:
        if self._pins:
            try:
                with torch.cuda.device(self.device):
                    return page_locked(size)
            except RuntimeError as error:
                self._pins = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"no page-locked memory is to be had ({reason}): what goes to {self.device} goes slower", RuntimeWarning, stacklevel=2
                )
        return super().host(size)

    def copy(self, into: torch.Tensor, value: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(value, non_blocking=True)

    def mark(self) -> "torch.cuda.Event | None":
        event = torch.cuda.Event(blocking=True)  # a thread that waits for it leaves the core to those that read
        event.record(self._stream)
        return event

    def finish(self) -> None:
        self._stream.synchronize()


def page_locked(size: int) -> torch.Tensor:
    """`size` bytes that a device can fetch by itself. Raises RuntimeError where the system has none."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def device_of(name: "str | int | torch.device") -> Device | None:
    """What fills tensors on a device by that name; None for the CPU, whose memory needs no copies."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ReshardError(f"unknown device {name!r}: {str(error).splitlines()[0]}", "use cpu, cuda or cuda:N") from None
    return None if device.type == "cpu" else Cuda(device) if device.type == "cuda" else Device(device)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still have on a GPU; 0 for what has no such number."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
