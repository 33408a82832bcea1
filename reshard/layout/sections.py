"""What each format stores of a resolved descriptor: entries of parts and of own tables laid over each other, and named.

An own entry takes away all inherited ones that hold any of its tensors, copies excepted; ``like`` begins with another
format's finished table, newest names.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from reshard.errors import LayoutError
from reshard.layout.entries import RawEntry
from reshard.layout.expressions import both, names_in
from reshard.layout.files import Prefixes
from reshard.layout.fusion import check_axes, fused_dim, stored_dims
from reshard.layout.model import Constant, Entry, Section, parse_version
from reshard.layout.values import fields_of

if TYPE_CHECKING:
    from reshard.layout.resolve import Resolver, Standing


class Labelled(NamedTuple):
    """The alternatives of one label, and the part whose module its names stand in."""

    entries: tuple[RawEntry, ...]
    standing: "Standing | None"

    @property
    def copies(self) -> bool:
        return all(entry.copy for entry in self.entries)

    @property
    def tensors(self) -> set[str]:
        return {leaf for entry in self.entries if entry.fusion for leaf in entry.fusion.leaves()}


class Spelt(NamedTuple):
    """One way of writing a format: under which of its prefixes, for which engine release (None: the newest), or as which form."""

    choice: int = 0
    release: tuple[int, ...] | None = None
    form: str | None = None
    apart: str | None = None  # the prefix that some numbers of the place have

    def chosen(self, entries: tuple[RawEntry, ...]) -> list[RawEntry]:
        """The alternatives of one label that are written so. Copies of a form are read beside the rest, in every spelling."""
        if self.form is not None:
            return [entry for entry in entries if entry.form == self.form and not entry.copy]
        plain = [entry for entry in entries if entry.form is None]
        fits = {parse_version(entry.until) for entry in plain if entry.until} if self.release is not None else set()
        until = min((version for version in fits if version >= self.release), default=None)
        chosen = [entry for entry in plain if (parse_version(entry.until) if entry.until else None) == until]
        return chosen + [entry for entry in entries if entry.form and entry.copy]


class Sections:
    """The sections of one descriptor, by the format's name."""

    def __init__(self, resolver: "Resolver"):
        self.name, self.chain, self.where = resolver.name, resolver.chain, resolver.where
        self.places, self.uses, self.axes = resolver.places, resolver.uses, resolver.axes
        self.raw, self.ids, self.tensors, self.removed = resolver.raw, resolver.ids, resolver.tensors, resolver.removed
        self._known_axis, self._tables = resolver.known_axis, resolver.tables

    def has(self, format: str) -> bool:
        """Whether the descriptor speaks of `format`: a table, not taken away, and a prefix of some place with parts."""
        own = [file.own.formats[format] for file in self.chain if format in file.own.formats]
        if own and own[-1] is False:
            return False
        formats = self._names_of(format)
        placed = any(self._prefixes(use.place, formats) is not None for use in self.uses)
        if not placed and any(format in file.own.formats for file in self.chain if file is self.chain[-1]):
            raise LayoutError(f"{self.where}: [{format}]: no place has a prefix for it", f'write {format} = "…" in [place.…]')
        return placed and (bool(own) or any(format in use.part.formats for use in self.uses))

    def _names_of(self, format: str) -> tuple[str, ...]:
        """`format`, and the one it is like, whose names hold where it gives none."""
        like = next((t.like for file in reversed(self.chain) if (t := file.own.formats.get(format)) and t.like), None)
        return (format, like) if like else (format,)

    def _prefixes(self, place: str, formats: tuple[str, ...]) -> Prefixes | None:
        for format in formats:
            if format in self.places[place]:
                return self.places[place][format] or None
        return None

    def _prefix(self, place: str, formats: tuple[str, ...], spelt: "Spelt", below: tuple[str, ...] = ()) -> str | None:
        """The prefix of `place`, those of others in it filled in; its number and other expressions stay in braces."""
        given = self._prefixes(place, formats)
        if given is None:
            return None
        where = f"{self.where}: [place.{place}] {formats[0]}"
        text = given.names[min(spelt.choice, len(given.names) - 1)] if spelt.apart is None else spelt.apart
        if spelt.release is not None and spelt.apart is None:
            older = [(parse_version(until), prefix) for prefix, until in given.older]
            text = min([found for found in older if found[0] >= spelt.release], default=(None, text))[1]
        for name in fields_of(where, text):
            if name == place or name not in self.places:
                continue
            if name in below or "count" in self.places[name]:
                raise LayoutError(f"{where}: {{{name}}} must be another place without a count")
            inner = self._prefix(name, formats, spelt._replace(apart=None), (*below, place))
            if inner is None:
                raise LayoutError(f"{where}: place {name} has no prefix for {formats[0]}")
            text = text.replace(f"{{{name}}}", inner)
        if "count" not in self.places[place] and f"{{{place}}}" in text:
            raise LayoutError(f"{where}: {{{place}}} in its own prefix, but it has no count")
        if not text.strip(".") and self.places[place].get("carry"):
            raise LayoutError(f"{where}: what is carried needs a prefix", "without one it would be every tensor of the files")
        return text.strip(".")

    def section(self, format: str) -> Section:
        formats = self._names_of(format)
        carried = [place for place, keys in self.places.items() if keys.get("carry")]
        places = {*carried, *(use.place for use in self.uses)}
        given = [found for place in self.places if (found := self._prefixes(place, formats))]
        labelled = self._collect(format)
        sections = [self._spelt(format, formats, labelled, choice) for choice in range(max(len(found.names) for found in given))]
        without = tuple(sorted(place for place in places if self._prefixes(place, formats) is None))
        return replace(sections[0], prefixes=tuple(sections[1:]), without=without)

    def _collect(self, format: str) -> dict[str, dict[str, Labelled]]:
        """Per place, the entries of `format` by label, all overlaid."""
        state: dict[str, dict[str, Labelled]] = {place: {} for place in self.places}
        formats = self._names_of(format)
        if len(formats) > 1:
            if not self.has(formats[1]):
                raise LayoutError(f"{self.where}: [{format}] like = {formats[1]!r}: this descriptor says nothing of it")
            if len(self._names_of(formats[1])) > 1:
                raise LayoutError(f"{self.where}: [{format}] like = {formats[1]!r}: that is like another itself")
            for place, labels in self._collect(formats[1]).items():
                for label, found in labels.items():
                    newest = tuple(entry for entry in found.entries if entry.until is None)
                    if newest:
                        state[place][label] = Labelled(newest, found.standing)
        for place in self.places:
            fresh: dict[str, Labelled] = {}
            for use in self.uses:
                if use.place != place or not (table := use.part.formats.get(format)):
                    continue
                for label, entries in table.entries.items():
                    if entries is False:
                        if state[place].pop(label, None) is None:
                            raise LayoutError(f"{table.where} {label} = false: there is none to take away")
                        continue
                    if label in fresh:
                        raise LayoutError(
                            f"{table.where} {label}: part {fresh[label].standing.part.name} of place {place} has this label too"
                        )
                    found = Labelled(tuple(entry for entry in entries if not self._emptied(entry, place)), use)
                    self._known_tensors(found, place)
                    if found.entries:
                        fresh[label] = found
            _lay(state[place], fresh)
        for file in self.chain:
            if table := file.own.formats.get(format):
                self._overlay(state, table, file is self.chain[-1])
        return state

    def _overlay(self, state: dict[str, dict[str, Labelled]], table, last: bool) -> None:
        """Lay one own table over all places; `last`: the descriptor's own, and not a parent's."""
        fresh: dict[str, dict[str, Labelled]] = {place: {} for place in self.places}
        for label, entries in table.entries.items():
            if entries is False:
                if not [labels.pop(label) for labels in state.values() if label in labels]:
                    raise LayoutError(f"{table.where} {label} = false: there is none to take away")
                continue
            leaves = Labelled(entries, None).tensors
            if leaves and not last and leaves <= {label for _, label in self.removed}:
                continue  # a parent's, of tensors that a child takes away
            own = [leaf for leaf in leaves if "." not in leaf]
            if own:
                places = [place for place in self.places if all((place, leaf) in self.raw for leaf in own)]
            else:
                places = [place for place, labels in state.items() if label in labels]
            if not places:
                raise self._nowhere(entries[0], own)
            for place in places:
                first = next((leaf for entry in entries if entry.fusion for leaf in entry.fusion.leaves() if "." not in leaf), None)
                standing = self.raw[place, first][1] if first else state[place][label].standing
                found = Labelled(entries, standing)
                self._known_tensors(found, place)
                fresh[place][label] = found
        for place, labels in fresh.items():
            _lay(state[place], labels)

    def _nowhere(self, entry: RawEntry, leaves: list[str]) -> LayoutError:
        known = {label for _, label in self.raw}
        unknown = sorted(set(leaves) - known)
        if unknown:
            return LayoutError(f"{entry.where}: no tensor {unknown[0]!r} in [tensors]", 'say which it holds with of = "…"')
        if leaves:
            return LayoutError(f"{entry.where}: {', '.join(leaves)} do not stand in one place")
        return LayoutError(f"{entry.where}: a new constant or copy needs a part", "an own table changes those that parts have")

    def _emptied(self, entry: RawEntry, place: str) -> bool:
        """Whether all that a part's entry holds was taken away."""
        return entry.fusion is not None and all(self._leaf(leaf, place) in self.removed for leaf in entry.fusion.leaves())

    def _known_tensors(self, found: Labelled, place: str) -> None:
        for entry in found.entries:
            for leaf in entry.fusion.leaves() if entry.fusion else ():
                if self._leaf(leaf, place) not in self.raw:
                    raise LayoutError(f"{entry.where}: no tensor {leaf!r} in [tensors]", 'say which it holds with of = "…"')

    def _leaf(self, leaf: str, place: str) -> tuple[str, str]:
        other, dot, label = leaf.partition(".")
        return (other, label) if dot else (place, leaf)

    def _spelt(self, format: str, formats: tuple[str, ...], labelled: Mapping[str, Mapping[str, Labelled]], choice: int) -> Section:
        """The section of `format`, under the `choice`-th of the prefixes that files may have."""
        newest = Spelt(choice)
        base = self._named(formats, labelled, newest)
        untils = {entry.until for labels in labelled.values() for found in labels.values() for entry in found.entries if entry.until}
        untils |= {until for place in self.places for _, until in getattr(self._prefixes(place, formats), "older", ())}
        variants = []
        for until in sorted(untils, key=parse_version, reverse=True):
            own = self._named(formats, labelled, newest._replace(release=parse_version(until)))
            changed = {at: held for at, held in own.items() if held != base.get(at)}
            variants.append((f"until {until}", until, _gathered(changed)))
        forms = {e.form: None for labels in labelled.values() for found in labels.values() for e in found.entries if e.form and not e.copy}
        for form in forms:
            variants.append((form, None, _gathered(self._named(formats, labelled, newest._replace(form=form)))))
        drop, omit = (self._patterns(key, format, formats, newest) for key in ("drop", "omit"))
        carried = [(place, self._prefix(place, formats, newest)) for place, keys in self.places.items() if keys.get("carry")]
        since = next((t.since for file in reversed(self.chain) if (t := file.own.formats.get(format)) and t.since), None)
        return replace(
            _gathered(base),
            since=since,
            drop=drop,
            omit=omit,
            args=self._args(format),
            variants=tuple(variants),
            carried=tuple((place, prefix) for place, prefix in carried if prefix is not None),
        )

    def _named(
        self, formats: tuple[str, ...], labelled: Mapping[str, Mapping[str, Labelled]], spelt: "Spelt"
    ) -> dict[tuple[str, str], list]:
        """Per place and label, what one spelling holds: entries and constants with their names in full."""
        out: dict[tuple[str, str], list] = {}
        pads, units, stage = self._of_axes(formats, "pad"), self._of_axes(formats, "unit"), self._stage(formats)
        for place, labels in labelled.items():
            if (given := self._prefixes(place, formats)) is None:
                continue
            others = [condition for _, condition in given.apart]
            elsewhere = both(*(f"not ({condition})" for condition in others))
            ways = [(self._prefix(place, formats, spelt), elsewhere)]
            ways += [(self._prefix(place, formats, spelt._replace(apart=text)), condition) for text, condition in given.apart]
            for label, found in labels.items():
                held = []
                for (prefix, there), raw in product(ways, spelt.chosen(found.entries)):
                    name = self._name(raw, place, prefix or "", found.standing, formats, spelt) if raw.name else ""
                    raw = raw._replace(when=both(there, raw.when))
                    if raw.constant is None:
                        held.append(self._entry(raw, name, place, pads, units, stage))
                    else:
                        when = both(found.standing.when, raw.when)
                        held.append(Constant(raw.label, name, raw.constant, raw.dtype, raw.shape, when, place))
                if held:
                    out[place, label] = held
        return out

    def _name(self, raw: RawEntry, place: str, prefix: str, standing: "Standing | None", formats: tuple[str, ...], spelt: "Spelt") -> str:
        """A name of an entry in full: ``.x`` in the part's module, ``/x`` from the place root, else from the place."""
        if raw.name.startswith("/"):
            root = self._prefix("root", formats, spelt) if "root" in self.places else ""
            return ".".join(filter(None, (root, raw.name[1:])))
        module = None
        if raw.name.startswith("."):
            module = standing.module(formats) if standing else None
            if module is None:
                part = standing.part.name if standing else "?"
                raise LayoutError(f"{raw.where}: {raw.name!r} stands in the part's module, but part {part} has no at for {formats[0]}")
        return ".".join(filter(None, (prefix, module, raw.name.removeprefix("."))))

    def _of_axes(self, formats: tuple[str, ...], key: str) -> dict[str, str]:
        """What the format pads axes to, or cuts them in multiples of, wherever they stand; its own word before that of the one it is like."""
        said = {axis: text for table in self._said(formats) for axis, text in getattr(table, key).items()}
        for axis in said:
            self._known_axis(f"{self.where}: [{formats[0]}] {key}", axis)
        return said

    def _stage(self, formats: tuple[str, ...]) -> str | None:
        """Where the format holds all that no number tells apart, whatever its tensors and entries say."""
        return next((table.stage for table in reversed(self._said(formats)) if table.stage), None)

    def _said(self, formats: tuple[str, ...]) -> list:
        """Every table of the format, after those of the one it is like."""
        return [part.formats[format] for format in reversed(formats) for part in self._tables() if part.formats.get(format)]

    def _entry(self, raw: RawEntry, name: str, place: str, pads: Mapping[str, str], units: Mapping[str, str], stage: str | None) -> Entry:
        names = {leaf: self.ids[self._leaf(leaf, place)] for leaf in raw.fusion.leaves()}
        fusion = raw.fusion.renamed(names)
        leaves = list(fusion.leaves())
        tensors = [self.tensors[leaf] for leaf in leaves]
        where = raw.where
        elsewhere = [t for t in tensors if t.place != place]
        if elsewhere and (len(elsewhere) < len(tensors) or "count" in self.places[elsewhere[0].place]):
            raise LayoutError(
                f"{where}: {', '.join(raw.fusion.leaves())} do not stand in one place", "another place's must be unnumbered, and alone"
            )
        if any(("expert" in t.index) != ("expert" in tensors[0].index) for t in tensors):
            raise LayoutError(f"{where}: {', '.join(leaves)} must be numbered alike, by {{expert}} or not")
        if "{expert}" in raw.name and "expert" not in tensors[0].index:
            raise LayoutError(f"{where}: {{expert}} in {raw.name!r}, but {leaves[0]} is not numbered by it")
        stored = {axis for dim in raw.dims or () for axis in dim}
        for tensor in tensors:
            if raw.dims is not None and (set(tensor.axes) - stored or stored - {axis for t in tensors for axis in t.axes}):
                raise LayoutError(f"{where}: dims must hold the axes of {tensor.name}: {' '.join(tensor.axes)}")
            if len(tensor.dims) != len(tensors[0].dims):
                raise LayoutError(f"{where}: {tensor.name} has {len(tensor.dims)} dimensions, {leaves[0]} {len(tensors[0].dims)}")
        try:
            order = {t.name: stored_dims(t.dims, raw.dims) for t in tensors}
            dims = {fused_dim(t.dims, order[t.name]) for t in tensors} if len(leaves) > 1 or fusion.axis else {0}
            if len(dims) > 1:
                raise ValueError(f"{', '.join(leaves)} are not fused along one dimension")
            dim = dims.pop()
            check_axes(fusion, {t.name: (order[t.name][dim] if t.dims else ()) for t in tensors})
        except ValueError as error:
            raise LayoutError(f"{where}: of = {str(raw.fusion)!r}: {error}") from None
        every = {axis for t in tensors for axis in t.axes}
        for key, axes in (("split", raw.split or ()), ("pad", [axis for axis, _ in raw.pad])):
            for axis in axes:
                self._known_axis(f"{where}: {key}", axis)
                if axis not in every:
                    raise LayoutError(f"{where}: {key} names axis {axis!r}, which {', '.join(leaves)} do not have")
        pad = tuple(({axis: text for axis, text in pads.items() if axis in every} | dict(raw.pad)).items())
        for leaf, _ in raw.aligned:
            if leaf not in names:
                raise LayoutError(f"{where}: align names {leaf!r}, which is not in of = {str(raw.fusion)!r}")
        entry = Entry(
            raw.label, name, fusion, raw.dims, raw.cut, raw.split, pad, raw.align,
            tuple((names[leaf], text) for leaf, text in raw.aligned), raw.when,
            raw.stage if stage is None or "count" in self.places[place] else stage, raw.form if raw.copy else None, raw.copy, raw.omit,
            raw.only_rank0, raw.view, raw.dtype, raw.transform, raw.scheme, place,
            unit=tuple((axis, text) for axis, text in units.items() if axis in every),
        )  # fmt: skip
        stacked = [index for index in tensors[0].index if index not in entry.numbered]
        dims = range(len(stacked) + len(raw.dims or tensors[0].dims))
        if raw.view is not None and sorted(d for group in raw.view for d in group) != list(dims):
            view = [list(group) for group in raw.view]
            raise LayoutError(f"{where}: view = {view} must join the dimensions 0 to {len(dims) - 1}, each once")
        return entry

    def _patterns(self, key: str, format: str, formats: tuple[str, ...], spelt: "Spelt") -> tuple[str, ...]:
        """Patterns of the names that files may have beside the tensors; every number of a place matches. `key`: drop or omit."""
        out = []
        for use in self.uses:
            table, prefix = use.part.formats.get(format), self._prefix(use.place, formats, spelt)
            for text in getattr(table, key) if table and prefix is not None else ():
                name = self._name(RawEntry(f"{table.where} {key}", key, text, None), use.place, prefix, use, formats, spelt)
                for field in fields_of(f"{table.where} {key}", name):
                    if use.place in names_in(field):
                        name = name.replace(f"{{{field}}}", "*")
                out.append(name)
        for file in self.chain:
            table = file.own.formats.get(format)
            for text in getattr(table, key) if table else ():
                if not text.startswith("/"):
                    raise LayoutError(f"{table.where} {key}: {text!r} must begin with /", "names inside a place belong into its part")
                out.append(self._name(RawEntry(f"{table.where} {key}", key, text, None), "", "", None, formats, spelt))
        return tuple(dict.fromkeys(out))

    def _args(self, format: str) -> tuple[tuple[str, str], ...]:
        out: dict[str, str] = {}
        for part in self._tables():
            table = part.formats.get(format)
            for key, text in (table.args if table else {}).items():
                if text is not False:
                    out[key] = text
                elif out.pop(key, None) is None:
                    raise LayoutError(f"{part.where}: [{format}.args] {key} = false: there is none to take away")
        return tuple(out.items())


def _lay(state: dict[str, Labelled], fresh: Mapping[str, Labelled]) -> None:
    """`fresh` over `state`: what has the same label, or holds a tensor that `fresh` holds, is taken away; a copy only by its
    label. Entries of `fresh` do not take each other away."""
    held = {tensor for found in fresh.values() if not found.copies for tensor in found.tensors}
    for label, found in list(state.items()):
        if label in fresh or (not found.copies and found.tensors & held):
            del state[label]
    state.update(fresh)


def _gathered(held: Mapping[tuple[str, str], list]) -> Section:
    """A section of entries and constants by label."""
    every = [item for items in held.values() for item in items]
    return Section(tuple(i for i in every if isinstance(i, Entry)), tuple(i for i in every if isinstance(i, Constant)))
