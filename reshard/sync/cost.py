"""What a sync moves, added up before anything runs: per rank beside the least possible, and beside what others do. Pure.

The least that a rank must receive is what it must hold minus what it has, computed from the two layouts alone and not
from the plan's transfers. Two ways for comparison: each parameter gathered whole on the trainer ranks that hold parts of
it, then broadcast to all engine ranks (slime, verl, NeMo-RL by default, OpenRLHF); and everything to everyone.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Box, Key, overlap
from reshard.geometry.pieces import union_volume
from reshard.sync.plan import Batch, SyncPlan
from reshard.text import human, table


@dataclass
class Load:
    """Bytes of one process: what it wants in all, has already of that, sends, receives, and at least must receive."""

    wants: int = 0
    has: int = 0
    sent: int = 0
    received: int = 0
    bound: int = 0
    gathered: int = 0  # received when parameters are gathered whole and broadcast
    spread: int = 0  # sent then


@dataclass
class Cost:
    """The sums of a plan, in bytes. `model` is the model's size on the wire, whole; `bandwidth` bytes/s each way per rank."""

    title: str
    model: int
    bandwidth: float
    ranks: dict[int, Load] = field(default_factory=dict)
    first_holder: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(load.received for load in self.ranks.values())

    @property
    def most_sent(self) -> int:
        return max(load.sent for load in self.ranks.values())

    @property
    def most_received(self) -> int:
        return max(load.received for load in self.ranks.values())

    @property
    def most_sent_by_first_holder(self) -> int:
        """What the busiest sender would send if the first rank that holds a box always sent it."""
        return max(self.first_holder.values(), default=0)

    @property
    def ratio(self) -> float:
        """Bytes received over the least possible, of the rank where that is worst; 1.0 is the least possible."""
        return max((load.received / load.bound for load in self.ranks.values() if load.bound), default=1.0)

    @property
    def seconds(self) -> float:
        """Of the busiest link, at full bandwidth: nothing can be faster without other links."""
        return max(self.most_sent, self.most_received) / self.bandwidth

    @property
    def gather_broadcast_seconds(self) -> float:
        return max(max(load.gathered, load.spread) for load in self.ranks.values()) / self.bandwidth

    @property
    def everyone_seconds(self) -> float:
        return self.model / self.bandwidth

    def __str__(self) -> str:
        shown = sorted(self.ranks.items())
        rows = [
            (r, human(x.wants), human(x.has), human(x.sent), human(x.received), human(x.bound), human(x.gathered)) for r, x in shown[:64]
        ]
        lines = [
            f"{self.title}: {human(self.model)} of weights, {human(self.total)} on the wire, {self.seconds:.3g} s at {human(self.bandwidth)}/s each way per rank\n",
            table(rows, ("rank", "wants", "has", "sends", "receives", "least", "by all-gather + broadcast")),
            *([f"… and {len(shown) - 64} more ranks"] if len(shown) > 64 else []),
            f"\nreceived by a rank, most: {human(self.most_received)}, {self.ratio:.3f} × the least possible",
            f"sent by a rank, most: {human(self.most_sent)} (the first holder always sending: {human(self.most_sent_by_first_holder)})",
            f"all-gather + broadcast: {self.gather_broadcast_seconds:.3g} s; everything to everyone: {self.everyone_seconds:.3g} s",
        ]
        return "\n".join(lines)


def cost(plan: SyncPlan, bandwidth: float) -> Cost:
    title = f"{plan.source.title} → {', '.join(dict.fromkeys(side.title for side in plan.destinations))}"
    out = Cost(title, 0, bandwidth, {p: Load() for p in plan.processes})
    out.first_holder = defaultdict(int)
    engines = sorted({p for side in plan.destinations for p in side.processes})
    first: dict[Key, int] = {}  # of each tensor, the batch of the first side that wants it
    bounds: dict[tuple, dict[int, tuple[int, int]]] = {}
    for number, batch in enumerate(plan.batches):
        count = batch.run.count
        for i in range(count):
            first.setdefault(batch.run.key(i), number)
        for size, holders, takers in zip(batch.pair.sizes, batch.pair.holders, batch.pair.takers):
            for process, _ in takers:
                if process not in holders:
                    out.ranks[process].received += size * count
                    out.first_holder[holders[0]] += size * count
        at = batch.side, batch.run.pattern, batch.scaled
        if at not in bounds:
            bounds[at] = _bounds(plan, batch)
        for process, (wants, has) in bounds[at].items():
            load = out.ranks[process]
            load.wants += wants * count
            load.has += has * count
            load.bound += (wants - has) * count
    for process, sent in plan.loads.items():
        out.ranks[process].sent = sent
    _gathered(plan, out, engines, Counter(first.values()))
    return out


def _spread_bytes(plan: SyncPlan, batch: Batch, boxes: frozenset[Box]) -> int:
    """Bytes on the wire of all that lies in any of `boxes` of one tensor."""
    size = union_volume(boxes) * DTYPE_SIZE[batch.wire]
    if batch.scaled:
        size += sum(4 * plan.blocks(batch, box).count for box in boxes)
    return size


def _bounds(plan: SyncPlan, batch: Batch) -> dict[int, tuple[int, int]]:
    """Per process, bytes of one tensor that it wants on this side, and has of those; unions of boxes, not sums of pieces."""
    wanted: dict[int, set[Box]] = defaultdict(set)
    held: dict[int, set[Box]] = defaultdict(set)
    for slot in batch.pattern.destinations:
        for process in plan.destinations[batch.side].at(slot.rank):
            wanted[process].add(slot.box)
    for slot in batch.pattern.sources:
        for process in plan.source.at(slot.rank):
            if process in wanted:
                held[process].add(slot.box)
    out = {}
    for process, boxes in wanted.items():
        common = frozenset(meet for box in boxes for other in held.get(process, ()) for meet in [overlap(box, other)] if meet)
        out[process] = _spread_bytes(plan, batch, frozenset(boxes)), _spread_bytes(plan, batch, common) if common else 0
    return out


def _gathered(plan: SyncPlan, out: Cost, engines: list[int], tensors: Mapping[int, int]) -> None:
    """Each tensor gathered whole on all ranks that hold a part of it, then broadcast from one of them to the engines."""
    for number, times in tensors.items():
        batch = plan.batches[number]
        slots = batch.pattern.sources
        out.model += _spread_bytes(plan, batch, frozenset(slot.box for slot in slots)) * times
        size = DTYPE_SIZE[batch.wire] * times
        whole = union_volume([slot.box for slot in slots]) * size
        shares: dict[int, int] = defaultdict(int)
        for slot in slots:
            for process in plan.source.at(slot.rank):
                shares[process] += slot.size * size
        root = min(shares)
        for process, share in shares.items():
            out.ranks[process].gathered += whole - share
            out.ranks[process].spread += whole * (len(shares) - 1) // len(shares) if share < whole else 0
        out.ranks[root].spread += whole
        for process in engines:
            if process not in shares:
                out.ranks[process].gathered += whole
