"""The plan of a sync: for every box that some process wants, the one process that sends it. Pure, and the same everywhere.

A process that holds what it wants copies it locally. Of several holders, the one with the least to send so far is chosen:
boxes with the fewest holders first, then the largest, so that small boxes held by many fill the gaps. A box with a choice
of holders that is larger than a bucket is cut, so that senders end up within one bucket of each other.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import PlanError
from reshard.geometry.block import Block, Box, Key, Stored, volume
from reshard.geometry.coverage import label
from reshard.geometry.pieces import Piece, halved
from reshard.planner.copies import Copy
from reshard.planner.join import Pattern, Run, join
from reshard.planner.plan import copy_at, digest, move_between
from reshard.sync.fp8_blocks import Blocks, block_grid
from reshard.sync.side import Side, restricted

if TYPE_CHECKING:
    from reshard.sync.cost import Cost


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy of one box from a tensor that `sender` holds into one of `taker`'s."""

    sender: int
    taker: int
    copy: Copy
    place: tuple[int, int]  # of the destination: the plan's side, and the number of the tensor there
    blocks: Blocks | None  # where quantised blocks and their scales lie, for an FP8 destination

    @property
    def wire(self) -> str:
        return wire_dtype(self.copy.src.dtype, self.copy.dst.dtype)

    @property
    def bytes(self) -> int:
        """Bytes on the wire."""
        return self.copy.move.size * DTYPE_SIZE[self.wire] + (4 * self.blocks.count if self.blocks else 0)


def wire_dtype(source: str, destination: str) -> str:
    """Values are cast by the sender when that makes them smaller, else by the taker."""
    return source if DTYPE_SIZE[source] < DTYPE_SIZE[destination] else destination


@dataclass(frozen=True)
class Choice:
    """Pieces of one size that the same processes hold and others want: who of them sends which is to be chosen."""

    holders: tuple[int, ...]
    size: int  # bytes of one on the wire
    wants: tuple[tuple[int, int, int], ...]  # (piece, taker, destination slot)

    @cached_property
    def takers(self) -> frozenset[int]:
        return frozenset(taker for _, taker, _ in self.wants)


@dataclass(frozen=True)
class Pair:
    """A pattern of the join, for processes: its pieces, who holds each and who wants it, and the bytes of one on the wire."""

    pieces: tuple[Piece, ...]
    sizes: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    takers: tuple[tuple[tuple[int, int], ...], ...]  # (process, destination slot)
    own: dict[int, list[tuple[int, int, int]]]  # process → what it holds itself, or one alone holds: (piece, sender, destination slot)
    sent: dict[int, list[tuple[int, int, int]]]  # process → pieces that it alone holds, and others want: (piece, taker, destination slot)
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Batch:
    """A run of the join towards one side: tensors that lie alike, and what they come to."""

    side: int
    run: Run
    pattern: Pattern
    pair: Pair
    wire: str  # dtype on the wire
    scaled: str  # the tensor's name where it is quantised on the way, else nothing


