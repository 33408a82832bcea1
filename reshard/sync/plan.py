"""The plan of a sync: for every box that some process wants, the one process that sends it. Pure, and the same everywhere.

A process that holds what it wants copies it locally. Of several holders, the one with the least to send so far is chosen:
boxes with the fewest holders first, then the largest, so that small boxes held by many fill the gaps. A box with a choice
of holders that is larger than a bucket is cut, so that senders end up within one bucket of each other.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import PlanError
from reshard.geometry.block import Block, Box, Key, Stored, volume
from reshard.geometry.coverage import label
from reshard.sync.fp8_blocks import Blocks, block_grid
from reshard.sync.pieces import Pattern, Piece, halved, pieces
from reshard.sync.side import Side, restricted

if TYPE_CHECKING:
    from reshard.sync.cost import Cost

#: a tensor of the model on one engine side: (number of the side, the tensor)
Place = tuple[int, Key]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A box of tensor `key` that `sender` gives to `taker`: which stored tensor holds it there, which wants it here."""

    sender: int
    taker: int
    key: Key
    box: Box
    size: int
    src: Stored
    src_block: Block
    dst: Stored
    dst_block: Block
    blocks: Blocks | None  # where quantised blocks and their scales lie, for an FP8 destination

    @property
    def wire(self) -> str:
        return wire_dtype(self.src.dtype, self.dst.dtype)

    @property
    def bytes(self) -> int:
        """Bytes on the wire."""
        return self.size * DTYPE_SIZE[self.wire] + (4 * self.blocks.count if self.blocks else 0)


def wire_dtype(source: str, destination: str) -> str:
    """Values are cast by the sender when that makes them smaller, else by the taker."""
    return source if DTYPE_SIZE[source] < DTYPE_SIZE[destination] else destination


@dataclass(frozen=True)
class Pair:
    """Pattern of one tensor: its pieces, and for each the processes that hold it and those that want it."""

    pieces: tuple[Piece, ...]
    holders: tuple[tuple[int, ...], ...]
    takers: tuple[tuple[tuple[int, int], ...], ...]  # (process, position of the destination block)
    sent: dict  # process → pieces that it alone holds, and others want
    taken: dict  # process → (piece, position of the destination block)


