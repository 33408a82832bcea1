"""The dtype that each stored tensor of a destination gets: its engine's, its source's, or what floats are cast to. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from reshard.dtypes import DTYPE_SIZE, FLOATS, INTEGERS
from reshard.geometry.block import Key, Stored
from reshard.geometry.coverage import label, where
from reshard.planner.values import Ways, ways_of


def target_dtype(source: str, *, cast: str | None = None, keep: bool = False, wanted: str | None = None) -> str:
    """The dtype that a tensor of `source` is stored in: the one its engine wants, else floats follow `cast`, which
    never narrows those to `keep`. Whole numbers stay whole numbers."""
    if source == "F8_E8M0" and wanted:  # powers of two: a float has each of them
        return wanted
    if source not in FLOATS:
        return wanted if wanted in INTEGERS and source in INTEGERS else source
    if wanted or cast is None:
        return wanted or source
    return source if keep and DTYPE_SIZE[cast] < DTYPE_SIZE[source] else cast


def typed(
    sources: Sequence[Stored],
    destinations: Sequence[Stored],
    cast: str | None,
    keep: set[str],
    native: Mapping[str, str],
    values: Mapping[str, Ways] = {},
) -> tuple[tuple[Stored, ...], list[str]]:
    """`destinations` with the dtypes that they get from `sources`, and what is wrong with those."""
    held: dict[str, set[str]] = defaultdict(set)  # of all layers and experts
    for s in sources:
        for part in s.parts:
            held[part.first[0]].add(s.dtype)
    computed = {
        name: value.dtype or next(iter(held[value.operands[0].name]))
        for name, ways in values.items()
        for value in ways_of(ways)[:1]
        if value.operands[0].name in held
    }
    for name, own_dtype in computed.items():
        held[name].add(own_dtype)
    mixed = {name for name, dtypes in held.items() if len(dtypes) > 1}
    own = {key: s.dtype for s in reversed(sources) for key, _ in s.blocks if key[0] in mixed} if mixed else {}
    any_of = {name: next(iter(dtypes)) for name, dtypes in held.items()}

    def dtype_of(stored: Stored, name: str, source: str) -> str:
        wanted = stored.entry.dtype if stored.entry else None
        return target_dtype(native.get(name, source), cast=cast, keep=name in keep, wanted=wanted)

    problems: list[str] = []
    out = []
    sound: dict[tuple[object, ...], str] = {}  # the dtype of what holds these tensors for such an engine, where nothing is wrong with it
    for stored in destinations:
        alike = tuple([part.first[0] for part in stored.parts]), stored.entry and stored.entry.dtype
        dtype = sound.get(alike)
        if dtype is not None:
            out.append(Stored(stored.rank, stored.name, dtype, *stored[3:]))
            continue
        told = len(problems)
        found: dict[str, Key] = {}
        for part in stored.parts:
            name = part.first[0]
            for key, source in (
                ((key, own.get(key, computed.get(name))) for key, _ in part.each()) if name in mixed else ((part.first, any_of.get(name)),)
            ):
                if source is None:
                    continue  # told as missing
                wanted = dtype_of(stored, name, source)
                found.setdefault(wanted, key)
                if wanted not in (source, native.get(name)) and not any(
                    {source, wanted} <= set(kinds) for kinds in ((*FLOATS, "F8_E8M0"), INTEGERS)
                ):
                    problems.append(
                        f"{where(stored)}: {label(key)} is {source} and cannot become {wanted}: floats become floats, whole numbers whole numbers"
                    )
        if len(found) > 1:
            kinds = ", ".join(f"{label(key)} is {dtype}" for dtype, key in found.items())
            problems.append(f"{where(stored)} fuses tensors of different dtypes: {kinds}")
        name = stored.entry.of[0] if stored.entry else ""
        # all padding on this rank: of the dtype that the tensor has elsewhere
        dtype = next(iter(found), None) or stored.dtype or dtype_of(stored, name, native.get(name) or any_of.get(name, "BF16"))
        out.append(Stored(stored.rank, stored.name, dtype, *stored[3:]))
        if found and len(problems) == told and mixed.isdisjoint(alike[0]):
            sound[alike] = dtype
    return tuple(out), problems
