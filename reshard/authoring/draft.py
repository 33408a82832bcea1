"""A first draft of a descriptor, out of a checkpoint's names, shapes and config.json.

The built-in descriptor that explains most of it is the parent. What the files lack is taken away, a tensor of the files that has
as many rows as several of the parent's that are lacking is their fusion, and what is left becomes a part of its own, its
dimensions guessed from sizes that the parent's axes have. All that the files cannot tell is marked DECIDE: the order inside a
fusion, what tensor parallelism splits, and what engines call it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from reshard import formats
from reshard.authoring.frameworks import Loaded, engine_entries, loaded, tensor_parallel_plan
from reshard.checkpoint import find_config, model_config, read_config
from reshard.checkpoint.config import folder_of
from reshard.errors import LayoutError, ReshardError
from reshard.foreign import quote
from reshard.layout import Descriptor, Layout, Mesh, Placement, architectures, builtin_descriptors
from reshard.layout.expressions import names_in
from reshard.layout.files import Use
from reshard.layout.find import parts_of

Shapes = Mapping[str, tuple[int, ...]]


class Nearest(NamedTuple):
    """A descriptor bound to the config, and the tensors that it expects in the Hugging Face files."""

    layout: Layout
    stored: Mapping[str, object]
    switches: tuple[tuple[str, str, str], ...] = ()  # (table, name, value) that differ from the descriptor

    def agreeing(self, shapes: Shapes) -> set[str]:
        return {name for name, s in self.stored.items() if shapes.get(name) == s.shape}

    def apart(self, shapes: Shapes) -> int:
        """How many tensors one side alone has."""
        right = self.agreeing(shapes)
        return len(shapes.keys() - right) + len(self.stored.keys() - right)


def draft(path: str | Path, *, from_transformers: bool = False, from_vllm: bool = False, without: frozenset[str] = frozenset()) -> str:
    """The text of a descriptor for the checkpoint in folder `path`. `without`: descriptors that are not looked at.

    `from_transformers` asks the tensor-parallel plan of transformers' model of this architecture what is split; `from_vllm` asks
    vLLM's model and loader that, and what its parameters are called and made of. Raises FormatError or LayoutError where
    nothing that is known comes near, ReshardError where what is asked is not installed or does not know the architecture.
    """
    folder = folder_of(path)
    settings = read_config(find_config(folder, None))
    shapes = {piece.name: piece.whole or piece.shape for piece in formats.get("hf").read(folder).pieces}
    nearest = _nearest(shapes, settings, without)
    plan = tensor_parallel_plan(settings) if from_transformers else None
    told = loaded(folder, shapes) if from_vllm else {}
    if told:
        ways = {name: next((each.way for each in found if each.way), None) for name, found in told.items()}
        plan = {**(plan or {}), **{_generic(name): way for name, way in ways.items() if way}}
    return "\n".join(_lines(nearest, shapes, architectures(settings), plan, told)) + "\n"


def _nearest(shapes: Shapes, settings: Mapping[str, object], without: frozenset[str]) -> Nearest:
    best: tuple[tuple[int, ...], Nearest] | None = None
    for name, descriptor in builtin_descriptors().items():
        if name in without:
            continue
        for candidate in _bound(descriptor, settings, shapes):
            score = (
                candidate.apart(shapes),
                len(candidate.switches),
                -len(descriptor.formats),
                len(descriptor.tensors),
                -len(descriptor.architectures),
            )
            if candidate.agreeing(shapes) and (best is None or score < best[0]):
                best = score, candidate
    if best is None:
        listed = ", ".join(map(quote, sorted(shapes)[:4]))
        raise LayoutError(
            f"no descriptor that is known has a tensor of this name and shape: {listed} …", "write one: docs/guides/descriptor.md"
        )
    return best[1]


def _bound(descriptor: Descriptor, settings: Mapping[str, object], shapes: Shapes) -> Iterator[Nearest]:
    """`descriptor` on the config, under each of its prefixes; with those of its conditions turned that bring it nearer."""
    for number in range(1 + len(descriptor.section("hf").prefixes)):
        found = _one(descriptor, settings, number)
        if found is None:
            return  # another architecture's config
        if found.agreeing(shapes):
            for switch in _switches(descriptor):
                turned = _one(descriptor, settings, number, (*found.switches, switch))
                if turned and turned.apart(shapes) < found.apart(shapes):
                    found = turned
        yield found


def _one(descriptor: Descriptor, settings: Mapping[str, object], number: int, switches: tuple = ()) -> Nearest | None:
    for table, name, value in switches:
        descriptor = replace(descriptor, **{table: {**getattr(descriptor, table), name: value}})
    try:
        layout = descriptor.bind(model_config(settings))
        section = layout.section("hf")
        placement = Placement(layout, (section, *section.prefixes)[number], formats.get("hf").rules, Mesh())
        return Nearest(layout, {s.name: s for s in placement.stored()}, switches)
    except ReshardError:
        return None


def _switches(descriptor: Descriptor) -> list[tuple[str, str, str]]:
    """The conditions and defaults that say which tensors there are, each turned on and off."""
    names = {name for tensor in descriptor.tensors.values() for name in names_in(tensor.when)}
    tables = [("conditions", name) for name in descriptor.conditions] + [("defaults", name) for name in descriptor.defaults]
    return [(table, name, value) for table, name in tables if name in names for value in ("true", "false")]


def _lines(
    nearest: Nearest, shapes: Shapes, names: list[str], plan: Mapping[str, str] | None, told: Mapping[str, list[Loaded]]
) -> Iterator[str]:
    layout = nearest.layout
    right = nearest.agreeing(shapes)
    lacking = [s for name, s in nearest.stored.items() if name not in right]
    left = {name: shape for name, shape in shapes.items() if name not in right}
    yield f'extends = "{layout.name}"'
    yield f"architectures = [{', '.join(f'{quote(repr(name))}' for name in names)}]".replace("'", '"')
    fused, gone, own = _explained(nearest, lacking, left)
    engine = engine_entries(nearest.layout, _held(nearest, right, fused, own), told) if told else None
    if left or lacking:
        for format in ("vllm", "sglang", "megatron"):
            if format == "vllm" and engine is not None:
                continue
            if format in layout.descriptor.formats:
                yield f"{format} = false" + " " * (25 - len(format)) + "# DECIDE: what it calls the tensors below, if it has this model"
    for kind in ("defaults", "conditions"):
        turned = {name: value for place, name, value in nearest.switches if place == kind}
        if turned:
            yield f"\n[{kind}]"
            yield from (f'{name} = "{value}"' for name, value in turned.items())
    if own:
        yield from _own_part(layout, own, plan)
    if gone:
        yield "\n[tensors]"
        yield from (f"{label} = false" for label in gone)
    if fused:
        yield "\n[hf]"
        for label, name, of in fused:
            yield f'{label} = {{ name = "{name}", of = "{" ".join(of)}" }}   # DECIDE: this order, or head by head ("kv: {" ".join(of)}")'
    if engine:
        yield "\n[vllm]"
        yield from engine


def _explained(nearest: Nearest, lacking: list, left: dict[str, tuple[int, ...]]):
    """(fusions of lacking tensors, lacking tensors that nothing replaces, what remains of `left`) by the layer-less names."""
    fused, used = [], set()
    own: dict[str, tuple[int, ...]] = {}
    by_module: dict[str, list] = {}
    for s in lacking:
        by_module.setdefault(_generic(s.name).rpartition(".")[0].rpartition(".")[0], []).append(s)
    seen: set[str] = set()
    for name, shape in left.items():
        generic = _generic(name)
        if generic in seen:
            continue
        seen.add(generic)
        module, kind = generic.rpartition(".")[0].rpartition(".")[0], generic.rpartition(".")[2]
        candidates = {
            _generic(s.name): s for s in by_module.get(module, ()) if s.name.rpartition(".")[2] == kind and s.shape[1:] == shape[1:]
        }
        for count in (3, 2):
            groups = [g for g in combinations(candidates.values(), count) if sum(s.shape[0] for s in g) == shape[0]]
            if len(groups) == 1 and not used & {s.entry.label for s in groups[0]}:
                of = [label for s in groups[0] for label in s.entry.of]
                used |= {s.entry.label for s in groups[0]}
                fused.append(("_".join(of), "." + generic.removeprefix(f"{module}."), of))
                break
        else:
            own[generic] = shape
    gone = [
        label
        for label in dict.fromkeys(label for s in lacking for label in s.entry.of)
        if label not in {x for _, _, of in fused for x in of}
    ]
    return fused, gone, own


def _generic(name: str) -> str:
    """`name` with * for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _own_part(layout: Layout, own: Mapping[str, tuple[int, ...]], plan: Mapping[str, str] | None) -> Iterator[str]:
    """The parts that hold what no tensor of the parent explains, in the layers and beside them."""
    sizes = _known(layout)
    unknown: dict[int, str] = {}
    for place in ("layer", "model"):
        mine = {name: shape for name, shape in own.items() if ("*" in name) == (place == "layer")}
        if not mine:
            continue
        parts = ", ".join([*map(_use, parts_of(layout.name, place)), f'"own_{place}"'])
        yield f"\n[place.{place}]\nparts = [{parts}]"
        tensors, entries = [], []
        for name, shape in mine.items():
            label = _label(layout, name)
            way = (
                next((v for k, v in (plan or {}).items() if name.partition(".")[2].startswith(k) or name.startswith(k)), "")
                if plan
                else None
            )
            dims, sure = _dims(shape, sizes, unknown)
            starred = _starred(dims, way)
            known = all(sure) and bool(way)
            tensors.append(
                f'{label} = "{" ".join(starred)}"' + ("" if known else "   # DECIDE: axes, and * at what tensor parallelism splits")
            )
            entries.append(f'{label} = "{("/" + name) if place == "model" else name.split("*.", 1)[1]}"')
        if unknown:
            yield f"\n[part.own_{place}.axes]"
            yield from (f'{axis} = "{abs(size)}"   # DECIDE: which number of config.json this is' for size, axis in unknown.items())
            unknown.clear()
        yield f"\n[part.own_{place}.tensors]"
        yield from tensors
        yield f"\n[part.own_{place}.hf]"
        yield from entries


