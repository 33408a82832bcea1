"""Where reshard.sync plugs into verl: a checkpoint engine of its own, `checkpoint_engine.backend=reshard`.

What it replaces: verl's trainer yields every parameter whole (`get_per_tensor_param`, an all-gather each), rank 0 packs them
into 2 GB buckets and broadcasts them to all rollout ranks (`NCCLCheckpointEngine`), which hand each to the engine's loader,
which slices it again. Here FSDP2's DTensors go out as they lie, shared among all trainer ranks, and rollout ranks get whole
tensors under Hugging Face names in buckets, since verl's server adapters load by name: no gather, no single sender, and one
bucket of staging; the engine's ranks still receive the whole model. An engine that lets its parameters be written in place
takes 1/TP of that with ``recv`` (see slime_adapter.py).

To use it, put this file on PYTHONPATH and set `checkpoint_engine.backend=reshard`,
`checkpoint_engine.custom_backend_module=verl_adapter`, `engine_kwargs.reshard={config: …}`. verl hands the gathering generator
to all backends but one (`delta_sharded`): until that is a switch, pass `model.named_parameters()` at the call of
`send_weights`, as DTensors. Written against verl as read (checkpoint_engine/base.py), not run in it: no GPU was at hand. What
it calls in reshard.sync is what tests/test_sync.py runs on gloo.
"""

import socket

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from reshard import sync


@CheckpointEngineRegistry.register("reshard")
class ReshardCheckpointEngine(CheckpointEngine):
    """Trainer ranks first in the group, then rollout ranks; the group and the plan are made once."""

    def __init__(self, bucket_size: int, config: str, tp: int = 1, is_master: bool = False) -> None:
        self.bucket_size, self.config, self.tp, self.is_master = bucket_size, config, tp, is_master
        self.session: sync.Sync | None = None

    def prepare(self) -> dict:
        with socket.socket() as free:
            free.bind(("", 0))
            return {"address": f"tcp://{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]) -> tuple[dict, dict]:
        world = actor_wg_world_size + rollout_world_size
        ranks = list(range(world))

        def part(own: list[int]) -> dict:
            return {
                "rank": own,
                "world_size": [world] * len(own),
                "trainers": [actor_wg_world_size] * len(own),
                "address": [metadata[0]["address"]] * len(own),
            }

        return part(ranks[:actor_wg_world_size]), part(ranks[actor_wg_world_size:])

    def init_process_group(self, rank: int, world_size: int, trainers: int, address: str) -> None:
        if self.session is not None:
            return
        layout = sync.layout(self.config)
        src = sync.Side.sharded(layout, sync.fsdp(layout, dp=trainers // self.tp, tp=self.tp, ranks=range(trainers)), dtype="fp32")
        dst = sync.Side.placed(layout, "hf", ranks=range(trainers, world_size))
        self.session = sync.Sync(sync.plan(src, dst, bucket_bytes=self.bucket_size), sync.joined(address, rank, world_size))

    async def send_weights(self, weights, global_steps: int | None = None) -> None:
        """`weights`: (name, DTensor) pairs of this rank's module."""
        self.session.send(weights, version=global_steps)

    async def receive_weights(self, global_steps: int | None = None):
        for bucket in self.session.buckets(version=global_steps):
            for name, tensor in bucket.tensors:
                yield name, tensor

    def finalize(self) -> None:
        """The group stays for the next step."""
