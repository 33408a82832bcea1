"""One rank's part of a plan, laid out as messages: what is packed together, what goes straight from tensor to tensor. Pure.

Both ends of a pair list the same copies in the same order, since both know where each lies on either side; so no header
travels, and no padding. Small copies share a staging buffer; a large one that is one run on either side is a message of
its own, and that side needs no buffer for it. Messages go in rounds, which bound what a rank stages at a time.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import prod

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Id, Stored, row_major
from reshard.geometry.pieces import halved
from reshard.planner.copies import Copy, Move
from reshard.sync.fp8_blocks import block_grid, grain, scale_place
from reshard.sync.plan import SyncPlan, Transfer
from reshard.sync.side import Side

#: a copy of at least so many bytes that is one run on a side goes without a buffer there
DIRECT = 256 << 10

#: elements along an axis, and their strides at the source and at the destination
Axis = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Message:
    """What `sender` gives `taker` in one piece: `copies` one after another, each at its byte offset, on the wire row-major by the
    shape of its move. `tag` counts those of the pair."""

    sender: int
    taker: int
    tag: int
    round: int
    copies: tuple[tuple[Transfer, int], ...]
    bytes: int
    alone: bool  # one large copy, that is one run on at least one side


@dataclass(frozen=True)
class RankPlan:
    """What one process does in a sync. `local` copies stay in it; `transfers` list the boxes, for the sums of ``checks.py``."""

    process: int
    transfers: tuple[Transfer, ...]
    sends: list[Message] = field(default_factory=list)
    takes: list[Message] = field(default_factory=list)
    local: list[Transfer] = field(default_factory=list)
    pairs: dict[tuple[int, int], list[Transfer]] = field(default_factory=dict)  # not cut, for peers whose memory is mapped
    gives: tuple[Stored, ...] | None = None  # where windows are of the source's tensors, those of this one
    opens: tuple[Stored, ...] = ()  # tensors of the destination to which nothing came before it
    completes: tuple[Stored, ...] = ()  # those to which nothing comes after it

    @property
    def rounds(self) -> int:
        return 1 + max((m.round for m in (*self.sends, *self.takes)), default=-1)

    @property
    def bytes_sent(self) -> int:
        return sum(message.bytes for message in self.sends)

    @property
    def bytes_taken(self) -> int:
        return sum(message.bytes for message in self.takes)


def rank_plan(plan: SyncPlan, process: int, transfers: Iterable[Transfer] | None = None, staged: Collection[int] = ()) -> RankPlan:
    """What `process` does; `transfers`, where given, are the part of its transfers to lay out. The tensors of the processes
    `staged` lie on another device than the group sends from: all that these send and take goes by way of a buffer."""
    out = RankPlan(process, tuple(plan.transfers(process) if transfers is None else transfers))
    pairs: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for t in out.transfers:
        pairs[t.sender, t.taker].append(t)
    for (sender, taker), own in sorted(pairs.items()):
        own.sort(key=lambda t: (t.place, t.copy.move.dst_offset, t.copy.key, t.copy.move.box))
        copies = merged(own)
        if sender == taker:
            out.local.extend(copies)
            continue
        out.pairs[sender, taker] = copies
        limit = max(plan.bucket_bytes // max(len(plan.peers[sender]), len(plan.peers[taker])), 8)  # an element is never cut
        (out.sends if sender == process else out.takes).extend(_messages(plan, sender, taker, copies, limit, staged))
    return out


def windows(plan: SyncPlan, process: int, staged: Collection[int] = (), by: str = "windows") -> list[RankPlan]:
    """`process`' part of a plan that moves a window at a time: one RankPlan for each, in the same order on every rank.

    A window is as many of a destination's tensors, in their model's order, as fit `bucket_bytes` (one may be larger). `by` ``stream``: of the
    source's tensors, for a source that is not there as a whole; ``tensors``: one window is all.
    """
    by_source = by == "stream"
    sides = (plan.source,) if by_source else plan.destinations
    numbers = [_numbered(side, sys.maxsize if by == "tensors" else plan.bucket_bytes) for side in sides]
    parts: list[list[Transfer]] = [[] for _ in range(1 + max(n for own in numbers for n in own.values()))]
    first: dict[Id, int] = {}
    last: dict[Id, int] = {}
    for t in plan.transfers(process):
        number = numbers[0][t.copy.src.id] if by_source else numbers[t.place[0]][t.copy.dst.id]
        parts[number].append(t)
        if t.taker == process:
            at = t.copy.dst.id
            first[at], last[at] = min(first.get(at, number), number), max(last.get(at, 0), number)
    gives = plan.source.held_by(process)
    takes = [s for side in plan.destinations for s in side.held_by(process)]  # with nothing but padding: in the first window
    return [
        replace(
            rank_plan(plan, process, part, staged),
            gives=tuple(s for s in gives if numbers[0][s.id] == number) if by_source else None,
            opens=tuple(s for s in takes if first.get(s.id, 0) == number),
            completes=tuple(s for s in takes if last.get(s.id, 0) == number),
        )
        for number, part in enumerate(parts)
    ]


def _numbered(side: Side, limit: int) -> dict[Id, int]:
    """The window of each stored tensor, in the order in which models name theirs: embeddings, layer by layer, the rest."""
    tensors, places = side.layout.descriptor.tensors, list(side.layout.descriptor.places)

    def order(s: Stored) -> tuple[int, ...]:
        tensor, key = tensors[s.entry.of[0]], s.parts[0].first if s.parts else ()
        if tensor.index and len(key) > 1:
            return 1, places.index(tensor.place) if tensor.place in places else 0, key[1]
        return (0 if tensor.stage == "first" else 2,)

    out: dict[Id, int] = {}
    for member in side.members:
        window, filled = 0, 0
        for s in sorted(member, key=order):
            size = s.size * DTYPE_SIZE[s.dtype]
            if filled and filled + size > limit:
                window, filled = window + 1, 0
            out[s.id] = window
            filled += size
    return out


# ------------------------------------------------------------------------------------------------- copies, as few as do


def merged(transfers: Iterable[Transfer]) -> list[Transfer]:
    """`transfers` with as few axes as do, in the destination's order, neighbours joined that are one larger box: runs that go on,
    and equal boxes at equal steps. Their boxes then count from zero along axes of their own. What is quantised stays as it is."""
    out: list[Transfer] = []
    axes: list[Axis] = []  # of the last one, where others may be joined to it
    stepped = False  # whether its leading axis was made here
    for t in transfers:
        if t.blocks:
            out.append(t)
            axes = []
            continue
        own, move = folded(t.copy.move), t.copy.move
        last = out[-1] if out else None
        if axes and last and (last.copy.src.id, last.place, last.wire) == (t.copy.src.id, t.place, t.wire):
            rise = move.src_offset - last.copy.move.src_offset, move.dst_offset - last.copy.move.dst_offset
            (count, *step), one = axes[0], _run(axes)
            if stepped and own == axes[1:] and rise == (count * step[0], count * step[1]):
                axes = [(count + 1, *step), *own]
            elif one and _run(own) and rise == (one, one):
                axes, stepped = [(one + own[0][0], 1, 1)], False
            elif not stepped and own == axes and rise[0] > 0 and rise[1] > 0:
                axes, stepped = [(2, *rise), *own], True
            else:
                last = None
            if last:
                out[-1] = _of_axes(last, axes)
                continue
        axes, stepped = own, False
        out.append(_of_axes(t, axes))
    return [t if t.blocks else _of_axes(t, folded(t.copy.move)) for t in out]


def folded(move: Move) -> list[Axis]:
    """The axes of a move in the destination's order, those that run on into each other on both sides made one."""
    return list(_folded(move.shape, move.src_strides, move.dst_strides))


