"""What is inconsistent in a descriptor, per format and mesh, told by the same plan that a conversion would follow; no weights.

A model of the descriptor's own Hugging Face names stands for the checkpoint. Whatever the plan refuses then is a mistake of the
descriptor, but for cuts that the format itself cannot make (`cannot`).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from reshard import formats
from reshard.checkpoint import Checkpoint, model_config
from reshard.conversion.placing import join_to, place, split_hint
from reshard.dtypes import DTYPE_SIZE
from reshard.errors import LayoutError, PlanError
from reshard.geometry.block import Stored
from reshard.layout import Descriptor, Layout, Mesh, Placement, parse_version
from reshard.registry import FORMATS

#: tried of every format, as far as it has such ranks
MESHES = (Mesh(), Mesh(2), Mesh(4), Mesh(8), Mesh(1, 2), Mesh(2, 2), Mesh(2, ep=2))


class Finding(NamedTuple):
    """One format on one mesh. `release`: of the engine, where it is not the newest. `cannot`: no mistake, but no such cut."""

    format: str
    mesh: Mesh
    release: str | None
    tensors: int
    largest: int  # bytes of the largest rank in bf16
    wrong: tuple[str, ...] = ()
    cannot: tuple[str, ...] = ()


def review(descriptor: Descriptor, config: Mapping[str, object]) -> list[Finding]:
    """Every format of `descriptor` on all of MESHES, with the sizes of `config` (a config.json). Raises LayoutError where it
    cannot even be bound to them."""
    layout = descriptor.bind(model_config(config))
    source = pretended(layout)
    out = []
    for kind in map(formats.get, FORMATS):
        if kind.section in descriptor.formats:
            section = descriptor.section(kind.section)
            oldest = max(parse_version(kind.oldest), parse_version(section.since or kind.oldest)) if kind.newest else ()
            releases = [until for _, until, _ in section.variants if until and parse_version(until) > oldest] if kind.newest else []
            meshes = [
                mesh
                for mesh in MESHES
                if (mesh.ep == 1 or layout.sizes.get("expert")) and (mesh == Mesh() or not kind.whole and kind.name != "hf")
            ]
            out += [_found(source, kind, mesh, None) for mesh in meshes]
            out += [_found(source, kind, Mesh(2), release) for release in releases]
    return out


def pretended(layout: Layout) -> Checkpoint:
    """A checkpoint in bf16 that has all tensors of `layout` under their Hugging Face names, and no bytes."""
    layout = layout.present(layout.absent)
    placement = Placement(layout, layout.section("hf"), formats.get("hf").rules, Mesh())
    stored = [Stored(s.rank, s.name, "BF16", s.shape, s.parts, s.entry, "model.safetensors", 0, s.pad) for s in placement.stored()]
    return Checkpoint(Path("model"), "hf", Mesh(), layout, stored)


def _found(source: Checkpoint, kind: formats.Format, mesh: Mesh, release: str | None) -> Finding:
    found = Finding(kind.name, mesh, release, 0, 0)
    try:
        placement = place(source, kind.name, mesh, release)
        stored = list(placement.stored())
    except LayoutError as error:
        return found._replace(wrong=(str(error),))
    except PlanError as error:
        return found._replace(cannot=error.problems)
    if placement.problems:
        hint = split_hint(placement)
        return found._replace(cannot=(*placement.problems[:3], *([hint] if hint else ())))
    sizes = [0] * len(placement.ranks)
    for s in stored:
        sizes[s.rank] += s.size * DTYPE_SIZE[s.entry.dtype or "BF16"]
    found = found._replace(tensors=len(stored), largest=max(sizes))
    try:
        join_to(source, placement, None)
    except PlanError as error:
        return found._replace(wrong=error.problems)
    return found


def doubts(descriptor: Descriptor) -> list[str]:
    """What its parts know to be mistaken often: see [doubts] in layouts/parts."""
    out = []
    entries = descriptor.section("hf").entries
    for tensor, named, like, says in descriptor.doubts:
        for entry in entries:
            if tensor in entry.of and fnmatchcase(entry.name, named):
                beside = [e.name for e in entries if e.place == entry.place and fnmatchcase(e.name, like)]
                if beside:
                    out.append(f"{entry.name} holds {tensor}, beside {', '.join(beside)}: {says}")
    return out
