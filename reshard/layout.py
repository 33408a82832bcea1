"""Layout descriptors: one TOML file per architecture family says, as data, how every format names, fuses and splits it.

``descriptors.py`` reads and checks the file; ``Descriptor.bind(config)`` gives it sizes from a config.json. What
a bound layout means for one rank of one format is in ``place.py``. README, *Write a descriptor*, explains the notation:

    [tensors]  q = "{layer} (kv* group* head) hidden"      dims in axes; {…} number the tensor; * is what TP splits
    [hf]       q = "model.layers.{layer}.self_attn.q_proj.weight"
    [megatron] qkv = { name = "…linear_qkv.weight", of = ["q", "k", "v"], within = "kv" }
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from reshard.errors import LayoutError
from reshard.expr import Expression, evaluate, holds
from reshard.foreign import quote

#: axes that number tensors instead of lying in their dimensions: pipeline parallelism deals out the one, expert parallelism the other
INDEX_AXES = ("layer", "expert")
#: layers, or experts of a layer: no model comes near, and a wrong config.json must not keep us busy for hours
_MOST_NUMBERED = 4096
#: layers × experts of a layer: five times those of the largest model
_MOST_TENSORS = 200_000


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter of the model, whole and unfused: `dims` in axes, `split` the axes that TP spreads over, in order.
    `dtype` marks one that is kept in that dtype beside a model of a smaller one: ``--dtype`` never narrows it."""

    name: str
    index: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    split: tuple[str, ...]
    when: str = "true"
    stage: str = "last"
    dtype: str | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for dim in self.dims for axis in dim)


@dataclass(frozen=True)
class Entry:
    """What one format stores under one name: which tensors, in which order, fused and cut how."""

    label: str
    name: str
    of: tuple[str, ...]
    within: str | None = None
    dims: tuple[tuple[str, ...], ...] | None = None
    dim: int = 0
    cut: str = "parts"
    split: tuple[str, ...] | None = None
    pad: tuple[tuple[str, str], ...] = ()
    when: str = "true"
    stage: str | None = None
    alias: bool = False
    only_rank0: bool = False
    view: tuple[tuple[int, ...], ...] | None = None  # stored under other dimensions: which of its own each one joins
    dtype: str | None = None  # the engine's own dtype of it, whatever the model has


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that an engine demands beside the weights, the same in every model: a template of names and one value."""

    name: str
    value: float
    dtype: str
    shape: tuple[int, ...]
    when: str = "true"


@dataclass(frozen=True)
class Section:
    """All that one format says of one architecture. `drop` are names of buffers that can be computed again, `omit` those of
    weights that the descriptor does not describe: they are left out, and the user is told so. `variants` are other ways it is written; each entry of one takes
    the place of the entries that hold the same tensors. `until` is the newest engine release that wants the variant.
    `args` are settings, as expressions over config.json, that the format keeps beside the weights (Megatron's args)."""

    entries: tuple[Entry, ...] = ()
    constants: tuple[Constant, ...] = ()
    drop: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    args: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[str, str | None, "Section"], ...] = ()

    def overlaid(self, other: "Section") -> "Section":
        """This section with `other`'s entries in the place of those that hold the same tensors."""
        covered = {tensor for entry in other.entries for tensor in entry.of}
        kept = tuple(e for e in self.entries if e.alias or not covered.intersection(e.of) or not other.entries)
        names = {c.name for c in other.constants}
        constants = tuple(c for c in self.constants if c.name not in names) + other.constants
        return replace(self, entries=kept + other.entries, constants=constants, drop=self.drop + other.drop, omit=self.omit + other.omit)

    def for_version(self, version: tuple[int, ...] | None) -> "Section":
        """As engine release `version` wants it; None is the newest known."""
        section = self
        for _, until, variant in self.variants:
            newest = until and parse_version(until)  # 0.23 includes 0.23.1
            if newest and version is not None and version[: len(newest)] <= newest:
                section = section.overlaid(variant)
        return section


