"""Where a bound layout puts every tensor: the stored tensors of each rank of a (format, mesh).

``Placement(layout, section, rules, mesh).stored()`` is the whole geometry of reshard: names, shapes and blocks, from
integers alone. Each rule is written once and serves both directions, since reading and writing a format are the same
placement on the two sides of a join.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.geometry.block import Block, Part, Stored, chunk
from reshard.geometry.regions import slice_dim
from reshard.layout.bound import Layout, Scope
from reshard.layout.expressions import evaluate, holds
from reshard.layout.fusion import Item, fuse, stored_dims
from reshard.layout.mesh import Mesh, Rank, Rules, expert_cut
from reshard.layout.model import Constant, Entry, Section, Tensor
from reshard.layout.schemes import attention_scales
from reshard.layout.values import PLATFORMS
from reshard.planner.values import formed

#: tensors in order, as (the numbers of the first, how many count up from its last number)
Runs = list[tuple[tuple[int, ...], int]]


@dataclass(eq=False, repr=False)
class Pattern:
    """One entry made ready: its tensors, and where they exist. What does not depend on the rank is worked out once.

    `numbers`: of its place, those in which the format holds it, each with its place's own sizes where these differ.
    `geometry`: shapes and blocks, by the rank's part and by those sizes.
    """

    entry: Entry
    tensors: tuple[Tensor, ...]
    numbers: Mapping[int | None, tuple]
    varying: bool  # sizes, pads or aligns depend on the number
    heads: dict = field(default_factory=dict)
    geometry: dict = field(default_factory=dict)

    @property
    def expert(self) -> bool:
        return "expert" in self.tensors[0].index

    @property
    def packed(self) -> bool:
        """Whether experts lie among the axes of its dimensions, and not one after another."""
        return self.expert and any("expert" in dim for dim in self.entry.dims or ())

    @property
    def stage(self) -> str:
        return self.entry.stage or self.tensors[0].stage


@dataclass
class Placement:
    """All stored tensors of a format on a mesh. `pads` overrides padded sizes, for a source that was padded otherwise."""

    layout: Layout
    section: Section
    rules: Rules
    mesh: Mesh
    pads: dict[str, int] = field(default_factory=dict)
    engine: tuple[int, ...] | None = None  # the engine's release; None is the newest known
    over: Mesh | None = None  # of a format that cuts whole tensors itself: the ranks whose rows it pads for
    platform: str | None = None  # what the engine runs on: one of PLATFORMS; None is the first
    problems: list[str] = field(default_factory=list)
    _patterns: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.ranks = self.rules.ranks(self.mesh)
        self.stages = self.rules.stages(self.layout.layers, self.mesh.pp)
        self.etp = expert_cut(self.mesh, self.ranks)
        engine = list(self.engine or (999,))
        self._given = {
            "tp": (self.over or self.mesh).tp,
            "pp": self.mesh.pp,
            "ep": self.mesh.ep,
            "engine": engine,
            "scheme": self.layout.scheme,
            "attention_scales": attention_scales(self.layout.scheme),
        }
        self._given["platform"] = self.platform or PLATFORMS[0]
        self._scopes: dict[tuple[str, int | None], Scope] = {}

    def trial(self, **changes: Any) -> "Placement":
        """This placement with other fields, and nothing found wrong with it yet."""
        return replace(self, problems=[], _patterns={}, **changes)

    def scope(self, place: str = "", number: int | None = None) -> Scope:
        """What expressions of entries may name, in number `number` of `place`."""
        if (place, number) not in self._scopes:
            names = self.layout.names(place, number)
            self._scopes[place, number] = Scope(self.layout.descriptor, self.layout.scope, self._given, names)
        return self._scopes[place, number]

    def stored(self, ranks: list[Rank] | None = None, aliases: bool = False, number: int | None = None) -> Iterator[Stored]:
        """Stored tensors in order of rank, without dtypes. `aliases` adds names that are read but never written; `number`
        limits them to one number of their places.

        Cuts that can't be made are gathered in `problems`, all of them; the caller raises.
        """
        patterns = [self.pattern(e) for e in self.section.entries if not e.omit and (aliases or not e.alias)]
        refused = [e.omit for e in self.section.entries if isinstance(e.omit, str) and e.omit not in self.problems and self.holding(e)]
        self.problems.extend(dict.fromkeys(refused))
        for rank in ranks or self.ranks:
            for pattern in patterns:
                if pattern.numbers:
                    yield from self._stored(pattern, rank, number)

    def alike(self, place: str) -> bool:
        """Whether every number of `place` holds the same tensors, each of one size in all of them, and no experts."""
        every = list(self.layout.numbers(place))
        patterns = [self.pattern(entry) for entry in self.section.entries if entry.place == place and not entry.omit]
        held = [pattern for pattern in patterns if pattern.numbers]
        return all(list(p.numbers) == every and len(set(p.numbers.values())) == 1 and not p.expert for p in held)

    def constants(self, rank: Rank) -> Iterator[tuple[str, Constant]]:
        """Names and values of the tensors the engine demands beside the weights on `rank`."""
        for constant in self.section.constants:
            for number, printed in self._here(constant.place, "all", rank):
                if number is None or number in self.layout.numbers(constant.place):
                    if self._holds(constant.when, constant.place, number):
                        yield self.layout.fill(constant.name, constant.place, number, printed), constant

    def pattern(self, entry: Entry) -> Pattern:
        """`entry` made ready for this placement."""
        at = id(entry)
        if at not in self._patterns:
            self._patterns[at] = entry, self._pattern(entry)
        return self._patterns[at][1]

    def holding(self, entry: Entry) -> list[int | None]:
        """The numbers of its place in which `entry` is in force and its tensors exist, some of them at least."""
        tensors = [self.layout.descriptor.tensors[name] for name in entry.of]
        out = []
        for number in self.layout.numbers(entry.place):
            own = [number if t.place == entry.place else None for t in tensors]
            if any(self.layout.exists(t, n) for t, n in zip(tensors, own)) and self._holds(entry.when, entry.place, number):
                out.append(number)
        return out

    def _pattern(self, entry: Entry) -> Pattern:
        tensors = tuple(self.layout.descriptor.tensors[name] for name in entry.of)
        names = self.layout.names(entry.place, 0 if entry.place in self.layout.counts else None)
        texts = [entry.align, *(text for _, text in (*entry.pad, *entry.aligned, *entry.unit))]
        axes = dict.fromkeys(axis for tensor in tensors for axis in (*tensor.axes, *tensor.index) if axis in self.layout.descriptor.axes)
        varying = any(map(names.needs, axes)) or any(map(names.depends, texts))
        numbers: dict[int | None, tuple] = {}
        for number in self.holding(entry):
            lacking = [t.name for t in tensors if not self.layout.exists(t, number if t.place == entry.place else None)]
            if lacking:
                where = "" if number is None else f" ({entry.place} {number})"
                self._problem(entry, f"fuses {', '.join(entry.of)}, but this model has no {lacking[0]}{where}")
                continue
            numbers[number] = ()
            if varying:
                scope = self.scope(entry.place, number)
                numbers[number] = tuple(scope[axis] for axis in axes), tuple(evaluate(text, scope) for text in texts)
        return Pattern(entry, tensors, numbers, varying)

    def _holds(self, condition: str, place: str, number: int | None) -> bool:
        at = "holds", condition, place, number
        if at not in self._patterns:
            scope = self.scope(place, number)
            if number is not None and scope.wider is not None and not scope.wider.depends(condition):
                self._patterns[at] = self._holds(condition, "", None)
            else:
                self._patterns[at] = holds(condition, scope)
        return self._patterns[at]

    def _here(self, place: str, stage: str, rank: Rank) -> list[tuple[int | None, int | None]]:
        """The numbers of `place` on this rank's stage, each with the one that is printed."""
        if place == "layer":
            return [(layer, i if self.rules.local else layer) for i, layer in enumerate(self.stages[rank.pp])]
        if (stage == "first" and rank.pp != 0) or (stage == "last" and rank.pp != self.mesh.pp - 1):
            return []
        return [(number, number) for number in self.layout.numbers(place)]

    def _stored(self, pattern: Pattern, rank: Rank, only: int | None = None) -> Iterator[Stored]:
        entry, present = pattern.entry, pattern.numbers if only is None else pattern.numbers.keys() & {only}
        here = [(number, printed) for number, printed in self._here(entry.place, pattern.stage, rank) if number in present]
        if not here:
            return
        numbered = here[0][0] is not None
        own = numbered and pattern.tensors[0].place == entry.place
        if numbered and entry.place not in entry.numbered:
            if own:
                yield from self._stacked(pattern, rank, here)
                return
            here = here[:1]  # another place's tensor: once, however many numbers there are
        local, separate = self.rules.local, "expert" in entry.numbered
        for number, printed in here:
            shape, blocks, pad = self._blocks(pattern, rank, number)
            head = self._head(pattern, number, printed)
            lead = (number,) if own else ()
            if not pattern.expert:
                held = tuple([Part((t, *lead), block) for t, block in blocks])
                yield Stored(rank.number, head, "", _viewed(entry, shape), held, entry, pad=pad)
                continue
            experts = self._experts(pattern, rank, number)
            if separate:
                dims, at = _viewed(entry, shape), rank.number
                each = zip(self._numbered(head, range(len(experts)) if local else experts), experts)
                if len(blocks) == 1:  # the most frequent of all: a model has tens of thousands
                    ((t, block),) = blocks
                    for name, expert in each:
                        yield Stored(at, name, "", dims, (Part((t, *lead, expert), block),), entry, "", 0, pad)
                    continue
                for name, expert in each:
                    yield Stored(at, name, "", dims, tuple([Part((t, *lead, expert), block) for t, block in blocks]), entry, "", 0, pad)
            elif pattern.packed:
                held = [
                    Part((t, *lead, experts.start), Block(b.box[:-1], b.offset, b.strides[:-1]), len(experts), b.strides[-1])
                    for t, b in blocks
                ]
                yield Stored(rank.number, head, "", _viewed(entry, shape), tuple(held), entry, pad=pad)
            else:
                yield self._stack(pattern, rank, head, shape, blocks, pad, [((*lead, experts.start), len(experts))], (len(experts),))

    def _stacked(self, pattern: Pattern, rank: Rank, here: list[tuple[int, int]]) -> Iterator[Stored]:
        """A stored tensor that holds all layers of a stage."""
        entry = pattern.entry
        if len({pattern.numbers[number] for number, _ in here}) > 1:
            self._problem(entry, f"is a stack over {entry.place}s of unequal size")
            return
        shape, blocks, pad = self._blocks(pattern, rank, here[0][0])
        head = self._head(pattern, *here[0])
        if pattern.expert and "expert" in entry.numbered:
            experts = self._experts(pattern, rank, here[0][0])
            for name, expert in zip(self._numbered(head, range(len(experts)) if self.rules.local else experts), experts):
                runs = [((number, expert), 1) for number, _ in here]
                yield self._stack(pattern, rank, name, shape, blocks, pad, runs, (len(here),))
        elif pattern.expert:
            experts = self._experts(pattern, rank, here[0][0])
            runs = [((number, experts.start), len(experts)) for number, _ in here]
            yield self._stack(pattern, rank, head, shape, blocks, pad, runs, (len(here), len(experts)))
        else:
            yield self._stack(pattern, rank, head, shape, blocks, pad, _runs([number for number, _ in here]), (len(here),))

    def _stack(self, pattern: Pattern, rank: Rank, name: str, shape, blocks, pad: int, runs: Runs, lead: tuple[int, ...]) -> Stored:
        """One stored tensor that holds many layers' or experts' tensors one after another."""
        size, out = prod(shape), []
        for tensor, block in blocks:
            before = 0
            for first, count in runs:
                if not count:  # more ranks than experts: this one holds none
                    continue
                out.append(Part((tensor, *first), block.moved(before * size) if before else block, count, size if count > 1 else 0))
                before += count
        return Stored(rank.number, name, "", _viewed(pattern.entry, lead + shape), tuple(out), pattern.entry, pad=pad * prod(lead))

    def _experts(self, pattern: Pattern, rank: Rank, number: int | None) -> range:
        """The experts of this rank."""
        count = self.layout.size("expert", pattern.entry.place, number)
        if not count:
            self._problem(pattern.entry, f"axis expert has size 0 by config.json ({self.layout.descriptor.axes['expert']})")
        if self.rules.even and count % self.mesh.ep:
            self._problem(pattern.entry, f"cannot split {count} experts over ep={self.mesh.ep}")
        return range(*chunk(count, self.mesh.ep, rank.ep))

    def _numbered(self, head: str, numbers: range) -> list[str]:
        """`head` with each of `numbers` as {expert}; ranks that number alike share the texts."""
        at = "names", head, numbers
        if at not in self._patterns:
            before, after = head.split("{expert}", 1)
            self._patterns[at] = [f"{before}{number}{after}" for number in numbers]
        return self._patterns[at]

    def _head(self, pattern: Pattern, number: int | None, printed: int | None) -> str:
        """Its name in full but for {expert}."""
        at = number, printed
        if at not in pattern.heads:
            pattern.heads[at] = self.layout.fill(pattern.entry.name, pattern.entry.place, number, printed)
        return pattern.heads[at]

    def _blocks(self, pattern: Pattern, rank: Rank, number: int | None):
        """Shape and blocks of one stored tensor, and how many of its elements are declared padding; the same objects wherever
        the sizes are the same."""
        entry = pattern.entry
        index, count = (rank.etp, self.etp) if pattern.expert else (rank.tp, self.mesh.tp)
        experts = self._experts(pattern, rank, number) if pattern.packed else range(0)
        at = index, count, pattern.numbers[number], experts
        if at not in pattern.geometry:
            whole = entry.cut == "whole"
            scope = self.scope(entry.place, number)
            items = [self._item(entry, t, scope, 0 if whole else index, 1 if whole else count) for t in pattern.tensors]
            if pattern.packed:  # experts are an axis like any, until each has a block of its own
                numbered = {"expert": ((experts.start, experts.stop), experts.stop)}
                dims = [stored_dims((*item.dims, ("expert",)), entry.dims) for item in items]
                items = [Item(i.tensor, own, (*i.axes, "expert"), {**i.held, **numbered}) for i, own in zip(items, dims)]
            shape, blocks = self._fused(entry, items, scope, index, count)
            pad = 0
            if entry.only_rank0 and index:  # elsewhere the same shape with nothing in it
                blocks, pad = [], prod(shape)
            elif entry.pad or entry.align != "1" or entry.aligned:
                full = [item._replace(held={axis: (held, held[1]) for axis, (held, _) in item.held.items()}) for item in items]
                filled = self._fused(entry, full, scope, index, count)[1]  # as if the padded axes were as long as that
                pad = sum(block.size for _, block in filled) - sum(block.size for _, block in blocks)
                if not entry.pad:
                    pad += prod(shape) - sum(block.size for _, block in filled)
            if entry.transform:
                blocks = [(formed(name, entry.transform), block) for name, block in blocks]
            pattern.geometry[at] = shape, blocks, pad
        return pattern.geometry[at]

    def _fused(self, entry: Entry, items: list[Item], scope: Scope, index: int, count: int):
        align, aligned = self._aligned(entry, entry.align, scope), {leaf: self._aligned(entry, text, scope) for leaf, text in entry.aligned}
        dim = entry.dim(self.layout.descriptor.tensors) if len(items) > 1 or entry.fusion.axis else 0
        try:
            shape, blocks = fuse(entry.fusion, items, dim, align, aligned)
        except ValueError as error:
            raise LayoutError(f"layout {self.layout.name}: {entry.name}: {error}") from None
        if entry.cut != "whole" or count == 1:
            return shape, blocks
        if shape[dim] % count:
            self._problem(entry, f"cannot cut {shape[dim]} fused rows evenly over {count} ranks")
        return slice_dim(shape, blocks, dim, *chunk(shape[dim], count, index))

    def _aligned(self, entry: Entry, text: str, scope: Scope) -> int:
        unit = evaluate(text, scope)
        if not isinstance(unit, int) or isinstance(unit, bool) or unit < 1:
            raise LayoutError(f"layout {self.layout.name}: {entry.name}: {text!r} is {quote(repr(unit))}, not a number of rows")
        return unit

    def _item(self, entry: Entry, tensor: Tensor, scope: Scope, index: int, count: int) -> Item:
        """What this rank holds of `tensor`: per axis (its range in the padded axis, the true size)."""
        if tensor.name in self.layout.operands:
            return self._operand(entry, tensor, scope, index, count)
        true = {axis: scope[axis] for axis in tensor.axes}
        for axis, size in true.items():
            if not size:  # a tensor of no elements is a mistake in config.json: nothing could be said of its place
                text = self.layout.descriptor.axes[axis]
                self._problem(entry, f"axis {axis} of {tensor.name} has size 0 by config.json ({text})")
        sizes = {axis: self._padded(entry, axis, size, scope) for axis, size in true.items()}
        ranges = {axis: (0, size) for axis, size in sizes.items()}
        split = tensor.split if entry.split is None else [axis for axis in entry.split if axis in true]
        left = count
        for axis in split:
            if left == 1:
                break
            size = sizes[axis]
            parts = left
            if left > size and axis in self.layout.descriptor.replicate:
                parts = size
                if not size or left % size:
                    parts = left  # the last ranks hold nothing, where the format allows that
                    if self.rules.even:
                        self._problem(entry, f"cannot repeat {size} {axis} over {left} ranks: {left} is not a multiple of {size}")
            unit = self._unit(entry, axis, scope)
            if self.rules.even and unit == 1 and size % parts:
                self._problem(entry, f"cannot split axis {axis} ({size}) of {tensor.name} evenly over {parts} ranks")
            left //= parts
            start, stop = chunk(-(-size // unit), parts, index // left)
            ranges[axis] = min(start * unit, size), min(stop * unit, size)
            index %= left
        return Item(tensor.name, entry.dims_of(tensor), tensor.axes, {axis: (ranges[axis], true[axis]) for axis in tensor.axes})

    def _operand(self, entry: Entry, tensor: Tensor, scope: Scope, index: int, count: int) -> Item:
        """What this rank holds of codes or scales: what goes with its part of the tensor that they are of."""
        name, operand = self.layout.operands[tensor.name]
        own = self.layout.descriptor.tensors[name]
        held = self._item(replace(entry, dims=None), own, scope, index, count).held
        box = tuple(held[axis][0] for axis in own.axes)
        empty = {axis for axis, (start, stop) in enumerate(box) if start >= stop}  # the last ranks of too many
        ranges = [over.extent(box) if empty.isdisjoint(over.axes) else (0, 0) for over in operand.axes]
        if not all(over.whole(box) for over in operand.axes) or (entry.cut == "whole" and self.mesh.tp > 1):
            self._problem(
                entry, f"{name}, cut over {count} ranks, would be cut inside a block ({operand.grain}) that shares one {operand.label}"
            )
        sizes = {axis: (extent, over.size) for axis, extent, over in zip(tensor.axes, ranges, operand.axes)}
        return Item(tensor.name, entry.dims_of(tensor), tensor.axes, sizes)

    def _unit(self, entry: Entry, axis: str, scope: Scope) -> int:
        """What `axis` is cut in multiples of."""
        return next((self._aligned(entry, text, scope) for known, text in entry.unit if known == axis), 1)

    def _padded(self, entry: Entry, axis: str, size: int, scope: Scope) -> int:
        for padded, text in entry.pad:
            if padded == axis:
                value = self.pads.get(axis) or evaluate(text, scope)
                if not isinstance(value, int) or isinstance(value, bool) or value < size:
                    raise LayoutError(
                        f"layout {self.layout.name}: {entry.name}: pad {axis} = {text!r} is {quote(repr(value))}, less than its size {size}"
                    )
                return value
        return size

    def _problem(self, entry: Entry, text: str) -> None:
        line = f"{entry.name}: {text}"
        if line not in self.problems:
            self.problems.append(line)


def _viewed(entry: Entry, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions that a stored tensor of `dims` is declared under: the same elements in the same order."""
    return dims if entry.view is None else tuple(prod(dims[d] for d in group) for group in entry.view)


def _runs(numbers: list[int]) -> Runs:
    """`numbers`, those that count up by one together."""
    out: list[tuple[tuple[int, ...], int]] = []
    for number in numbers:
        if out and number == out[-1][0][0] + out[-1][1]:
            out[-1] = out[-1][0], out[-1][1] + 1
        else:
            out.append(((number,), 1))
    return out
