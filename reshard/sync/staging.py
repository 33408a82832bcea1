"""Messages and the tensors at this end of them: views packed into and unpacked from bounded buffers, made once.

A step then runs lists of tensor copies. Two buffers each way, used by turns, so that one round is packed while the one
before it travels. Where tensors lie on another device than the group sends from (CUDA tensors under gloo, CPU tensors under
NCCL) a message is packed where its tensors are and crosses in one copy: the host's end of that is pinned memory.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from reshard.planner.copies import Copy
from reshard.sync.device import Devices
from reshard.sync.fp8 import quantise
from reshard.sync.messages import Message, RankPlan, scale_copy, sent_as_it_lies, taken_as_it_lies
from reshard.sync.plan import Transfer
from reshard.sync.tensors import DTYPES, Tensors, scales_of

FLIGHTS = 2
_ALIGN = 64


@dataclass(slots=True)
class Parcel:
    """The bytes of one message at this end; `straight`: they are a tensor's own, and wait for no buffer."""

    peer: int
    bytes: torch.Tensor
    tag: int
    straight: bool


@dataclass
class Copies:
    """Tensor copies, made ready: `into[i]` takes `values[i]`; `quantised` are those whose blocks are scaled on the way."""

    into: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    quantised: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]] = field(default_factory=list)
    odd: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # of shapes that only a copy brings together
    _groups: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)
    _grouped: int = 0

    def add(self, into: torch.Tensor, value: torch.Tensor) -> None:
        """Both are row-major over the same elements; one may lie in more dimensions. Never a copy made now: a step's values
        are those of the step."""
        if into.shape != value.shape:
            try:
                into, value = (into.view(value.shape), value) if value.dim() >= into.dim() else (into, value.view(into.shape))
            except RuntimeError:
                try:
                    into, value = (into, value.view(into.shape)) if value.dim() >= into.dim() else (into.view(value.shape), value)
                except RuntimeError:
                    self.odd.append((into, value))
                    return
        self.into.append(into)
        self.values.append(value)

    def extend(self, other: "Copies") -> None:
        self.into += other.into
        self.values += other.values
        self.quantised += other.quantised
        self.odd += other.odd

    def groups(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """The copies, those together that one ``_foreach_copy_`` may take: of one pair of dtypes (before torch#173531 CUDA's
        took the first destination's dtype for all) and of devices, and dense ones apart, for which it has a fast way."""
        if self._grouped != len(self.into):
            found: dict[tuple, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
            for into, value in zip(self.into, self.values):
                dense = into.is_contiguous() and value.is_contiguous()
                here = found.setdefault((into.dtype, value.dtype, into.device, value.device, dense), ([], []))
                here[0].append(into)
                here[1].append(value)
            self._groups, self._grouped = list(found.values()), len(self.into)
        return self._groups

    def run(self) -> None:
        """Queue all copies; on the CPU they are done when this returns."""
        for into, values in self.groups():
            torch._foreach_copy_(into, values, non_blocking=True)
        for into, value in self.odd:
            into.copy_(value.reshape(into.shape))
        for weight, scales, value, blocks in self.quantised:
            fp8, scale = quantise(value, blocks)
            weight.copy_(fp8.view(weight.dtype).reshape(weight.shape))
            scales.copy_(scale.view(scales.dtype).reshape(scales.shape))


@dataclass
class Round:
    """One round at this process: what to run before it is sent, the bytes each way, and what to run when they are here.

    `leave` and `arrive` take messages between the device of their tensors and the one that the group sends from.
    """

    pack: Copies = field(default_factory=Copies)
    leave: Copies = field(default_factory=Copies)
    sends: list[Parcel] = field(default_factory=list)
    takes: list[Parcel] = field(default_factory=list)
    arrive: Copies = field(default_factory=Copies)
    unpack: Copies = field(default_factory=Copies)


def source_view(copy: Copy, source: Tensors) -> torch.Tensor:
    return source[copy.src.id].view(copy.move.shape, copy.move.src_offset, copy.move.src_strides)


def target_view(copy: Copy, into: Tensors) -> torch.Tensor:
    return into[copy.dst.id].view(copy.move.shape, copy.move.dst_offset, copy.move.dst_strides)


def scale_view(t: Transfer, into: Tensors) -> torch.Tensor:
    return into[scales_of(t.copy.dst.id)].view(*scale_copy(t))


def straight(transfers: Iterable[Transfer], source_of: Callable[[Copy], torch.Tensor], into: Tensors) -> Copies:
    """Copies from tensor to tensor, with no message between: within a process, or out of a peer's mapped memory."""
    out = Copies()
    for t in transfers:
        value = source_of(t.copy)
        if t.blocks:
            out.quantised.append((target_view(t.copy, into), scale_view(t, into), value, t.blocks))
        else:
            out.add(target_view(t.copy, into), value)
    return out


@dataclass(frozen=True)
class Peers:
    """Processes that need no messages: those that copy out of this one's memory (`to`), those whose memory this one reads."""

    to: frozenset[int] = frozenset()
    out_of: frozenset[int] = frozenset()


class Staging:
    """The rounds of a RankPlan, bound to tensors; `device` is where the group sends from and receives into. `bytes` is what
    its buffers take, `devices` all that its copies run on."""

    def __init__(
        self,
        part: RankPlan,
        source: Tensors,
        into: Tensors,
        device: torch.device,
        mapped: "Peers",
        devices: Devices | None = None,
        buffers: "Buffers | None" = None,
    ):
        self._made = buffers if buffers is not None else Buffers(devices or Devices())
        sends = [m for m in part.sends if m.taker not in mapped.to]
        takes = [m for m in part.takes if m.sender not in mapped.out_of]
        self.rounds = [Round() for _ in range(1 + max((m.round for m in (*sends, *takes)), default=-1))]
        self.bytes_sent, self.bytes_taken = sum(m.bytes for m in sends), sum(m.bytes for m in takes)
        self.bytes = 0
        self.devices = {device} | {b.tensor.device for b in (*source.values(), *into.values())}
        #: whether messages cross between devices: the buffers are then free only when the copies are done
        self.crosses = False
        lying_there = [_lying(m, source_view, sent_as_it_lies, source, device) for m in sends]
        lying_here = [_lying(m, target_view, taken_as_it_lies, into, device) for m in takes]
        for m, found, (buffer, near) in zip(sends, lying_there, self._buffers(sends, lying_there, device)):
            here = self.rounds[m.round]
            for t, at in () if found.run is not None else m.copies:
                _pack(here.pack, t, near, at, source)
            if near is not buffer:
                here.leave.add(buffer, near)
            here.sends.append(Parcel(m.taker, buffer, m.tag, found.run is not None))
        for m, found, (buffer, near) in zip(takes, lying_here, self._buffers(takes, lying_here, device)):
            here = self.rounds[m.round]
            for t, at in () if found.run is not None else m.copies:
                _unpack(here.unpack, t, near, at, into)
            if near is not buffer:
                here.arrive.add(near, buffer)
            here.takes.append(Parcel(m.sender, buffer, m.tag, found.run is not None))

    def _buffers(self, messages: list[Message], lying: list["_Lying"], device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each message its bytes on `device`, and where its copies are packed or unpacked: the same bytes, or as many on the
        device where its tensors lie. Buffers hold the staged messages of any one round, one buffer for each flight."""
        filled: dict[tuple[int, torch.device | None], int] = defaultdict(int)
        places = []
        for m, found in zip(messages, lying):
            at = m.round, found.device if found.device != device else None
            places.append((at, filled[at]))
            if found.run is None:
                filled[at] = -(-(filled[at] + m.bytes) // _ALIGN) * _ALIGN
        sizes: dict[tuple[int, torch.device | None], int] = defaultdict(int)
        for (number, other), size in filled.items():
            flight = number % FLIGHTS, other
            sizes[flight] = max(sizes[flight], size)
        made = {}
        for (flight, other), size in sizes.items():
            self.crosses |= other is not None and size > 0
            self.bytes += size * (2 if other else 1)
            own = self._made.take(size, device, other)
            made[flight, other] = own, self._made.take(size, other, device) if other else own
        for m, found, ((number, other), at) in zip(messages, lying, places):
            if found.run is not None:
                yield found.run, found.run
            else:
                wire, near = (b[at : at + m.bytes] for b in made[number % FLIGHTS, other])
                yield wire, near if other else wire


class Buffers:
    """Staging buffers, which outlive the views of one Staging: those of one that has moved are free for the next."""

    def __init__(self, devices: Devices):
        self._devices = devices
        self._free: dict[tuple[torch.device, bool], list[torch.Tensor]] = defaultdict(list)
        self._used: dict[tuple[torch.device, bool], list[torch.Tensor]] = defaultdict(list)

    def take(self, size: int, device: torch.device, other: "torch.device | None") -> torch.Tensor:
        """`size` bytes on `device`: pinned where that is the host's, and `other` an accelerator that they go to or come from."""
        pinned = device.type == "cpu" and other is not None and self._devices.accelerated(other)
        free = sorted(self._free[device, pinned], key=len)
        found = next((b for b in free if len(b) >= size), None)
        if found is None:
            if free:
                free.pop()  # the largest is too small: let go of it before a larger one is made
            found = self._devices.pinned(size) if pinned else torch.empty(size, dtype=torch.uint8, device=device)
        self._free[device, pinned] = [b for b in free if b is not found]
        self._used[device, pinned].append(found)
        return found[:size]

    def release(self) -> None:
        """All of them are free: nothing that was made of them moves any more."""
        for at, used in self._used.items():
            self._free[at] += used
        self._used.clear()


@dataclass(frozen=True)
class _Lying:
    """Where a message's tensors lie at this end: the `device` of all, None where they differ (such a message is packed right where
    it is sent from, copy by copy); and the bytes of the message, where it is one `run` of a tensor on the group's device."""

    device: torch.device | None
    run: torch.Tensor | None


def _lying(m: Message, view, as_it_lies, tensors: Tensors, device: torch.device) -> _Lying:
    devices = {view(t.copy, tensors).device for t, _ in m.copies}
    own = devices.pop() if len(devices) == 1 else None
    first = m.copies[0][0]
    if own == device and m.alone and as_it_lies(first):  # gloo would read a CUDA address, NCCL refuse a host's
        run = view(first.copy, tensors)
        if run.is_contiguous():
            return _Lying(own, run.view(-1).view(torch.uint8))
    return _Lying(own, None)


def _parts(t: Transfer, buffer: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where a copy's elements lie in a message's buffer, in their shape; and the bytes of its scales."""
    scales = None
    if t.blocks:
        scales = buffer[at : at + 4 * t.blocks.count]
        at += 4 * t.blocks.count
    kind = DTYPES[t.wire]
    return buffer[at : at + t.copy.move.size * kind.itemsize].view(kind).view(t.copy.move.shape), scales


def _pack(out: Copies, t: Transfer, buffer: torch.Tensor, at: int, source: Tensors) -> None:
    elements, scales = _parts(t, buffer, at)
    value = source_view(t.copy, source)
    if scales is None:
        out.add(elements, value)
    else:
        out.quantised.append((elements.view(torch.uint8), scales, value, t.blocks))


def _unpack(out: Copies, t: Transfer, buffer: torch.Tensor, at: int, into: Tensors) -> None:
    elements, scales = _parts(t, buffer, at)
    out.add(target_view(t.copy, into), elements)
    if scales is not None:
        target = scale_view(t, into)
        out.add(target.view(torch.uint8), scales.view(*target.shape[:-1], 4 * target.shape[-1]))
