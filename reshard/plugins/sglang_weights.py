"""SGLang's end of an update: its workers call ``receive`` as a custom weight loader (--custom-weight-loader), and fill their own parameters.

SGLang 0.5.23 wants this between begin_weight_update and end_weight_update, which undo and redo its repacking. Read there
(srt/model_executor/model_runner_components/weight_updater.py), not run.
"""

import json

import torch

from reshard import sync
from reshard.plugins.transfer import Terms

_session: tuple[str, sync.Sync] | None = None


def receive(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """`named_tensors`: one, whose name is the note of a trainer: Terms, the version that is due, and the first rank of this engine. A trainer
    at another address than the one before is joined, the one before left. Raises SyncError."""
    global _session
    note = json.loads(named_tensors[0][0])
    version, first = note.pop("version"), note.pop("first")
    terms = Terms(**note)
    if _session is None or _session[0] != terms.address:
        leave()
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        _session = terms.address, terms.joined(first + worker(), backend)
    _session[1].recv(model, version)


def leave() -> None:
    """Leave the trainer that was joined, if any."""
    global _session
    if _session is not None:
        _session[1].close(leave=True)
    _session = None


def worker() -> int:
    """The number of this worker in its engine: stages of tensor-parallel ranks."""
    from sglang.srt.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_pp_group().rank_in_group * get_tensor_model_parallel_world_size() + get_tensor_model_parallel_rank()
