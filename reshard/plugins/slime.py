"""slime and miles (Megatron → SGLang): their updater by NCCL replaced by one that sends every trainer rank's parameters as they lie.

    --custom-megatron-init-path reshard.plugins.slime.install            (both; it runs in every actor, before the updater is chosen)
    --sglang-custom-weight-loader reshard.plugins.sglang_weights.receive

What it replaces: per parameter an all-gather over TP, another over EP, conversion to Hugging Face's names, and a broadcast of every whole
tensor from one rank per pipeline stage to every engine rank. Here each engine rank receives its own slices, in its fused parameters.
Source: slime 624b824a8 (after v0.3.1) and miles 31f1ca961, backends/megatron_utils/actor.py and update_weight/; neither was run.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import groupby

import torch
import torch.distributed as dist

from reshard import sync
from reshard.errors import PlanError
from reshard.plugins.transfer import Terms, free_address, meanwhile, pairs

RECEIVE = "reshard.plugins.sglang_weights.receive"


def install(args: Namespace) -> None:
    """Make the framework that called this use reshard in the place of its updater by NCCL. Raises PlanError outside both."""
    for package, updater in (("slime", UpdateWeightByReshard), ("miles", MilesUpdateWeightByReshard)):
        actor = sys.modules.get(f"{package}.backends.megatron_utils.actor")
        if actor is not None and hasattr(actor, "UpdateWeightFromDistributed"):
            actor.UpdateWeightFromDistributed = updater
            return
    raise PlanError(["neither slime's nor miles' actor has been imported"], "use it as --custom-megatron-init-path")


class UpdateWeightByReshard:
    """slime's updater, by its interface."""

    package, backend = "slime", "nccl"

    def __init__(self, args: Namespace, model: Sequence[torch.nn.Module], weights_getter, *, model_name: str,
                 quantization_config: Mapping | None, is_lora: bool = False) -> None:  # fmt: skip
        if is_lora or quantization_config:
            raise PlanError(["adapters and quantised engines are not supported here"], "leave out --custom-megatron-init-path")
        self.args, self.model, self.weight_version = args, model, 0
        self._sync: sync.Sync | None = None
        self._metrics: dict[str, float] = {}

    def pop_metrics(self) -> dict[str, float]:
        out, self._metrics = self._metrics, {}
        return out

    def connect_rollout_engines(self, rollout_engines, rollout_engine_lock, engine_gpu_counts=None, engine_gpu_offsets=None,
                                engine_parallel_configs=None) -> None:  # fmt: skip
        """Note who the engines are; all meet in the next update. Called again when engines are new: the group is made anew."""
        self.disconnect_rollout_engines()
        self.rollout_engines = rollout_engines
        counts = list(engine_gpu_counts or [self.args.rollout_num_gpus_per_engine] * len(rollout_engines))
        configs = list(engine_parallel_configs or [{}] * len(rollout_engines))
        own = [self._engine(count, config) for count, config in zip(counts, configs, strict=True)]
        told = [json.loads(key) | {"ranks": sum(one["ranks"] for one in group)} for key, group in
                ((key, list(group)) for key, group in groupby(own, key=lambda one: json.dumps(one, sort_keys=True)))]  # fmt: skip
        address = [free_address() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(address, 0, group=self._gloo())
        self.terms = Terms(address[0], self.args.hf_checkpoint, told, self._trainer())
        self._ranks = counts

    def disconnect_rollout_engines(self) -> None:
        if self._sync is not None:
            self._sync.close(leave=True)
        self._sync = None

    @torch.no_grad()
    def update_weights(self) -> None:
        """Raises on all ranks what any rank found wrong; the engines stay paused then."""
        self.weight_version += 1
        first = dist.get_rank() == 0
        if first:
            self._pause()

        def own():
            if self._sync is None:
                self._sync = self.terms.joined(dist.get_rank(), self.backend)
            return self._sync.send(pairs(self.model), self.weight_version)

        stats = meanwhile(self._ask, own) if first else own()
        self._metrics = {"reshard/seconds": stats.seconds, "reshard/sent_bytes": float(stats.sent)}
        if first:
            self._resume()
        dist.barrier(group=self._gloo())

    def _ask(self) -> None:
        """Have each engine's workers call ``sglang_weights.receive`` with a note that says where to join, and what is due. It is the name
        of an empty tensor: bytes would lie in memory that an engine on another node cannot open."""
        from sglang.srt.utils import MultiprocessingSerializer

        trainers, pending = self.terms.trainer["ranks"], []
        for number, engine in enumerate(self.rollout_engines):
            note = json.dumps(asdict(self.terms) | {"version": self.weight_version, "first": trainers + sum(self._ranks[:number])})
            one = MultiprocessingSerializer.serialize([(note, torch.empty(0))], output_str=True)
            options = {"load_format": RECEIVE, "weight_version": str(self.weight_version)}
            pending.append(engine.update_weights_from_tensor.remote([one] * self._ranks[number], **options))
        self._get(pending)

    def _engine(self, count: int, config: Mapping) -> dict:
        """Who holds what in an engine of `count` GPUs."""
        pp = int(config.get("pp_size", getattr(self.args, "sglang_pp_size", 1) or 1))
        tp = int(config.get("tp_size", count // pp))
        ep = int(config.get("ep_size", getattr(self.args, "sglang_ep_size", 1) or 1))
        return {"format": "sglang", "ranks": count, "tp": tp, "pp": pp, "ep": ep, "dtype": "bf16"}

    def _trainer(self) -> dict:
        args = self.args
        if getattr(args, "virtual_pipeline_model_parallel_size", None):
            raise PlanError(["virtual pipeline stages are not supported"], "leave out --num-layers-per-virtual-pipeline-stage")
        dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        return {"format": "megatron", "ranks": dist.get_world_size(), "tp": args.tensor_model_parallel_size, "pp": args.pipeline_model_parallel_size,
                "ep": args.expert_model_parallel_size, "etp": args.expert_tensor_parallel_size or 0, "dtype": dtype}  # fmt: skip

    def _pause(self) -> None:
        self._get([engine.pause_generation.remote() for engine in self.rollout_engines])
        self._get([engine.flush_cache.remote() for engine in self.rollout_engines])

    def _resume(self) -> None:
        self._get([engine.continue_generation.remote() for engine in self.rollout_engines])

    def _gloo(self):
        return import_module(f"{self.package}.utils.distributed_utils").get_gloo_group()

    def _get(self, pending: list) -> list:
        import ray

        return ray.get(pending)


class MilesUpdateWeightByReshard(UpdateWeightByReshard):
    """miles' updater: the engine's sessions around an update, and connections that go stale."""

    package = "miles"
    rollout_engines, _stale = None, False

    def is_rollout_engines_fresh(self) -> bool:
        return self.rollout_engines is not None and not self._stale

    def mark_engine_connection_stale(self) -> None:
        self._stale = True

    def connect_rollout_engines(self, *given, **named) -> None:
        super().connect_rollout_engines(*given, **named)
        self._stale = False

    def _pause(self) -> None:
        mode = self.args.pause_generation_mode
        self._get([engine.pause_generation.remote(mode=mode) for engine in self.rollout_engines])
        if mode != "in_place":
            self._get([engine.flush_cache.remote() for engine in self.rollout_engines])
        self._get([engine.begin_weight_update.remote() for engine in self.rollout_engines])

    def _resume(self) -> None:
        version = str(self.weight_version)
        self._get([engine.update_weight_version.remote(weight_version=version) for engine in self.rollout_engines])
        self._get([engine.end_weight_update.remote() for engine in self.rollout_engines])
        super()._resume()
