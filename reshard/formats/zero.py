"""ZeRO's partitions: which elements of each parameter lie where in the flat fp32 tensors of the data-parallel ranks.

ZeRO-1 and 2: a group's parameters lie one after another, each with its padding, and the whole is cut into equal partitions, in
the order of their shapes. ZeRO-3: each parameter is cut into equal parts, and a rank's lie one after another
over its flat groups. Source: deepspeed 0.19 ``zero_to_fp32.py``, ``stage_1_and_2.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.stores import TensorInfo
from reshard.stores.torch_names import Opaque

_COPY = "copy the folder again, whole"


class Fragment(NamedTuple):
    """Elements `low` to `high` of a parameter, which begin at `at` in `file`, of data-parallel rank `rank`."""

    rank: int
    file: str
    at: TensorInfo
    low: int
    high: int


def fragments(
    root: Path,
    optimizers: Sequence[tuple[str, Mapping[str, Any]]],
    models: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    word: str | None = None,
) -> Iterator[tuple[str, tuple[int, ...], list[Fragment]]]:
    """Each parameter's name, shape and fragments, of one tensor-parallel rank's data-parallel ranks: (file, state) of their optimizers, model
    states and the names of their files. Of the weights themselves, or of the state that Adam calls `word`. Raises FormatError where fragments lack."""
    shapes = [{name: tuple(size) for name, size in group.items()} for group in models[0].get("param_shapes") or ()]
    zero3 = "fp32_flat_groups" in optimizers[0][1]
    key = "fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"
    flat = []
    for file, state in optimizers:
        groups = state.get(key) if word is None else [each.get(word) for each in moments(root / file, state)]
        if not isinstance(groups, list) or not all(
            isinstance(at, TensorInfo) and len(at.shape) == 1 and at.strides is None for at in groups
        ):
            raise FormatError(
                f"{root / file} holds no {word or key}", "it is no optimizer of ZeRO's; the model states may do, without fp32"
            )
        flat.append(groups)
    lengths = [[at.shape[0] for at in groups] for groups in flat]
    other = next((i for i, each in enumerate(lengths) if zero3 and each != lengths[0] or len(each) != len(lengths[0])), None)
    if other:
        raise FormatError(f"{root}: {optimizers[0][0]} has groups of {lengths[0]} elements, {optimizers[other][0]} of {lengths[other]}",
                          "files of several checkpoints were mixed")  # fmt: skip
    if zero3:
        found = _partitioned(shapes, len(flat), lengths[0])
    else:
        found = list(_in_order(shapes, lengths, optimizers[0][1].get("param_alignment_paddings")))
        config = (models[0].get("ds_config") or {}).get("zero_optimization") or {}
        if not config.get("round_robin_gradients"):  # DeepSpeed's notes are of the order without it, its shapes are not
            _agree(root, optimizers, found)
    own: dict[str, list[Fragment]] = {}
    for name, rank, group, start, low, high in found:
        if not 0 <= start <= start + high - low <= lengths[rank][group]:
            raise FormatError(f"{root / optimizers[rank][0]} has {lengths[rank][group]} elements in group {group}, {quote(name)} is said to lie at "
                              f"{start} to {start + high - low}", _COPY)  # fmt: skip
        at = flat[rank][group]
        own.setdefault(name, []).append(
            Fragment(rank, optimizers[rank][0], TensorInfo(at.dtype, (high - low,), at.offset + start * DTYPE_SIZE[at.dtype]), low, high)
        )
    for name, size in ((name, size) for group in shapes for name, size in group.items()):
        parts = own.get(name, [])
        if sum(part.high - part.low for part in parts) != prod(size):
            held = sum(part.high - part.low for part in parts)
            raise FormatError(
                f"{root}: the partitions of {len(flat)} ranks hold {held} elements of {quote(name)}, its shape {list(size)} has {prod(size)}",
                _COPY,
            )
        yield name, size, parts
    if word is None:
        yield from _frozen(root, models, names, zero3)


def moments(path: Path, state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The state of the optimizer that ZeRO wraps, of each of its flat groups. Raises FormatError."""
    base = base_of(state)
    table, groups = base.get("state"), base.get("param_groups")
    if (
        not isinstance(table, dict)
        or not isinstance(groups, list)
        or not all(isinstance(each, dict) for each in (*table.values(), *groups))
    ):
        raise FormatError(f"{path} holds no state of an optimizer that reshard knows", "leave out --optimizer")
    return [table[number] for number in sorted(table)]


