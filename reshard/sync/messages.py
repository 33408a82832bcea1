"""One rank's part of a plan, laid out as messages: what is packed together, what goes straight from tensor to tensor. Pure.

Both ends of a pair list the same copies in the same order, since both know where each lies on either side; so no header
travels, and no padding. Small copies share a staging buffer; a large one that is one run on either side is a message of
its own, and that side needs no buffer for it. Messages go in rounds, which bound what a rank stages at a time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import gcd, prod

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Stored, row_major
from reshard.sync.fp8_blocks import Blocks, scale_place
from reshard.sync.plan import SyncPlan, Transfer

#: a copy of at least so many bytes that is one run on a side goes without a buffer there
DIRECT = 256 << 10


@dataclass(slots=True)
class Copy:
    """Elements that go from stored tensor `src` to `dst`; on the wire row-major by `shape`. Offsets and strides in elements.

    With `blocks` the shape is rows × columns of one box in the weight's own axes, quantised on the way, its scales
    (grid, row-major, fp32) before it.
    """

    src: Stored
    dst: Stored
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]
    wire: str
    blocks: Blocks | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_SIZE[self.wire] + (4 * self.blocks.count if self.blocks else 0)

    @property
    def sent_as_it_lies(self) -> bool:
        return self.blocks is None and self.src.dtype == self.wire and _one_run(self.shape, self.src_strides)

    @property
    def taken_as_it_lies(self) -> bool:
        return self.blocks is None and self.dst.dtype == self.wire and _one_run(self.shape, self.dst_strides)


@dataclass(slots=True)
class Message:
    """What `sender` gives `taker` in one piece: `copies` one after another, each at its byte offset. `tag` counts those of the pair."""

    sender: int
    taker: int
    tag: int
    round: int
    copies: list[tuple[Copy, int]]
    bytes: int
    alone: bool  # one large copy, that is one run on at least one side


@dataclass
class RankPlan:
    """What one process does in a sync. `local` copies stay in it; `transfers` list the boxes, for the sums of ``checks.py``."""

    process: int
    sends: list[Message] = field(default_factory=list)
    takes: list[Message] = field(default_factory=list)
    local: list[Copy] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    pairs: dict[tuple[int, int], list[Copy]] = field(default_factory=dict)  # uncut copies, for peers whose memory is mapped

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
    out = RankPlan(process, transfers=list(plan.transfers(process) if transfers is None else transfers))
    order = {id(s): i for side in plan.destinations for member in side.members for i, s in enumerate(member)}
    pairs: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for t in out.transfers:
        pairs[t.sender, t.taker].append(t)
    peers = plan.peers
    for (sender, taker), own in sorted(pairs.items()):
        own.sort(key=lambda t: (order[id(t.dst)], t.dst_block.offset, t.key, t.box))
        copies = merged([_copy(t) for t in own])
        if sender == taker:
            out.local += copies
            continue
        out.pairs[sender, taker] = copies
        limit = max(plan.bucket_bytes // max(len(peers[sender]), len(peers[taker])), 8)  # an element is never cut
        (out.sends if sender == process else out.takes).extend(_messages(sender, taker, copies, limit, staged))
    return out


def _copy(t: Transfer) -> Copy:
    if t.blocks is None:
        return Copy(t.src, t.dst, *_geometry(t.src_block, t.dst_block, t.box), t.wire)
    src, dst = t.src_block.clip(t.box), t.dst_block.clip(t.box)
    return Copy(t.src, t.dst, dst.shape, src.offset, src.strides, dst.offset, dst.strides, t.wire, t.blocks)


@lru_cache(maxsize=65536)
def _geometry(src_block, dst_block, box):
    """(shape, offset and strides at the source, at the destination) in the destination's order, with as few axes as do."""
    src, dst = src_block.clip(box), dst_block.clip(box)
    axes = [(n, s, d) for n, s, d in zip(dst.shape, src.strides, dst.strides) if n > 1]
    return _folded(src.offset, dst.offset, sorted(axes, key=lambda a: (-a[2], -a[1])))


