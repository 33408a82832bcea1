"""Messages and the tensors at this end of them: views packed into and unpacked from bounded buffers, made once.

A step then runs lists of tensor copies. Two buffers each way, used by turns, so that one round is packed while the one
before it travels. Where tensors lie on another device than the group sends from (CUDA tensors under gloo, CPU tensors under
NCCL) a message is packed where its tensors are and crosses in one copy: the host's end of that is pinned memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from reshard.sync.device import Devices
from reshard.sync.fp8 import quantise
from reshard.sync.messages import Copy, Message, RankPlan, scale_copy
from reshard.sync.tensors import DTYPES, Bound

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


def source_view(copy: Copy, source: dict[int, Bound]) -> torch.Tensor:
    return source[id(copy.src)].view(copy.shape, copy.src_offset, copy.src_strides)


def target_view(copy: Copy, into: dict[int, Bound]) -> torch.Tensor:
    return into[id(copy.dst)].view(copy.shape, copy.dst_offset, copy.dst_strides)


def scale_view(copy: Copy, into: dict[int, Bound]) -> torch.Tensor:
    return into[-id(copy.dst)].view(*scale_copy(copy))


def straight(copies: list[Copy], source_of, into: dict[int, Bound]) -> Copies:
    """Copies from tensor to tensor, with no message between: within a process, or out of a peer's mapped memory."""
    out = Copies()
    for copy in copies:
        value = source_of(copy)
        if copy.blocks:
            out.quantised.append((target_view(copy, into), scale_view(copy, into), value, copy.blocks))
        else:
            out.add(target_view(copy, into), value)
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
        source: dict[int, Bound],
        into: dict[int, Bound],
        device: torch.device,
        mapped: "Peers",
        devices: Devices | None = None,
    ):
        self._devices = devices or Devices()
        sends = [m for m in part.sends if m.taker not in mapped.to]
        takes = [m for m in part.takes if m.sender not in mapped.out_of]
        self.rounds = [Round() for _ in range(1 + max((m.round for m in (*sends, *takes)), default=-1))]
        self.bytes_sent, self.bytes_taken = sum(m.bytes for m in sends), sum(m.bytes for m in takes)
        self.bytes = 0
        self.devices = {device} | {b.tensor.device for b in (*source.values(), *into.values())}
        #: whether messages cross between devices: the buffers are then free only when the copies are done
        self.crosses = False
        straight_out = {id(m): view for m in sends for view in [_run(m, source_view, source, device, sent=True)] if view is not None}
        straight_in = {id(m): view for m in takes for view in [_run(m, target_view, into, device, sent=False)] if view is not None}
        out_of = {id(m): _one_device(source[id(copy.src)].tensor.device for copy, _ in m.copies) for m in sends}
        in_to = {id(m): _one_device(into[id(copy.dst)].tensor.device for copy, _ in m.copies) for m in takes}
        out_buffers = self._buffers(sends, straight_out, out_of, device)
        in_buffers = self._buffers(takes, straight_in, in_to, device)
        for m in sends:
            here, buffer = self.rounds[m.round], straight_out.get(id(m))
            if buffer is None:
                buffer, near = out_buffers[id(m)]
                for copy, at in m.copies:
                    _pack(here.pack, copy, near, at, source)
                if near is not buffer:
                    here.leave.add(buffer, near)
            here.sends.append(Parcel(m.taker, buffer, m.tag, id(m) in straight_out))
        for m in takes:
            here, buffer = self.rounds[m.round], straight_in.get(id(m))
            if buffer is None:
                buffer, near = in_buffers[id(m)]
                for copy, at in m.copies:
                    _unpack(here.unpack, copy, near, at, into)
                if near is not buffer:
                    here.arrive.add(near, buffer)
            here.takes.append(Parcel(m.sender, buffer, m.tag, id(m) in straight_in))

    def _buffers(
        self, messages: list[Message], without: dict[int, torch.Tensor], lying: dict[int, "torch.device | None"], device: torch.device
    ):
        """For each staged message its bytes on `device`, and where its copies are packed or unpacked: the same bytes, or as
        many on the device where its tensors lie. Buffers hold the messages of any one round, one buffer for each flight."""
        filled: dict[tuple, int] = {}
        places: dict[int, tuple[int, torch.device | None, int]] = {}
        for m in messages:
            if id(m) not in without:
                other = lying[id(m)] if lying[id(m)] != device else None
                at = filled.get((m.round, other), 0)
                places[id(m)] = m.round % FLIGHTS, other, at
                filled[m.round, other] = -(-(at + m.bytes) // _ALIGN) * _ALIGN
        sizes: dict[tuple, int] = {}
        for (number, other), size in filled.items():
            flight = number % FLIGHTS, other
            sizes[flight] = max(sizes.get(flight, 0), size)
        made = {}
        for (flight, other), size in sizes.items():
            self.crosses |= other is not None
            made[flight, other] = self._empty(size, device, other), self._empty(size, other, device) if other else None
        out = {}
        for m in messages:
            if id(m) in places:
                flight, other, at = places[id(m)]
                wire, near = (None if b is None else b[at : at + m.bytes] for b in made[flight, other])
                out[id(m)] = wire, wire if near is None else near
        return out

    def _empty(self, size: int, device: torch.device, other: "torch.device | None") -> torch.Tensor:
        """`size` bytes on `device`: pinned where that is the host's, and `other` an accelerator that they go to or come from."""
        self.bytes += size
        if device.type == "cpu" and other is not None and self._devices.accelerated(other):
            return self._devices.pinned(size)
        return torch.empty(size, dtype=torch.uint8, device=device)


def _one_device(found: Iterable[torch.device]) -> torch.device | None:
    """The device of all, or None where they differ: such a message is packed right where it is sent from, copy by copy."""
    devices = set(found)
    return devices.pop() if len(devices) == 1 else None


def _run(message: Message, view, tensors: dict[int, Bound], device: torch.device, *, sent: bool) -> torch.Tensor | None:
    """The bytes of a message that is one run of a tensor at this end, on the device that the group sends from."""
    copy = message.copies[0][0]
    if not message.alone or not (copy.sent_as_it_lies if sent else copy.taken_as_it_lies):
        return None
    if tensors[id(copy.src if sent else copy.dst)].tensor.device != device:
        return None  # gloo would read a CUDA address, NCCL refuse a host's
    run = view(copy, tensors)
    return run.view(-1).view(torch.uint8) if run.is_contiguous() else None


def _parts(copy: Copy, buffer: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where a copy's elements lie in a message's buffer, in their shape; and the bytes of its scales."""
    scales = None
    if copy.blocks:
        scales = buffer[at : at + 4 * copy.blocks.count]
        at += 4 * copy.blocks.count
    kind = DTYPES[copy.wire]
    size = copy.bytes - (4 * copy.blocks.count if copy.blocks else 0)
    return buffer[at : at + size].view(kind).view(copy.shape), scales


def _pack(out: Copies, copy: Copy, buffer: torch.Tensor, at: int, source: dict[int, Bound]) -> None:
    elements, scales = _parts(copy, buffer, at)
    value = source_view(copy, source)
    if scales is None:
        out.add(elements, value)
    else:
        out.quantised.append((elements.view(torch.uint8), scales, value, copy.blocks))


def _unpack(out: Copies, copy: Copy, buffer: torch.Tensor, at: int, into: dict[int, Bound]) -> None:
    elements, scales = _parts(copy, buffer, at)
    out.add(target_view(copy, into), elements)
    if scales is not None:
        target = scale_view(copy, into)
        out.add(target.view(torch.uint8), scales.view(*target.shape[:-1], 4 * target.shape[-1]))
