"""Which ranks a Megatron-LM model runs on, which of them write a file, and what the files' folders are called.

The one place that knows. Source: ``parallel_state.py`` and ``get_checkpoint_name`` (checkpointing.py). Within a pipeline
stage, processes are numbered with the tensor-parallel rank fastest; dense tensors are cut by tp, experts by etp and dealt
out by ep, in the same processes. So a stage has lcm(tp, ep·etp) of them, and not every pair of a tensor-parallel and an
expert-parallel rank need exist: with tp=2, ep=2, etp=1 there are two processes, (0, 0) and (1, 1).
"""

import re
from math import lcm

from reshard.errors import PlanError
from reshard.layout import Mesh, Rank
from reshard.layout.mesh import MOST_RANKS, stage_order

FOLDER = re.compile(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?(?:_([0-9]{3,}))?")


def processes(mesh: Mesh) -> list[tuple[int, int, int]]:
    """(tp rank, ep rank, etp rank) of each process of one pipeline stage, in order; `mesh.etp` 0 means tp.

    Raises PlanError for sizes that Megatron can't run or that one file per (tp, ep) can't hold.
    """
    etp = mesh.etp or mesh.tp
    if mesh.tp % etp and etp % mesh.tp:
        raise PlanError([f"etp={etp} and tp={mesh.tp}: one must divide the other"])
    if etp > mesh.tp:
        raise PlanError([f"etp={etp} is larger than tp={mesh.tp}: a file holds one tp rank's and one etp rank's tensors"])
    width = lcm(mesh.tp, mesh.ep * etp)
    if width * mesh.pp > MOST_RANKS:
        raise PlanError([f"{mesh} with etp={etp} has {width * mesh.pp} processes, more than the {MOST_RANKS} allowed"])
    return stage_order(mesh, etp)


def mp_ranks(mesh: Mesh) -> list[Rank]:
    """Every (tensor, pipeline, expert) rank that gets a file: each pair of tp and ep that occurs in a stage."""
    pairs: dict[tuple[int, int], int] = {}
    for t, e, x in processes(mesh):
        pairs.setdefault((e, t), x)
    stage = [(t, e, x) for (e, t), x in sorted(pairs.items())]
    return [Rank(p * len(stage) + i, t, p, e, x) for p in range(mesh.pp) for i, (t, e, x) in enumerate(stage)]


def folder_name(rank: Rank, mesh: Mesh) -> str:
    return f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if mesh.pp > 1 else "") + (f"_{rank.ep:03d}" if mesh.ep > 1 else "")


def folder_names(mesh: Mesh) -> list[str]:
    return [folder_name(rank, mesh) for rank in mp_ranks(mesh)]


def expert_cuts(tp: int) -> list[int]:
    """Sizes that etp may have beside `tp`, Megatron's default (tp itself) first."""
    return [etp for etp in range(tp, 0, -1) if tp % etp == 0]
