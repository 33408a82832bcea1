"""Sums that show whether what arrived is what was sent, and whether replicas hold the same weights.

The bytes of a box, in the order of its own axes, are read as 64-bit words and laid in rows of a prime number of columns; each
column and each row is added up, mod 2^64, and these sums are mixed, each with the number of its place, and added. So a flipped
bit always changes its column's sum, and two exchanged words (elements, heads) those of two columns or two rows, wherever they
are. That takes one pass over memory and one over the cache, and no product for each word. Both ends sum the
same boxes, wherever these lie. Small boxes are copied together, so that a step takes few passes whatever their number.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Box, Key, Stored
from reshard.geometry.coverage import label
from reshard.geometry.pieces import halved
from reshard.sync.fp8 import quantise
from reshard.sync.fp8_blocks import Blocks, scale_place
from reshard.sync.messages import RankPlan
from reshard.sync.plan import SyncPlan
from reshard.sync.staging import Copies
from reshard.sync.tensors import DTYPES, Tensors, scales_of

_COLUMNS = 4093  # a prime: no dimension of a model is a multiple of it, so that rows of a matrix never lie in step
_SMALL = 1 << 16  # bytes: boxes of fewer are copied together and summed at once
_PIECE = 1 << 20  # bytes summed at a time: they, and what is copied or cast for it, stay in a core's cache
_TOGETHER = 256  # boxes whose sums are mixed at once


@dataclass(frozen=True)
class Item:
    """A box of tensor `key` to sum, as elements of dtype `wire`, and where it lies at this end in `stored`. With `blocks` it is
    quantised: with its scales at the taker (`scaled`), still to be quantised at the sender."""

    key: Key
    box: Box
    wire: str
    stored: Stored
    offset: int
    strides: tuple[int, ...]
    blocks: Blocks | None = None
    scaled: bool = False
    order: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit numbers in which each bit of the input changes half of the output's (splitmix64's)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=16)
def numbers(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """`count` 64-bit numbers, one for each place."""
    return mix(torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131 + seed)


def word_sums(boxes: Iterable[Iterable[torch.Tensor]]) -> torch.Tensor:
    """The sum of each box, given as pieces: 1-d int64 tensors of its words. 1-d; the boxes lie on one device."""
    columns, rows, counts = [], [], []
    for pieces in boxes:
        total, before = None, len(rows)
        for words in pieces:
            square = words[: len(words) // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
            rest, own = words[square.numel() :], square.sum(0)
            rows.append(square.sum(1))
            if len(rest):
                own[: len(rest)] += rest
                rows.append(rest.sum().view(1))
            total = own if total is None else total.add_(own)
        columns.append(total)
        counts.append(sum(map(len, rows[before:])))
    table, flat = torch.stack(columns), torch.cat(rows)
    owners = torch.repeat_interleave(torch.tensor(counts)).to(flat.device)
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0).to(flat.device)
    places = torch.arange(len(flat), device=flat.device) - starts[owners]
    most = 1 << max(counts).bit_length()
    out = mix(table ^ numbers(_COLUMNS, 1, flat.device)).sum(1)
    return out.index_add_(0, owners, mix(flat ^ numbers(most, 2, flat.device)[places]))


class Sums:
    """The sums of the tensors between this process and its peers, made ready once: ``run`` reads what the tensors hold then."""

    def __init__(self, items: dict[tuple[int, int], list[Item]], tensors: Tensors):
        self.labels: dict[tuple[int, int], list[str]] = {}
        self._places: dict[tuple[int, int], slice] = {}
        self._whole: list[tuple[int, int, torch.Tensor, tuple[int, ...], str]] = []  # (place of the sum, factor, view, shape, dtype)
        self._to_quantise: list[tuple[int, int, torch.Tensor, tuple[int, ...], Blocks]] = []
        self._batches: list[_Batch] = []
        self.size = 0
        for pair, own in sorted(items.items()):
            own.sort(key=lambda item: (item.key, item.box, item.order))
            keys = list(dict.fromkeys(item.key for item in own))
            self.labels[pair] = [label(key) for key in keys]
            self._places[pair] = slice(self.size, self.size + len(keys))
            place = {key: self.size + i for i, key in enumerate(keys)}
            self.size += len(keys)
            batch = _Batch()
            for number, item in enumerate(own):
                factor = _odd(number)
                values, shape = _elements(item, tensors)
                if item.blocks and not item.scaled:
                    self._to_quantise.append((place[item.key], factor, values, shape, item.blocks))
                elif item.blocks:
                    self._whole.append((place[item.key], factor, values, shape, item.wire))
                    self._whole.append((place[item.key], factor * 3, _scales(item, tensors), item.blocks.grid, "F32"))
                elif values.numel() * DTYPE_SIZE[item.wire] >= _SMALL:
                    self._whole.append((place[item.key], factor, values, shape, item.wire))
                elif not batch.takes(place[item.key], factor, values, item.wire):
                    self._batches.append(batch)
                    batch = _Batch()
                    batch.takes(place[item.key], factor, values, item.wire)
            if batch.values:
                self._batches.append(batch)

    def run(self) -> dict[tuple[int, int], torch.Tensor]:
        """Per pair of processes one int64 for each label, on the CPU."""
        out = torch.zeros(self.size, dtype=torch.int64)
        scratch: dict[torch.device, torch.Tensor] = {}

        def add(boxes: list[tuple[int, int, torch.Tensor, tuple[int, ...], str]]) -> None:
            values = word_sums(_words(view.reshape(shape), wire, scratch) for _, _, view, shape, wire in boxes).cpu()
            out.index_add_(0, torch.tensor([b[0] for b in boxes]), values * torch.tensor([_wrapped(b[1]) for b in boxes]))

        for device in {view.device for _, _, view, _, _ in self._whole}:
            own = [whole for whole in self._whole if whole[2].device == device]
            for low in range(0, len(own), _TOGETHER):
                add(own[low : low + _TOGETHER])
        for place, factor, view, shape, blocks in self._to_quantise:
            fp8, scales = quantise(view, blocks)
            add([(place, factor, fp8, shape, "F8_E4M3"), (place, factor * 3, scales, blocks.grid, "F32")])
        for batch in self._batches:
            out.index_add_(0, torch.tensor(batch.places), batch.sums().cpu() * torch.tensor(batch.factors))
        return {pair: out[where] for pair, where in self._places.items()}


@dataclass
class _Batch:
    """Small boxes, copied one after another into one buffer. Which ones is settled by their sizes, the same at both ends."""

    places: list[int] = field(default_factory=list)
    factors: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # in words
    wires: list[str] = field(default_factory=list)
    filled: int = 0

    def takes(self, place: int, factor: int, values: torch.Tensor, wire: str) -> bool:
        words = -(-values.numel() * DTYPE_SIZE[wire] // 8)
        if self.values and self.filled + words > _SMALL:  # words
            return False
        self.filled += words
        self.places.append(place)
        self.factors.append(_wrapped(factor))
        self.values.append(values)
        self.wires.append(wire)
        self.ends.append(self.filled)
        return True

    def sums(self) -> torch.Tensor:
        device = self.values[0].device
        words = torch.zeros(self.filled, dtype=torch.int64, device=device)
        flat, copies, start = words.view(torch.uint8), Copies(), 0
        for values, wire, stop in zip(self.values, self.wires, self.ends):
            size = values.numel() * DTYPE_SIZE[wire]
            copies.add(flat[8 * start : 8 * start + size].view(DTYPES[wire]).view(values.shape), values)
            start = stop
        copies.run()
        upto = mix(words ^ numbers(_SMALL, 3, device)[: len(words)]).cumsum(0)[torch.tensor(self.ends, device=device) - 1]
        return torch.diff(upto, prepend=upto.new_zeros(1))


def _elements(item: Item, tensors: Tensors) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The box where it lies, and its shape in its own axes, which the view may have more of."""
    return tensors[item.stored.id].view(item.shape, item.offset, item.strides), item.shape


