"""Where reshard.sync plugs into slime (Megatron → SGLang, trainer and engines on GPUs of their own).

What it replaces: `UpdateWeightFromDistributed` (slime/backends/megatron_utils/update_weight), that is, per parameter an
all-gather over TP, another over EP, conversion to Hugging Face names, and a broadcast of every whole tensor from one rank
per pipeline stage to every engine rank, under a Ray lock. Here each trainer rank passes its parameters as they lie, each
engine rank gets its own slices straight into its fused parameters: no gather, no conversion, no lock, 1/TP of the bytes.

It was written against slime and SGLang 0.5.23 as read, and has not been run in either: no GPU was at hand. What it calls in
reshard.sync is what tests/test_sync.py runs on gloo. To use it, let slime's actor make this class instead of its own.
"""

import json
import socket
from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.distributed as dist

from reshard import sync

#: the path by which SGLang's workers find `receive`; it must be importable there, and named in --custom-weight-loader
RECEIVE = "slime_adapter.receive"
_session: sync.Sync | None = None


def sides(config: str, trainer: dict, engine: dict) -> tuple[sync.Side, sync.Side]:
    """Both sides, from numbers alone: trainer ranks come first in the group, then the engines', one after another."""
    layout = sync.layout(config)
    src = sync.Side.placed(layout, "megatron", **trainer)
    dst = sync.Side.placed(layout, "sglang", **engine)
    return src, dst


class UpdateWeightByReshard:
    """slime's updater, by its interface: `connect_rollout_engines`, then `update_weights` after each step."""

    def __init__(
        self, args: Namespace, model: Sequence[torch.nn.Module], weights_getter, *, model_name: str, quantization_config: dict | None
    ) -> None:
        self.args, self.model, self.weight_version = args, model, 0

    def connect_rollout_engines(self, rollout_engines, rollout_engine_lock, engine_gpu_counts=None, engine_gpu_offsets=None) -> None:
        """One group of all trainer and engine ranks (slime makes one per pipeline stage), and the plan, on every rank for itself."""
        args, trainers = self.args, dist.get_world_size()
        engines = args.rollout_num_gpus
        address = [None]
        if dist.get_rank() == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                address = [f"tcp://{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"]
        dist.broadcast_object_list(address, 0)
        mesh = {"tp": args.tensor_model_parallel_size, "pp": args.pipeline_model_parallel_size, "ep": args.expert_model_parallel_size,
                "etp": args.expert_tensor_parallel_size or 0}  # fmt: skip
        self.what = {
            "address": address[0], "world": trainers + engines, "config": args.hf_checkpoint,
            "trainer": {**mesh, "ranks": list(range(trainers))},
            "engine": {"tp": args.rollout_num_gpus_per_engine, "ranks": list(range(trainers, trainers + engines))},
        }  # fmt: skip
        self.engines = rollout_engines
        self._call(0)  # the engines' workers join the group while the trainers do
        group = sync.joined(address[0], dist.get_rank(), self.what["world"])
        self.session = sync.Sync(sync.plan(*sides(self.what["config"], self.what["trainer"], self.what["engine"])), group)

    def update_weights(self) -> None:
        import ray

        self.weight_version += 1
        if dist.get_rank() == 0:
            ray.get([engine.pause_generation.remote() for engine in self.engines])
            ray.get([engine.flush_cache.remote() for engine in self.engines])
        pending = self._call(self.weight_version)
        self.session.send(
            ((n, p) for chunk in self.model for n, p in _bare(chunk)), version=self.weight_version
        )  # raises on all ranks what any rank found
        if dist.get_rank() == 0:
            ray.get(pending)
            ray.get([engine.continue_generation.remote() for engine in self.engines])

    def _call(self, version: int):
        """Have every engine's workers call ``receive``; they get a note of where to join and which version is due."""
        if dist.get_rank() != 0:
            return None
        notes = []
        for number, engine in enumerate(self.engines):
            note = json.dumps({**self.what, "version": version, "engine_number": number})
            data = torch.frombuffer(bytearray(note.encode()), dtype=torch.uint8).clone()
            notes.append(engine.update_weights_from_tensor.remote([("reshard", data)], load_format=RECEIVE))
        return notes


def receive(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader, in each TP worker: join the group at first, then fill this rank's parameters in place."""
    global _session
    note = json.loads(bytes(named_tensors[0][1].cpu().tolist()))
    if _session is None:
        from sglang.srt.distributed import get_tensor_model_parallel_rank

        engine = note["engine"]
        rank = engine["ranks"][note["engine_number"] * engine["tp"] + get_tensor_model_parallel_rank()]
        group = sync.joined(note["address"], rank, note["world"])
        _session = sync.Sync(sync.plan(*sides(note["config"], note["trainer"], engine)), group)
    if note["version"]:
        _session.recv(model.named_parameters(), version=note["version"])


def _bare(chunk: torch.nn.Module):
    """A Megatron model's parameters and persistent buffers (expert_bias), without the names of its wrappers."""
    for name, tensor in (*chunk.named_parameters(), *((n, b) for n, b in chunk.named_buffers() if n.endswith("expert_bias"))):
        yield name.removeprefix("module.module.").removeprefix("module."), tensor
