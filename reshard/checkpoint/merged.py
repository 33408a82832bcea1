"""A checkpoint and an adapter of it as one: its weights are computed as base + scale·B·A while they are read."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from reshard.checkpoint.opened import Checkpoint
from reshard.errors import FormatError, PlanError
from reshard.geometry.block import Key, Part
from reshard.layout import Layout
from reshard.layout.lora import changed
from reshard.text import count, some


def merged(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """`base` with the weights that `adapter` (opened with base's config.json) makes of its. Raises PlanError or FormatError."""
    if adapter.adapter is None:
        raise FormatError(f"{adapter.path} is no LoRA adapter", "it should hold adapter_config.json and adapter_model.safetensors")
    if adapter.remote:
        raise _remote(adapter)
    layout, renamed = changed(base.layout, adapter.adapter.targets)
    own = {key for s in adapter.stored for key, _ in s.blocks if key[0] in base.layout.descriptor.tensors}
    stored = [s._replace(parts=tuple(_renamed(layout, _without(s.parts, own), renamed))) for s in base.stored]
    folder = os.path.realpath(adapter.path)
    for s in adapter.stored:
        stored.append(s._replace(file=os.path.join(folder, s.file), parts=tuple(_renamed(layout, s.parts, renamed))))
    out = replace(base, layout=layout, stored=[s for s in stored if s.parts], identities={**base.identities, **adapter.identities})
    out.merges = _told(adapter, len(renamed), own)
    return out


def mergeable(base: Checkpoint) -> None:
    """Raises PlanError for a checkpoint that no adapter can be merged into, before one is looked at."""
    if base.remote:
        raise _remote(base)
    if base.layout.plain is not None:
        raise PlanError([f"{base.path} is quantised as {base.layout.scheme}: its codes cannot take an update"],
                        "dequantise it first: reshard convert BASE DIR --to hf --dequantise")  # fmt: skip


def _remote(checkpoint: Checkpoint) -> PlanError:
    return PlanError([f"{checkpoint.path} is on the Hub; a merge reads folders"], "fetch it first: reshard pull hf://ORG/NAME DIR")


def _without(parts: tuple[Part, ...], keys: set[Key]) -> Iterator[Part]:
    for part in parts:
        if keys and any(key in keys for key, _ in part.each()):
            yield from (Part(key, block) for key, block in part.each() if key not in keys)
        else:
            yield part


def _renamed(layout: Layout, parts: "Iterator[Part] | tuple[Part, ...]", renamed: Mapping[tuple[str, int | None], str]) -> Iterator[Part]:
    """`parts`, those of tensors that are computed under the names that they have as operands."""
    known = {name for name, _ in renamed}
    for part in parts:
        tensor = layout.descriptor.tensors.get(part.first[0])
        if tensor is None or part.first[0] not in known:
            yield part
            continue
        numbered = bool(tensor.index) and tensor.index[0] == tensor.place
        keys = [part.first] if numbered and len(part.first) > 2 or not numbered else [key for key, _ in part.each()]
        names = [renamed.get((key[0], key[1] if numbered else None), key[0]) for key in keys]
        if len(set(names)) == 1:
            yield part._replace(first=(names[0], *part.first[1:]))
        else:
            yield from (Part((name, *key[1:]), block) for name, (key, block) in zip(names, part.each()))


def _told(adapter: Checkpoint, number: int, own: set[Key]) -> str:
    factors = {value for target in adapter.adapter.targets for value in target.ranks.values()}
    ranks = some([f"rank {rank}, scale {scale:g}" for rank, scale in sorted(factors)])
    taken = f"; taken from it as they are: {count(len(own), 'tensor')} ({some(sorted({key[0] for key in own}))})" if own else ""
    return f"merged: {adapter.path} ({ranks}) into {count(number, 'tensor')}{taken}"