def base_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    base = state.get("optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state")
    return base if isinstance(base, dict) else {}


#: name, data-parallel rank, group, where it begins in the rank's flat tensor of that group, and which elements of the parameter
Found = tuple[str, int, int, int, int, int]


def _partitioned(shapes: Sequence[Mapping[str, tuple[int, ...]]], world: int, lengths: Sequence[int]) -> Iterator[Found]:
    """ZeRO-3: `lengths` of a rank's flat groups, over which parameters run on."""
    begins = [0, *accumulate(lengths)]
    at = 0
    for name, size in ((name, size) for group in shapes for name, size in group.items()):
        whole, own = prod(size), -(-prod(size) // world)
        for group, (begin, stop) in enumerate(zip(begins, begins[1:])):
            first, last = max(at, begin), min(at + own, stop)
            for rank in range(world if first < last else 0):
                low, high = min(rank * own + first - at, whole), min(rank * own + last - at, whole)
                if low < high:
                    yield name, rank, group, first - begin, low, high
        at += own


def _in_order(shapes: Sequence[Mapping[str, tuple[int, ...]]], lengths: Sequence[Sequence[int]], paddings: Any) -> Iterator[Found]:
    """ZeRO-1 and 2: parameters in the order of `shapes`, each with its padding."""
    for group, table in enumerate(shapes):
        begins = [0, *accumulate(each[group] for each in lengths)]
        at = 0
        for i, (name, size) in enumerate(table.items()):
            for rank, (begin, stop) in enumerate(zip(begins, begins[1:])):
                first, last = max(at, begin), min(at + prod(size), stop)
                if first < last:
                    yield name, rank, group, first - begin, first - at, last - at
            at += prod(size) + (paddings[group][i] if paddings else 0)


def _agree(root: Path, optimizers: Sequence[tuple[str, Mapping[str, Any]]], found: Sequence[Found]) -> None:
    """Raises FormatError where a rank's own notes, if it has any, say that fragments lie elsewhere than `found`."""
    ours = {(rank, group, name): (start, high - low) for name, rank, group, start, low, high in found}
    for rank, (file, state) in enumerate(optimizers):
        for group, table in enumerate(state.get("param_slice_mappings") or ()):
            for name, address in table.items():
                noted = address.state if isinstance(address, Opaque) else {}
                if ours.get((rank, group, name)) != (noted.get("start"), noted.get("numel")):
                    raise FormatError(f"{root / file} says that {quote(name)} lies at {quote(noted.get('start'))}, {quote(noted.get('numel'))} elements of it; "
                                      f"by the order of shapes it is {ours.get((rank, group, name), 'not there')}", _COPY)  # fmt: skip


def _frozen(
    root: Path, models: Sequence[Mapping[str, Any]], names: Sequence[str], zero3: bool
) -> Iterator[tuple[str, tuple[int, ...], list[Fragment]]]:
    """Parameters that are not trained, in the model states: whole, or (ZeRO-3) a part on each rank."""
    for name, size in (models[0].get("frozen_param_shapes") or {}).items():
        whole = prod(size)
        own = -(-whole // len(models)) if zero3 else whole
        parts = []
        for rank, (model, file) in enumerate(zip(models, names)):
            at = (model.get("frozen_param_fragments") or {}).get(name)
            low, high = min(rank * own, whole), min((rank + 1) * own, whole)
            if not isinstance(at, TensorInfo) or prod(at.shape) < high - low or at.strides is not None:
                raise FormatError(f"{root / file} holds no fragment of {high - low} elements of {quote(name)}, which is frozen", _COPY)
            if low < high:
                parts.append(Fragment(rank, file, at, low, high))
        yield name, tuple(size), parts
