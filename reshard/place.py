"""Where a bound layout puts every tensor: the stored tensors of each rank of a (format, mesh).

``Placement(layout, section, rules, mesh).stored()`` is the whole geometry of reshard: names, shapes and blocks, from
integers alone. Each rule is written once and serves both directions, since reading and writing a format are the same
placement on the two sides of a join.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import lcm, prod

from reshard.errors import LayoutError, PlanError
from reshard.expr import evaluate, holds
from reshard.foreign import quote
from reshard.geometry.block import Block, Part, Stored, chunk, cut, restride, row_major
from reshard.layout import Constant, Entry, Layout, Section, Tensor

#: ranks of one mesh: more than any model was ever spread over, and few enough to be counted one by one
MOST_RANKS = 65536


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the parallel dimensions. `etp` cuts experts where tp cuts the rest; 0 means the format's own choice."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0

    def __post_init__(self):
        for name, least in (("tp", 1), ("pp", 1), ("ep", 1), ("etp", 0)):
            size = getattr(self, name)
            if type(size) is not int or not least <= size <= MOST_RANKS:
                raise PlanError([f"{name} is {quote(repr(size))}, expected a whole number from {least} to {MOST_RANKS}"])
        if self.pp * max(self.tp, self.ep) > MOST_RANKS:
            raise PlanError([f"tp={self.tp}, pp={self.pp}, ep={self.ep} is a mesh of more than {MOST_RANKS} ranks"])

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in (("pp", self.pp), ("ep", self.ep)) if size > 1]
        return "×".join([f"tp{self.tp}", *sizes])


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's place in the mesh. `number` orders the ranks of a format."""

    number: int
    tp: int
    pp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Rules:
    """What a format does alike for all architectures.

    `even`: its engine refuses cuts that leave a remainder. `local`: layers are numbered from 0 in each stage and
    experts from 0 in each rank. `ranks`: its ranks, in order. `stages`: the layers of each pipeline stage.
    """

    ranks: Callable[[Mesh], list[Rank]]
    stages: Callable[[int, int], list[list[int]]]
    even: bool = True
    local: bool = False


def even_stages(layers: int, stages: int) -> list[list[int]]:
    """Layers in order, as many to each stage as to any other. Raises PlanError when they don't divide."""
    if layers % stages:
        raise PlanError([f"cannot split {layers} layers over pp={stages}"], f"use a pp that divides {layers}")
    size = layers // stages
    return [list(range(i * size, (i + 1) * size)) for i in range(stages)]


def grid(mesh: Mesh) -> list[Rank]:
    """Ranks of a format in which each tensor-parallel rank is an expert-parallel one too: tp fastest, then pp.

    With ep > 1 the experts are dealt out whole to the ranks of a stage, as vLLM's --enable-expert-parallel does.
    """
    if mesh.ep not in (1, mesh.tp) or mesh.etp not in (0, 1 if mesh.ep > 1 else mesh.tp):
        raise PlanError([f"ep={mesh.ep} with tp={mesh.tp}: this format deals experts out to its tensor-parallel ranks"],
                        f"use --ep 1 or --ep {mesh.tp}")  # fmt: skip
    return [
        Rank(p * mesh.tp + t, t, p, t if mesh.ep > 1 else 0, 0 if mesh.ep > 1 else t)
        for p in range(mesh.pp)
        for t in range(mesh.tp)
    ]


