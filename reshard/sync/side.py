"""One side of a sync: which processes hold which stored tensors. Pure, from a layout and a mesh or from DTensor placements.

``Side.placed`` is a framework's own layout (Megatron, vLLM, SGLang, ``tp``, whole HF tensors) on processes in that
framework's order of ranks. ``Side.sharded`` is HF tensors cut as DTensors are: FSDP2, tensor parallel, both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from reshard import formats
from reshard.checkpoint import find_config, model_config, read_config
from reshard.conversion.placing import split_hint
from reshard.dtypes import USER_WORDS
from reshard.errors import LayoutError, PlanError
from reshard.geometry.block import Stored, singles
from reshard.layout import Layout, Mesh, Placement, Rank, Section, find_descriptor, load_descriptor, parse_version
from reshard.layout.mesh import stage_order
from reshard.sync import carried
from reshard.sync.fp8_blocks import Fp8, linear_tensors, scale_shape, scales_name
from reshard.sync.sharding import Sharding, local_part, spelled, unsharded


def layout(config: Mapping | str | Path, descriptor: str | Path | None = None) -> Layout:
    """The layout of a model, from its config.json (a path, its folder, or the settings themselves)."""
    settings = config if isinstance(config, Mapping) else read_config(find_config(Path(config), None if Path(config).is_dir() else config))
    found = load_descriptor(Path(descriptor)) if descriptor else find_descriptor(settings)
    if found is None:
        raise LayoutError(
            f"no layout descriptor for architecture {settings.get('architectures')}",
            "pass a descriptor of your own: layout(config, 'my.toml')",
        )
    return found.bind(model_config(settings))


@dataclass(frozen=True)
class Side:
    """Stored tensors, with dtypes, and the processes that hold them.

    `members[i]` is what one place of the mesh holds; each process in `ranks[i]` holds a copy of it. `other_names` lists,
    for what holds several names' tensors, the others (a tied head is found under either). `constants`
    are names that are no part of the sync (an engine's constants, tensors not selected), `ignored` name patterns that are no weights.
    """

    layout: Layout
    format: str
    members: tuple[tuple[Stored, ...], ...]
    ranks: tuple[tuple[int, ...], ...]
    shardings: Mapping[str, Sharding] = field(default_factory=dict)
    other_names: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    title: str = ""
    fp8: Fp8 | None = None
    partly: frozenset[str] = frozenset()  # names of tensors of which a part is not selected
    recipe: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what it was made from, for ``to_json``

    @property
    def processes(self) -> list[int]:
        return sorted({rank for ranks in self.ranks for rank in ranks})

    @cached_property
    def _at(self) -> dict[int, tuple[int, ...]]:
        return {member[0].rank: ranks for member, ranks in zip(self.members, self.ranks) if member}

    @property
    def resolved(self) -> str:
        """The layout as far as it settles what moves: its tensors' axes and their sizes, and the quantised blocks."""
        descriptor = self.layout.descriptor
        tensors = sorted((t.name, t.index, t.dims, str(t.dtype), t.stage, t.place) for t in descriptor.tensors.values())
        fp8 = (self.fp8.edge, sorted(self.fp8.tensors)) if self.fp8 else None
        return repr(
            (self.format, self.layout.layers, sorted(self.layout.sizes.items()), tensors, list(descriptor.places), fp8, sorted(self.partly))
        )

    def at(self, rank: int) -> tuple[int, ...]:
        """The processes that hold what stored tensors of `rank` (``Stored.rank``) hold."""
        return self._at[rank]

    def held_by(self, process: int) -> list[Stored]:
        """All that `process` holds on this side."""
        return [s for member, ranks in zip(self.members, self.ranks) if process in ranks for s in member]

    def names(self, process: int) -> list[str]:
        """All names under which `process` may give what it holds, scales and tied weights' other names among them."""
        held = self.held_by(process)
        scales = [found for s in held for found in [self.scales(s)] if found]
        return [name for s in (*held, *scales) for name in (s.name, *self.other_names.get(s.entry.of, ()))]

    def leaves_out(self, name: str) -> bool:
        """Whether `name` may be given and is no part of the sync: a constant, or no weight."""
        return name in self.constants or any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def typed(self, dtypes: Mapping[str, str]) -> "Side":
        """This side with the dtypes that ``sync.dtypes(model)`` read from tensors, of one process or of several together."""
        members = []
        for member in self.members:
            words = [next((dtypes[n] for n in (s.name, *self.other_names.get(s.entry.of, ())) if n in dtypes), s.dtype) for s in member]
            members.append(tuple(s if word == s.dtype else s._replace(dtype=word) for s, word in zip(member, words)))
        known = {name for process in self.processes for name in self.names(process)}
        if not known & dtypes.keys():
            raise PlanError([f"{self.title} has none of the tensors whose dtypes are given: {', '.join(list(dtypes)[:3])} …"])
        recipe = {**self.recipe, "typed": {**self.recipe.get("typed", {}), **{n: w for n, w in dtypes.items() if n in known}}}
        return replace(self, members=tuple(members), recipe=recipe)

    def to_json(self) -> str:
        """Who holds what, for a control plane to carry: the model's config, the layout's name, and how this side was made."""
        return carried.written(self.layout, self.recipe, whole=not self.partly)

    @classmethod
    def from_json(cls, text: str, descriptor: str | Path | None = None) -> "Side":
        """The side of which ``to_json`` wrote `text`; `descriptor` is the layout's file, where it is not one of reshard's. Raises
        PlanError for what is no such text."""
        kind, layout, made, typed = carried.read(text, descriptor)
        with carried.reading():
            side = getattr(cls, kind)(layout, **made)
            return side.typed(typed) if typed else side

    def scales(self, stored: Stored) -> Stored | None:
        """The tensor of scales beside `stored`, where that is held in FP8 blocks."""
        if self.fp8 is None or stored.dtype != "F8_E4M3":
            return None
        return Stored(stored.rank, scales_name(stored.name), "F32", scale_shape(stored.shape, self.fp8.edge), (), stored.entry)

    @classmethod
    def placed(
        cls,
        layout: Layout,
        format: str,
        *,
        ranks: Iterable[int],
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        etp: int = 0,
        dtype: str = "bf16",
        dtypes: Mapping[str, str] = {},
        engine_version: str | None = None,
        variants: Sequence[str] = (),
        fp8: Fp8 | bool | None = None,
    ) -> "Side":
        """`format` on a mesh. `ranks` are the processes in the framework's own order: Megatron's (tp fastest, then data
        parallel, then pp), or for engines one replica after another. More of them than the mesh has are replicas.

        `dtype` is that of all tensors but those which the layout pins; `dtypes` overrides it by tensor of the layout
        (``{"router": "fp32"}``). `fp8` (True: the matrices inside layers, blocks of 128): what an engine holds in FP8 with
        scales. `variants` are names of the layout's other spellings (Megatron's ``local``, ``sequential``).
        Raises PlanError when the mesh cannot cut the model.
        """
        recipe = {"format": format, "ranks": list(ranks), "tp": tp, "pp": pp, "ep": ep, "etp": etp, "dtype": dtype, "dtypes": dict(dtypes),
                  "engine_version": engine_version, "variants": list(variants), "fp8": fp8}  # fmt: skip
        quantised = Fp8(linear_tensors(layout)) if fp8 is True else fp8 or None
        kind, mesh, processes = formats.get(format), Mesh(tp, pp, ep, etp), recipe["ranks"]
        section = layout.section(kind.section)
        version = parse_version(engine_version) if engine_version else None
        placement = Placement(layout, spelled(section.for_version(version), section, variants), kind.rules, mesh, engine=version)
        numbers = _numbers(format, placement, len(processes))
        stored: list[list[Stored]] = [[] for _ in placement.ranks]
        for s in placement.stored():
            stored[s.rank].append(s)
        if placement.problems:
            raise PlanError(placement.problems, split_hint(placement))

        def word(s: Stored) -> str:
            return "F8_E4M3" if quantised and quantised.tensors.issuperset(s.entry.of) else _dtype(layout, s, dtype, dtypes)

        stored = [[s._replace(dtype=word(s)) for s in member] for member in stored]
        holders = [tuple(p for p, n in zip(processes, numbers) if n == number) for number in range(len(placement.ranks))]
        constants = frozenset(name for rank in placement.ranks for name, _ in placement.constants(rank))
        replicas = f" × {len(processes) // len(holders)}" if len(processes) > len(holders) else ""
        return cls(
            layout,
            format,
            tuple(map(tuple, stored)),
            tuple(holders),
            {},
            _other_names(section, {s.name for member in stored for s in member}),
            constants,
            layout.buffers(section) + layout.omitted(section),
            f"{format} {mesh}{replicas}",
            quantised,
            recipe={"placed": recipe},
        )

    @classmethod
    def sharded(
        cls,
        layout: Layout,
        shardings: Mapping[str, Sharding],
        *,
        dtype: str = "bf16",
        dtypes: Mapping[str, str] = {},
        variants: Sequence[str] = (),
    ) -> "Side":
        """HF tensors as DTensors hold them: `shardings` by HF name, e.g. from ``shardings(model.named_parameters())``.

        Raises PlanError for names that the layout lacks, and for tensors of the layout that have no sharding.
        """
        section = layout.section("hf")
        if not variants:  # transformers holds experts stacked, its files each apart: by the names that are given
            variants = [name for name, _, v in section.variants
                        if any(s.name in shardings for s in Placement(layout, v, formats.get("hf").rules, Mesh()).stored())]  # fmt: skip
        placement = unsharded(layout, variants)
        processes = sorted({process for sharding in shardings.values() for process, _ in sharding.members()})
        held: dict[int, list[Stored]] = {process: [] for process in processes}
        every = list(placement.stored())
        others, problems, used = _other_names(section, {s.name for s in every}), [], set()
        cache: dict = {}
        for whole in every:
            name = next((n for n in (whole.name, *others.get(whole.entry.of, ())) if n in shardings), None)
            if name is None:
                problems.append(f"{whole.name} has no sharding")
                continue
            used.add(name)
            word = _dtype(layout, whole, dtype, dtypes)
            sharding = shardings[name]
            for process, coordinate in sharding.members():
                at = (whole.entry.label, whole.shape, sharding.sizes, sharding.cuts, coordinate)
                if at not in cache:
                    keys = [key for key, _ in whole.blocks]
                    shape, parts = local_part(whole, sharding, coordinate)
                    cache[at] = shape, [(keys.index(key), block) for key, block in parts]
                shape, parts = cache[at]
                keys = [key for key, _ in whole.blocks]
                held[process].append(Stored(process, name, word, shape, singles((keys[i], block) for i, block in parts), whole.entry))
        problems += [f"{name} is not in layout {layout.name}" for name in shardings if name not in used and not _is_alias(name, others)]
        if problems:
            lacks = any(problem.endswith(" has no sharding") for problem in problems)
            raise PlanError(problems, "named_parameters() leaves out buffers: shardings(model) of the module has them" if lacks else None)
        members = tuple(tuple(held[p]) for p in processes)
        return cls(
            layout,
            "hf",
            members,
            tuple((p,) for p in processes),
            dict(shardings),
            others,
            frozenset(),
            layout.buffers(section) + layout.omitted(section),
            f"DTensors on {len(processes)} ranks",
            recipe={"sharded": {"shardings": shardings, "dtype": dtype, "dtypes": dict(dtypes), "variants": list(variants)}},
        )


def _numbers(format: str, placement: Placement, count: int) -> list[int]:
    """For each process in the framework's order, the number of the format's rank whose tensors it holds."""
    mesh, places = placement.mesh, len(placement.ranks)
    order = stage_order(mesh, placement.etp)
    unit = mesh.pp * len(order) if format == "megatron" else places
    if count == 0 or count % unit:
        raise PlanError([f"{format} {mesh} needs a multiple of {unit} ranks, got {count}"])
    if format != "megatron":
        return [i % places for i in range(count)]
    by_place: dict[tuple[int, int, int], Rank] = {(r.pp, r.tp, r.ep): r for r in placement.ranks}
    return [by_place[p, *order[g % len(order)][:2]].number for p in range(mesh.pp) for g in range(count // mesh.pp)]


def _dtype(layout: Layout, s: Stored, dtype: str, dtypes: Mapping[str, str]) -> str:
    for word in (dtype, *dtypes.values()):
        if word not in USER_WORDS:
            raise PlanError([f"unknown dtype {word!r}"], f"use one of {', '.join(USER_WORDS)}")
    own = {USER_WORDS[dtypes[t]] if t in dtypes else layout.descriptor.tensors[t].dtype or USER_WORDS[dtype] for t in s.entry.of}
    if len(own) > 1 and not s.entry.dtype:
        raise PlanError([f"{s.name} fuses tensors of different dtypes: {', '.join(sorted(own))}"])
    given = next((USER_WORDS[dtypes[t]] for t in s.entry.of if t in dtypes), None)
    return given or s.entry.dtype or own.pop()


def _other_names(section: Section, placed: set[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Per set of tensors, the names beside those placed that the section has for them, conditions aside (tied weights)."""
    names: dict[tuple[str, ...], list[str]] = {}
    for entry in section.entries:
        if "{" not in entry.name and entry.name not in placed:
            names.setdefault(entry.of, []).append(entry.name)
    return {of: tuple(own) for of, own in names.items()}


def _is_alias(name: str, others: Mapping[tuple[str, ...], tuple[str, ...]]) -> bool:
    return any(name in names for names in others.values())


def restricted(side: Side, select: Callable[[tuple], bool]) -> Side:
    """`side` with the tensors that `select(key)` chooses; `key` is the layout's name, then layer and expert numbers."""
    members, left, partly = [], set(side.constants), set()
    for member in side.members:
        kept = [s._replace(parts=singles(own)) for s in member for own in [[b for b in s.blocks if select(b[0])]] if own]
        left |= {s.name for s in member} - {s.name for s in kept}
        whole = {s.name: len(s.blocks) for s in member}
        partly |= {s.name for s in kept if len(s.blocks) < whole[s.name]}
        members.append(tuple(kept))
    return replace(side, members=tuple(members), constants=frozenset(left), partly=frozenset(partly))
