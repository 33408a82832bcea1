"""verl's checkpoint engine ``reshard``: all trainer ranks send, rollout ranks receive each tensor once, whole, by its Hugging Face name.

    rollout.checkpoint_engine.backend=reshard
    rollout.checkpoint_engine.custom_backend_module=reshard.plugins.verl
    rollout.checkpoint_engine.engine_kwargs.reshard={config: /ckpt/hf}

By default trainers hand over what verl gathers, tensor by tensor, as to any backend. With ``trainer: {format: fsdp, dp: 8, dtype: fp32}`` among the
options FSDP2's DTensors go out as they lie, and nothing is gathered; verl then has to pass its engine, which takes three lines
(``examples/verl_takes_engine.patch``). Source: verl 0.9.1, checkpoint_engine/base.py, workers/engine_workers.py.
"""

from collections.abc import Mapping
from typing import Any

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from reshard.errors import PlanError
from reshard.plugins.transfer import ByName, free_address


@CheckpointEngineRegistry.register("reshard")
class ReshardCheckpointEngine(CheckpointEngine):
    """Options are those of ``transfer.ByName``; the group stays from step to step, and is made anew when replicas come or go."""

    takes_engine = True

    def __init__(self, bucket_size: int, config, is_master: bool = False, **options: Any) -> None:
        self.is_master = is_master
        self.ends = ByName(bucket_size, config, **options)

    def prepare(self) -> dict[str, Any]:
        return {"mark": self.ends.mark, "address": free_address() if self.is_master else None}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]) -> tuple[dict, dict]:
        """Trainer ranks come first; rank 0 is the one that everyone meets at."""
        every = {"marks": [told["mark"] for told in metadata], "trainers": actor_wg_world_size, "address": metadata[0]["address"]}

        def part(ranks: range) -> dict[str, list]:
            return {"rank": list(ranks)} | {name: [value] * len(ranks) for name, value in every.items()}

        return part(range(actor_wg_world_size)), part(range(actor_wg_world_size, actor_wg_world_size + rollout_world_size))

    def init_process_group(self, rank: int, marks: list[str], trainers: int, address: str) -> None:
        self.ends.join(rank, trainers, marks, address)

    async def send_weights(self, weights, global_steps: int | None = None) -> dict[str, float]:
        """`weights`: verl's training engine, or its generator of (name, whole tensor). Returns metrics."""
        engine = weights if hasattr(weights, "get_per_tensor_param") else None
        if self.ends.whole:
            weights = engine.get_per_tensor_param()[0] if engine else weights
        elif engine is None:
            raise PlanError(
                ["verl hands over gathered tensors, this plan is for shards as they lie"], "apply examples/verl_takes_engine.patch"
            )
        else:
            weights = engine.module
        if isinstance(weights, Mapping):
            weights = weights.items()
        stats = self.ends.send(weights)
        return {"reshard/seconds": stats.seconds, "reshard/sent_bytes": float(stats.sent)}

    async def receive_weights(self, global_steps: int | None = None):
        async for batch in self.ends.batches():
            for name, tensor in batch:
                yield name, tensor

    def finalize(self) -> None:
        """The group stays for the next step."""