def _label(layout: Layout, name: str) -> str:
    """What a tensor of its own is called in the draft."""
    label = re.sub(r"\W+", "_", name.split("*.", 1)[-1].removesuffix(".weight").split("model.")[-1])
    return f"own_{label}" if label in layout.descriptor.tensors else label


def _held(nearest: Nearest, right: set[str], fused: list, own: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """By the name with * for its layer's number, the labels of the draft's tensors that a tensor of the checkpoint holds."""
    found = {_generic(name): nearest.stored[name].entry.of for name in right}
    layer = next((name.partition("*")[0] for name in found if "*" in name), "")
    found |= {f"{layer}*{name}" if name.startswith(".") else name: tuple(of) for _, name, of in fused}
    return found | {name: (_label(nearest.layout, name),) for name in own}


def _use(use: Use) -> str:
    said = [f'part = "{use.part}"'] + ([f'when = "{use.when}"'] if use.when != "true" else [])
    if use.at is not None:
        at = [f'{format} = "{name}"' for format, name in use.at.items()] if isinstance(use.at, Mapping) else None
        said.append(f"at = {{ {', '.join(at)} }}" if at else f'at = "{use.at}"')
    return f'"{use.part}"' if len(said) == 1 else f"{{ {', '.join(said)} }}"


def _known(layout: Layout) -> dict[int, list[str]]:
    """The dimensions that the parent's tensors have, by size; the most frequent first where several have one size."""
    found: dict[int, dict[str, int]] = {}
    for tensor in layout.descriptor.tensors.values():
        for dim in tensor.dims:
            try:
                size = 1
                for axis in dim:
                    size *= layout.size(axis)
            except (LayoutError, KeyError):
                continue
            words = " ".join(axis + "*" * (axis in tensor.split) for axis in dim)
            text = f"({words})" if len(dim) > 1 else words
            if dim:
                found.setdefault(size, {})[text] = found.get(size, {}).get(text, 0) + 1
    return {size: sorted(texts, key=texts.__getitem__, reverse=True) for size, texts in found.items()}


def _dims(shape: tuple[int, ...], sizes: Mapping[int, list[str]], unknown: dict[int, str]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """A guess at each dimension of `shape`, and whether its size is one that the parent knows. No axis stands twice."""
    dims: list[str] = []
    sure: list[bool] = []
    used: set[str] = set()
    for size in shape:
        fitting = [text for text in sizes.get(size, ()) if used.isdisjoint(re.findall(r"\w+", text))]
        text = "1" if size == 1 else fitting[0] if fitting else unknown.setdefault(size, f"size_{size}")
        if text in dims and text != "1":  # square, and of no size that is known
            text = f"{text}_b"
            unknown[-size] = text
        used |= set(re.findall(r"\w+", text))
        dims.append(text)
        sure.append(size == 1 or bool(fitting))
    return tuple(dims), tuple(sure)


def _starred(dims: tuple[str, ...], way: str | None) -> list[str]:
    """`dims` with stars only where `way` (of transformers' plan) splits; as the parent's axes are where there is no plan."""
    plain = [dim.replace("*", "") for dim in dims]
    if way is None:
        first = next((i for i, dim in enumerate(dims) if "*" in dim), None)
        return [dims[i] if i == first else dim for i, dim in enumerate(plain)]
    column = way.startswith(("colwise", "packed_colwise"))
    at = 0 if column else 1 if way.startswith("rowwise") and len(dims) > 1 else None
    return [(dims[i] if "*" in dims[i] else _star(dim)) if i == at else dim for i, dim in enumerate(plain)]


def _star(dim: str) -> str:
    return dim if dim.startswith("(") else f"{dim}*"