def _folded(src_offset: int, dst_offset: int, axes: list[tuple[int, int, int]]):
    folded: list[tuple[int, int, int]] = []
    for n, s, d in axes:
        if folded and folded[-1][1] == n * s and folded[-1][2] == n * d:
            folded[-1] = folded[-1][0] * n, s, d
        else:
            folded.append((n, s, d))
    shape, src, dst = zip(*folded) if folded else ((1,), (1,), (1,))
    return shape, src_offset, src, dst_offset, dst


def merged(copies: list[Copy]) -> list[Copy]:
    """`copies` with neighbours joined that are one larger box: runs that go on, and equal boxes at equal steps."""
    out: list[Copy] = []
    step: tuple[int, int] | None = None  # of the last copy's leading axis, where that was made here
    for copy in copies:
        last = out[-1] if out else None
        if last is None or last.src is not copy.src or last.dst is not copy.dst or copy.blocks or last.blocks:
            out.append(copy)
            step = None
            continue
        if (
            step is not None
            and copy.shape == last.shape[1:]
            and copy.src_strides == last.src_strides[1:]
            and copy.dst_strides == last.dst_strides[1:]
        ):
            count = last.shape[0]
            if (copy.src_offset, copy.dst_offset) == (last.src_offset + count * step[0], last.dst_offset + count * step[1]):
                last.shape = (count + 1, *last.shape[1:])
                continue
        one, two = _dense(last), _dense(copy)
        if one and two and (copy.src_offset, copy.dst_offset) == (last.src_offset + one, last.dst_offset + one):
            last.shape, last.src_strides, last.dst_strides = (one + two,), (1,), (1,)
            step = None
            continue
        rise = copy.src_offset - last.src_offset, copy.dst_offset - last.dst_offset
        alike = (copy.shape, copy.src_strides, copy.dst_strides) == (last.shape, last.src_strides, last.dst_strides)
        if step is None and alike and rise[0] > 0 and rise[1] > 0:
            last.shape = (2, *copy.shape)
            last.src_strides, last.dst_strides = (rise[0], *copy.src_strides), (rise[1], *copy.dst_strides)
            step = rise
            continue
        out.append(copy)
        step = None
    return [_refolded(copy) for copy in out]


def _dense(copy: Copy) -> int:
    """Elements of a copy that is one run on both sides; else 0."""
    runs = len(copy.shape) == 1 and copy.src_strides == (1,) and copy.dst_strides == (1,)
    return copy.shape[0] if runs else 0


def _refolded(copy: Copy) -> Copy:
    if copy.blocks is None and len(copy.shape) > 1:
        axes = sorted(zip(copy.shape, copy.src_strides, copy.dst_strides), key=lambda a: (-a[2], -a[1]))
        copy.shape, _, copy.src_strides, _, copy.dst_strides = _folded(0, 0, axes)
    return copy


@lru_cache(maxsize=65536)
def _one_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(n == 1 or s == step for n, s, step in zip(shape, strides, row_major(shape)))


