"""Layouts of weights that are quantised on the way, and of scales that are repeated on finer blocks."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from math import lcm, prod
from types import MappingProxyType

from reshard.errors import PlanError
from reshard.layout.bound import Layout
from reshard.layout.model import Tensor
from reshard.layout.quantised import Numbered, grained, quantised_tensors, with_operands
from reshard.layout.schemes import Scheme, Settings, grain_of, scheme_of, schemes, settings_of
from reshard.planner.values import Operand, Over, Value, ways_of

#: how much finer blocks may be: vLLM's kernels take no less than 32 of 128
FACTORS = (2, 4)


def recipes() -> dict[str, Scheme]:
    """What ``--quantise`` may be given: the schemes whose pages say how weights become codes."""
    return {str(scheme.quantise["recipe"]): scheme for scheme in schemes() if scheme.quantise is not None}


def quantising(layout: Layout, recipe: str) -> Layout:
    """`layout` of weights as that of their codes and scales, which ``made`` says how to compute. Raises PlanError."""
    known = recipes()
    if recipe not in known:
        raise PlanError([f"{recipe!r} is no recipe to quantise by"], f"use one of {', '.join(known)}")
    scheme = known[recipe]
    told: Mapping[str, object] = scheme.quantise or {}
    chosen = {at for tensor in layout.descriptor.tensors.values() for at in _linear(layout, tensor, str(told["keep"]).split())}
    if not chosen:
        raise PlanError([f"{layout.name} has no matrix that {recipe} quantises"])
    config = dict(told["config"])  # type: ignore[call-overload]
    config["modules_to_not_convert"] = sorted(_kept(layout, chosen))
    settings = Settings(config)
    new = with_operands(layout, scheme, settings, chosen)
    made = {}
    for name, ways in new.values.items():
        (value,) = ways_of(ways)
        tensor, rows = layout.descriptor.tensors[name], dict(value.settings)["rows"]
        edges = [grain_of(text, settings)[1] for text in scheme.kinds[1].dims]
        numbers = [number for at, number in chosen if at == name]
        shape, given = layout.shape(tensor, numbers[0]), (("rows", rows), ("out", edges[0]), ("in", edges[1]))
        for kind, operand in zip(scheme.kinds, value.operands):
            whole = _of_whole_blocks(tensor, shape, operand, edges, codes=kind is scheme.kinds[0])
            made[operand.name] = Value(kind.made or "", (Operand(name, whole),), kind.dtype or "F32", given)
    return replace(new, made=MappingProxyType(made), _cache={})


def as_published(layout: Layout) -> Layout:
    """`layout` of a model of which there is a config.json alone, as that says it is quantised: all linear layers but those that it names."""
    settings = settings_of(layout.config)
    scheme = scheme_of(settings) if settings is not None else None
    if scheme is None or settings is None or "hf" not in scheme.kinds[0].forms:
        return layout
    keep = str(next(iter(recipes().values())).quantise["keep"]).split()  # type: ignore[index]
    named = [settings[key] for key in ("modules_to_not_convert", "ignore", "exclude_modules") if isinstance(settings[key], list)]
    patterns = [str(pattern) for patterns in named for pattern in patterns]
    chosen = {at for tensor in layout.descriptor.tensors.values() for at in _linear(layout, tensor, keep)}
    for entry in layout.section("hf").entries:
        for number in layout.numbers(entry.place) if entry.name else ():
            module = layout.fill(entry.name, entry.place, number, number).removesuffix(".weight")
            if any(fnmatchcase(module, pattern) or _under(module, pattern) for pattern in patterns):
                chosen -= {(name, number) for name in entry.of}
    return with_operands(layout, scheme, settings, chosen) if chosen else layout


def _under(module: str, pattern: str) -> bool:
    """Whether `pattern` fits a module that `module` is in."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts)))


def _linear(layout: Layout, tensor: Tensor, keep: list[str]) -> Iterator[Numbered]:
    """The numbers in which `tensor` is the weight of a linear layer that is quantised: one of a numbered place, by the rule that all
    recipes share. What is kept beside is told by the scheme's page."""
    if len(tensor.dims) != 2 or tensor.dtype or tensor.name in keep or tensor.place not in layout.counts:
        return
    if all(tensor.dims):
        yield from ((tensor.name, number) for number in layout.numbers(tensor.place) if layout.exists(tensor, number))


def _kept(layout: Layout, chosen: set[Numbered]) -> Iterator[str]:
    """The modules whose matrices are not quantised, as config.json names them."""
    for entry in layout.section("hf").entries:
        if entry.omit or entry.copy or not entry.name.endswith(".weight") or len(layout.descriptor.tensors[entry.of[0]].dims) < 2:
            continue
        for number in layout.numbers(entry.place):
            own = [(name, number if layout.descriptor.tensors[name].place == entry.place else None) for name in entry.of]
            if chosen.isdisjoint(own) and any(layout.exists(layout.descriptor.tensors[name], at) for name, at in own):
                yield layout.fill(entry.name, entry.place, number, number).removesuffix(".weight")