@dataclass(frozen=True)
class Descriptor:
    """A parsed TOML file. Everything is still symbolic: sizes come from ``bind``."""

    name: str
    architectures: tuple[str, ...]
    description: str
    defaults: Mapping[str, str]
    axes: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    replicate: tuple[str, ...]
    formats: Mapping[str, Section]
    conditions: Mapping[str, Expression] = field(default_factory=dict)  # names that `when`s use
    path: str = ""  # of the user's own file; empty for those that come with reshard

    def section(self, format: str) -> Section:
        if format not in self.formats:
            known = ", ".join(sorted(self.formats))
            raise LayoutError(f"layout {self.name} says nothing of format {format}",
                              f"it knows {known}; add a [{format}] table to {self.path or f'a descriptor that extends {self.name}'}")  # fmt: skip
        return self.formats[format]

    def bind(self, config: Mapping[str, object]) -> "Layout":
        """Sizes from config.json (its text_config where the model's numbers are nested there). Raises LayoutError."""
        numbers = {key: value for key, value in config.items() if value is not None}
        scope: dict[str, object] = dict(numbers)
        for key, text in self.defaults.items():
            if scope.get(key) is None:
                scope[key] = evaluate(text, scope)
        sizes: dict[str, int] = {}
        for axis, text in self.axes.items():
            size = evaluate(text, {**scope, **sizes})
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise LayoutError(f"layout {self.name}: axis {axis} = {text!r} is {quote(repr(size))}, not a size", "check config.json")
            if axis in INDEX_AXES and size > _MOST_NUMBERED:
                raise LayoutError(f"layout {self.name}: axis {axis} = {text!r} is {quote(size)}, more than the {_MOST_NUMBERED} allowed", "check config.json")
            sizes[axis] = size
        count = prod(max(1, sizes.get(axis, 1)) for axis in INDEX_AXES)
        if count > _MOST_TENSORS:
            raise LayoutError(f"layout {self.name}: {' × '.join(f'{sizes[axis]} {axis}s' for axis in INDEX_AXES if axis in sizes)} are {count}, "
                              f"more than the {_MOST_TENSORS} allowed", "check config.json")  # fmt: skip
        layout = Layout(self, config, {**scope, **self.conditions}, sizes)
        for tensor in self.tensors.values():
            empty = next((axis for axis in tensor.axes if not sizes[axis]), None)
            if empty and any(layout.exists(tensor, layer) for layer in (range(layout.layers) if "layer" in tensor.index else [None])):
                raise LayoutError(f"layout {self.name}: [tensors] {tensor.name} has no elements: axis {empty} = {self.axes[empty]!r} is 0", "check config.json")
        return layout


@dataclass(frozen=True)
class Layout:
    """A descriptor bound to one config.json: `sizes` of all axes, `scope` for conditions."""

    descriptor: Descriptor
    config: Mapping[str, object]
    scope: Mapping[str, object]
    sizes: Mapping[str, int]
    _exists: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.descriptor.name

    @property
    def layers(self) -> int:
        return self.sizes.get("layer", 0)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Size per axis of `tensor`, in the order of its axes."""
        return tuple(self.sizes[axis] for axis in tensor.axes)

    def exists(self, tensor: Tensor, layer: int | None = None) -> bool:
        """Whether the model has `tensor` (in `layer`)."""
        at = (tensor.name, layer)
        if at not in self._exists:
            self._exists[at] = holds(tensor.when, {**self.scope, **self.sizes, "layer": layer})
        return self._exists[at]

    def section(self, format: str) -> Section:
        return self.descriptor.section(format)


def parse_version(text: str) -> tuple[int, ...]:
    """(0, 11, 2) of "0.11.2", "v0.11.2" or "0.11.2rc1+cu128"; as many numbers as are said, up to three."""
    match = re.fullmatch(r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){1,2})(?:[.+-]?[a-z][\w.+-]{0,80}|\.[0-9]+)?", text, re.ASCII) if isinstance(text, str) else None
    if not match:
        raise LayoutError(f"{quote(repr(text))} is not a version", "write it like 0.32")
    return tuple(map(int, match[1].split(".")))