def cut(copy: Copy, limit: int) -> list[Copy]:
    """`copy` in parts of at most `limit` bytes, cut along its leading axes; quantised blocks stay whole, each with its scale."""
    if copy.bytes <= limit:
        return [copy]
    if copy.blocks:
        return _cut_blocks(copy, limit)
    axis = next((a for a, n in enumerate(copy.shape) if n > 1), None)
    if axis is None:
        return [copy]
    row = prod(copy.shape[axis + 1 :]) * DTYPE_SIZE[copy.wire]
    step = max(1, limit // row)
    parts = []
    for low in range(0, copy.shape[axis], step):
        shape = (*copy.shape[:axis], min(step, copy.shape[axis] - low), *copy.shape[axis + 1 :])
        parts += cut(replace(copy, shape=shape, src_offset=copy.src_offset + low * copy.src_strides[axis],
                             dst_offset=copy.dst_offset + low * copy.dst_strides[axis]), limit)  # fmt: skip
    return parts


def _cut_blocks(copy: Copy, limit: int) -> list[Copy]:
    """As ``cut``, between blocks: rows first, then columns. A single block larger than `limit` stays as it is."""
    blocks = copy.blocks
    for first, last in ((0, blocks.row_axes), (blocks.row_axes, len(copy.shape))):
        axis = next((a for a in range(first, last) if copy.shape[a] > 1), None)
        if axis is None:
            continue
        inner = prod(copy.shape[axis + 1 : last])  # rows (or columns) for each index of the axis
        unit = blocks.edge // gcd(blocks.edge, inner)  # indices after which a block ends
        if copy.shape[axis] <= unit:
            continue
        step = max(1, limit * copy.shape[axis] // copy.bytes // unit) * unit
        parts = []
        for low in range(0, copy.shape[axis], step):
            shape = (*copy.shape[:axis], min(step, copy.shape[axis] - low), *copy.shape[axis + 1 :])
            own = replace(
                blocks,
                rows=prod(shape[: blocks.row_axes]),
                columns=prod(shape[blocks.row_axes :]),
                row=blocks.row + (low * inner if first == 0 else 0),
                column=blocks.column + (low * inner if first else 0),
            )
            source, destination = copy.src_offset + low * copy.src_strides[axis], copy.dst_offset + low * copy.dst_strides[axis]
            parts += cut(replace(copy, shape=shape, src_offset=source, dst_offset=destination, blocks=own), limit)
        return parts
    return [copy]


def _messages(sender: int, taker: int, copies: list[Copy], limit: int, staged: Collection[int] = ()) -> list[Message]:
    out: list[Message] = []
    number, filled = 0, 0
    shared: list[Copy] = []

    def close() -> None:
        nonlocal shared
        if shared:
            shared.sort(key=lambda c: -DTYPE_SIZE[c.wire])  # wide elements first: each lies aligned, with no padding
            placed, at = [], 0
            for copy in shared:
                placed.append((copy, at))
                at += copy.bytes
            out.append(Message(sender, taker, len(out), number, placed, at, False))
            shared = []

    for copy in copies:
        ends = (copy.sent_as_it_lies and sender not in staged, copy.taken_as_it_lies and taker not in staged)
        for part in [copy] if all(ends) and copy.bytes >= DIRECT else cut(copy, limit):
            size = part.bytes
            if all(ends) and size >= DIRECT:  # staged at neither end: bounds nothing
                out.append(Message(sender, taker, len(out), number, [(part, 0)], size, True))
                continue
            if filled and filled + size > limit:
                close()
                number, filled = number + 1, 0
            filled += size
            if size >= DIRECT and ((part.sent_as_it_lies and sender not in staged) or (part.taken_as_it_lies and taker not in staged)):
                out.append(Message(sender, taker, len(out), number, [(part, 0)], size, True))
            else:
                shared.append(part)
    close()
    return out


def scale_copy(copy: Copy) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Of a quantised copy's scales at the destination: grid, offset, strides."""
    offset, step = scale_place(copy.dst, copy.dst_offset, copy.blocks.edge)
    return copy.blocks.grid, offset, (step, 1)


def windows(plan: SyncPlan, process: int, staged: Collection[int] = ()) -> list[RankPlan]:
    """`process`' part of a plan whose destinations are filled a bucket at a time: one RankPlan per bucket, in the same order
    on every rank. A bucket is as many of a destination's tensors, in its order, as fit `bucket_bytes` (one may be larger)."""
    number: dict[int, int] = {}
    for side in plan.destinations:
        for member in side.members:
            window, filled = 0, 0
            for s in member:
                size = s.size * DTYPE_SIZE[s.dtype]
                if filled and filled + size > plan.bucket_bytes:
                    window, filled = window + 1, 0
                number[id(s)] = window
                filled += size
    parts: list[list[Transfer]] = [[] for _ in range(1 + max(number.values()))]
    for t in plan.transfers(process):
        parts[number[id(t.dst)]].append(t)
    return [rank_plan(plan, process, part, staged) for part in parts]