class SyncPlan:
    """Who sends which box to whom. Made by ``plan``; ``rank`` gives one process's part, ``cost`` the sums."""

    def __init__(self, source: Side, destinations: tuple[Side, ...], bucket_bytes: int):
        self.source, self.destinations, self.bucket_bytes = source, destinations, bucket_bytes
        self.problems: list[str] = []
        self._pairs: dict[tuple, Pair] = {}
        self._held = _blocks_of(source)
        self._wanted = [_blocks_of(side) for side in destinations]
        self._match: dict[Place, Pair] = {}
        self._width: dict[Place, tuple[str, str]] = {}
        self._join()
        if self.problems:
            raise PlanError(list(dict.fromkeys(self.problems)))
        self.loads: dict[int, int] = {}
        self._sender: dict[tuple[Place, int, int], int] = {}
        self._choose()

    # ------------------------------------------------------------------------------------------------------- the join

    def _join(self) -> None:
        source_pattern = {key: tuple((member, block.box) for member, _, block in held) for key, held in self._held.items()}
        for number, (side, wanted) in enumerate(zip(self.destinations, self._wanted)):
            for key, takers in wanted.items():
                if key not in self._held:
                    self.problems.append(f"{side.title} wants {label(key)}, which the source does not have")
                    continue
                pattern = tuple((member, block.box) for member, _, block in takers)
                kinds = {s.dtype for _, s, _ in self._held[key]} | set(), {s.dtype for _, s, _ in takers}
                if any(len(kind) > 1 for kind in kinds):
                    self.problems.append(f"{label(key)} is held in several dtypes: {', '.join(sorted(kinds[0] | kinds[1]))}")
                    continue
                src, dst = kinds[0].pop(), kinds[1].pop()
                self._width[number, key] = src, dst
                if {src, dst} & {"F8_E4M3"} and src != dst and side.fp8 is None:
                    self.problems.append(f"{label(key)}: {src} cannot become {dst} without block scales")
                    continue
                choice = max(1, self.bucket_bytes // DTYPE_SIZE[wire_dtype(src, dst)])
                at = (number, source_pattern[key], pattern, choice, key[0] if dst == "F8_E4M3" else "")
                if at not in self._pairs:
                    self._pairs[at] = self._pair(side, key, source_pattern[key], pattern, choice, quantised=dst == "F8_E4M3" != src)
                self._match[number, key] = self._pairs[at]

    def _pair(self, side: Side, key: Key, source: Pattern, destination: Pattern, limit: int, quantised: bool) -> Pair:
        found, problem = pieces(source, destination)
        if problem:
            self.problems.append(f"{label(key)}: {problem} ({self.source.title} → {side.title})")
        out, holders, takers = [], [], []
        sent: dict[int, list] = defaultdict(list)
        taken: dict[int, list] = defaultdict(list)
        for piece in found:
            own = tuple(sorted({process for i in piece.sources for process in self.source.ranks[source[i][0]]}))
            want = tuple((process, i) for i in piece.takers for process in side.ranks[destination[i][0]])
            parts = [piece.box] if len(own) == 1 or quantised else halved(piece.box, limit)
            for box in parts:
                number = len(out)
                out.append(Piece(box, volume(box), piece.sources, piece.takers))
                holders.append(own)
                takers.append(want)
                for process, i in want:
                    taken[process].append((number, i))
                    if len(own) == 1 and process != own[0]:
                        sent[own[0]].append((number, process, i))
        return Pair(tuple(out), tuple(holders), tuple(takers), dict(sent), dict(taken))

    # ----------------------------------------------------------------------------------------------------- the choice

    def _choose(self) -> None:
        """Fill in who sends each piece that several processes hold."""
        loads: dict[int, int] = {process: 0 for process in self.source.processes}
        open_choices: list[tuple[int, int, Place, int, int]] = []
        sizes: dict[tuple, list[int]] = {}
        for place, pair in self._match.items():
            at = id(pair), self._width[place], self._scaled(place)
            if at not in sizes:
                sizes[at] = [self._bytes(place, piece) for piece in pair.pieces]
            for number, size in enumerate(sizes[at]):
                holders = pair.holders[number]
                for process, _ in pair.takers[number]:
                    if process in holders:
                        continue
                    if len(holders) == 1:
                        loads[holders[0]] += size
                    else:
                        open_choices.append((len(holders), -size, place, number, process))
        order = {place: i for i, place in enumerate(self._match)}
        open_choices.sort(key=lambda c: (c[0], c[1], order[c[2]], c[3], c[4]))
        for _, size, place, number, process in open_choices:
            sender = min(self._match[place].holders[number], key=loads.__getitem__)
            loads[sender] -= size
            self._sender[place, number, process] = sender
        self.loads = loads

    def _bytes(self, place: Place, piece: Piece) -> int:
        wire = wire_dtype(*self._width[place])
        blocks = self._blocks(place, piece.box)
        return piece.size * DTYPE_SIZE[wire] + (4 * blocks.count if blocks else 0)

    def _scaled(self, place: Place) -> str:
        src, dst = self._width[place]
        return place[1][0] if dst == "F8_E4M3" != src else ""

    def _blocks(self, place: Place, box: Box) -> Blocks | None:
        return block_grid(self.source.layout, place[1][0], box, self.destinations[place[0]].fp8) if self._scaled(place) else None

    # -------------------------------------------------------------------------------------------------- what comes out

    def transfers(self, process: int) -> Iterator[Transfer]:
        """All that `process` sends, takes, or copies to itself."""
        for place, pair in self._match.items():
            for number, i in pair.taken.get(process, ()):
                yield self._transfer(place, pair, number, self._from(place, pair, number, process), process, i)
            for number, taker, i in pair.sent.get(process, ()):
                yield self._transfer(place, pair, number, process, taker, i)
        for (place, number, taker), sender in self._sender.items():
            if sender == process:
                pair = self._match[place]
                for other, i in pair.takers[number]:
                    if other == taker:
                        yield self._transfer(place, pair, number, process, taker, i)

    def _from(self, place: Place, pair: Pair, number: int, process: int) -> int:
        holders = pair.holders[number]
        return process if process in holders else holders[0] if len(holders) == 1 else self._sender[place, number, process]

    def _transfer(self, place: Place, pair: Pair, number: int, sender: int, taker: int, position: int) -> Transfer:
        side, key = place
        piece = pair.pieces[number]
        held = self._held[key]
        _, src, src_block = next(held[i] for i in piece.sources if sender in self.source.ranks[held[i][0]])
        _, dst, dst_block = self._wanted[side][key][position]
        return Transfer(sender, taker, key, piece.box, piece.size, src, src_block, dst, dst_block, self._blocks(place, piece.box))

    def shared(self, process: int) -> dict[tuple[Key, Box], tuple[tuple[int, ...], Stored, Block]]:
        """The boxes of the source that `process` and others hold: all their holders, and where each lies at `process`."""
        found = {}
        for place, pair in self._match.items():
            for piece, holders in zip(pair.pieces, pair.holders):
                if len(holders) > 1 and process in holders and (place[1], piece.box) not in found:
                    held = self._held[place[1]]
                    _, stored, block = next(held[i] for i in piece.sources if process in self.source.ranks[held[i][0]])
                    found[place[1], piece.box] = holders, stored, block
        return found

    @cached_property
    def processes(self) -> list[int]:
        return sorted({p for side in (self.source, *self.destinations) for p in side.processes})

    @cached_property
    def peers(self) -> dict[int, set[int]]:
        """Per process, those it sends to or takes from: how many share its staging buffer."""
        peers: dict[int, set[int]] = defaultdict(set)
        for (_, _, taker), sender in self._sender.items():
            peers[sender].add(taker), peers[taker].add(sender)
        for pair in {id(p): p for p in self._match.values()}.values():
            for sender, sent in pair.sent.items():
                for _, taker, _ in sent:
                    if taker != sender:
                        peers[sender].add(taker), peers[taker].add(sender)
        return peers

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the layouts as resolved, names, shapes, dtypes, every block of every tensor, ranks and senders: equal
        where, and only where, plans are equal."""
        digest = hashlib.sha256(repr(("sync 2", self.bucket_bytes, self.source.ranks, [d.ranks for d in self.destinations])).encode())
        texts: dict[int, str] = {}  # blocks are shared among the tensors of a pattern: each is written out once
        for side in (self.source, *self.destinations):
            digest.update(resolved(side).encode())
            for member in side.members:
                digest.update(b"member")
                for s in member:
                    blocks = []
                    for key, block in s.blocks:
                        if id(block) not in texts:
                            texts[id(block)] = repr((block.box, block.offset, block.strides))
                        blocks.append(f"{key}{texts[id(block)]}")
                    digest.update(repr((s.rank, s.name, s.dtype, s.shape, blocks)).encode())
        boxes: dict[int, str] = {}
        for (side, key), pair in self._match.items():
            if id(pair) not in boxes:
                boxes[id(pair)] = repr((pair.pieces, pair.holders, pair.takers))
                digest.update(boxes[id(pair)].encode())
            digest.update(repr((side, key, hash_of(boxes[id(pair)]))).encode())
        for choice in self._sender.items():
            digest.update(repr(choice).encode())
        return digest.hexdigest()

    def cost(self, bandwidth: float = 50e9) -> "Cost":
        """Bytes per rank beside their bounds, and seconds at `bandwidth` bytes/s each way per rank."""
        from reshard.sync.cost import cost

        return cost(self, bandwidth)


def resolved(side: Side) -> str:
    """A side's layout as far as it settles what moves: its tensors' axes and their sizes, and the quantised blocks."""
    layout = side.layout
    tensors = sorted((t.name, t.index, t.dims, t.dtype) for t in layout.descriptor.tensors.values())
    fp8 = (side.fp8.edge, sorted(side.fp8.tensors)) if side.fp8 else None
    return repr((side.format, layout.layers, sorted(layout.sizes.items()), tensors, fp8, sorted(side.partly)))


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _blocks_of(side: Side) -> dict[Key, list[tuple[int, Stored, Block]]]:
    """For each tensor of the model, (member, stored tensor, block) of all that holds a part of it on `side`."""
    found: dict[Key, list[tuple[int, Stored, Block]]] = defaultdict(list)
    for member, stored in enumerate(side.members):
        for s in stored:
            for key, block in s.blocks:
                found[key].append((member, s, block))
    return dict(found)


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