def _of_whole_blocks(tensor: Tensor, shape: tuple[int, ...], operand: Operand, edges: list[int], codes: bool) -> tuple[Over, ...]:
    """How the axes of `tensor` lie over those of its codes or scales: what is taken begins and ends with a block."""
    overs: dict[int, Over] = {}
    for side, dim in enumerate(tensor.dims):
        axes, edge = [tensor.axes.index(axis) for axis in dim], edges[side]
        first = next((over.axes[0] for over in _blocked(tensor, shape, edges)[side] if over.grain > 1), axes[-1])
        for axis in axes:
            at, inner = (next(i for i, over in enumerate(operand.axes) if axis in over.axes)), prod(shape[a] for a in axes if a > first)
            if axis > first:
                overs[axis] = Over((), (), shape[axis])
            elif axis < first:
                overs[axis] = Over((at,), (shape[axis],), shape[axis])
            elif codes:
                overs[axis] = Over((at,), (shape[axis],), shape[axis], closed=lcm(edge, inner) // inner)
            else:
                overs[axis] = Over((at,), (operand.axes[at].size,), shape[axis], grain=inner, times=edge, closed=lcm(edge, inner))
    return tuple(overs[axis] for axis in range(len(shape)))


def _blocked(tensor: Tensor, shape: tuple[int, ...], edges: list[int]) -> list[list[Over]]:
    return [[over for _, over in grained([tensor.axes.index(a) for a in dim], shape, edge)] for dim, edge in zip(tensor.dims, edges)]


def refinements(layout: Layout, engine: bool) -> Iterator[Layout]:
    """`layout` with scales on finer blocks, the coarsest first. An engine's: of experts alone, as vLLM has them in memory beside
    a config.json of whole blocks; then, as in every other format, of all. Raises PlanError for a scheme without blocks."""
    scheme = next(each for each in schemes() if each.name == layout.scheme)
    if scheme.blocks is None:
        raise PlanError([f"the scales of {layout.scheme} cannot be repeated on finer blocks"], "leave out --refine")
    if engine:
        yield from experts_refined(layout)
    for factor in FACTORS:
        yield _refined(layout, scheme, factor, {name for name, _ in quantised_tensors(layout)})


def experts_refined(layout: Layout) -> Iterator[Layout]:
    """`layout` with the scales of its experts on finer blocks; nothing where it has none."""
    scheme = next((each for each in schemes() if each.name == layout.scheme and each.blocks), None)
    every = {name for name, _ in quantised_tensors(layout)} if scheme else set()
    experts = {name for name in every if "expert" in layout.descriptor.tensors[name].index}
    for factor in FACTORS if scheme and experts else ():
        yield _refined(layout, scheme, factor, experts)


def _refined(layout: Layout, scheme: Scheme, factor: int, names: set[str]) -> Layout:
    """`layout` with the scales of `names` repeated on blocks finer by `factor`."""
    plain, settings = layout.plain, layout.quantisation
    assert plain is not None and isinstance(settings, Settings)
    every = names == {name for name, _ in quantised_tensors(layout)}
    finer = with_operands(plain, scheme, settings, quantised_tensors(layout), finer=dict.fromkeys(names, factor))
    made = {}
    for name in names:
        coarse, fine = ways_of(layout.values[name])[0].operands[1], ways_of(finer.values[name])[0].operands[1]
        made[fine.name] = Value("repeated", (Operand(coarse.name, tuple(_over(axis, fine) for axis in coarse.axes)),))
    written = Settings(_divided(settings, (scheme.blocks or "").split("."), factor)) if every else settings
    return replace(finer, made=MappingProxyType(made), quantisation=written, finer=1 if every else factor, _cache={})


def _over(axis: Over, fine: Operand) -> Over:
    """How an axis of coarse scales lies over those of the fine ones."""
    at = [i for i, over in enumerate(fine.axes) if set(over.axes) <= set(axis.axes)]
    return Over(tuple(at), tuple(fine.axes[i].size for i in at), axis.size, axis.grain // fine.axes[at[-1]].grain)


def _divided(table: Mapping[str, object], path: list[str], factor: int) -> dict[str, object]:
    """`table` with the sizes at `path` divided; ``*`` stands for every key."""
    key, *rest = path
    keys = [each for each in table if each == key or key == "*"]
    new: dict[str, object] = dict(table)
    for each in keys:
        held = table[each]
        if rest and isinstance(held, Mapping):
            new[each] = _divided(held, rest, factor)
        elif isinstance(held, list):
            new[each] = [size // factor for size in held]
    return new
