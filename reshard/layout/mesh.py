"""The ranks of a format: sizes of the parallel dimensions, who stands where, and which layers a stage has."""

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from reshard.errors import PlanError
from reshard.foreign import quote

#: ranks of one mesh: more than any model was ever spread over, and few enough to be counted one by one
MOST_RANKS = 65536


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the parallel dimensions. `etp` cuts experts where tp cuts the rest; 0 means the format's own choice."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0

    def __post_init__(self):
        for name, least in (("tp", 1), ("pp", 1), ("ep", 1), ("etp", 0)):
            size = getattr(self, name)
            if type(size) is not int or not least <= size <= MOST_RANKS:
                raise PlanError([f"{name} is {quote(repr(size))}, expected a whole number from {least} to {MOST_RANKS}"])
        if self.pp * max(self.tp, self.ep) > MOST_RANKS:
            raise PlanError([f"tp={self.tp}, pp={self.pp}, ep={self.ep} is a mesh of more than {MOST_RANKS} ranks"])

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in (("pp", self.pp), ("ep", self.ep)) if size > 1]
        return "×".join([f"tp{self.tp}", *sizes])


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's place in the mesh. `number` orders the ranks of a format."""

    number: int
    tp: int
    pp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Rules:
    """What a format does alike for all architectures.

    `even`: its engine refuses cuts that leave a remainder. `local`: layers are numbered from 0 in each stage and
    experts from 0 in each rank. `ranks`: its ranks, in order. `stages`: the layers of each pipeline stage.
    """

    ranks: Callable[[Mesh], list[Rank]]
    stages: Callable[[int, int], list[list[int]]]
    even: bool = True
    local: bool = False


def even_stages(layers: int, stages: int) -> list[list[int]]:
    """Layers in order, as many to each stage as to any other. Raises PlanError when they don't divide."""
    if layers % stages:
        raise PlanError([f"cannot split {layers} layers over pp={stages}"], f"use a pp that divides {layers}")
    size = layers // stages
    return [list(range(i * size, (i + 1) * size)) for i in range(stages)]


def grid(mesh: Mesh) -> list[Rank]:
    """Ranks of a format in which each tensor-parallel rank is an expert-parallel one too: tp fastest, then pp.

    With ep > 1 the experts are dealt out whole to the ranks of a stage, as vLLM's --enable-expert-parallel does.
    """
    if mesh.ep not in (1, mesh.tp) or mesh.etp not in (0, 1 if mesh.ep > 1 else mesh.tp):
        raise PlanError([f"ep={mesh.ep} with tp={mesh.tp}: this format deals experts out to its tensor-parallel ranks"],
                        f"use --ep 1 or --ep {mesh.tp}")  # fmt: skip
    return [Rank(p * mesh.tp + t, t, p, t if mesh.ep > 1 else 0, 0 if mesh.ep > 1 else t) for p in range(mesh.pp) for t in range(mesh.tp)]


def rows(mesh: Mesh) -> list[Rank]:
    """Ranks that each tensor's rows are dealt out to: as many as tp says."""
    if mesh != Mesh(mesh.tp):
        raise PlanError([f"each tensor's rows are dealt out to ranks, which have no {mesh}"], "say how many with --tp, and nothing else")
    return grid(mesh)


def stage_order(mesh: Mesh, etp: int) -> list[tuple[int, int, int]]:
    """(tp, ep, etp) of each process of one stage and one replica, in Megatron's own order: the tensor-parallel rank runs
    fastest, for experts the expert-tensor-parallel one (``parallel_state.py``)."""
    return [(g % mesh.tp, g // etp % mesh.ep, g % etp) for g in range(lcm(mesh.tp, mesh.ep * etp))]


def expert_cut(mesh: Mesh, ranks: list[Rank]) -> int:
    """How many ranks cut each expert, where the mesh leaves it to the format."""
    return mesh.etp or (1 if mesh.ep > 1 and ranks[-1].etp == 0 else mesh.tp)
