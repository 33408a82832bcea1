"""Messages and the tensors at this end of them: views packed into and unpacked from bounded buffers, made once.

A step then runs lists of tensor copies. Two buffers each way, used by turns, so that one round is packed while the one
before it travels.
"""

from dataclasses import dataclass, field

import torch

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
class Round:
    """One round at this process: what to run before it is sent, the bytes each way, and what to run when they are here."""

    pack: "Copies"
    sends: list[Parcel] = field(default_factory=list)
    takes: list[Parcel] = field(default_factory=list)
    unpack: "Copies" = field(default_factory=lambda: Copies())


@dataclass
class Copies:
    """Tensor copies, made ready: `into[i]` takes `values[i]`; `quantised` are those whose blocks are scaled on the way."""

    into: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    quantised: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]] = field(default_factory=list)

    def add(self, into: torch.Tensor, value: torch.Tensor) -> None:
        if into.shape != value.shape:  # one of them lies in more dimensions: both are row-major over the same elements
            if into.is_contiguous():
                into = into.view(value.shape)
            else:
                value = value.view(into.shape)
        self.into.append(into)
        self.values.append(value)

    def run(self) -> None:
        if self.into:
            torch._foreach_copy_(self.into, self.values)
        for weight, scales, value, blocks in self.quantised:
            fp8, scale = quantise(value, blocks)
            weight.copy_(fp8.view(weight.dtype).view(weight.shape))
            scales.copy_(scale.view(scales.dtype).view(scales.shape))


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
            target = target_view(copy, into)
            if target.shape != value.shape:
                target, value = _common(copy, target, value)
            out.into.append(target)
            out.values.append(value)
    return out


def _common(copy: Copy, target: torch.Tensor, value: torch.Tensor):
    """Two views of the same elements in one shape: that of the one with more dimensions."""
    if target.dim() >= value.dim():
        return target, value.reshape(target.shape)
    return target, value.reshape(copy.shape).reshape(target.shape)


@dataclass(frozen=True)
class Peers:
    """Processes that need no messages: those that copy out of this one's memory (`to`), those whose memory this one reads."""

    to: frozenset[int] = frozenset()
    out_of: frozenset[int] = frozenset()


class Staging:
    """The rounds of a RankPlan, bound to tensors. `bytes` is what its buffers take."""

    def __init__(self, part: RankPlan, source: dict[int, Bound], into: dict[int, Bound], device: torch.device, mapped: "Peers"):
        sends = [m for m in part.sends if m.taker not in mapped.to]
        takes = [m for m in part.takes if m.sender not in mapped.out_of]
        self.rounds = [Round(Copies()) for _ in range(1 + max((m.round for m in (*sends, *takes)), default=-1))]
        self.bytes_sent, self.bytes_taken = sum(m.bytes for m in sends), sum(m.bytes for m in takes)
        straight_out = {id(m): view for m in sends for view in [_run(m, source_view, source, sent=True)] if view is not None}
        straight_in = {id(m): view for m in takes for view in [_run(m, target_view, into, sent=False)] if view is not None}
        out_buffers, out_at = self._buffers(sends, straight_out, device)
        in_buffers, in_at = self._buffers(takes, straight_in, device)
        self.bytes = sum(b.numel() for b in (*out_buffers, *in_buffers))
        for m in sends:
            here = self.rounds[m.round]
            buffer = straight_out.get(id(m))
            if buffer is None:
                buffer = out_buffers[m.round % FLIGHTS][out_at[id(m)] : out_at[id(m)] + m.bytes]
                for copy, at in m.copies:
                    _pack(here.pack, copy, buffer, at, source)
            here.sends.append(Parcel(m.taker, buffer, m.tag, id(m) in straight_out))
        for m in takes:
            here = self.rounds[m.round]
            buffer = straight_in.get(id(m))
            if buffer is None:
                buffer = in_buffers[m.round % FLIGHTS][in_at[id(m)] : in_at[id(m)] + m.bytes]
                for copy, at in m.copies:
                    _unpack(here.unpack, copy, buffer, at, into)
            here.takes.append(Parcel(m.sender, buffer, m.tag, id(m) in straight_in))

    def _buffers(self, messages: list[Message], without: dict[int, torch.Tensor], device: torch.device):
        """Buffers that hold the staged messages of any one round, one for each flight; and where each message lies in them."""
        filled: dict[int, int] = {}
        at = {}
        for m in messages:
            if id(m) not in without:
                at[id(m)] = filled.get(m.round, 0)
                filled[m.round] = -(-(at[id(m)] + m.bytes) // _ALIGN) * _ALIGN
        size = max(filled.values(), default=0)
        flights = min(FLIGHTS, 1 + max(filled, default=-1))
        return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(flights)], at


def _run(message: Message, view, tensors: dict[int, Bound], *, sent: bool) -> torch.Tensor | None:
    """The bytes of a message that is one run of a tensor at this end."""
    copy = message.copies[0][0]
    if not message.alone or not (copy.sent_as_it_lies if sent else copy.taken_as_it_lies):
        return None
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
        out.quantised.append((elements.view(torch.uint8), scales, value.reshape(copy.shape), copy.blocks))


def _unpack(out: Copies, copy: Copy, buffer: torch.Tensor, at: int, into: dict[int, Bound]) -> None:
    elements, scales = _parts(copy, buffer, at)
    out.add(target_view(copy, into), elements)
    if scales is not None:
        target = scale_view(copy, into)
        out.add(target.view(torch.uint8), scales.view(*target.shape[:-1], 4 * target.shape[-1]))
