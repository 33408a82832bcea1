"""What a descriptor says once its parts and places are put together: tensors, and what each format stores of them.

Everything is still symbolic here: sizes come from ``bind`` (``bound.py``), stored tensors from ``place.py``.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.expressions import names_in
from reshard.layout.fusion import Group, fused_dim, stored_dims

#: the functions of a tensor that an entry may hold, each with its inverse; ``executor/values.py`` runs them
TRANSFORMS = {"minus_exp": "log_minus", "minus_one": "plus_one", "plus_one": "minus_one"}

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter of the model, whole and unfused: `dims` in axes, `split` the axes that TP spreads over, in order.

    `index` says what numbers it: its place's number, then the expert. `dtype` marks one that is kept in that dtype
    beside a model of a smaller one: ``--dtype`` never narrows it. Where `optional` holds, files may lack it.
    """

    name: str
    index: tuple[str, ...]
    dims: Dims
    split: tuple[str, ...]
    when: str = "true"
    stage: str = "last"
    dtype: str | None = None
    place: str = ""
    optional: str | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for dim in self.dims for axis in dim)


@dataclass(frozen=True)
class Entry:
    """What one format stores under one name: which tensors, in which order, fused and cut how.

    `name` is a template: ``{layer}``, ``{expert}``, or a whole-number expression in braces. `place` is where its first
    tensor stands. `alias`: a form that copies: read where files have it, written by formats that have this form. `copy`: may hold what
    another entry holds. `omit`: the format does not hold its tensors, and says so; a text: it cannot, and why. `view`: stored under other dimensions, which
    of its own each one joins. `turned`: its dimensions are stored in reverse order. `unit`: what an axis is cut in
    multiples of: as many on each rank, rounded up, and what is left on the last.
    """

    label: str
    name: str
    fusion: Group
    dims: Dims | None = None
    cut: str = "parts"
    split: tuple[str, ...] | None = None
    pad: tuple[tuple[str, str], ...] = ()
    align: str = "1"
    aligned: tuple[tuple[str, str], ...] = ()  # of each item, by tensor
    when: str = "true"
    stage: str | None = None
    alias: str | None = None
    copy: bool = False
    omit: bool | str = False
    only_rank0: bool = False
    view: tuple[tuple[int, ...], ...] | None = None
    dtype: str | None = None  # the engine's own dtype of it, whatever the model has
    transform: str | None = None  # the stored value is this function of the tensor's
    scheme: str | None = None
    place: str = ""
    turned: bool = False
    unit: tuple[tuple[str, str], ...] = ()

    @cached_property
    def of(self) -> tuple[str, ...]:
        """Its tensors, in order; one may stand there twice."""
        return tuple(self.fusion.leaves())

    @cached_property
    def numbered(self) -> frozenset[str]:
        """What the names that it generates are told apart by: its place's number, experts."""
        return frozenset(used for text in re.findall(r"\{([^{}]+)\}", self.name) for used in names_in(text))

    def dims_of(self, tensor: Tensor) -> Dims:
        """The order in which `tensor` is stored: the entry's, as far as the tensor has the axes, or its own."""
        return tensor.dims[::-1] if self.turned else stored_dims(tensor.dims, self.dims)

    def dim(self, tensors: Mapping[str, Tensor]) -> int:
        """The stored dimension along which its tensors are fused."""
        return fused_dim(tensors[self.of[0]].dims, self.dims_of(tensors[self.of[0]]))


class Constant(NamedTuple):
    """A tensor that an engine demands beside the weights, the same in every model: a template of names and one value."""

    label: str
    name: str
    value: float
    dtype: str
    shape: tuple[int, ...]
    when: str = "true"
    place: str = ""


