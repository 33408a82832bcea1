"""FSDP2 over tensor parallelism as torch makes it, where parts of the model are left out of the tensor parallel plan."""

import pytest
import torch
from safetensors.torch import load_file
from sync_world import LLAMA, blank, loaded, models_of, world_of

import reshard
from reshard import sync
from reshard.sync.tensors import bind

models = models_of({"llama": LLAMA})
world = world_of(6)


def built(path, mesh, outside, sharded) -> torch.nn.Module:
    """The checkpoint as a module under TP, then FSDP2. `outside`: what the TP plan leaves out; without `sharded` FSDP2 does too."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = torch.nn.Module()
    for name, tensor in load_file(path / "model.safetensors").items():
        *parts, leaf = name.split(".")
        at = model
        for part in parts:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        if not any(word in name for word in outside):
            tensor = distribute_tensor(tensor, mesh["tp"], [Shard(1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0)])
        at.register_parameter(leaf, torch.nn.Parameter(tensor))
    left = {p for name, p in model.named_parameters() if not sharded and any(word in name for word in outside)}
    for layer in model.model.layers.children():
        fully_shard(layer, mesh=mesh["dp"], ignored_params=left)
    return fully_shard(model, mesh=mesh["dp"], ignored_params=left)


def outside_case(rank, root, outside, sharded, by_layout):
    from torch.distributed.device_mesh import DeviceMesh

    layout = sync.layout(LLAMA)
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    model = built(root / "llama", mesh, outside, sharded) if rank < 4 else None
    names = {"norm": (), "embed": ("embed",), "lm_head": ("lm_head",)}
    declared = sync.fsdp(layout, dp=2, tp=2, ranks=range(4), outside_tp=[n for word in outside for n in names[word]])
    if not sharded:
        left = [name for name in declared if any(word in name for word in outside)]
        declared |= {name: sync.Sharding((0, 1, 2, 3), (None,)) for name in left}
    read = sync.shardings(model) if model is not None else declared
    dst = sync.Side.placed(layout, "vllm", tp=3, ranks=range(3, 6))
    plan = sync.plan(sync.Side.sharded(layout, declared if by_layout else read), dst)
    session = sync.Sync(plan, timeout=30, verify=True)
    into = blank(dst, rank) if rank in dst.processes else None
    session.exchange(model, into, 1)
    wanted = loaded(root / "llama", dst, rank, tp=3) if into else {}
    assert all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())
    return plan.fingerprint


@pytest.mark.parametrize("by_layout", [False, True])
@pytest.mark.parametrize("outside", [("norm",), ("norm", "embed"), ("norm", "embed", "lm_head")])
@pytest.mark.parametrize("sharded", [True, False])
def test_norms_and_embeddings_outside_the_tensor_parallel_plan(world, models, outside, sharded, by_layout):
    """defects.md D8: under FSDP2 they lie on a mesh of their own on each TP rank, or are plain tensors; each rank read another plan."""
    assert len(set(world.call(outside_case, models, outside, sharded, by_layout))) == 1


def astray_case(rank, root):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meshes = DeviceMesh("cpu", [[0, 1], [2, 3]]), DeviceMesh("cpu", [[0, 3], [1, 2]])
    if rank > 3:
        return None
    found = {"a": distribute_tensor(torch.zeros(8, 8), meshes[0], [Shard(0), Shard(1)]), "b": torch.zeros(3)}
    found["c"] = distribute_tensor(torch.zeros(8, 8), meshes[1], [Shard(0), Shard(1)])
    read = sync.shardings(found)
    assert read["b"] == sync.Sharding((0, 1, 2, 3), (None,)) and read["c"].ranks == ((0, 3), (1, 2))
    return sync.Sharding((0, 3), (0,)).extended(((0, 1), (2, 3)))


def test_a_mesh_that_is_no_part_of_the_model_s_is_not_guessed(world, models):
    """defects.md D8: ranks on a diagonal of the mesh are no dimension of it."""
    assert world.call(astray_case, models) == [None] * 6


def test_buffers_that_are_weights_come_with_the_module():
    """defects.md D8: DeepSeek's correction bias is a buffer; `named_parameters()` has none."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, vocab_size=64, n_shared_experts=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).bfloat16()
    layout = sync.layout({**config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]})
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.float()
    side = sync.Side.sharded(layout, sync.shardings(model, ranks=[0]))
    held = bind(model, side, 0, "source")
    assert sum(b.stored.name.endswith("e_score_correction_bias") for b in held.values()) == 2
    with pytest.raises(reshard.PlanError, match="e_score_correction_bias has no sharding") as caught:
        sync.Side.sharded(layout, sync.shardings(model.named_parameters(), ranks=[0]))
    assert "shardings(model)" in caught.value.hint
    with pytest.raises(reshard.PlanError, match="e_score_correction_bias is missing") as caught:
        bind(model.named_parameters(), side, 0, "source")
    assert "pass the module itself" in caught.value.hint
