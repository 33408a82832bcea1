"""A plan cut into tiles: boxes small enough for a worker's buffer, in order of where they lie in the source. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Box, Id, Key, Stored, end
from reshard.geometry.pieces import union_volume
from reshard.planner.copies import Computed, Copy
from reshard.planner.plan import Plan

BUFFER = 128 * 10**6  # bytes: of all buffers together, unless said otherwise
_TILE = 16 << 20  # bytes: large enough that Python costs nothing
_CAST_TILE = 2 << 20  # bytes: a cast holds each value several times over
PORTION, MOST_PORTION = 4 << 20, 64 << 20  # source bytes


@dataclass(frozen=True, slots=True)
class Tile:
    """Boxes of one or more tensors that are moved together, or computed: then they are cut where they are run."""

    boxes: dict[Key, Box]
    copies: list[Copy]
    checks: list[Copy]
    computed: list[Computed] = field(default_factory=list)

    @property
    def source_bytes(self) -> int:
        """Bytes that it takes from its sources, what several destinations want counted once."""
        moved = sum(used * DTYPE_SIZE[stored.dtype] for stored, _, _, used in spans(self).values())
        return moved + sum(each.source_bytes for each in self.computed)

    @property
    def flows(self) -> Iterator[tuple[str, str]]:
        """(file that is read, file that is written) of all that it fills."""
        yield from ((copy.src.file, copy.dst.file) for copy in self.copies)
        for each in self.computed:
            for held in each.sources:
                yield from ((source.stored.file, taker.stored.file) for source in held for taker in each.takers)

    @property
    def idle(self) -> bool:
        """Whether it fills nothing."""
        return not self.copies and not self.computed

    def cut(self, boxes: dict[Key, Box]) -> "Tile":
        """What of it lies in `boxes`."""
        return Tile(boxes, _clip(self.copies, boxes), _clip(self.checks, boxes))

    def without(self, finished: set[str]) -> "Tile":
        """What is left when the output files `finished` are."""
        computed = [left for each in self.computed if (left := each.without(finished)) is not None]
        return Tile(self.boxes, [c for c in self.copies if c.dst.file not in finished], self.checks, computed)


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are moved together: instances (number of the run, number in it) and where the first lies in the sources."""

    at: tuple[str, int]
    members: tuple[tuple[int, int], ...]

    def tile(self, plan: Plan) -> Tile:
        """All of it, spelled out."""
        out = Tile({}, [], [])
        for number, i in self.members:
            run = plan.join.runs[number]
            copies, checks = plan.spelled(run, i)
            boxes: dict[Key, list[Box]] = defaultdict(list)
            for copy in (*copies, *checks):
                boxes[copy.key].append(copy.move.box)
            for key, held in boxes.items():
                out.boxes[key] = tuple((min(b[a][0] for b in held), max(b[a][1] for b in held)) for a in range(len(held[0])))
            out.copies.extend(copies)
            out.checks.extend(checks)
            out.computed.extend(plan.computed(run, i))
        return out

    def source_bytes(self, plan: Plan) -> int:
        return sum(plan.bytes_of_one[plan.join.runs[number].pattern] for number, _ in self.members)


def groups(plan: Plan, sides: tuple[str, ...] = ("src", "dst")) -> list[Group]:
    """What must be moved together, in order of where it lies in the sources. Tensors that a file interleaves along their leading
    axis stay together, so that runs in it are long; `sides` whose interleaving counts."""
    runs = plan.join.runs
    first = {run.first: number for number, run in enumerate(runs)}
    leader = list(range(len(runs)))

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    for number, run in enumerate(runs):
        sources, destinations = plan.join.sources, plan.join.destinations
        held = [sources[column.at(0)[0]] for column in run.sources] if "src" in sides else []
        held += [destinations[column.at(0)[0]] for column in run.destinations] if "dst" in sides else []
        for stored in held:
            if stored.interleaved:
                for part in stored.parts:
                    mate = first.get((part.first[0], *run.first[1:]))
                    if mate is not None and runs[mate].count == run.count:
                        leader[find(mate)] = find(number)
    together: dict[int, list[int]] = defaultdict(list)
    for number in range(len(runs)):
        if plan.work[runs[number].pattern].copies or plan.join.patterns[runs[number].pattern].value:
            together[find(number)].append(number)
    out = [
        Group(_begin(plan, members, i), tuple((n, i) for n in members))
        for members in together.values()
        for i in range(runs[members[0]].count)
    ]
    return sorted(out, key=lambda group: (group.at, group.members))


def _begin(plan: Plan, members: list[int], i: int) -> tuple[str, int]:
    """File and byte where the first of some instances lies."""
    places = [column.at(i) for n in members for column in plan.join.runs[n].sources]
    held = [(plan.join.sources[number], start) for number, start in places]
    return min((stored.file, stored.start + start * DTYPE_SIZE[stored.dtype]) for stored, start in held)


def tiles(plan: Plan, limit: int = _TILE) -> Iterator[Tile]:
    """The plan cut into tiles of about `limit` source bytes, ordered by where they lie in the sources."""
    for group in groups(plan):
        yield from split(group.tile(plan), limit)