def stage_order(mesh: Mesh, etp: int) -> list[tuple[int, int, int]]:
    """(tp, ep, etp) of each process of one stage and one replica, in Megatron's own order: the tensor-parallel rank runs
    fastest, for experts the expert-tensor-parallel one (``parallel_state.py``)."""
    return [(g % mesh.tp, g // etp % mesh.ep, g % etp) for g in range(lcm(mesh.tp, mesh.ep * etp))]


def expert_cut(mesh: Mesh, ranks: list[Rank]) -> int:
    """How many ranks cut each expert, where the mesh leaves it to the format."""
    return mesh.etp or (1 if mesh.ep > 1 and ranks[-1].etp == 0 else mesh.tp)


@dataclass
class Placement:
    """All stored tensors of a format on a mesh. `pads` overrides padded sizes, for a source that was padded otherwise."""

    layout: Layout
    section: Section
    rules: Rules
    mesh: Mesh
    pads: dict[str, int] = field(default_factory=dict)
    engine: tuple[int, ...] | None = None  # the engine's release; None is the newest known
    problems: list[str] = field(default_factory=list)
    _geometry: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.scope = {**self.layout.scope, **self.layout.sizes,
                      "tp": self.mesh.tp, "pp": self.mesh.pp, "ep": self.mesh.ep,
                      "engine": list(self.engine or (999,))}  # fmt: skip
        self.ranks = self.rules.ranks(self.mesh)
        self.stages = self.rules.stages(self.layout.layers, self.mesh.pp)
        self.etp = expert_cut(self.mesh, self.ranks)

    def stored(self, ranks: list[Rank] | None = None, aliases: bool = False) -> Iterator[Stored]:
        """Stored tensors in order of rank, without dtypes. `aliases` adds names that are read but never written.

        Cuts that can't be made are gathered in `problems`, all of them; the caller raises.
        """
        entries = [e for e in self.section.entries if (aliases or not e.alias) and holds(e.when, self.scope)]
        for rank in ranks or self.ranks:
            for entry in entries:
                yield from self._entry(entry, rank)

    def constants(self, rank: Rank) -> Iterator[tuple[str, Constant]]:
        """Names and values of the tensors the engine demands beside the weights on `rank`."""
        for constant in self.section.constants:
            if "{layer}" not in constant.name:
                if holds(constant.when, self.scope):
                    yield constant.name, constant
                continue
            stage = self.stages[rank.pp]
            for i, layer in enumerate(stage):
                if holds(constant.when, {**self.scope, "layer": layer}):
                    yield constant.name.format(layer=i if self.rules.local else layer), constant

    def _entry(self, entry: Entry, rank: Rank) -> Iterator[Stored]:
        tensors = [self.layout.descriptor.tensors[name] for name in entry.of]
        index = tensors[0].index
        stage = entry.stage or tensors[0].stage
        layers: list = [None]
        if "layer" in index:
            layers = self.stages[rank.pp]
        elif (stage == "first" and rank.pp != 0) or (stage == "last" and rank.pp != self.mesh.pp - 1):
            return
        experts: list = [None]
        if "expert" in index:
            low, high = chunk(self.layout.sizes["expert"], self.mesh.ep, rank.ep)
            if self.rules.even and self.layout.sizes["expert"] % self.mesh.ep:
                self._problem(entry, f"cannot split {self.layout.sizes['expert']} experts over ep={self.mesh.ep}")
            experts = list(range(low, high))
        if not any(self.layout.exists(tensor, layer) for layer in layers for tensor in tensors):
            return
        if "expert" in index and not self.layout.sizes["expert"]:
            self._problem(entry, f"axis expert has size 0 by config.json ({self.layout.descriptor.axes['expert']})")
            return
        shape, blocks, pad = self._blocks(entry, tensors, rank, "expert" in index)
        size = prod(shape)
        stacked_layers, stacked_experts = "{layer}" not in entry.name, "{expert}" not in entry.name
        present: list[tuple] = []
        for i, layer in enumerate(layers):
            exist = [self.layout.exists(tensor, layer) for tensor in tensors]
            if not all(exist):
                if any(exist):
                    missing = tensors[exist.index(False)].name
                    self._problem(entry, f"fuses {', '.join(entry.of)}, but this model has no {missing} (layer {layer})")
                continue
            number = i if self.rules.local else layer
            here = [((layer, number), (expert, j if self.rules.local else expert)) for j, expert in enumerate(experts)]
            if stacked_layers and layer is not None:
                present += here
            elif stacked_experts and index[-1:] == ("expert",):
                yield self._stack(entry, rank, shape, size, blocks, pad, here, (len(here),))
            else:
                for (layer_, number_), (expert_, local) in here:
                    key = tuple(x for x in (layer_, expert_) if x is not None)
                    name = entry.name.format(layer=number_, expert=local) if index else entry.name
                    held = tuple([Part((t, *key), block) for t, block in blocks])
                    yield Stored(rank.number, name, "", shape if entry.view is None else self._viewed(entry, shape), held, entry, pad=pad)
        if present:
            lead = (len(present) // len(experts), len(experts)) if "expert" in index else (len(present),)
            yield self._stack(entry, rank, shape, size, blocks, pad, present, lead)

    def _stack(self, entry, rank, shape, size, blocks, pad, numbered, lead) -> Stored:
        """One stored tensor that holds many layers' or experts' tensors one after another."""
        out: list[Part] = []
        for tensor, block in blocks:
            for i, count in _stretches(numbered):
                (layer, _), (expert, _) = numbered[i]
                key = tuple(x for x in (layer, expert) if x is not None)
                out.append(Part((tensor, *key), block.moved(i * size), count, size if count > 1 else 0))
        name = entry.name.format(layer=numbered[0][0][1]) if numbered else entry.name
        return Stored(rank.number, name, "", self._viewed(entry, lead + shape), tuple(out), entry, pad=pad * len(numbered))

    def _viewed(self, entry: Entry, dims: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions that a stored tensor of `dims` is declared under: the same elements in the same order."""
        if entry.view is None:
            return dims
        if sorted(d for group in entry.view for d in group) != list(range(len(dims))):
            self._problem(entry, f"view = {[list(group) for group in entry.view]} must join each of its {len(dims)} dimensions once (0 to {len(dims) - 1})")
            return dims
        return tuple(prod(dims[d] for d in group) for group in entry.view)

    def _blocks(self, entry: Entry, tensors: list[Tensor], rank: Rank, expert: bool):
        """Shape and blocks of one stored tensor, and how many of its elements are padding; the same objects for every
        layer and expert."""
        index, count = (rank.etp, self.etp) if expert else (rank.tp, self.mesh.tp)
        if entry.only_rank0 and index:
            index = -index  # the same shape with nothing in it
        at = (entry, index, count)
        if at not in self._geometry:
            whole = entry.cut == "whole"
            boxes = [self._box(entry, t, 0 if whole else abs(index), 1 if whole else count) for t in tensors]
            self._sized(entry, tensors)
            shape, blocks = self._fused(entry, tensors, boxes, index, count)
            pad = 0
            if index < 0:
                blocks, pad = [], prod(shape)
            elif entry.pad:  # what the parts would fill if their padded axes were as long as that
                padded = [{axis: (extent, extent[1]) for axis, (extent, _) in box.items()} for box in boxes]
                filled = self._fused(entry, tensors, padded, index, count)[1]
                pad = sum(block.size for _, block in filled) - sum(block.size for _, block in blocks)
            self._geometry[at] = shape, blocks, pad
        return self._geometry[at]

    def _fused(self, entry: Entry, tensors: list[Tensor], boxes: list[dict], index: int, count: int):
        shape, blocks = fuse(self.layout, entry, tensors, boxes)
        if entry.cut == "whole" and count > 1:
            return self._slice(entry, shape, blocks, abs(index), count)
        return shape, blocks

    def _sized(self, entry: Entry, tensors: list[Tensor]) -> None:
        """A tensor that the model has, of no elements, is a mistake in config.json: nothing could be said of its place."""
        for tensor in tensors:
            for axis in tensor.axes:
                if self.layout.sizes[axis] == 0:
                    self._problem(entry, f"axis {axis} of {tensor.name} has size 0 by config.json ({self.layout.descriptor.axes[axis]})")

    def _box(self, entry: Entry, tensor: Tensor, index: int, count: int):
        """Per axis of `tensor`, (range of this rank in the padded tensor, true size)."""
        sizes = {axis: self._padded(entry, axis) for axis in tensor.axes}
        ranges = {axis: (0, size) for axis, size in sizes.items()}
        split = tensor.split if entry.split is None else entry.split
        left = count
        for axis in split:
            if left == 1:
                break
            size = sizes[axis]
            parts = left
            if left > size and axis in self.layout.descriptor.replicate:
                parts = size
                if left % size:
                    parts = left  # the last ranks hold nothing, where the format allows that
                    if self.rules.even:
                        self._problem(entry, f"cannot repeat {size} {axis} over {left} ranks: {left} is not a multiple of {size}")
            elif self.rules.even and size % parts:
                self._problem(entry, f"cannot split axis {axis} ({size}) of {tensor.name} evenly over {parts} ranks")
            left //= parts
            ranges[axis] = chunk(size, parts, index // left)
            index %= left
        return {axis: (ranges[axis], self.layout.sizes[axis]) for axis in tensor.axes}

    def _padded(self, entry: Entry, axis: str) -> int:
        for padded, text in entry.pad:
            if padded == axis:
                return self.pads.get(axis) or self._padding(entry, axis, evaluate(text, self.scope))
        return self.layout.sizes[axis]

    def _padding(self, entry: Entry, axis: str, size: object) -> int:
        if type(size) is not int or size < self.layout.sizes[axis]:
            raise LayoutError(f"layout {self.layout.name}: {entry.name}: pad of {axis} is {quote(repr(size))}, its size {self.layout.sizes[axis]}")
        return size

    def _slice(self, entry: Entry, shape, blocks, index: int, count: int):
        """A plain chunk of the fused dimension, which may begin and end inside a part."""
        dim = entry.dim
        if shape[dim] % count:
            self._problem(entry, f"cannot cut {shape[dim]} fused rows evenly over {count} ranks")
        low, high = chunk(shape[dim], count, index)
        return slice_dim(shape, blocks, dim, low, high, self.dim_axes(entry, dim))

    def dim_axes(self, entry: Entry, dim: int) -> dict[str, tuple[int, ...]]:
        """Per tensor of `entry`, the numbers of its axes that lie in dimension `dim`, from the slowest."""
        out = {}
        for name in entry.of:
            tensor = self.layout.descriptor.tensors[name]
            stored = entry.dims or tensor.dims
            out[name] = tuple(tensor.axes.index(axis) for axis in stored[dim])
        return out

    def _problem(self, entry: Entry, text: str) -> None:
        line = f"{entry.name}: {text}"
        if line not in self.problems:
            self.problems.append(line)


def _stretches(numbered: list) -> Iterator[tuple[int, int]]:
    """(position, count) of the tensors of a stack whose last numbers count up by one."""
    start = 0
    for i in range(1, len(numbered) + 1):
        before = numbered[i - 1]
        if i < len(numbered):
            (layer, _), (expert, _) = numbered[i]
            (last, _), (at, _) = before
            if (layer == last and expert == at + 1) if expert is not None else layer == last + 1:
                continue
        yield start, i - start
        start = i


def fuse(layout: Layout, entry: Entry, tensors: list[Tensor], boxes: list[dict]):
    """Shape of the stored tensor that holds the given boxes of `tensors`, and the block of each.

    Along dimension `entry.dim` the parts stand one after another, once for every position of the axes up to and
    including `entry.within` (once in all where that is None).
    """
    dims = [entry.dims or tensor.dims for tensor in tensors]
    within, fused = entry.within, entry.dim
    if within is not None:
        fused = next(d for d, axes in enumerate(dims[0]) if within in axes)
    extent = [{axis: stop - start for axis, ((start, stop), _) in box.items()} for box in boxes]

    def outer(part: int) -> tuple[str, ...]:
        axes = dims[part][fused] if dims[part] else ()
        return axes[: axes.index(within) + 1] if within is not None else ()

    widths = [prod(extent[p][axis] for axis in dims[p][fused][len(outer(p)):]) if dims[p] else 1 for p in range(len(tensors))]
    total = sum(widths)
    repeats = prod(extent[0][axis] for axis in outer(0))
    shape = tuple(
        repeats * total if d == fused else prod(extent[0][axis] for axis in axes) for d, axes in enumerate(dims[0])
    )
    for p, tensor in enumerate(tensors):
        own = tuple(prod(extent[p][a] for a in axes) for d, axes in enumerate(dims[p]) if d != fused)
        if own != tuple(s for d, s in enumerate(shape) if d != fused) or prod(extent[p][a] for a in outer(p)) != repeats:
            raise LayoutError(f"layout {layout.name}: {entry.name}: {entry.of[0]} and {tensor.name} cannot be fused: their sizes differ")
    steps = row_major(shape)
    blocks, before = [], 0
    for p, tensor in enumerate(tensors):
        strides: dict[str, int] = {}
        for d, axes in enumerate(dims[p]):
            step = steps[d]
            for axis in reversed(axes):
                if d == fused and within is not None and axis == within:
                    step = steps[d] * total
                strides[axis] = step
                step *= extent[p][axis]
        offset = before * (steps[fused] if shape else 0)
        before += widths[p]
        box = tuple((start, min(stop, boxes[p][axis][1])) for axis in tensor.axes for start, stop in [boxes[p][axis][0]])
        if all(start < stop for start, stop in box):
            blocks.append((tensor.name, Block(box, offset, tuple(strides[axis] for axis in tensor.axes))))
    return shape, blocks


def slice_dim(shape, blocks, dim: int, low: int, high: int, axes: dict[str, tuple[int, ...]]):
    """Rows [low, high) along `dim` of a stored tensor: its shape and blocks. `axes` names, per tensor, the axes in `dim`."""
    new = shape[:dim] + (high - low,) + shape[dim + 1 :]
    step = row_major(shape)[dim]
    steps = row_major(new)
    out = []
    for tensor, block in blocks:
        at = (block.offset // step) % shape[dim] * step  # the block's own place along dim
        for part in cut(block, axes[tensor], low * step - at, high * step - at):
            moved = restride(part, shape, steps)
            out.append((tensor, moved.moved(-low * steps[dim])))
    return new, out
