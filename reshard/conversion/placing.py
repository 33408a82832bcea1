"""Where a format puts a model's tensors on a mesh, and the plan that fills those places from a checkpoint."""

from dataclasses import replace
from typing import TYPE_CHECKING

from reshard import formats
from reshard.checkpoint import Checkpoint
from reshard.dtypes import USER_WORDS
from reshard.errors import PlanError
from reshard.geometry.block import Stored
from reshard.layout import Entry, Layout, Mesh, Placement, Rank
from reshard.layout.check import omitted, refuse_unheld
from reshard.layout.quantise import quantising, refinements
from reshard.layout.transforms import values_of
from reshard.planner.make import LOST, plan
from reshard.planner.plan import Plan
from reshard.planner.values import bare

if TYPE_CHECKING:
    from reshard.conversion.optimizer import Optimizer


def place(
    source: Checkpoint,
    format: str,
    mesh: Mesh,
    engine_version: str | None = None,
    engine_platform: str | None = None,
    dequantise: bool = False,
    quantise: str | None = None,
    refine: bool = False,
) -> Placement:
    """Where `format` puts the tensors of `source`'s model on `mesh`; of a quantised one its codes and scales, or (`dequantise`) its weights.

    `quantise` names a recipe by which weights become codes and scales; `refine`: where a cut misses the blocks of scales, these are
    repeated on the coarsest finer blocks that it does not miss.
    """
    layout = _stored_as(source, formats.get(format), dequantise, quantise)
    whole = on_mesh(source, layout, format, mesh, engine_version, engine_platform)
    if not refine:
        return whole
    if layout.plain is None or quantise:
        raise PlanError([f"{source.path} holds no scales that could be repeated on finer blocks"], "leave out --refine")
    trial = whole
    for finer in refinements(layout, engine=formats.get(format).newest is not None):
        for _ in trial.stored():
            pass
        if not trial.problems:
            return whole if trial.layout is layout else on_mesh(source, trial.layout, format, mesh, engine_version, engine_platform)
        trial = on_mesh(source, finer, format, mesh, engine_version, engine_platform)
    return trial  # its problems are told


def _stored_as(source: Checkpoint, kind: formats.Format, dequantise: bool, quantise: str | None) -> Layout:
    layout = source.layout
    if ("model" if source.adapter is None else "adapter") not in kind.holds:
        what, way = (
            ("LoRA adapters", "--to hf")
            if source.adapter is None
            else ("whole models", "--to peft, tp or dcp; or merge it: reshard merge BASE ADAPTER DST --to …")
        )
        raise PlanError(
            [f"format {kind.name} holds {what}, and {source.path} is {'none' if source.adapter is None else 'an adapter'}"], f"use {way}"
        )
    if quantise and layout.plain is not None:
        raise PlanError([f"{source.path} is quantised already, as {layout.scheme}"], "dequantise it first, into a folder of its own")
    if quantise:
        layout = quantising(layout, quantise)
    if dequantise and layout.plain is None:
        raise PlanError([f"{source.path} is not quantised: there is nothing to dequantise"], "leave out --dequantise")
    if dequantise and layout.plain is not None:
        return layout.plain
    if layout.finer > 1 and kind.newest is None:
        raise PlanError(
            [f"{source.path}: its scales of experts are on finer blocks than its config.json says, which format {kind.name} cannot hold"],
            "convert what it was made of, or use --dequantise",
        )
    if layout.plain is not None and kind.section not in layout.descriptor.formats:
        way = "leave out --quantise" if quantise else "use --dequantise"
        raise PlanError([f"format {kind.name} cannot hold weights quantised as {layout.scheme}"], way)
    return layout