@dataclass(frozen=True)
class Section:
    """All that one format says of one architecture.

    `variants` are other ways it is written, each (name, newest engine release that wants it or None, entries); an entry
    of one takes the place of those that hold the same tensors. `prefixes` are the same section under other names of its
    places. `args` are settings, as expressions over config.json, that the format keeps beside the weights (Megatron's
    args). `drop` are patterns of names of buffers that can be computed again, `omit` of weights that the descriptor does not
    describe: they are left out, and the user is told so. `without` are places that the format does not hold, `carried` those
    that it holds as they are, each with its prefix. `since` is the oldest engine release whose names these are.
    """

    entries: tuple[Entry, ...] = ()
    constants: tuple[Constant, ...] = ()
    drop: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    args: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[str, str | None, "Section"], ...] = ()
    prefixes: tuple["Section", ...] = ()
    without: tuple[str, ...] = ()
    since: str | None = None
    carried: tuple[tuple[str, str], ...] = ()

    def overlaid(self, other: "Section") -> "Section":
        """This section with `other`'s entries in the place of those of the same label, or that hold the same tensors."""
        labels = {(e.place, e.label) for e in other.entries}
        covered = {tensor for entry in other.entries if not entry.copy for tensor in entry.of}
        kept = tuple(e for e in self.entries if (e.place, e.label) not in labels and (e.copy or not covered.intersection(e.of)))
        names = {(c.place, c.label) for c in other.constants}
        constants = tuple(c for c in self.constants if (c.place, c.label) not in names) + other.constants
        return replace(self, entries=kept + other.entries, constants=constants)

    def stacked(self) -> "Section":
        """The same with all layers of a name in one tensor, along a new first dimension: named without their number."""
        entries = tuple([replace(entry, name=entry.name.replace(".{layer}", "")) for entry in self.entries])
        return replace(self, entries=entries, variants=tuple([(name, until, own.stacked()) for name, until, own in self.variants]))

    def spelled(self, forms: Container[str]) -> "Section":
        """In those of its variants that are named in `forms`, as are the second names under which a tensor is stored too."""
        out = self
        for name, _, variant in self.variants:
            out = out.overlaid(variant) if name in forms else out
        return replace(out, entries=tuple([replace(e, alias=None) if e.alias and e.alias in forms else e for e in out.entries]))

    def for_version(self, version: tuple[int, ...] | None) -> "Section":
        """As engine release `version` wants it; None is the newest known. Raises LayoutError for one whose names nobody looked up."""
        if version is not None and self.since and version < parse_version(self.since)[: len(version)]:
            raise LayoutError(f"names of {'.'.join(map(str, version))} are not known for this model, only since {self.since}",
                              f"use --engine-version {self.since}, if its tensors are still named so")  # fmt: skip
        fitting = [variant for _, until, variant in self.variants if until and version is not None and not _newer(version, until)]
        return self.overlaid(fitting[-1]) if fitting else self  # the oldest of those not older than `version`


def _newer(version: tuple[int, ...], until: str) -> bool:
    newest = parse_version(until)
    return version[: len(newest)] > newest  # 0.23 includes 0.23.1


class Place(NamedTuple):
    """Where parts stand: `count` (an expression) numbers it; None is once. An `optional` one may lack in files, whole.
    `carry`: whatever files have under its prefix is kept as it is, whole on every rank (``carry.py``)."""

    name: str
    count: str | None = None
    optional: bool = False
    carry: bool = False


@dataclass(frozen=True)
class Descriptor:
    """An architecture, resolved. Everything is still symbolic: sizes come from ``bind``."""

    name: str
    architectures: tuple[str, ...]
    description: str
    defaults: Mapping[str, str]
    conditions: Mapping[str, str]
    axes: Mapping[str, str]
    places: Mapping[str, Place]
    tensors: Mapping[str, Tensor]
    replicate: tuple[str, ...]
    formats: Mapping[str, Section]
    path: str = ""  # of the user's own file; empty for those that come with reshard
    doubts: tuple[tuple[str, str, str, str], ...] = ()  # (tensor, named, beside, says): what `layouts check` asks the author

    def section(self, format: str) -> Section:
        if format not in self.formats:
            known, file = ", ".join(sorted(self.formats)), self.path or f"a descriptor that extends {self.name}"
            raise LayoutError(f"layout {self.name} says nothing of format {format}", f"it knows {known}; add a [{format}] table to {file}")
        return self.formats[format]

    def bind(self, config: Mapping[str, object]):
        """Sizes from config.json (its text_config where the model's numbers are nested there). Raises LayoutError."""
        from reshard.layout.bound import bind

        return bind(self, config)


def parse_version(text: str) -> tuple[int, ...]:
    """(0, 11, 2) of "0.11.2", "v0.11.2" or "0.11.2rc1+cu128"; as many numbers as are said, up to three."""
    pattern = r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){1,2})(?:[.+-]?[a-z][\w.+-]{0,80}|\.[0-9]+)?"
    match = re.fullmatch(pattern, text, re.ASCII) if isinstance(text, str) else None
    if not match:
        raise LayoutError(f"{quote(repr(text))} is not a version", "write it like 0.32")
    return tuple(map(int, match[1].split(".")))
