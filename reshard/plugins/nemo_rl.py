"""NeMo-RL's refit over reshard: all policy ranks send, rollout ranks receive each tensor once, whole, by its Hugging Face name.

    policy.generation.refit_transport: "reshard.plugins.nemo_rl:ReshardCheckpointEngine"
    policy.generation.refit_cfg: {"reshard.plugins.nemo_rl:ReshardCheckpointEngine": {config: /ckpt/hf}}

The policy hands over what it gathers, tensor by tensor, as to any such engine; NeMo-RL gives no access to its shards. Source: NeMo-RL
at 7ea279abf (2026-08-22), nemo_rl/utils/checkpoint_engines/base.py, weight_sync/checkpoint_engine_weight_synchronizer.py.
"""

from typing import Any

from nemo_rl.utils.checkpoint_engines.base import CheckpointEngine

from reshard.plugins.transfer import ByName, free_address


class ReshardCheckpointEngine(CheckpointEngine):
    """Options are those of ``transfer.ByName``; `release_after_refit` is the synchronizer's, which then finalizes after every refit."""

    def __init__(self, bucket_size: int, config, release_after_refit: bool = False, **options: Any) -> None:
        self.ends = ByName(bucket_size, config, **options)

    def prepare(self) -> dict[str, Any]:
        return {"mark": self.ends.mark, "address": free_address()}

    def init_policy_process_group(self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]) -> None:
        self.ends.join(worker_rank, train_world_size, [told["mark"] for told in metadata], metadata[0]["address"])

    def init_rollout_process_group(self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]) -> None:
        self.ends.join(train_world_size + rollout_rank, train_world_size, [told["mark"] for told in metadata], metadata[0]["address"])

    async def send_weights(self, weights) -> None:
        self.ends.send(weights)

    async def receive_weight_batches(self):
        async for batch in self.ends.batches():
            yield batch

    def finalize(self) -> None:
        self.ends.leave()
