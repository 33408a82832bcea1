"""Tensors that change between steps: parameters made anew, in other strides or dtypes, at the address of those before."""

from dataclasses import replace

import pytest
import torch
from sync_world import LLAMA, blank, loaded, models_of, world_of

from reshard import sync
from reshard.demo import make_model
from reshard.geometry.block import singles
from reshard.sync.tensors import identity

OBLONG = {**LLAMA, "num_attention_heads": 10, "num_key_value_heads": 10, "intermediate_size": 160}  # no shard of TP2 is square


models = models_of({"llama": LLAMA})
world = world_of(4)


def anew_case(rank, root, transport, role):
    """At step 2 every square matrix lies transposed in the memory that it had, as a parameter made anew."""
    layout = sync.layout(OBLONG)
    src, dst = sync.Side.placed(layout, "tp", tp=2, ranks=range(2)), sync.Side.placed(layout, "tp", tp=2, ranks=(2, 3))
    session = sync.Sync(sync.plan(src, dst), timeout=30, transport=transport, verify=True)
    held = loaded(root / "llama", src, rank, tp=2) if rank < 2 else None
    into = blank(dst, rank) if rank > 1 else None
    wanted = loaded(root / "llama", dst, rank, tp=2) if rank > 1 else {}
    session.exchange(held, into, 1)
    turned, mine = 0, held if role == "source" else into
    for name, tensor in list((mine or {}).items()):
        if tensor.dim() == 2 and tensor.shape != tensor.t().shape:
            value, address = tensor.clone(), tensor.data_ptr()
            fresh = tensor.view(-1).view(tensor.shape[1], tensor.shape[0]).t()
            fresh.copy_(value if role == "source" else torch.zeros_like(value))
            mine[name] = fresh
            assert fresh.data_ptr() == address and fresh.shape == value.shape and fresh.stride() != value.stride()
            turned += 1
    session.exchange(held, into, 2)
    assert session.state == ("clean" if into else "empty") and (turned > 8 or not mine), (turned, mine is None)
    assert all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("transport", ["p2p", "auto"])
def test_a_parameter_made_anew_at_the_same_address_is_read_as_it_lies_now(world, tmp_path_factory, transport, role):
    """defects.md D3: old views read it; wrong weights, state `clean`, with verify=True too."""
    root = tmp_path_factory.mktemp("sync")
    make_model(root / "llama", OBLONG)
    world.call(anew_case, root, transport, role)


def dtype_case(rank, root):
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "hf", ranks=[0]), sync.Side.placed(layout, "vllm", tp=1, ranks=[1])
    if rank > 1:
        return [refused(sync.Sync(sync.plan(src, dst), timeout=30, verify=True), None, None, step) for step in (1, 2)][1]
    session = sync.Sync(sync.plan(src, dst), timeout=30, verify=True)
    held, into = loaded(root / "llama", src, 0) if rank == 0 else None, blank(dst, 1) if rank == 1 else None
    refused(session, held, into, 1)
    if held:
        held["model.norm.weight"] = held["model.norm.weight"].view(torch.float16)
    return refused(session, held, into, 2)


def refused(session, held, into, step) -> str:
    try:
        session.exchange(held, into, step)
    except sync.SyncError as error:
        return str(error)
    return ""


def test_a_parameter_of_another_dtype_at_the_same_address_is_refused(world, models):
    """defects.md D3: an fp16 view of the bytes went out as bf16."""
    for text in world.call(dtype_case, models):
        assert "model.norm.weight: dtype F16, expected BF16" in text


def test_identity_tells_apart_all_that_a_view_depends_on():
    """defects.md D3."""
    base = torch.zeros(64)
    tensors = [base, base[:32], base[1:], base.view(8, 8), base.view(8, 8).t(), base.view(torch.int32), base.view(torch.bfloat16)]
    tensors += [base.as_strided((8, 4), (8, 1)), base.as_strided((8, 4), (8, 2)), torch.zeros(64, device="meta")]
    keys = [repr(identity({"w": tensor})) for tensor in tensors]
    assert len(set(keys)) == len(tensors) and identity({"w": base}) == identity({"w": base.detach()})
    assert identity({"w": base}) != identity({"v": base})


# ------------------------------------------------------------------------------------------------------------ plans' fingerprints


def test_plans_that_differ_in_a_later_block_have_other_fingerprints():
    """defects.md A4: only the first block of each tensor was hashed; q, k, v and q, v, k were one plan."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))

    def exchanged(side, which):
        """`side` whose fused qkv has two of its blocks in each other's places."""
        members = []
        for member in side.members:
            own = []
            for s in member:
                if len(s.blocks) >= 3 and {key[0] for key, _ in s.blocks} >= {"q", "k", "v"} and ".1." in s.name:
                    blocks = list(s.blocks)
                    k = [i for i, (key, _) in enumerate(blocks) if key[0] == "k"]
                    v = [i for i, (key, _) in enumerate(blocks) if key[0] == "v"]
                    for a, b in list(zip(k, v))[which : which + 1]:
                        (key_a, block_a), (key_b, block_b) = blocks[a], blocks[b]
                        blocks[a] = key_a, block_a._replace(offset=block_b.offset)
                        blocks[b] = key_b, block_b._replace(offset=block_a.offset)
                    s = s._replace(parts=singles(blocks))
                own.append(s)
            members.append(tuple(own))
        return replace(side, members=tuple(members))

    prints = [sync.plan(src, dst).fingerprint, sync.plan(exchanged(src, 0), dst).fingerprint, sync.plan(src, exchanged(dst, 0)).fingerprint]
    assert len(set(prints)) == 3 and sync.plan(src, dst).fingerprint == prints[0]
    other = sync.layout({**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 16})
    pairs = [(sync.Side.placed(x, "tp", tp=2, ranks=range(2)), sync.Side.placed(x, "tp", tp=2, ranks=(2, 3))) for x in (layout, other)]
    chosen = [sync.plan(*sides, select=lambda key: key[0] == "embed").fingerprint for sides in pairs]
    assert chosen[0] != chosen[1]  # the layout as resolved is part of the plan, also where the tensors it moves are alike