@lru_cache(maxsize=65536)
def _folded(shape: tuple[int, ...], src: tuple[int, ...], dst: tuple[int, ...]) -> tuple[Axis, ...]:
    out: list[Axis] = []
    for n, s, d in sorted((axis for axis in zip(shape, src, dst) if axis[0] > 1), key=lambda axis: (-axis[2], -axis[1])):
        if out and out[-1][1:] == (n * s, n * d):
            out[-1] = out[-1][0] * n, s, d
        else:
            out.append((n, s, d))
    return tuple(out) or ((1, 1, 1),)


def _run(axes: list[Axis]) -> int:
    """Elements of what is one run on both sides; else 0."""
    return axes[0][0] if len(axes) == 1 and axes[0][1:] == (1, 1) else 0


def _of_axes(t: Transfer, axes: list[Axis]) -> Transfer:
    shape, src, dst = zip(*axes)
    old = t.copy.move
    move = Move(tuple((0, n) for n in shape), prod(shape), old.src_offset, src, old.dst_offset, dst)
    return t if move == old else replace(t, copy=Copy(t.copy.key, t.copy.src, t.copy.dst, move))


# ----------------------------------------------------------------------------------------------------------- messages


def sent_as_it_lies(t: Transfer) -> bool:
    """Whether its bytes at the source are one run, and those of the wire."""
    return t.blocks is None and t.copy.src.dtype == t.wire and _one_run(t.copy.move.shape, t.copy.move.src_strides)


