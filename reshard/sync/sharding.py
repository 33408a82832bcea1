"""How DTensors lie: which ranges of a tensor each process of a device mesh holds. Pure.

A mesh is nested tuples of processes. torch.chunk's rule throughout; a strided shard (FSDP over TP, packed tensors) is several ranges.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from reshard import formats
from reshard.errors import PlanError
from reshard.geometry.block import Block, Key, Stored, restride, row_major
from reshard.geometry.regions import intervals, slice_dim
from reshard.layout import Layout, Mesh, Placement, Section

#: how one dimension of a device mesh cuts a tensor: None replicates, a number is Shard(dim), a pair is _StridedShard(dim, split_factor)
Cut = None | int | tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """How a DTensor lies: `ranks` is its device mesh, nested lists of processes, `cuts` one Cut per dimension of that mesh."""

    ranks: tuple
    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuples(self.ranks))

    @property
    def sizes(self) -> tuple[int, ...]:
        return sizes(self.ranks)[: len(self.cuts)]

    def members(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(process, its place in the mesh) of all processes."""
        return zip(flat(self.ranks), product(*map(range, self.sizes)))

    def along(self, dim: int, dims: int, coordinate: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """What cuts dimension `dim` of a tensor of `dims` dimensions at one place of the mesh, as ``intervals`` takes it."""
        pairs = [cut if isinstance(cut, tuple) else (cut, 1) for cut in self.cuts]
        return [(n, i, factor) for n, i, (on, factor) in zip(self.sizes, coordinate, pairs) if on is not None and on % dims == dim]

    def held(self, process: int, shape: tuple[int, ...]) -> list[list[tuple[int, int]]] | None:
        """The ranges of each dimension that `process` holds; None where it is not in the mesh."""
        at = dict(self.members()).get(process)
        return None if at is None else [intervals(n, self.along(dim, len(shape), at)) for dim, n in enumerate(shape)]

    def extended(self, mesh: tuple) -> "Sharding | None":
        """This over all of `mesh`, replicated along the dimensions that its own mesh does not have; itself where it has all the
        ranks; None where its mesh is no part of `mesh`."""
        own = flat(self.ranks)
        if sorted(own) == sorted(flat(mesh)):
            return self
        places = dict(zip(flat(mesh), product(*map(range, sizes(mesh)))))
        if not places.keys() >= set(own):
            return None
        for dims in permutations(range(len(sizes(mesh))), len(self.sizes)):
            if tuple(sizes(mesh)[d] for d in dims) != self.sizes:
                continue

            def there(at: tuple[int, ...], dims: tuple[int, ...] = dims) -> tuple[int, ...]:
                steps = dict(zip(dims, at))
                return tuple(steps.get(d, index) for d, index in enumerate(places[own[0]]))

            if all(places[rank] == there(at) for rank, at in self.members()):
                cuts = dict(zip(dims, self.cuts))
                return Sharding(mesh, tuple(cuts.get(d) for d in range(len(sizes(mesh)))))
        return None


def tuples(ranks: Sequence) -> tuple:
    """Nested lists as nested tuples."""
    return tuple(tuples(x) if isinstance(x, list | tuple) else x for x in ranks)


def sizes(mesh: tuple) -> tuple[int, ...]:
    """Sizes of a mesh's dimensions."""
    out = []
    while isinstance(mesh, tuple):
        out.append(len(mesh))
        mesh = mesh[0]
    return tuple(out)


def flat(mesh: tuple) -> list[int]:
    """The processes of a mesh in its order."""
    return [rank for part in mesh for rank in (flat(part) if isinstance(part, tuple) else [part])]


def nested(ranks: Sequence, sizes: Sequence[int]) -> tuple:
    """The mesh of `ranks` whose dimensions have `sizes`."""
    if len(sizes) == 1:
        return tuple(ranks)
    step = len(ranks) // sizes[0]
    return tuple(nested(ranks[i * step : (i + 1) * step], sizes[1:]) for i in range(sizes[0]))


def fsdp(
    layout: Layout,
    *,
    dp: int = 1,
    tp: int = 1,
    ranks: Iterable[int],
    replicas: int = 1,
    variants: Sequence[str] = (),
    outside_tp: Iterable[str] = (),
) -> dict[str, Sharding]:
    """The shardings of a model under FSDP2's ``fully_shard`` over `dp`, on top of tensor parallelism over `tp` by its
    layout's rule: what ``shardings(model)`` reads there, for ranks that have no such model. The mesh is (replicas, dp, tp), its
    dimensions of size 1 left out; `ranks` in its order. `outside_tp`: tensors of the layout that the tensor parallel plan leaves
    whole (``["embed", "lm_head"]``)."""
    whole_over_tp = frozenset(outside_tp)
    if unknown := sorted(whole_over_tp - set(layout.descriptor.tensors)):
        raise PlanError(
            [f"{name} is no tensor of layout {layout.name}" for name in unknown], f"known are {', '.join(layout.descriptor.tensors)}"
        )
    processes = list(ranks)
    if len(processes) != replicas * dp * tp:
        raise PlanError([f"{len(processes)} ranks for {replicas} × dp{dp} × tp{tp} = {replicas * dp * tp}"])
    kept = {name: size for name, size in (("replicas", replicas), ("dp", dp), ("tp", tp)) if size > 1} or {"dp": 1}
    mesh = nested(processes, list(kept.values()))
    out = {}
    for whole in unsharded(layout, variants).stored():
        dim = _split_dim(layout, whole) if tp > 1 and not whole_over_tp.intersection(whole.entry.of) else None
        cuts: dict[str, Cut] = {"replicas": None, "dp": (0, tp) if dim == 0 else 0, "tp": dim}
        out[whole.name] = Sharding(mesh, tuple(cuts[name] for name in kept))
    return out


def _split_dim(layout: Layout, whole: Stored) -> int | None:
    """The dimension of an HF tensor that its layout's tensor parallelism cuts."""
    tensor = layout.descriptor.tensors[whole.entry.of[0]]
    dims = whole.entry.dims_of(tensor)
    lead = len(whole.shape) - len(dims)
    return next((lead + d for d, axes in enumerate(dims) if tensor.split and tensor.split[0] in axes), None)


def unsharded(layout: Layout, variants: Sequence[str] = ()) -> Placement:
    """All HF tensors whole, in the layout's other spellings that `variants` names."""
    section = layout.section("hf")
    return Placement(layout, spelled(section, section, variants), formats.get("hf").rules, Mesh())


def spelled(section: Section, known: Section, variants: Sequence[str]) -> Section:
    """`section` with those of `known`'s variants that are named."""
    names = {name: variant for name, _, variant in known.variants}
    for name in variants:
        if name not in names:
            raise PlanError([f"unknown variant {name!r}"], f"known are {', '.join(names) or 'none'}")
        section = section.overlaid(names[name])
    return section


def local_part(whole: Stored, sharding: Sharding, coordinate: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[Key, Block]]]:
    """Shape and blocks of one place's part of an HF tensor."""
    shape, blocks, dims = whole.shape, list(whole.blocks), len(whole.shape)
    for cut in sharding.cuts:
        on = cut[0] if isinstance(cut, tuple) else cut
        if on is not None and not -dims <= on < dims:
            raise PlanError([f"{whole.name}: sharded along dimension {on}, it has {dims}"])
    for dim in range(dims):
        cuts = sharding.along(dim, dims, coordinate)
        if not cuts:
            continue
        parts, ranges = [], intervals(shape[dim], cuts)
        local = (*shape[:dim], sum(high - low for low, high in ranges), *shape[dim + 1 :])
        steps, at = row_major(local), 0
        for low, high in ranges:
            piece, cut_blocks = slice_dim(shape, blocks, dim, low, high)
            parts += [(key, restride(block, piece, steps).moved(at * steps[dim])) for key, block in cut_blocks]
            at += high - low
        shape, blocks = local, parts
    return shape, blocks
