"""A descriptor bound to one config.json: how many layers, the sizes of all axes, which tensors the model has.

Sizes and conditions may differ from layer to layer: an expression that uses a place's number is evaluated for each
number, every other one once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.expressions import evaluate, holds, names_in
from reshard.layout.model import Descriptor, Section, Tensor
from reshard.planner.values import Operand, Value, Ways, bare, ways_of

#: layers, or experts of a layer: no model comes near, and a wrong config.json must not keep us busy for hours
MOST_NUMBERED = 4096
#: layers × experts of a layer: five times those of the largest model
MOST_TENSORS = 200_000
#: names under which any framework may hold what is no weight of any model: rotary caches, which transformers wrote before 4.32,
#: TransformerEngine's scaling state, Megatron's counts of tokens per expert
BUFFERS = ("*.inv_freq", "*.original_inv_freq", "*.cos_sin_cache", "*.cos_cached", "*.sin_cached",
           "*._extra_state", "*.local_tokens_per_expert", "*.global_tokens_per_expert")  # fmt: skip


class Scope(Mapping[str, object]):
    """What an expression may name: what is `given` (a place's number, tp …), then axes, conditions, and config.json.

    An axis or condition is evaluated when it is first asked for, and in the widest scope that has all it uses: what does
    not depend on the layer is evaluated once. Inside its own expression a name means config.json's.
    """

    def __init__(
        self, descriptor: Descriptor, config: Mapping[str, object], given: Mapping[str, object] = {}, wider: "Scope | None" = None
    ):
        self.descriptor, self.config, self.given, self.wider = descriptor, config, given, wider
        self._known: dict[str, object] = {}
        self._open: list[str] = []
        self._uses: dict[str, frozenset[str]] = {} if wider is None else wider._uses

    def __getitem__(self, name: str) -> object:
        if name in self.given:
            return self.given[name]
        if name in self._known:
            return self._known[name]
        axes, conditions = self.descriptor.axes, self.descriptor.conditions
        if (name not in axes and name not in conditions) or (self._open and self._open[-1] == name):
            return self.wider[name] if self.wider is not None and self.wider.sees(name) else self.config[name]
        if self.wider is not None and not self.needs(name):
            return self.wider[name]
        if name in self._open:
            raise LayoutError(f"layout {self.descriptor.name}: {name} is defined by itself: {' → '.join([*self._open, name])}")
        self._open.append(name)
        try:
            self._known[name] = self._size(name, axes[name]) if name in axes else holds(conditions[name], self)
        finally:
            self._open.pop()
        return self._known[name]

    def sees(self, name: str) -> bool:
        """Whether some scope gives `name`, descriptors and config.json aside."""
        return name in self.given or (self.wider is not None and self.wider.sees(name))

    def needs(self, name: str) -> bool:
        """Whether axis or condition `name` depends on what this scope gives."""
        return not self.given.keys().isdisjoint(self.uses(name))

    def depends(self, text: str) -> bool:
        """Whether expression `text` depends on what this scope gives."""
        return any(name in self.given or self.needs(name) for name in names_in(text))

    def uses(self, name: str) -> frozenset[str]:
        """The names that axis or condition `name` looks up in the end."""
        if name not in self._uses:
            found: set[str] = set()
            todo = [name]
            while todo:
                text = self.descriptor.axes.get(todo[-1]) or self.descriptor.conditions.get(todo[-1])
                todo.pop()
                fresh = (names_in(text) if text else frozenset()) - found
                found |= fresh
                todo += fresh
            self._uses[name] = frozenset(found)
        return self._uses[name]

    def _size(self, axis: str, text: str) -> int:
        size = evaluate(text, self)
        where = f"layout {self.descriptor.name}: axis {axis} = {text!r} is {quote(repr(size))}"
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise LayoutError(f"{where}, not a size", "check config.json")
        if axis == "expert" and size > MOST_NUMBERED:
            raise LayoutError(f"{where}, more than the {MOST_NUMBERED} allowed", "check config.json")
        return size

    def __iter__(self) -> Iterator[str]:
        return iter({**self.config, **self.descriptor.conditions, **self.descriptor.axes, **self.given})

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Layout:
    """`scope` is config.json with the descriptor's defaults, `sizes` are those axes that are alike in all layers,
    `counts` how often each numbered place stands. `absent` are optional places, `lacking` optional tensors (name, number
    of its place) that a checkpoint does without. Of a quantised checkpoint's, `scheme` is the name of the scheme, `quantisation` its settings, `finer` by how much its experts'
    blocks are smaller than those say, `values` how its
    tensors are computed from what is stored of them, `made` how is computed what goes with them and is not in its files, `told` what its files must say of it, and `plain` the
    layout of the model as it was before."""

    descriptor: Descriptor
    config: Mapping[str, object]
    scope: Mapping[str, object]
    sizes: Mapping[str, int]
    counts: Mapping[str, int]
    absent: frozenset[str] = frozenset()
    lacking: frozenset[tuple[str, int | None]] = frozenset()
    values: Mapping[str, Ways] = field(default_factory=dict)
    made: Mapping[str, Ways] = field(default_factory=dict)
    told: Mapping[str, Value] = field(default_factory=dict)
    scheme: str = "none"
    quantisation: Mapping[str, object] = field(default_factory=dict)
    finer: int = 1
    plain: "Layout | None" = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.descriptor.name

    @cached_property
    def operands(self) -> Mapping[str, tuple[str, Operand]]:
        """The tensors that are codes, scales and the like: of which one, and how they lie over it."""
        return {
            operand.name: (name, operand) for name, ways in self.values.items() for value in ways_of(ways) for operand in value.operands
        }

    @property
    def layers(self) -> int:
        return self.counts.get("layer", 0)

    def names(self, place: str = "", number: int | None = None) -> Scope:
        """What an expression may name, in number `number` of `place`."""
        at = ("names", place, number)
        if at not in self._cache:
            whole = None if number is None else self.names()
            self._cache[at] = Scope(self.descriptor, self.scope, {} if number is None else {place: number}, whole)
        return self._cache[at]

    def numbers(self, place: str) -> list[int | None]:
        """The numbers of a place; [None] of one without."""
        if place in self.absent:
            return []
        return list(range(self.counts[place])) if place in self.counts else [None]

    def size(self, axis: str, place: str = "", number: int | None = None) -> int:
        return self.names(place, number)[axis]

    def shape(self, tensor: Tensor, number: int | None = None) -> tuple[int, ...]:
        """Size per axis of `tensor` (in layer `number`, where its axes differ by layer), in the order of its axes."""
        scope = self.names(tensor.place, number)
        return tuple(scope[axis] for axis in tensor.axes)

    def shape_of(self, key: tuple) -> tuple[int, ...]:
        """Size per axis of the tensor `key` names: its name (or a function's of it), its place's number, its expert's, where it has them."""
        tensor = self.descriptor.tensors[bare(key[0])]
        number = key[1] if tensor.index and tensor.index[0] == tensor.place else None
        at = "shape", key[0], number
        if at not in self._cache:
            self._cache[at] = self.shape(tensor, number)
        return self._cache[at]

    def exists(self, tensor: Tensor, number: int | None = None) -> bool:
        """Whether the model has `tensor` (in layer `number`)."""
        if tensor.place in self.absent or (tensor.name, number) in self.lacking:
            return False
        return self.holds(tensor.when, tensor.place, number)

    def holds(self, condition: str, place: str = "", number: int | None = None) -> bool:
        at = ("holds", condition, place, number)
        if at not in self._cache:
            scope = self.names(place, number)
            if number is not None and not scope.depends(condition):
                self._cache[at] = self.holds(condition)
            else:
                self._cache[at] = holds(condition, scope)
        return self._cache[at]

    def section(self, format: str) -> Section:
        return self.descriptor.section(format)

    def buffers(self, section: Section) -> tuple[str, ...]:
        """Patterns of names under which files and memory hold what is no weight: computed again by whoever needs it."""
        return (*BUFFERS, *map(self.fill, section.drop))

    def omitted(self, section: Section) -> tuple[str, ...]:
        """Patterns of names of weights that the descriptor leaves out."""
        return tuple(map(self.fill, section.omit))

    def fill(self, name: str, place: str = "", number: int | None = None, printed: int | None = None) -> str:
        """`name` with its place's number as it is printed there, and with expressions, in which numbers are always global.
        {expert} stays."""

        def word(match: re.Match) -> str:
            if match[1] == "expert":
                return match[0]
            if match[1] == place:
                return str(printed)
            value = evaluate(match[1], self.names(place, number))
            if not isinstance(value, int) or isinstance(value, bool):
                raise LayoutError(f"layout {self.name}: {name!r}: {match[0]} is {quote(repr(value))}, not a whole number")
            return str(value)

        return re.sub(r"\{([^{}]+)\}", word, name)

    def without(self, places: Iterable[str] = (), tensors: Iterable[tuple[str, int | None]] = ()) -> "Layout":
        """This layout of a checkpoint that lacks optional places and tensors."""
        places, tensors = frozenset(places), frozenset(tensors)
        plain = self.plain and self.plain.without(places, tensors)
        return replace(self, absent=self.absent | places, lacking=self.lacking | tensors, plain=plain, _cache={})

    def present(self, places: Iterable[str]) -> "Layout":
        """This layout of a checkpoint that has optional `places`."""
        places = frozenset(places)
        return replace(self, absent=self.absent - places, plain=self.plain and self.plain.present(places), _cache={})


def bind(descriptor: Descriptor, config: Mapping[str, object]) -> Layout:
    """Sizes from `config`. Optional places are absent until a checkpoint is found to have them. Raises LayoutError."""
    scope = _defaults(descriptor, {key: value for key, value in config.items() if value is not None})
    base = Scope(descriptor, scope)
    counts = {}
    for place in descriptor.places.values():
        if place.count is not None:
            count = evaluate(place.count, base)
            where = f"layout {descriptor.name}: [place.{place.name}] count = {place.count!r} is {quote(repr(count))}"
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise LayoutError(f"{where}, not a number of places", "check config.json")
            if count > MOST_NUMBERED:
                raise LayoutError(f"{where}, more than the {MOST_NUMBERED} allowed", "check config.json")
            counts[place.name] = count
    _check_count(descriptor, counts, base)
    optional = frozenset(name for name, place in descriptor.places.items() if place.optional)
    layout = Layout(descriptor, config, scope, {}, counts, optional)
    layout = replace(layout, sizes=_sizes(layout), _cache={})
    for tensor in descriptor.tensors.values():
        empty = next((axis for axis in tensor.axes if layout.sizes.get(axis) == 0), None)
        if empty and any(layout.exists(tensor, number) for number in layout.numbers(tensor.place)):
            text = f"[tensors] {tensor.name} has no elements: axis {empty} = {str(descriptor.axes[empty])!r} is 0"
            raise LayoutError(f"layout {descriptor.path or descriptor.name}: {text}", "check config.json")
    return layout


def _check_count(descriptor: Descriptor, counts: Mapping[str, int], scope: Scope) -> None:
    expert = next((t for t in descriptor.tensors.values() if "expert" in t.index), None)
    if expert is None or "expert" not in descriptor.axes or any(name in scope.uses("expert") for name in counts):
        return
    try:
        experts = scope["expert"]
    except LayoutError:
        return  # of a model without: told where a tensor asks for it
    for place, count in counts.items():
        if count * experts > MOST_TENSORS:
            raise LayoutError(
                f"layout {descriptor.name}: {count} {place}s × {experts} experts are {count * experts}, more than the {MOST_TENSORS} allowed",
                "check config.json",
            )


def _defaults(descriptor: Descriptor, config: dict[str, object]) -> dict[str, object]:
    """`config`, completed by the descriptor's defaults, each of which may use others."""
    open_: list[str] = []

    class Completed(dict):
        def __missing__(self, key: str) -> object:
            if key not in descriptor.defaults or key in open_:
                raise KeyError(key)
            open_.append(key)
            self[key] = evaluate(descriptor.defaults[key], self)
            open_.pop()
            return self[key]

    completed = Completed(config)
    for key in descriptor.defaults:
        completed[key]
    return {key: value for key, value in completed.items() if value is not None or key in descriptor.defaults}


def _sizes(layout: Layout) -> dict[str, int]:
    """The axes that no layer has of its own. One that no tensor of this model uses may lack what it is computed from."""
    numbered = {name for name, place in layout.descriptor.places.items() if place.count is not None}
    scope, sizes = layout.names(), {}
    used = {
        axis
        for tensor in layout.descriptor.tensors.values()
        if tensor.place not in layout.absent and any(layout.exists(tensor, number) for number in layout.numbers(tensor.place))
        for axis in (*tensor.axes, *(i for i in tensor.index if i == "expert"))
    }
    for axis in layout.descriptor.axes:
        if numbered.isdisjoint(scope.uses(axis)):
            try:
                sizes[axis] = scope[axis]
            except LayoutError:
                if axis in used:
                    raise
    return sizes
