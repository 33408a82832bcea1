"""The layout of a quantised checkpoint, from the plain one's: codes and scales as tensors of their own, fused and cut as the matrix is.

So they are copied like any tensor, and ``Layout.values`` says how the matrix is computed where a destination wants it.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType

from reshard.errors import PlanError
from reshard.layout.bound import Layout
from reshard.layout.expressions import evaluate
from reshard.layout.model import Entry, Section, Tensor
from reshard.layout.schemes import Kind, Scheme, Settings, grain_of, scheme_of, settings_of
from reshard.planner.values import Operand, Over, Value

#: a tensor of the model, with the number of its place
Numbered = tuple[str, int | None]


def quantised(layout: Layout, format: str, names: Mapping[str, tuple[int, ...]]) -> Layout:
    """`layout` of a checkpoint whose files, in `format`, hold `names` (with their shapes): with the operands of those tensors that
    are quantised in the place of them. The same where none is. Raises PlanError, LayoutError."""
    settings = settings_of(layout.config)
    scheme = scheme_of(settings) if settings is not None else None
    if scheme is None or settings is None or not _holds(scheme.kinds_of(settings), format):
        return layout
    there = set(_found(layout.present(layout.absent), scheme.kinds_of(settings), format, names))  # optional places are looked for later
    if not there:
        return layout
    return with_operands(layout, scheme, settings, there, format, names)


def with_operands(
    layout: Layout,
    scheme: Scheme,
    settings: Settings,
    there: Container[Numbered],
    format: str | None = None,
    names: Mapping[str, tuple[int, ...]] = {},
    finer: Mapping[str, int] = {},
) -> Layout:
    """`layout` with those of its tensors that are `there` quantised. `names`: of the files that are so already, in `format`.
    `finer`: by how much the blocks of some tensors' scales are smaller than the scheme says."""
    kinds, every = scheme.kinds_of(settings), layout.present(layout.absent)
    tensors, axes, values = dict(layout.descriptor.tensors), dict(layout.descriptor.axes), {}
    lacking, made = set(layout.lacking), {}
    labels: dict[tuple[str, str], str] = {}
    for tensor in layout.descriptor.tensors.values():
        numbers = [number for number in every.numbers(tensor.place) if every.exists(tensor, number)]
        own = [number for number in numbers if (tensor.name, number) in there]
        if not own:
            continue
        shapes = {every.shape(tensor, number) for number in own}
        if len(shapes) > 1 or len(tensor.dims) != 2:
            text = "its size differs from layer to layer" if len(shapes) > 1 else "it is no matrix"
            raise PlanError([f"{tensor.name} is quantised, but {text}"])
        shape = shapes.pop()
        operands: dict[str, Operand] = {}
        for kind in kinds:
            factor = finer.get(tensor.name, 1) if kind is kinds[1] else 1
            new, operand, sizes = _operand(tensor, shape, kind, settings, factor)
            tensors[new.name] = new
            axes |= {axis: str(size) for axis, size in sizes.items()}
            labels[tensor.name, kind.label] = new.name
            operands[kind.label] = operand
            lacking |= {(new.name, number) for number in numbers if number not in own}
        lacking |= {(tensor.name, number) for number in own}
        rows = ("rows", len(tensor.dims[0]))
        given = (*((key, evaluate(text, settings)) for key, text in scheme.settings), rows)
        parts = tuple(operands[kind.label] for kind in kinds if not kind.beside)
        values[tensor.name] = Value(scheme.value, parts, _dtype(layout, scheme), given)
        one = Operand(parts[1].name, tuple(Over((), (), 1) for _ in parts[1].axes))  # no more of it than that it is there
        out, inner = (prod(shape[tensor.axes.index(axis)] for axis in dim) for dim in tensor.dims)
        for kind in (kind for kind in kinds if kind.made and kind.beside):
            told = ("in", inner), ("out", out), ("sizes", " ".join(str(over.size) for over in operands[kind.label].axes))
            made[operands[kind.label].name] = Value(kind.made or "", (one,), kind.dtype, (*given, *told))
    forms = {kind.label: _scalar_as_found(layout, kind, format, names) for kind in kinds}
    formats = {key: _section(section, key, kinds, forms if key == format else {}, labels, tensors)
               for key, section in layout.descriptor.formats.items() if _holds(kinds, key)}  # fmt: skip
    descriptor = replace(
        layout.descriptor, tensors=MappingProxyType(tensors), axes=MappingProxyType(axes), formats=MappingProxyType(formats)
    )
    sizes = {**layout.sizes, **{axis: int(text) for axis, text in axes.items() if axis not in layout.descriptor.axes}}
    held = {name for entry in formats[format].entries if not entry.omit for name in entry.of} if format else set()
    return replace(layout, descriptor=descriptor, sizes=sizes, lacking=frozenset(lacking), values=MappingProxyType(values),
                   made=MappingProxyType({name: value for name, value in made.items() if name not in held}),
                   told=MappingProxyType({name: value for name, value in made.items() if name in held}),
                   plain=layout, scheme=scheme.name, quantisation=settings, _cache={})  # fmt: skip