def taken_as_it_lies(t: Transfer) -> bool:
    return t.blocks is None and t.copy.dst.dtype == t.wire and _one_run(t.copy.move.shape, t.copy.move.dst_strides)


@lru_cache(maxsize=65536)
def _one_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(n == 1 or s == step for n, s, step in zip(shape, strides, row_major(shape)))


def cut(plan: SyncPlan, t: Transfer, limit: int) -> Iterator[Transfer]:
    """`t` in parts of at most `limit` bytes; quantised blocks stay whole, each with its scale: one may be larger."""
    if t.bytes <= limit:
        yield t
        return
    copy, layout, name, fp8 = t.copy, plan.source.layout, t.copy.key[0], plan.destinations[t.place[0]].fp8
    between = partial(grain, layout, name, fp8=fp8) if t.blocks else None
    for box in halved(copy.move.box, limit * copy.move.size // t.bytes, between):
        blocks = block_grid(layout, name, box, fp8) if t.blocks else None
        yield replace(t, copy=Copy(copy.key, copy.src, copy.dst, copy.move.clip(box)), blocks=blocks)


def _messages(plan: SyncPlan, sender: int, taker: int, copies: list[Transfer], limit: int, staged: Collection[int]) -> list[Message]:
    out: list[Message] = []
    number, filled = 0, 0
    shared: list[Transfer] = []

    def close() -> None:
        placed, at = [], 0
        for t in sorted(shared, key=lambda t: -DTYPE_SIZE[t.wire]):  # wide elements first: each lies aligned, with no padding
            placed.append((t, at))
            at += t.bytes
        if placed:
            out.append(Message(sender, taker, len(out), number, tuple(placed), at, False))
        shared.clear()

    def direct(t: Transfer) -> list[bool]:
        """Whether it goes without a buffer: at the sender, at the taker."""
        large = t.bytes >= DIRECT
        return [large and sender not in staged and sent_as_it_lies(t), large and taker not in staged and taken_as_it_lies(t)]

    for whole in copies:
        through = all(direct(whole))  # staged at neither end: bounds nothing
        for t in [whole] if through else cut(plan, whole, limit):
            if not through and filled and filled + t.bytes > limit:
                close()
                number, filled = number + 1, 0
            filled += 0 if through else t.bytes
            if any(direct(t)):
                out.append(Message(sender, taker, len(out), number, ((t, 0),), t.bytes, True))
            else:
                shared.append(t)
    close()
    return out


def scale_copy(t: Transfer) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Of a quantised copy's scales at the destination: grid, offset, strides."""
    offset, step = scale_place(t.copy.dst, t.copy.move.dst_offset, t.blocks.edge)
    return t.blocks.grid, offset, (step, 1)
