"""The peers that `bench_sync.py` times: their own planners and executors, driven on gloo. None where they are not installed.

Awex imports converters of Megatron models when its planner is imported; megatron-core's executor synchronises CUDA devices.
What neither needs for moving tensors is replaced by empty modules.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types

import torch
import torch.distributed as dist


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules under `roots`, all of them empty."""

    def __init__(self, *roots: str):
        self.roots = roots

    def find_spec(self, name, path=None, target=None):
        if any(name == root or name.startswith(root + ".") for root in self.roots):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def dims(case) -> dict[str, int | None]:
    """The dimension of each tensor that tensor parallelism cuts."""
    from reshard import sync

    whole = sync.Side.placed(case.layout, "hf", ranks=[0]).members[0]
    return {s.name: next((d for d, (a, b) in enumerate(zip(s.shape, t.shape)) if a != b), None) for s, t in zip(case.src.members[0], whole)}


def awex(case):
    """Awex's TransferPlanBuilder on both sides' metadata, its P2P ops and their batch. Infer ranks come first in its world."""
    if importlib.util.find_spec("awex") is None:
        return None
    finder = _Finder("megatron", "sglang", "vllm", "mooncake")
    sys.meta_path.append(finder)
    import os

    os.environ["AWEX_DEVICE_TYPE"] = "cpu"
    logging.disable(logging.INFO)
    from awex.meta.weight_meta import ParameterMeta, ParameterReplicaMeta, ParameterShardMeta
    from awex.transfer.nccl_comm import batch_send_recv, nccl_build_recv_ops, nccl_build_send_ops
    from awex.transfer.transfer_plan import TransferPlanBuilder

    sys.meta_path.remove(finder)
    for name in [n for n in sys.modules if n.split(".")[0] == "megatron"]:
        del sys.modules[name]
    cut = dims(case)

    def metas(side, size):
        out = []
        for shards in zip(*side.members):
            dim, places, at = cut[shards[0].name], [], 0
            for rank, s in enumerate(shards):
                offset = [0] * len(s.shape)
                if dim is not None:
                    offset[dim], at = at, at + s.shape[dim]
                places.append(ParameterShardMeta(tp_rank=rank, attn_tp_rank=rank, pp_rank=0, ep_rank=0, ep_tp_rank=0, global_rank=rank, world_size=size,
                                                 engine_rank=0, name=s.name, shape=s.shape, numel=s.size, dtype=torch.bfloat16, global_offset=tuple(offset)))  # fmt: skip
            shape = tuple(at if d == dim else n for d, n in enumerate(shards[0].shape))
            replicas = [ParameterReplicaMeta(places)] if dim is not None else [ParameterReplicaMeta([place]) for place in places]
            out.append(ParameterMeta(shards[0].name, torch.Size(shape).numel(), shape, torch.bfloat16, places, replicas))
        return out

    trainers, engines = case.source, case.target
    own = case.rank + engines if case.rank < trainers else case.rank - trainers
    plan = TransferPlanBuilder(engines, trainers, 1).build_local_transfer_plan(metas(case.dst, engines), metas(case.src, trainers), own)
    plan.operations = {(peer + trainers if peer < engines else peer - engines): ops for peer, ops in plan.operations.items()}

    def run():
        sends, receives, apart = [], [], []
        if case.mine:
            sends, _, _ = nccl_build_send_ops(case.mine, plan, dist.group.WORLD, -1)
            for op in sends:
                op.tensor = op.tensor.contiguous()
        if case.into:
            receives, apart, _ = nccl_build_recv_ops(case.into, plan, dist.group.WORLD)
        batch_send_recv(sends, receives)
        for tensor, arrived in apart:
            tensor.copy_(arrived)

    return run


def megatron_core(case, folder: str | None):
    """megatron-core's planner (build_plan_from_rosters) and executor, with a copy service for CPU tensors on gloo."""
    if not folder or (case.source, case.target) == (4, 3):  # it refuses sizes of which neither divides the other
        return None
    for name in ("megatron", "megatron.core"):
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    resharding = types.ModuleType("megatron.core.resharding")
    resharding.__path__ = [f"{folder}/megatron/core/resharding"]
    services = types.ModuleType("megatron.core.resharding.copy_services")
    services.__path__ = [f"{folder}/megatron/core/resharding/copy_services"]
    sys.modules |= {m.__name__: m for m in (resharding, services)}
    fp8 = _Empty("megatron.core.fp8_utils")
    fp8.is_mxfp8tensor = lambda tensor: False
    sys.modules |= {"megatron.core.fp8_utils": fp8, "megatron.core.inference": _Empty("i"), "megatron.core.inference.quantization": _Empty("q"),
                    "megatron.core.inference.quantization.mxfp8_tensor": _Empty("m")}  # fmt: skip
    from megatron.core.resharding.copy_services.base import CopyService
    from megatron.core.resharding.execution import execute_reshard_plan
    from megatron.core.resharding.planner import build_plan_from_rosters, index_metadata_rosters
    from megatron.core.resharding.utils import ParameterMetadata

    logging.disable(logging.INFO)
    torch.cuda.synchronize = lambda *_: None

    class Gloo(CopyService):
        """Posts all and waits, as its NCCL service does; keyed by task, since gloo has tags."""

        def __init__(self):
            super().__init__()
            self.works = []

        def submit_send(self, src_tensor, dest_rank, task_id=None):
            self.works.append(dist.isend(src_tensor, dest_rank, tag=task_id or 0))

        def submit_recv(self, dest_tensor, src_rank, task_id=None):
            self.works.append(dist.irecv(dest_tensor, src_rank, tag=task_id or 0))

        def run(self):
            for work in self.works:
                work.wait()
            self.works = []

    cut, trainers, engines = dims(case), list(range(case.source)), list(range(case.source, case.source + case.target))

    def metas(side, ranks, rank):
        if rank not in ranks:
            return []
        return [ParameterMetadata(s.name.replace(".", "_"), s.shape, torch.bfloat16, 2, is_tp=cut[s.name] is not None, partition_dim=cut[s.name] or 0, owner_rank=rank,
                                  tensor_parallel_group_ranks=ranks, data_parallel_group_ranks=[rank], pipeline_parallel_group_ranks=[rank],
                                  resolved_name=s.name) for s in side.members[ranks.index(rank)]]  # fmt: skip

    pairs = [(metas(case.src, trainers, r), metas(case.dst, engines, r)) for r in (*trainers, *engines)]
    plan = build_plan_from_rosters(*index_metadata_rosters(pairs), case.rank)

    def module(state):
        if not state:
            return None
        out = torch.nn.Module()
        for name, tensor in state.items():
            out.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor, requires_grad=False))
        return out

    source, target, service = module(case.mine), module(case.into), Gloo()
    return lambda: execute_reshard_plan(plan, source, target, service)