def quantised_tensors(layout: Layout) -> set[Numbered]:
    """Those that `layout`, of a quantised checkpoint, has operands of."""
    plain = layout.plain
    assert plain is not None
    return {at for at in layout.lacking - plain.lacking if at[0] in layout.values}


def beside(layout: Layout) -> set[str]:
    """The tensors of a quantised layout that no matrix depends on: scales of activations, shapes."""
    operands = set(layout.operands)
    return {name for name in layout.descriptor.tensors if "." in name and name not in operands and name.rpartition(".")[0] in layout.values}


def _holds(kinds: tuple[Kind, ...], format: str) -> bool:
    return all(format in kind.forms for kind in kinds if not kind.beside)


def _dtype(layout: Layout, scheme: Scheme) -> str:
    """The model's own dtype, by config.json; else the scheme's."""
    words = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    told = layout.config.get("dtype") or layout.config.get("torch_dtype")
    return words.get(told, scheme.dtype) if isinstance(told, str) else scheme.dtype


def _found(layout: Layout, kinds: tuple[Kind, ...], format: str, names: Container[str]) -> Iterator[Numbered]:
    """The tensors whose operands are all among `names`, each with the number of its place."""
    needed = [kind.forms[format] for kind in kinds if not kind.beside]
    for entry, number, plain in _named(layout, format):
        if all(form.filled(plain) in names for form in needed):
            yield from ((name, number if layout.descriptor.tensors[name].place == entry.place else None) for name in entry.of)


def _named(layout: Layout, format: str) -> Iterator[tuple[Entry, int | None, str]]:
    """The entries of a format however it is written, with what each is called in each number of its place."""
    section = layout.section(format)
    every = [section, *section.prefixes, *(variant for _, _, variant in section.variants)]
    for entry in (entry for each in every for entry in each.entries if entry.name and not entry.omit and not entry.copy):
        for number in layout.numbers(entry.place):
            yield entry, number, layout.fill(entry.name, entry.place, number, number).replace("{expert}", "0")