def on_mesh(
    source: Checkpoint, layout: Layout, format: str, mesh: Mesh, engine_version: str | None = None, engine_platform: str | None = None
) -> Placement:
    """Where `format` puts the tensors of `layout`."""
    kind = formats.get(format)
    section = layout.section(kind.section)
    if mesh.ep > 1 and not source.layout.sizes.get("expert"):
        raise PlanError([f"ep={mesh.ep}, but {source.layout.name} is a model without experts"], "leave out --ep")
    version = kind.release(engine_version) if engine_version is not None else None
    kind.check_platform(engine_platform)
    section = section.for_version(version).spelled(kind.forms)
    over = mesh if kind.whole else None
    if over:
        kind.rules.ranks(over)  # which refuses a mesh that the format has no ranks for
    placement = Placement(layout, section, kind.rules, Mesh() if over else mesh, over=over, engine=version, platform=engine_platform)
    if kind.stacks and placement.alike("layer"):
        placement = placement.trial(section=section.stacked())
    refuse_unheld(placement, kind.section)
    return placement


def one_rank(ranks: list[Rank], mesh: Mesh, number: int) -> Rank:
    if not 0 <= number < len(ranks):
        raise PlanError([f"rank {number} does not exist on {mesh}"], f"ranks are 0 to {len(ranks) - 1}")
    return ranks[number]


def rank_at(placement: Placement, at: tuple[int, ...]) -> Rank:
    """The rank at (tp, pp), or (tp, pp, ep) where several stand there."""
    found = [rank for rank in placement.ranks if (rank.tp, rank.pp, rank.ep)[: len(at)] == tuple(at)] if len(at) in (2, 3) else []
    if not found or len({rank.ep for rank in found}) > 1:
        text = f"no rank stands at {at}" if not found else f"{len(found)} ranks stand at {at}"
        raise PlanError([f"{text} of {placement.mesh}"], "at is (tp, pp), or (tp, pp, ep), each from 0")
    return found[0]


def join_to(
    source: Checkpoint,
    placement: Placement,
    dtype: str | None,
    ranks: list[Rank] | None = None,
    complete: bool = True,
    cut: list[Stored] | None = None,
    optimizer: "Optimizer | None" = None,
) -> Plan:
    """The plan that fills `placement` (or some of its ranks, or what was `cut` of its tensors) from `source`; with an `optimizer`'s state."""
    if dtype is not None and dtype not in USER_WORDS:
        raise PlanError([f"unknown dtype {dtype!r}"], f"use one of {', '.join(USER_WORDS)}")
    destinations = list(placement.stored(ranks)) if cut is None else cut
    if placement.problems:
        raise PlanError(placement.problems, split_hint(placement))
    if optimizer and cut is None:
        destinations = [*optimizer.named(destinations), *optimizer.destinations]
    more = optimizer.sources if optimizer else []
    keep = [t.name for t in source.layout.descriptor.tensors.values() if t.dtype] + [part.first[0] for s in more for part in s.parts]
    shapes = optimizer.shapes if optimizer else {}
    known = source.layout.descriptor.tensors
    held = (s.entry for s in source.stored if isinstance(s.entry, Entry) and s.entry.transform)
    try:
        return plan(
            [*source.stored, *more],
            destinations,
            cast=USER_WORDS.get(dtype or ""),
            keep=keep,
            native=source.native,
            sizes=lambda key: (
                shapes[key[0]] if key[0] in shapes else (source.layout if bare(key[0]) in known else placement.layout).shape_of(key)
            ),
            omitted=omitted(placement, source.layout),
            complete=complete,
            check=complete,
            values={
                **source.layout.values,
                **source.layout.made,
                **placement.layout.made,
                **values_of(placement.layout, dict.fromkeys((*held, *placement.section.entries))),
            },
        )
    except PlanError as error:
        if error.hint is None and any(LOST in problem for problem in error.problems):
            own = placement.layout.descriptor
            hint = f"in {own.path or f'a descriptor that extends {own.name}'}, give it a name in the destination's table, or say there that it is left out: omit = true"
            raise PlanError(list(error.problems), hint) from None
        raise


def split_hint(placement: Placement) -> str:
    """Tensor-parallel sizes that would work, for the model at hand."""
    works = []
    for tp in range(1, 65):
        try:
            trial = placement.trial(mesh=replace(placement.mesh, tp=tp))
            for _ in trial.stored(trial.ranks[:1]):
                pass
        except PlanError:
            continue
        if not trial.problems:
            works.append(str(tp))
    return f"tp sizes that fit this model here: {', '.join(works) or 'none'}" + ("; --to tp cuts unevenly" if placement.rules.even else "")
