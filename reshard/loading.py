"""The tensors of one rank, filled in memory or on a device: a model larger than the host's memory gets there in pieces.

    read a tile ─► this thread's host buffer ─► full: its copies are queued, an event behind them ─► another buffer

Threads read files while the device takes what they read before. Host buffers are few and of fixed size, page-locked where
that can be had; one is written to again only when the event behind its copies has come. ``fill`` does the work on tensors
that exist; ``load_rank`` makes them, ``load_into`` takes an engine's or a trainer's. What is asked of a device is in ``devices.py``.
"""

import os
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from reshard.checkpoint import Checkpoint
from reshard.conversion.job import counting, default_jobs
from reshard.conversion.placing import join_to
from reshard.dtypes import DTYPE_SIZE
from reshard.errors import PlanError, ReshardError
from reshard.executor.devices import Device, device_of, free_bytes
from reshard.executor.run import run
from reshard.geometry.block import Stored
from reshard.layout import Placement, Rank
from reshard.planner.plan import Plan
from reshard.planner.tiles import BUFFER
from reshard.text import human

_LARGEST = 16 << 20  # bytes of one host buffer: a copy of it takes long enough to hide what starting one costs
_SMALLEST = 64 << 10
_SHORT = 64 << 10  # bytes: evenly spaced runs shorter than this are one strided copy, not one copy each


def load_rank(
    source: Checkpoint,
    placement: Placement,
    rank: Rank,
    dtype: str | None = None,
    device: Device | None = None,
    *,
    jobs: int | None = None,
    buffer: int = BUFFER,
    allow_overflow: bool = False,
) -> dict[str, torch.Tensor]:
    """{stored name: tensor} of one rank of `placement`, its constants among them, made on `device` (None: the CPU)."""
    from reshard.dtypes import torch_dtypes

    plan = join_to(source, placement, dtype, [rank], complete=False)
    kinds, at = torch_dtypes(), device.device if device else torch.device("cpu")
    free = free_bytes(at)
    try:
        tensors = {s.name: torch.zeros(s.shape, dtype=kinds[s.dtype], device=at) for s in plan.destinations}
        constants = {name: torch.full(c.shape, c.value, dtype=kinds[c.dtype], device=at) for name, c in placement.constants(rank)}
        fill(plan, source, tensors, device, jobs=jobs, buffer=buffer, allow_overflow=allow_overflow)
    except torch.cuda.OutOfMemoryError:
        held = f"rank {rank.number} takes {human(plan.bytes_held)} on {at}, which has {human(free)} free"
        raise ReshardError(held, "use more ranks, or another device") from None
    return tensors | constants


def load_into(
    source: Checkpoint,
    placement: Placement,
    rank: Rank,
    into: Mapping[str, torch.Tensor],
    *,
    jobs: int | None = None,
    buffer: int = BUFFER,
    allow_overflow: bool = False,
) -> dict[str, torch.Tensor]:
    """Fill the tensors of one rank of `placement`, given as {stored name: tensor}, and its constants, in place; returns them.

    Values are cast to the dtype of the tensor that takes them, padding becomes zero, strides may be any. All are on one device. Raises
    ReshardError before the first byte for a tensor that is lacking, or too many, or of another shape. After an error on the way they hold
    a part of what they should.
    """
    from reshard.dtypes import FLOATS, torch_dtypes

    kinds = torch_dtypes()
    words = {kind: word for word, kind in kinds.items() if word in FLOATS}
    wanted = {name: words[tensor.dtype] for name, tensor in into.items() if tensor.dtype in words}
    cut = [s._replace(entry=replace(s.entry, dtype=wanted.get(s.name, s.entry.dtype))) for s in placement.stored([rank])]
    plan = join_to(source, placement, None, [rank], complete=False, cut=cut)
    constants = dict(placement.constants(rank))
    due = {s.name: (s.shape, kinds[s.dtype]) for s in plan.destinations} | {
        n: (c.shape, into[n].dtype) for n, c in constants.items() if n in into
    }
    problems = [f"{name} {list(shape)} is not among the tensors given" for name, (shape, _) in due.items() if name not in into]
    problems += [
        f"{name} {list(into[name].shape)}: rank {rank.number} of {placement.mesh} has nothing of this name"
        for name in into.keys() - due.keys()
    ]
    for name in into.keys() & due.keys():
        shape, dtype = due[name]
        if tuple(into[name].shape) != tuple(shape):
            problems.append(f"{name}: shape {list(into[name].shape)}, expected {list(shape)}")
        elif into[name].dtype != dtype:
            problems.append(f"{name}: {into[name].dtype}, the source has {dtype}, which is not cast")
    places = sorted({str(tensor.device) for tensor in into.values()})
    if len(places) > 1:
        problems.append(f"the tensors lie on several devices: {', '.join(places)}")
    if problems:
        raise PlanError(sorted(problems), f"names and shapes are those of layout {source.layout.name}, as `reshard plan --json` tells them")
    targets = {s.name: into[s.name].detach() for s in plan.destinations}
    straight = {
        name: tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for name, tensor in targets.items()
    }
    for s in plan.destinations:
        if s.pad:
            straight[s.name].zero_()
    device = device_of(places[0]) if places else None
    fill(plan, source, straight, device, jobs=jobs, buffer=buffer, allow_overflow=allow_overflow)
    for name, tensor in targets.items():
        if straight[name] is not tensor:
            tensor.copy_(straight[name])
    for name in constants.keys() & into.keys():
        into[name].detach().fill_(constants[name].value)
    return dict(into)


