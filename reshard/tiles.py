"""A plan cut into tiles: boxes small enough for a worker's buffer, in order of where they lie in the source. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from reshard.block import Block, Box, Stored, end, overlap
from reshard.join import Copy, Plan, _read_bytes, move_between, union_volume
from reshard.stores import DTYPE_SIZE

BUFFER = 128 * 10**6  # bytes: of all buffers together, unless said otherwise
_TILE = 16 << 20  # bytes: large enough that Python costs nothing
_CAST_TILE = 2 << 20  # bytes: torch's own memory is enough beside it
_PORTION, _MOST_PORTION = 4 << 20, 64 << 20  # source bytes


@dataclass
class Tile:
    """Boxes of one or more tensors that are moved together."""

    boxes: dict[tuple, Box]
    copies: list[Copy]
    checks: list[Copy] = field(default_factory=list)

    def without(self, finished: set[int]) -> "Tile":
        """What is left when destinations, by id, are finished."""
        return Tile(self.boxes, [c for c in self.copies if id(c.dst) not in finished], self.checks)


@dataclass(frozen=True, slots=True)
class Portion:
    """What of a plan over local files is noted as done together. Which portions there are depends on the plan alone."""

    tiles: list[Tile]

    @property
    def size(self) -> int:
        """Bytes read for it."""
        return sum(_read_bytes(tile.copies, tile.checks) for tile in self.tiles)

    def without(self, finished: set[int]) -> "Portion":
        """What is left when destinations, by id, are finished."""
        return Portion([left for tile in self.tiles if (left := tile.without(finished)).copies])


def portions(plan: Plan) -> list[Portion]:
    """`plan` in portions: small enough that a killed run loses little, large enough that noting them costs nothing."""
    share = min(max(_PORTION, plan.bytes_read // 256), _MOST_PORTION)  # no worker is left with much when the others are done
    return [Portion([part]) for group in ordered(plan) for part in split(group, share)]


def tiles(plan: Plan, limit: int = _TILE) -> Iterator[Tile]:
    """The plan cut into tiles of about `limit` source bytes, ordered by where they lie in the sources."""
    for group in ordered(plan):
        yield from split(group, limit)


def ordered(plan: Plan, sides: tuple[str, ...] = ("src", "dst")) -> list[Tile]:
    """What must be moved together, whole, in order of where it lies in the sources. `sides` whose interleaving counts."""
    return sorted(_groups(plan, sides), key=lambda group: min((c.src.file, c.src.start + c.move.src_offset) for c in group.copies))


def _groups(plan: Plan, sides: tuple[str, ...] = ("src", "dst")) -> list[Tile]:
    """Copies gathered by tensor; tensors that some file interleaves along their leading axis stay together."""
    leader: dict[tuple, tuple] = {}

    def find(key: tuple) -> tuple:
        while leader.get(key, key) != key:
            key = leader[key]
        return key

    by_key: dict[tuple, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_key[copy.key].append(copy)
    for copies in by_key.values():
        for stored in {id(s): s for c in copies for s in (getattr(c, side) for side in sides)}.values():
            if getattr(stored.entry, "within", None) and len(stored.blocks) > 1:
                mates = [key for key, block in stored.blocks if key[1:] == copies[0].key[1:]]
                if len({block.strides[0] for key, block in stored.blocks if key in mates}) == 1:
                    for key in mates:
                        if key in by_key and find(key) != find(mates[0]):
                            leader[find(key)] = find(mates[0])
    checks: dict[tuple, list[Copy]] = defaultdict(list)
    for check in plan.checks:
        checks[check.key].append(check)
    groups: dict[tuple, Tile] = {}
    for key, copies in by_key.items():
        group = groups.setdefault(find(key), Tile({}, []))
        boxes = [c.move.box for c in copies] + [c.move.box for c in checks[key]]
        group.boxes[key] = tuple((min(b[a][0] for b in boxes), max(b[a][1] for b in boxes)) for a in range(len(boxes[0])))
        group.copies += copies
        group.checks += checks[key]
    return list(groups.values())


def split(tile: Tile, limit: int) -> Iterator[Tile]:
    """`tile` halved along the leading axes of its tensors until it fits `limit`."""
    size = source_bytes(tile)
    if size <= limit:
        yield tile
        return
    shared = {box[0] for box in tile.boxes.values() if box}
    if len(tile.boxes) > 1 and (len(shared) > 1 or next(iter(shared))[1] - next(iter(shared))[0] < 2):
        for key, box in tile.boxes.items():
            yield from split(cut(tile, {key: box}), limit)
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
        yield from split(cut(tile, {k: b[:axis] + (part,) + b[axis + 1 :] for k, b in tile.boxes.items()}), limit)


def source_bytes(tile: Tile) -> int:
    """Bytes that a tile takes from its sources, what several destinations want counted once."""
    wanted = {(id(c.src), c.key, c.move.box): c.src_bytes for c in (*tile.copies, *tile.checks)}
    wanted |= {(id(c.dst), c.key, c.move.box): c.src_bytes for c in tile.checks}
    return sum(wanted.values())


def spans(tile: Tile) -> dict[int, list]:
    """Per source that a tile takes from, by id: the stored tensor, the elements from and to which it is needed, and how many of them are."""
    found: dict[int, list] = {}
    boxes: dict[tuple[int, tuple], set[Box]] = defaultdict(set)
    for stored, copy, offset, strides in sides(tile):
        stop = end(offset, copy.move.shape, strides)
        span = found.setdefault(id(stored), [stored, offset, stop, 0])
        span[1], span[2] = min(span[1], offset), max(span[2], stop)
        boxes[id(stored), copy.key].add(copy.move.box)
    for (at, _), held in boxes.items():
        found[at][3] += union_volume(held)
    return found


def sides(tile: Tile) -> list[tuple[Stored, Copy, int, tuple[int, ...]]]:
    """All that a tile reads: the stored tensor, the copy, and where in the tensor (element offset, strides) its box lies."""
    read = [(c.src, c, c.move.src_offset, c.move.src_strides) for c in (*tile.copies, *tile.checks)]
    return read + [(c.dst, c, c.move.dst_offset, c.move.dst_strides) for c in tile.checks]


def between(tile: Tile) -> int:
    """Bytes from the first to the last that a tile needs of each source, of those sources where it does not need all of them."""
    return sum((high - low) * DTYPE_SIZE[stored.dtype] for stored, low, high, used in spans(tile).values() if used != high - low)


def cut(tile: Tile, boxes: dict[tuple, Box]) -> Tile:
    """What of `tile` lies in `boxes`."""
    return Tile(boxes, _clip(tile.copies, boxes), _clip(tile.checks, boxes))


def _clip(copies: Iterable[Copy], boxes: dict[tuple, Box]) -> list[Copy]:
    out = []
    for copy in copies:
        bound = boxes.get(copy.key)
        move = copy.move
        box = bound and overlap(move.box, bound)
        if box is None:
            continue
        if box != move.box:
            source, destination = Block(move.box, move.src_offset, move.src_strides), Block(move.box, move.dst_offset, move.dst_strides)
            move = move_between(source.clip(box), destination)
        out.append(Copy(copy.key, copy.src, copy.dst, move))
    return out


def tile_limit(plan: Plan, jobs: int, buffer: int) -> int:
    """Source bytes of a tile: a worker holds it at most four times over (as read, rearranged, and both for a cast)."""
    casts = any(copy.src.dtype != copy.dst.dtype for copy in plan.copies)
    return max(64 << 10, min(_CAST_TILE if casts else _TILE, buffer // (4 * jobs)))


def peak_buffer(plan: Plan, jobs: int, buffer: int) -> int:
    """The most bytes that buffers take together while `plan` runs."""
    limit = tile_limit(plan, jobs, buffer)
    if not any(copy.src_bytes >= limit for copy in plan.copies):  # a small model: less than one whole tile
        limit = min(limit, max((source_bytes(group) for group in _groups(plan)), default=0))
    return 4 * jobs * limit