@dataclass(frozen=True, slots=True)
class Portion:
    """What of a plan over local files is noted as done together. Which portions there are depends on the plan alone."""

    plan: Plan
    whole: Group | Tile
    size: int  # bytes read for it

    @property
    def tiles(self) -> list[Tile]:
        tile = self.whole.tile(self.plan) if isinstance(self.whole, Group) else self.whole
        return [] if tile.idle else [tile]

    def without(self, finished: set[str]) -> "Portion":
        """What is left when the output files `finished` are."""
        for tile in self.tiles:
            left = tile.without(finished)
            if left != tile:
                return Portion(self.plan, left, 0 if left.idle else left.source_bytes)
        return self


def portions(plan: Plan) -> list[Portion]:
    """`plan` in portions: small enough that a killed run loses little, large enough that noting them costs nothing."""
    share = min(max(PORTION, plan.bytes_read // 256), MOST_PORTION)  # no worker is left with much when the others are done
    out: list[Portion] = []
    for group in groups(plan):
        size = group.source_bytes(plan)
        if size <= share or any(plan.join.patterns[plan.join.runs[number].pattern].value for number, _ in group.members):
            out.append(Portion(plan, group, size))
        else:
            out += [Portion(plan, tile, tile.source_bytes) for tile in split(group.tile(plan), share)]
    return out


def split(tile: Tile, limit: int) -> Iterator[Tile]:
    """`tile` cut along the leading axes of its tensors until it fits `limit` source bytes; what is computed is one tile, and the
    last: it is cut where it is run."""
    if tile.computed:
        if tile.boxes:
            yield from split(Tile(tile.boxes, tile.copies, tile.checks), limit)
        yield Tile({}, [], [], tile.computed)
        return
    size = tile.source_bytes
    if size <= limit:
        yield tile
        return
    shared = {box[0] for box in tile.boxes.values() if box}
    if len(tile.boxes) > 1 and (len(shared) > 1 or next(iter(shared))[1] - next(iter(shared))[0] < 2):
        for key, box in tile.boxes.items():
            yield from split(tile.cut({key: box}), limit)
        return
    box = next(iter(tile.boxes.values()))
    axis = next((a for a, (start, stop) in enumerate(box) if stop - start > 1), None)
    if axis is None:
        yield tile
        return
    start, stop = box[axis]
    pieces = min(max(2, -(-size // limit)), stop - start)
    step = -(-(stop - start) // pieces)
    for low in range(start, stop, step):
        part = (low, min(low + step, stop))
        yield from split(tile.cut({k: b[:axis] + (part,) + b[axis + 1 :] for k, b in tile.boxes.items()}), limit)


def _clip(copies: Iterable[Copy], boxes: dict[Key, Box]) -> list[Copy]:
    out = []
    for copy in copies:
        bound = boxes.get(copy.key)
        move = copy.move.clip(bound) if bound is not None else None
        if move is not None:
            out.append(copy if move == copy.move else Copy(copy.key, copy.src, copy.dst, move))
    return out


def sides(tile: Tile) -> list[tuple[Stored, Copy, int, tuple[int, ...]]]:
    """All that a tile reads: the stored tensor, the copy, and where in the tensor (element offset, strides) its box lies."""
    read = [(c.src, c, c.move.src_offset, c.move.src_strides) for c in (*tile.copies, *tile.checks)]
    return read + [(c.dst, c, c.move.dst_offset, c.move.dst_strides) for c in tile.checks]


#: a stored tensor, the elements from and to which it is needed, and how many of them are
Span = tuple[Stored, int, int, int]


def spans(tile: Tile) -> dict[Id, Span]:
    """Per source that a tile takes from, by its ``Stored.id``, what of it is needed."""
    found: dict[Id, Span] = {}
    boxes: dict[tuple[Id, Key], set[Box]] = defaultdict(set)
    for stored, copy, offset, strides in sides(tile):
        stop = end(offset, copy.move.shape, strides)
        _, low, high, _ = found.get(stored.id, (stored, offset, stop, 0))
        found[stored.id] = stored, min(low, offset), max(high, stop), 0
        boxes[stored.id, copy.key].add(copy.move.box)
    for (at, _), held in boxes.items():
        stored, low, high, used = found[at]
        found[at] = stored, low, high, used + union_volume(held)
    return found


def between(tile: Tile) -> int:
    """Bytes from the first to the last that a tile needs of each source, of those sources where it does not need all of them."""
    return sum((high - low) * DTYPE_SIZE[stored.dtype] for stored, low, high, used in spans(tile).values() if used != high - low)


def casts(plan: Plan) -> bool:
    """Whether any value changes: a copy its dtype, or it is computed."""
    held = plan.join
    return any(pattern.value for pattern in held.patterns) or any(held.sources[run.sources[a].at(0)[0]].dtype != held.destinations[run.destinations[b].at(0)[0]].dtype
               for run in held.runs for a, b, _ in plan.work[run.pattern].copies)  # fmt: skip


def tile_limit(plan: Plan, jobs: int, buffer: int) -> int:
    """Source bytes of a tile: a worker holds it at most four times over (as read, rearranged, and both for a cast)."""
    return max(64 << 10, min(_CAST_TILE if casts(plan) else _TILE, buffer // (4 * jobs)))


def peak_buffer(plan: Plan, jobs: int, buffer: int) -> int:
    """The most bytes that buffers take together while `plan` runs."""
    limit = tile_limit(plan, jobs, buffer)
    if max(plan.bytes_of_one, default=0) < limit:  # a small model: less than one whole tile
        limit = min(limit, max((group.source_bytes(plan) for group in groups(plan)), default=0))
    return 4 * jobs * limit