class SyncPlan:
    """Who sends which box to whom. Made by ``plan``; ``transfers`` gives one process's part, ``cost`` the sums."""

    def __init__(self, source: Side, destinations: tuple[Side, ...], bucket_bytes: int):
        self.source, self.destinations, self.bucket_bytes = source, destinations, bucket_bytes
        held = tuple(s for member in source.members for s in member)
        self.joins = tuple(join(held, (s for member in side.members for s in member)) for side in destinations)
        problems: list[str] = []
        self.batches = [batch for number in range(len(destinations)) for batch in self._batches(number, problems)]
        if problems:
            raise PlanError(list(dict.fromkeys(problems)))
        self.loads = {process: 0 for process in source.processes}  # bytes that each sends
        #: of each choice (batch, number in its pair): who sends how many of its pieces, in order of `wants` and, of each, instances
        self.shares: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._choose()

    # ------------------------------------------------------------------------------------------------------- the join

    def _batches(self, number: int, problems: list[str]) -> Iterator[Batch]:
        """The runs of one side's join, checked."""
        side, joined = self.destinations[number], self.joins[number]
        problems += [f"{side.title} wants {label(key)}, which the source does not have" for key in joined.only_destination]
        pairs: dict[tuple, Pair] = {}
        for run in joined.runs:
            pattern, name = joined.patterns[run.pattern], label(run.first)
            kinds = {slot.dtype for slot in pattern.sources}, {slot.dtype for slot in pattern.destinations}
            if any(len(kind) > 1 for kind in kinds):
                problems.append(f"{name} is held in several dtypes: {', '.join(sorted(kinds[0] | kinds[1]))}")
                continue
            src, dst = kinds[0].pop(), kinds[1].pop()
            if {src, dst} & {"F8_E4M3"} and src != dst and side.fp8 is None:
                problems.append(f"{name}: {src} cannot become {dst} without block scales")
                continue
            where = f"({self.source.title} → {side.title})"
            if pattern.overlapping:
                problems.append(f"{name}: ranks of the source hold overlapping parts of it, and not the same ones {where}")
                continue
            for slot, count in pattern.missing:
                size = pattern.destinations[slot].size
                problems.append(f"{name}: {count} of {size} elements that the destination wants are on no source rank {where}")
            scaled = run.first[0] if dst == "F8_E4M3" != src else ""
            at = run.pattern, scaled
            if at not in pairs:
                pairs[at] = self._pair(side, pattern, wire_dtype(src, dst), scaled)
            yield Batch(number, run, pattern, pairs[at], wire_dtype(src, dst), scaled)

    def _pair(self, side: Side, pattern: Pattern, wire: str, scaled: str) -> Pair:
        """`scaled`: the tensor's name where it is quantised on the way. A piece that several processes hold is cut into buckets."""
        out, sizes, holders, takers = [], [], [], []
        own: dict[int, list] = defaultdict(list)
        sent: dict[int, list] = defaultdict(list)
        wants: dict[tuple[tuple[int, ...], int], list] = defaultdict(list)
        limit = max(1, self.bucket_bytes // DTYPE_SIZE[wire])
        for piece in pattern.pieces:
            held = tuple(sorted({process for i in piece.sources for process in self.source.at(pattern.sources[i].rank)}))
            want = tuple((process, i) for i in piece.destinations for process in side.at(pattern.destinations[i].rank))
            for box in [piece.box] if len(held) == 1 or scaled else halved(piece.box, limit):
                number = len(out)
                grid = block_grid(self.source.layout, scaled, box, side.fp8) if scaled else None
                out.append(Piece(box, volume(box), piece.sources, piece.destinations))
                sizes.append(out[-1].size * DTYPE_SIZE[wire] + (4 * grid.count if grid else 0))
                holders.append(held)
                takers.append(want)
                for process, i in want:
                    if process in held or len(held) == 1:
                        own[process].append((number, process if process in held else held[0], i))
                    else:
                        wants[held, sizes[-1]].append((number, process, i))
                    if len(held) == 1 and process != held[0]:
                        sent[held[0]].append((number, process, i))
        choices = tuple(Choice(held, size, tuple(found)) for (held, size), found in wants.items())
        return Pair(tuple(out), tuple(sizes), tuple(holders), tuple(takers), dict(own), dict(sent), choices)

    # ----------------------------------------------------------------------------------------------------- the choice

    def _choose(self) -> None:
        """Fill in who sends what several processes hold: the pieces with the fewest holders first, then the largest."""
        choices = []
        for at, batch in enumerate(self.batches):
            for process, sent in batch.pair.sent.items():
                self.loads[process] += sum(batch.pair.sizes[number] for number, _, _ in sent) * batch.run.count
            choices += [(len(choice.holders), -choice.size, at, i) for i, choice in enumerate(batch.pair.choices)]
        for _, _, at, i in sorted(choices):
            batch, choice = self.batches[at], self.batches[at].pair.choices[i]
            shares = share_out(batch.run.count * len(choice.wants), choice.size, choice.holders, self.loads)
            for sender, count in shares:
                self.loads[sender] += choice.size * count
            self.shares[at, i] = shares

    def _chosen(self, at: int, i: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Who sends what of a choice: (sender, piece, taker, destination slot, first instance, past the last)."""
        wants, count, start = self.batches[at].pair.choices[i].wants, self.batches[at].run.count, 0
        for sender, pieces in self.shares[at, i]:
            stop = start + pieces
            for which in range(start // count, -(-stop // count)):
                yield sender, *wants[which], max(start - which * count, 0), min(stop - which * count, count)
            start = stop

    def blocks(self, batch: Batch, box: Box) -> Blocks | None:
        """The grid of quantised blocks on `box`; None where nothing is quantised."""
        return block_grid(self.source.layout, batch.scaled, box, self.destinations[batch.side].fp8) if batch.scaled else None

    # -------------------------------------------------------------------------------------------------- what comes out

    def transfers(self, process: int) -> Iterator[Transfer]:
        """All that `process` sends, takes, or copies to itself."""
        for at, batch in enumerate(self.batches):
            count = batch.run.count
            for number, sender, slot in batch.pair.own.get(process, ()):
                yield from self._transfers(batch, number, slot, sender, process, 0, count)
            for number, taker, slot in batch.pair.sent.get(process, ()):
                yield from self._transfers(batch, number, slot, process, taker, 0, count)
            for i, choice in enumerate(batch.pair.choices):
                if process in choice.holders or process in choice.takers:
                    for sender, number, taker, slot, start, stop in self._chosen(at, i):
                        if process in (sender, taker):
                            yield from self._transfers(batch, number, slot, sender, taker, start, stop)

    def _transfers(self, batch: Batch, number: int, slot: int, sender: int, taker: int, start: int, stop: int) -> Iterator[Transfer]:
        piece, blocks = batch.pair.pieces[number], self.blocks(batch, batch.pair.pieces[number].box)
        source, joined, pattern, run = self._slot(batch, piece, sender), self.joins[batch.side], batch.pattern, batch.run
        move = move_between(pattern.sources[source], pattern.destinations[slot], piece.box)
        for i in range(start, stop):
            (a, src_start), (b, dst_start) = run.sources[source].at(i), run.destinations[slot].at(i)
            copy = copy_at(run.key(i), (joined.sources[a], src_start), (joined.destinations[b], dst_start), move)
            yield Transfer(sender, taker, copy, (batch.side, b), blocks)

    def _slot(self, batch: Batch, piece: Piece, process: int) -> int:
        """The source slot in which `process` holds a piece."""
        return next(i for i in piece.sources if process in self.source.at(batch.pattern.sources[i].rank))

    def shared(self, process: int) -> dict[tuple[Key, Box], tuple[tuple[int, ...], Stored, Block]]:
        """The boxes of the source that `process` and others hold: all their holders, and where each lies at `process`."""
        found = {}
        for batch in self.batches:
            for piece, holders in zip(batch.pair.pieces, batch.pair.holders):
                if len(holders) > 1 and process in holders:
                    source = self._slot(batch, piece, process)
                    slot = batch.pattern.sources[source]
                    for i in range(batch.run.count):
                        number, start = batch.run.sources[source].at(i)
                        block = Block(slot.box, start, slot.strides).part(piece.box)
                        found.setdefault((batch.run.key(i), piece.box), (holders, self.joins[batch.side].sources[number], block))
        return found

    @cached_property
    def processes(self) -> list[int]:
        return sorted({p for side in (self.source, *self.destinations) for p in side.processes})

    @cached_property
    def peers(self) -> dict[int, set[int]]:
        """Per process, those it sends to or takes from: how many share its staging buffer."""
        peers: dict[int, set[int]] = defaultdict(set)
        chosen = {(sender, taker) for at, i in self.shares for sender, _, taker, _, _, _ in self._chosen(at, i)}
        pairs = {(batch.side, batch.run.pattern, batch.scaled): batch.pair for batch in self.batches}
        alone = {(sender, taker) for pair in pairs.values() for sender, sent in pair.sent.items() for _, taker, _ in sent}
        for sender, taker in chosen | alone:
            peers[sender].add(taker), peers[taker].add(sender)
        return peers

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the layouts as resolved, every block of every stored tensor, ranks and senders: equal where, and only
        where, plans are equal."""
        sides = [(side.resolved, side.ranks, [digest(member) for member in side.members]) for side in (self.source, *self.destinations)]
        return hashlib.sha256(repr(("sync 3", self.bucket_bytes, sides, sorted(self.shares.items()))).encode()).hexdigest()

    def cost(self, bandwidth: float = 50e9) -> "Cost":
        """Bytes per rank beside their bounds, and seconds at `bandwidth` bytes/s each way per rank."""
        from reshard.sync.cost import cost

        return cost(self, bandwidth)


def share_out(count: int, size: int, holders: Sequence[int], loads: Mapping[int, int]) -> list[tuple[int, int]]:
    """`count` equal pieces of `size` bytes, dealt out one by one to whoever of `holders` has the least to send by then: how many each
    of them sends, for those that send any."""
    order = sorted(holders, key=lambda holder: (loads[holder], holder))
    for low in range(len(order), 0, -1):  # as many of the lowest as fill up to one level
        total = sum(loads[holder] for holder in order[:low]) + count * size
        if total >= low * loads[order[low - 1]]:
            break
    given = {holder: (total // low - loads[holder]) // size for holder in order[:low]}
    for _ in range(count - sum(given.values())):
        given[min(given, key=lambda holder: (loads[holder] + given[holder] * size, holder))] += 1
    return [(holder, number) for holder, number in given.items() if number]


def plan(
    source: Side,
    destination: Side | Sequence[Side],
    *,
    select: Callable[[Key], bool] | None = None,
    bucket_bytes: int = 64 << 20,
) -> SyncPlan:
    """The plan that fills `destination` (several engines: several sides) from `source`.

    `select` limits it to tensors of the layout, called with ("q", layer) or ("expert_gate", layer, expert). `bucket_bytes`
    bounds a rank's staging buffer for one message round; two of them are in flight. Takes no communication; equal arguments
    give equal plans. Raises PlanError with all problems.
    """
    sides = (destination,) if isinstance(destination, Side) else tuple(destination)
    if select:
        source, sides = restricted(source, select), tuple(restricted(side, select) for side in sides)
    if bucket_bytes < 1 << 12:
        raise PlanError([f"bucket_bytes={bucket_bytes} is less than the least of {1 << 12}"])
    if not any(side.members and any(side.members) for side in sides):
        raise PlanError(["the destination holds no tensor that is selected"])
    return SyncPlan(source, sides, bucket_bytes)