def fill(
    plan: Plan,
    source: Checkpoint,
    tensors: Mapping[str, torch.Tensor],
    device: Device | None = None,
    *,
    jobs: int | None = None,
    buffer: int = BUFFER,
    allow_overflow: bool = False,
) -> None:
    """Run `plan` into `tensors`: contiguous, {name of a destination: tensor} of its shape and dtype, all on `device` (None: the CPU).

    Elements under no block (padding) are left as they are. `jobs` threads read. `buffer` bytes are used for reading, and as
    many again for what is on its way to a device. The bytes are there when this returns, whatever stream looks.
    """
    jobs = jobs or (default_jobs(source) if device is None else max(default_jobs(source), min(8, _cores() // 2)))
    flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    with closing(source.source()) as files:
        files.casts = counting(allow_overflow)
        if device is None:
            run(plan, files, InPlace(flat), jobs=jobs, buffer=buffer)
            files.check_unchanged()
            return
        staged = Staged(device, flat, jobs, buffer)
        device.begin()
        try:
            run(plan, files, staged.write, jobs=jobs, buffer=buffer)
            staged.flush()
            files.check_unchanged()
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                device.finish()
            raise
        device.finish()  # before the tensors' memory, or the buffers', can be anyone else's


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InPlace:
    """Writes to tensors in the host's memory, or says where their elements lie, so that files are read straight into them."""

    def __init__(self, flat: dict[str, torch.Tensor]):
        self._raw = {name: bytes_.numpy() for name, bytes_ in flat.items()}

    def __call__(self, stored: Stored, element: int, data: memoryview) -> None:
        start = element * DTYPE_SIZE[stored.dtype]
        self._raw[stored.name][start : start + len(data)] = np.frombuffer(data, np.uint8)

    def room(self, stored: Stored, element: int, size: int) -> memoryview:
        width = DTYPE_SIZE[stored.dtype]
        return self._raw[stored.name][element * width : (element + size) * width].data


@dataclass(slots=True)
class Run:
    """`count` runs of `length` bytes of a tensor, each `step` bytes after the one before, which lie end to end in a buffer."""

    name: str
    start: int
    length: int
    count: int = 1
    step: int = 0

    def takes(self, name: str, start: int, length: int) -> bool:
        """Whether this became one with the run that follows it in the buffer."""
        if name != self.name:
            return False
        if self.count == 1 and start == self.start + self.length:
            self.length += length
        elif length == self.length < _SHORT and start > self.start and self.step in (0, start - self.start - (self.count - 1) * self.step):
            self.step, self.count = self.step or start - self.start, self.count + 1
        else:
            return False
        return True


@dataclass(slots=True)
class Lane:
    """What one thread has written to its buffer, and not yet sent."""

    buffer: torch.Tensor | None = None
    raw: np.ndarray | None = None  # the same memory
    used: int = 0
    runs: list[Run] = field(default_factory=list)


class Staged:
    """Writes to tensors on a device, by way of host buffers: at most `limit` bytes of them, at least one more than threads.

    `buffers` counts those that were made, `size` is that of each.
    """

    def __init__(self, device: Device, flat: dict[str, torch.Tensor], threads: int, limit: int):
        self._device, self._flat = device, flat
        most = max(limit // (2 * threads), 1)
        total = sum(bytes_.numel() for bytes_ in flat.values())
        self.size = max(_SMALLEST, min(_LARGEST, most, -(-total // 4096) * 4096))
        self._most = max(threads + 1, limit // self.size)
        self.buffers = 0
        self._used: deque[tuple[torch.Tensor, object]] = deque()  # buffers on their way, with the event behind their copies
        self._lock = threading.Lock()
        self._own = threading.local()
        self._lanes: list[Lane] = []

    def write(self, stored: Stored, element: int, data: memoryview) -> None:
        """Take bytes of a tensor, from `element` on. Any thread may call this; none that does waits for another thread."""
        if not hasattr(self._own, "lane"):
            self._own.lane = Lane()
            with self._lock:
                self._lanes.append(self._own.lane)
        lane, start, taken = self._own.lane, element * DTYPE_SIZE[stored.dtype], np.frombuffer(data, np.uint8)
        while len(taken):
            if lane.buffer is None:
                lane.buffer = self._buffer()
                lane.raw = lane.buffer.numpy()
            size = min(len(taken), self.size - lane.used)
            lane.raw[lane.used : lane.used + size] = taken[:size]
            if not (lane.runs and lane.runs[-1].takes(stored.name, start, size)):
                lane.runs.append(Run(stored.name, start, size))
            lane.used += size
            if lane.used == self.size:
                self._send(lane)
            start, taken = start + size, taken[size:]

    def flush(self) -> None:
        """Send what is left in buffers; nothing may be written meanwhile."""
        for lane in self._lanes:
            self._send(lane)

    def _send(self, lane: Lane) -> None:
        at = 0
        for here in lane.runs:
            value = lane.buffer[at : at + here.count * here.length]
            into = self._flat[here.name][here.start :]
            if here.count == 1:
                self._device.copy(into[: here.length], value)
            else:
                self._device.copy(into.as_strided((here.count, here.length), (here.step, 1)), value.view(here.count, here.length))
            at += len(value)
        if lane.buffer is not None:
            event = self._device.mark()
            with self._lock:
                self._used.append((lane.buffer, event))
        lane.buffer, lane.raw, lane.used, lane.runs = None, None, 0, []

    def _buffer(self) -> torch.Tensor:
        """A buffer whose copies are done: the oldest if it is ready, else a new one while there may be more."""
        with self._lock:
            ready = self._used and (self._used[0][1] is None or self._used[0][1].query())
            if not ready and self.buffers < self._most:
                self.buffers += 1
                new = True
            else:
                new, (buffer, event) = False, self._used.popleft()
        if new:
            return self._device.host(self.size)
        if event is not None:
            event.synchronize()
        return buffer