def _scalar_as_found(layout: Layout, kind: Kind, format: str | None, names: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether the files have scalars of `kind` without dimensions: both are usual. None where they have none of them."""
    if format is None or kind.dims != ("1",) or format not in kind.forms:
        return None
    found = (names[told] for _, _, plain in _named(layout, format) if (told := kind.forms[format].filled(plain)) in names)
    shape = next(found, None)
    return None if shape is None else shape == ()


def _section(section: Section, format: str, kinds, scalars: Mapping[str, bool | None], labels, tensors) -> Section:
    """`section` with an entry for each operand of what its entries hold, of the same form."""
    entries = list(section.entries)
    for entry in section.entries:
        if not entry.omit and all((name, kinds[0].label) in labels for name in entry.of):
            entries += [each for kind in kinds for each in _entries(entry, format, kind, scalars.get(kind.label), labels, tensors)]
    inner = tuple(_section(each, format, kinds, scalars, labels, tensors) for each in section.prefixes)
    variants = tuple((name, until, _section(each, format, kinds, scalars, labels, tensors)) for name, until, each in section.variants)
    return replace(section, entries=tuple(entries), prefixes=inner, variants=variants)


def _entries(entry: Entry, format: str, kind: Kind, scalar: bool | None, labels, tensors: Mapping[str, Tensor]) -> Iterator[Entry]:
    names = {name: labels[name, kind.label] for name in entry.of}
    form = kind.forms.get(format)
    name = form.filled(entry.name) if form else None
    own = replace(entry, label=f"{entry.label}.{kind.label}", fusion=entry.fusion.renamed(names), dims=None, pad=(), align="1", aligned=(),
                  view=None, transform=None, turned=kind.turned)  # fmt: skip
    if form is None or name is None:
        yield replace(own, name="", omit=True)
        return
    if form.last and len(entry.of) > 1:
        *others, last = entry.fusion.renamed(names).leaves()
        yield replace(own, name="", omit=True, fusion=entry.fusion._replace(axis=None, items=tuple(others)))
        own = replace(own, fusion=entry.fusion._replace(axis=None, items=(last,)))
    single, stacked = len(own.of) == 1, "expert" in tensors[own.of[0]].index and "{expert}" not in entry.name
    if kind.dims == ("1",) and single:  # one number for a matrix: a stack of them has one dimension
        scalar = form.scalar if scalar is None else scalar
        own = replace(own, view=((0, 1),) if stacked else () if scalar else None)
    elif form.flat:
        *kept, last, behind = range(len(kind.dims) + stacked)
        own = replace(own, view=(*((dim,) for dim in kept), (last, behind)))
    yield replace(own, name=name, dtype=form.dtype)


def _operand(tensor: Tensor, shape: tuple[int, ...], kind: Kind, settings: Settings, factor: int) -> tuple[Tensor, Operand, dict[str, int]]:
    """The operand as a tensor of the model, how it lies over `tensor`, and the sizes of axes that it brings."""
    where, own = dict(zip(tensor.axes, range(len(shape)))), f"{tensor.name}.{kind.label}" + (f"/{factor}" if factor > 1 else "")
    dims, overs, sizes, grains = [], [], {}, []
    for text in reversed(kind.dims) if kind.turned else kind.dims:
        side, grain = grain_of(text, settings)
        grain = grain // factor if side and grain > 1 else grain
        if not side:
            name = f"{own}:{grain}"
            dims.append((name,) if grain > 1 else ())
            if grain > 1:
                sizes[name] = grain
                overs.append(Over((), (), grain))
            continue
        grains.append(f"{grain} of {'input' if side == 'in' else 'output'}" if grain > 1 else "")
        named = []
        for axes, over in grained([where[axis] for axis in tensor.dims[side == "in"]], shape, grain) if grain else ():
            kept = over.grain == 1 and len(axes) == 1
            name = tensor.axes[axes[0]] if kept else f"{'·'.join(tensor.axes[axis] for axis in axes)}/{over.grain} of {tensor.name}"
            named.append(name)
            overs.append(over)
            if not kept:
                sizes[name] = over.size
        dims.append(tuple(named))
    new = replace(tensor, name=own, dims=tuple(dims), split=(), dtype=kind.dtype or "F32", optional=None)
    return new, Operand(new.name, tuple(overs), " and ".join(filter(None, grains))), sizes


def grained(axes: list[int], shape: tuple[int, ...], grain: int) -> list[tuple[list[int], Over]]:
    """The axes of a dimension whose flat range is divided by `grain`, as axes of the quotient: those outside a block stay, that in
    which it ends is one flat range with those inside it; where it ends nowhere, all are."""
    if grain == 1:
        return [([axis], Over((axis,), (shape[axis],), shape[axis])) for axis in axes]
    first, left = len(axes) - 1, grain
    while first > 0 and left % shape[axes[first]] == 0:
        left //= shape[axes[first]]
        first -= 1
    if shape[axes[first]] % left:
        first = 0
    inner = axes[first:]
    sizes = tuple(shape[axis] for axis in inner)
    split = [([axis], Over((axis,), (shape[axis],), shape[axis])) for axis in axes[:first]]
    return [*split, (inner, Over(tuple(inner), sizes, -(-prod(sizes) // grain), grain))]
