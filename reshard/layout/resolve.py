"""How a descriptor comes together: parent, parts in their places, own tables, and one format like another.

In this order: (1) a child's places overlay its parent's, key by key; (2) every use adds its part; (3) the architecture's
own tables follow, parent before child; (4) ``x = false`` takes away. What each format then stores is in ``sections.py``.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from reshard.errors import LayoutError
from reshard.layout.entries import RawTensor
from reshard.layout.expressions import both
from reshard.layout.files import File, Part, layout_dir, library_part
from reshard.layout.model import Descriptor, Place, Tensor
from reshard.layout.sections import Sections
from reshard.layout.values import FORMATS


class Standing(NamedTuple):
    """A part where it stands: in `place`, where `when` holds, its module called `at`."""

    place: str
    part: Part
    when: str
    at: "str | Mapping[str, str] | None"

    def module(self, formats: Iterable[str]) -> str | None:
        """What the part's module is called in the first of `formats` that has a word for it."""
        for given in (self.at, self.part.at):
            if isinstance(given, str):
                return given
            for format in formats:
                if given and format in given:
                    return given[format]
        return None


def resolve(name: str, chain: list[File]) -> Descriptor:
    """The descriptor of the last file of `chain`, which begins with the farthest parent. Raises LayoutError."""
    return Resolver(name, chain).descriptor()


