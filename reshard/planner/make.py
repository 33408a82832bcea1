"""Making a plan: every element counted on both sides, and all that is wrong told together. Pure."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from math import prod

from reshard.errors import PlanError
from reshard.geometry.block import Box, Id, Key, Stored, end
from reshard.geometry.coverage import faults_of, label, unlike, where
from reshard.geometry.pieces import union_volume
from reshard.planner.join import Join, Pattern, Run, Slot, join
from reshard.planner.plan import Plan
from reshard.planner.retype import typed
from reshard.planner.values import Ways, operand_key

#: how a problem ends of a tensor that the destination does not hold
LOST = "has no place in the destination"


def plan(
    sources: Iterable[Stored],
    destinations: Iterable[Stored],
    *,
    cast: str | None = None,
    keep: Iterable[str] = (),
    native: Mapping[str, str] = {},
    sizes: Callable[[Key], tuple[int, ...]] | None = None,
    omitted: Container[Key] = frozenset(),
    complete: bool = True,
    check: bool = True,
    values: Mapping[str, Ways] = {},
) -> Plan:
    """The plan that fills `destinations` from `sources`; gives the destinations their dtypes.

    `cast`: store floats as this dtype, but narrow none of the tensors named in `keep`. `native`: the model's own dtype
    of tensors that the source's engine wanted in another. `sizes`: of a tensor of the model, its size along each axis.
    `complete`: every element of every source must have a place (off when only some ranks are asked for; needs `sizes`),
    but for those tensors that the destination is declared to do without, `omitted`.
    `check`: compare replicas. `values`: how tensors are computed that the source lacks. Raises PlanError with all problems.
    """
    sources = tuple(sources)
    destinations, problems = typed(sources, tuple(destinations), cast, set(keep), native, values)
    joined = join(sources, destinations, values)
    problems += faults(joined.destinations)
    problems += _unmatched(joined, complete, omitted)
    problems += _counted(joined, sizes if complete else None, check)
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return Plan(joined, check)


def faults(destinations: Iterable[Stored]) -> list[str]:
    """Names that stand twice, and stored tensors whose elements are not each under one block or declared padding."""
    problems = []
    names: set[Id] = set()
    for stored in destinations:
        at = stored.id
        if at in names:
            problems.append(f"{where(stored)}: two entries of the layout store something under this name")
        names.add(at)
    for stored in unlike(destinations):
        found = faults_of(stored)
        if stored.pad and stored.size - stored.pad != max((end(b.offset, b.shape, b.strides) for _, b in stored.blocks), default=0):
            found.append("its padding would lie between its elements; only the first axis of its first dimension can be padded")
        problems += [f"{where(stored)}: {fault}" for fault in found]
    return problems


def _unmatched(joined: Join, complete: bool, omitted: Container[Key]) -> list[str]:
    """Tensors that one side alone has."""
    holders = _first_holders(joined.destinations, set(joined.only_destination))
    problems = [f"{where(holders[key])} needs {label(key)}, which the source does not have" for key in joined.only_destination]
    if complete:
        lost = [key for key in joined.only_source if key not in omitted]
        holders = _first_holders(joined.sources, set(lost))
        problems += [f"{label(key)} ({where(holders[key])}) {LOST}" for key in lost]
    return problems


def _first_holders(side: Sequence[Stored], keys: set[Key]) -> dict[Key, Stored]:
    return {key: s for s in reversed(side) for key, _ in s.blocks if key in keys} if keys else {}


def _counted(joined: Join, sizes: Callable[[Key], tuple[int, ...]] | None, check: bool) -> list[str]:
    """Elements that no source holds, or that the destination has no place for: counted pattern by pattern."""
    problems: list[str] = []
    told = set()
    for run in joined.runs:
        pattern, name = joined.patterns[run.pattern], run.first[0]
        if (run.pattern, name) in told:
            continue
        sources = [joined.sources[column.at(0)[0]] for column in run.sources]
        before = len(problems)
        for i, operand, count, size in pattern.lacking:
            stored = joined.destinations[run.destinations[i].at(0)[0]]
            problems.append(
                f"{where(stored)}: {label(run.first)} is computed from {label(operand_key(operand, run.first))}, of which {count} of {size} elements are in no source file"
            )
        for i, count in pattern.missing:
            stored = joined.destinations[run.destinations[i].at(0)[0]]
            problems.append(
                f"{where(stored)}: {count} of {pattern.destinations[i].size} elements of {label(run.first)} are in no source file"
            )
        if pattern.overlapping:
            problems.append(f"{label(run.first)}: {where(sources[0])} and other ranks hold overlapping parts of it")
        problems += _unlike_dtypes(run, pattern, sources, check)
        for shape in {sizes(run.key(i)) for i in range(run.count)} if sizes else ():
            problems += _uncovered(run, pattern, shape)
        if len(problems) == before:
            told.add((run.pattern, name))  # sound for all of them; faults are told for each tensor
    return problems


def _unlike_dtypes(run: Run, pattern: Pattern, sources: list[Stored], check: bool) -> list[str]:
    """Holders of one tensor must agree on its dtype, replicas too where they are compared."""
    problems = []
    firsts: dict[str, Slot] = {}
    replicas: dict[tuple[str, Box], int] = {}
    for i, slot in enumerate(pattern.sources):
        first = firsts.setdefault(slot.operand, slot)
        other = replicas.setdefault((slot.operand, slot.box), i)
        if other != i and check and pattern.sources[other].dtype != slot.dtype:
            problems.append(
                f"{label(run.first)}: {where(sources[other])} holds it as {pattern.sources[other].dtype}, {where(sources[i])} as {slot.dtype}"
            )
        elif other == i and slot.dtype != first.dtype:
            problems.append(f"{label(run.first)}: {where(sources[0])} is {first.dtype}, {where(sources[i])} is {slot.dtype}")
    return problems


def _uncovered(run: Run, pattern: Pattern, shape: tuple[int, ...]) -> list[str]:
    """Whether the destination has a place for each element of a tensor of `shape`, and none outside of it."""
    boxes = frozenset(slot.box for slot in pattern.destinations)
    whole, count = prod(shape), union_volume(boxes)
    if not all(0 <= start < stop <= size for box in boxes for (start, stop), size in zip(box, shape, strict=True)):
        return [f"{label(run.first)}: the destination has elements of it past its sizes, {list(shape)}"]
    if count != whole:
        return [f"{label(run.first)}: {whole - count} of {whole} elements have no place in the destination"]
    return []
