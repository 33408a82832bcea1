"""Ranks of a checkpoint as processes: who computes together, and how they exchange.

A checkpoint of tp × pp × ep ranks runs as that many processes. Ranks of one pipeline stage that hold the slices of one
dense model form a tensor-parallel group; experts are summed over the whole stage.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from reshard.errors import PlanError, ReshardError
from reshard.layout import Mesh, Rank
from reshard.layout.mesh import expert_cut, stage_order

#: ranks that are silent for so long are given up: the reference may take its time, and a rank that dies ends the run at once
SILENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Group:
    """Processes that take part in one collective, and this one's place among them."""

    members: tuple[int, ...]
    index: int
    handle: object = None

    @property
    def size(self) -> int:
        return len(self.members)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all members' `x`."""
        if self.size == 1:
            return x
        carried = _carried(x.contiguous())
        dist.all_reduce(carried, group=self.handle)
        return carried.to(x.device)

    def concatenate(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """All members' `x` side by side along the last dimension, of `widths[i]` columns each."""
        if self.size == 1:
            return x
        wide = _carried(torch.nn.functional.pad(x, (0, max(widths) - x.shape[-1])).contiguous())
        parts = [torch.empty_like(wide) for _ in self.members]
        dist.all_gather(parts, wide, group=self.handle)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths)], -1).to(x.device)

    def exchanged(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of members 0 and 1 exchanged, others' their own. All must be of one shape."""
        whole = self.concatenate(x.flatten()[None], [x.numel()] * self.size)
        other = {0: 1, 1: 0}.get(self.index, self.index)
        return whole[0, other * x.numel() : (other + 1) * x.numel()].view_as(x).clone()


#: the key of all ranks' group for messages that are no tensors of the model's
CONTROL = ("control",)


def control_group():
    """All ranks' group for messages that are no tensors of the model's: gloo, whatever the tensors go by."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=SILENCE)


def agree(problems: list, control) -> None:
    """Raise on every rank what any of them found: an error of one, or everyone's list of what doesn't fit."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems, group=control)
    every = [problem for one in found for problem in one]
    if errors := [problem for problem in every if isinstance(problem, ReshardError)]:
        raise agreed(errors[0])
    if every:
        raise agreed(PlanError(every, "is config.json this model's, and --from the engine that the shards are for?"))


def agreed(error: ReshardError) -> ReshardError:
    """`error` marked as one that every rank raises: all leave together, and nobody waits for another."""
    error.agreed = True
    return error


def is_agreed(error: BaseException) -> bool:
    return getattr(error, "agreed", False)


def process_groups(seats: list["Seat"], control) -> dict[tuple, object]:
    """A process group for every set of ranks that computes together, by its members; every process makes all of them."""
    world = dist.group.WORLD
    every = tuple(range(dist.get_world_size()))
    wanted = dict.fromkeys(members for seat in seats for members in (seat.tensor, seat.stage))
    groups = {
        members: None if len(members) == 1 else world if members == every else dist.new_group(members, timeout=SILENCE)
        for members in wanted
    }
    return {**groups, CONTROL: control}


def send(x: torch.Tensor, to: int) -> None:
    dist.send(_carried(x.contiguous()), to)


def receive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int) -> torch.Tensor:
    x = _carried(torch.empty(shape, dtype=dtype, device=device))
    dist.recv(x, source)
    return x.to(device)


def _carried(x: torch.Tensor) -> torch.Tensor:
    """`x` where the backend can reach it: gloo moves numbers of the CPU alone between ranks that share a GPU."""
    return x.cpu() if dist.get_backend() == "gloo" and x.is_cuda else x


@dataclass(frozen=True)
class Seat:
    """One process's part: its rank of the checkpoint, and the ranks it computes with, by number of process.

    `tensor` shares dense tensors with it, `stage` its experts; `before` and `after` hold the layers before and after
    its own. `slice` counts the dense models that the stage holds (more than one where expert parallelism repeats them).
    """

    rank: Rank
    tensor: tuple[int, ...]
    stage: tuple[int, ...]
    before: int | None
    after: int | None
    slice: int


def seats(mesh: Mesh, ranks: list[Rank]) -> list[Seat]:
    """A seat for every rank of the checkpoint, in Megatron's order of processes (other formats have one dense model)."""
    order = stage_order(mesh, expert_cut(mesh, ranks))
    width = len(order)
    at = {(rank.pp, rank.tp, rank.ep): rank for rank in ranks}
    out = []
    for stage in range(mesh.pp):
        first = stage * width
        for place, (t, e, _) in enumerate(order):
            dense = first + place // mesh.tp * mesh.tp
            out.append(Seat(at[stage, t, e], tuple(range(dense, dense + mesh.tp)), tuple(range(first, first + width)),
                            first + place - width if stage else None,
                            first + place + width if stage + 1 < mesh.pp else None, place // mesh.tp))  # fmt: skip
    return out