class Resolver:
    def __init__(self, name: str, chain: list[File]):
        self.name, self.chain, self.where = name, chain, chain[-1].own.where
        self.inline = {part: value for file in chain for part, value in file.parts.items()}
        self.places = self._places()
        self.uses = [self._standing(place, use) for place, keys in self.places.items() for use in keys.get("parts", ())]
        self.axes = self._expressions("axes")
        self.conditions = self._expressions("conditions")
        self.defaults = self._expressions("defaults")
        for key in sorted(self.axes.keys() & self.conditions.keys()):
            raise LayoutError(f"{self.where}: {key!r} is an axis and a condition", "give one of the two another name")
        self.removed: set[tuple[str, str]] = set()  # tensors of parts that an own table takes away
        self.raw = self._raw()
        self.ids = self._ids()
        self.tensors = {self.ids[at]: self._tensor(at, *found) for at, found in self.raw.items()}

    def descriptor(self) -> Descriptor:
        if not self.tensors:
            raise LayoutError(f"{self.where}: no place has a part with tensors", 'write [place.layer] parts = ["…"], and [part.….tensors]')
        replicate = dict.fromkeys(axis for part in self.tables() for axis in part.replicate)
        for axis in replicate:
            self.known_axis(f"{self.where}: replicate", axis)
        sections = Sections(self)
        formats = {format: sections.section(format) for format in FORMATS if sections.has(format)}
        if "hf" not in formats:
            raise LayoutError(f"{self.where}: says nothing of format hf", "give places a prefix hf, and entries in [hf]")
        file, places = self.chain[-1], {}
        for place, keys in self.places.items():
            places[place] = Place(place, keys.get("count"), bool(keys.get("optional")), bool(keys.get("carry")))
        return Descriptor(
            self.name,
            file.architectures,
            file.own.description,
            self.defaults,
            self.conditions,
            self.axes,
            places,
            self.tensors,
            tuple(replicate),
            formats,
            file.path,
            tuple(
                doubt._replace(tensor=self.ids[use.place, doubt.tensor])
                for use in self.uses
                for doubt in use.part.doubts
                if (use.place, doubt.tensor) in self.ids
            ),
        )

    # places, parts and what they define

    def _places(self) -> dict[str, dict[str, object]]:
        places: dict[str, dict[str, object]] = {}
        for file in self.chain:
            for place, keys in file.places.items():
                if keys is False:
                    if places.pop(place, None) is None:
                        raise LayoutError(f"{file.own.where}: [place] {place} = false: there is no such place to take away")
                else:
                    places[place] = {**places.get(place, {}), **keys}
        for place, keys in places.items():
            beside = sorted(keys.keys() & {"parts", "count", "optional"}) if keys.get("carry") else ()
            if beside:
                raise LayoutError(
                    f"{self.where}: [place.{place}] carry and {beside[0]} together",
                    "what is carried has no parts: it is what files have there",
                )
        return places

    def _standing(self, place: str, use) -> Standing:
        part = self.inline.get(use.part) or library_part(use.part)
        if part is None:
            known = sorted({*self.inline, *(path.stem for path in (layout_dir() / "parts").glob("*.toml"))})
            raise LayoutError(f"{use.where}: no such part", f"parts are {', '.join(known)}")
        return Standing(place, part, use.when, use.at)

    def tables(self) -> list[Part]:
        """Parts in use, then own tables, parent first."""
        parts = {id(use.part): use.part for use in self.uses}
        return [*parts.values(), *(file.own for file in self.chain)]

    def _expressions(self, table: str) -> dict[str, str]:
        own: dict[str, object] = {}
        for file in self.chain:
            for key, text in getattr(file.own, table).items():
                if text is False and key not in own and not any(key in getattr(use.part, table) for use in self.uses):
                    raise LayoutError(f"{file.own.where}: [{table}] {key} = false: there is none to take away")
                own[key] = text
        out: dict[str, object] = {}
        origin: dict[str, Part] = {}
        for use in self.uses:
            for key, text in getattr(use.part, table).items():
                if key in out and out[key] != text and key not in own:
                    raise LayoutError(
                        f"{self.where}: [{table}] {key} is {out[key]!r} in part {origin[key].name}, {text!r} in part {use.part.name}",
                        f"decide in {self.where}: [{table}] {key} = …",
                    )
                out[key] = text
                origin[key] = use.part
        return {key: text for key, text in {**out, **own}.items() if text is not False}

    def _raw(self) -> dict[tuple[str, str], tuple[RawTensor, Standing]]:
        found: dict[tuple[str, str], tuple[RawTensor, Standing]] = {}
        for use in self.uses:
            for label, raw in use.part.tensors.items():
                if raw is False:
                    raise LayoutError(f"{use.part.where}: [tensors] {label} = false: a part has nothing to take away")
                if (use.place, label) in found:
                    other = found[use.place, label][1].part
                    raise LayoutError(
                        f"{self.where}: parts {other.name} and {use.part.name} of place {use.place} both have tensor {label!r}"
                    )
                found[use.place, label] = raw, use
        for file in self.chain:
            for label, raw in file.own.tensors.items():
                having = [at for at in found if at[1] == label]
                if not having and not any(label in use.part.tensors for use in self.uses):
                    what = "there is none to take away" if raw is False else "no part in use has this tensor"
                    raise LayoutError(
                        f"{file.own.where}: [tensors] {label}: {what}", "an own tensor changes a part's; a new one needs a part"
                    )
                for at in having:
                    if raw is False:
                        del found[at]
                        self.removed.add(at)
                    else:
                        found[at] = raw, found[at][1]
        return found

    def _ids(self) -> dict[tuple[str, str], str]:
        """What each tensor is called: its label in the first place that has it, ``place.label`` in later ones."""
        first: dict[str, str] = {}
        for place, label in self.raw:
            first.setdefault(label, place)
        return {(place, label): label if first[label] == place else f"{place}.{label}" for place, label in self.raw}

    def _tensor(self, at: tuple[str, str], raw: RawTensor, use: Standing) -> Tensor:
        place = self.places[use.place]
        for axis in (axis for dim in raw.dims for axis in dim):
            self.known_axis(raw.where, axis)
        if raw.expert:
            self.known_axis(raw.where, "expert")
        index = ((use.place,) if "count" in place else ()) + (("expert",) if raw.expert else ())
        when = both(use.when, raw.when)
        return Tensor(self.ids[at], index, raw.dims, raw.split, when, raw.stage, raw.dtype, use.place, raw.optional)

    def known_axis(self, where: str, axis: str) -> None:
        if axis not in self.axes:
            raise LayoutError(f"{where} uses axis {axis!r}, which [axes] does not define")