def _scales(item: Item, tensors: Tensors) -> torch.Tensor:
    offset, step = scale_place(item.stored, item.offset, item.blocks.edge)
    return tensors[scales_of(item.stored.id)].view(item.blocks.grid, offset, (step, 1))


def _words(values: torch.Tensor, wire: str, scratch: dict[torch.device, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of a box as elements of `wire`, row-major, as int64 words: in pieces, as many at both ends however it lies, the
    last word of each filled up with zeros. What must be copied or cast for it is good until the next piece."""
    kind = DTYPES[wire]
    for box in halved(tuple((0, n) for n in values.shape), _PIECE // kind.itemsize):
        piece = values[tuple(slice(*ends) for ends in box)]
        size = piece.numel() * kind.itemsize
        if piece.dtype == kind and size % 8 == 0 and piece.is_contiguous() and piece.storage_offset() * kind.itemsize % 8 == 0:
            yield piece.view(-1).view(torch.int64)
            continue
        if scratch.get(piece.device) is None:
            scratch[piece.device] = torch.empty(_PIECE // 8, dtype=torch.int64, device=piece.device)
        words = scratch[piece.device][: -(-size // 8)]
        words[-1:] = 0
        words.view(torch.uint8)[:size].view(kind).view(piece.shape).copy_(piece)
        yield words


def _odd(number: int) -> int:
    """An odd factor for the `number`-th of several."""
    return _wrapped((number * 0x9E3779B97F4A7C15 ^ 0x5851F42D4C957F2D) | 1)


def _wrapped(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


# ------------------------------------------------------------------------------------------------------------ what is summed


def sent_and_taken(part: RankPlan) -> tuple[dict[tuple[int, int], list[Item]], dict[tuple[int, int], list[Item]]]:
    """What this process sends and what it takes, per (sender, taker), to be summed at both ends."""
    sent, taken = defaultdict(list), defaultdict(list)
    for t in part.transfers:
        if t.sender != t.taker:
            at, move = t.copy, t.copy.move
            if t.sender == part.process:
                item = Item(at.key, move.box, t.wire, at.src, move.src_offset, move.src_strides, t.blocks, False, at.dst.name)
                sent[t.sender, t.taker].append(item)
            else:
                item = Item(at.key, move.box, t.wire, at.dst, move.dst_offset, move.dst_strides, t.blocks, bool(t.blocks), at.dst.name)
                taken[t.sender, t.taker].append(item)
    return dict(sent), dict(taken)


def replicated(plan: SyncPlan, part: RankPlan) -> dict[tuple[int, int], list[Item]]:
    """What this process holds of the weights and others hold too, per (replica, first holder): replicas compare with the first. Of
    a window of the source, what belongs to it, among processes that hold the same tensors."""
    found: dict[tuple[int, int], list[Item]] = defaultdict(list)
    here = None if part.gives is None else {s.id for s in part.gives}
    for (key, box), (holders, stored, block) in plan.shared(part.process).items():
        if here is not None:
            holders = tuple(p for p in holders if p in plan.source.at(stored.rank)) if stored.id in here else ()
        item = Item(key, box, stored.dtype, stored, block.offset, block.strides)
        for other in holders[1:]:
            if part.process in (holders[0], other):
                found[other, holders[0]].append(item)
    return dict(found)


def differing(labels: list[str], mine: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    return [label for label, same in zip(labels, (mine == theirs).tolist()) if not same]
