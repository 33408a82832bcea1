"""What bounds and guards a step: FP8 messages within their bucket, replicas that hold other weights, sums of all kinds of boxes."""

import pytest
import torch
from sync_world import LLAMA, blank, loaded, loopback, models_of, world_of

from reshard import sync
from reshard.sync.checks import Sums, sent_and_taken, word_sums
from reshard.sync.messages import rank_plan, sent_as_it_lies, taken_as_it_lies
from reshard.sync.tensors import bind

LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 24, "num_key_value_heads": 12, "head_dim": 32}


def staged(messages, number: int) -> list:
    """Messages of a round that need a buffer: all but large runs that go from tensor to tensor."""
    through = [m for m in messages if m.alone and sent_as_it_lies(m.copies[0][0]) and taken_as_it_lies(m.copies[0][0])]
    return [m for m in messages if m.round == number and m not in through]


models = models_of({"llama": LLAMA, "wide": WIDE})
world = world_of(4)


def fp8_plan(config, edge: int, bucket: int, ranks: int = 3):
    layout = sync.layout(config)
    dst = sync.Side.placed(layout, "vllm", tp=ranks, ranks=range(2, 2 + ranks), fp8=sync.Fp8(LINEAR, edge=edge))
    return sync.plan(sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), dst, bucket_bytes=bucket)


@pytest.mark.parametrize("bucket", [4096, 1 << 14, 1 << 18])
def test_quantised_copies_are_cut_between_blocks_to_fit_the_bucket(models, bucket):
    """defects.md D13: they were never cut; a bucket of 1 MiB staged 8.4 MB. A single block is the least there is."""
    plan = fp8_plan(WIDE, 32, bucket)
    least = 32 * 32 + 4
    for process in plan.processes:
        part = rank_plan(plan, process)
        for messages in (part.sends, part.takes):
            for number in range(part.rounds):
                here = staged(messages, number)
                peers = len({m.sender + m.taker for m in here})
                assert sum(m.bytes for m in here) <= max(bucket, peers * least)
        assert part.bytes_sent == plan.cost().ranks[process].sent
    sources = {r: loaded(models / "wide", plan.source, r, tp=2) for r in range(2)}
    targets, whole = ({r: blank(plan.destinations[0], r) for r in range(2, 5)} for _ in range(2))
    loopback(plan, sources, targets)
    loopback(fp8_plan(WIDE, 32, 64 << 20), sources, whole)
    for r in range(2, 5):
        assert all(torch.equal(t.view(torch.uint8), whole[r][n].view(torch.uint8)) for n, t in targets[r].items() if t.dim())


def test_a_small_bucket_is_shared_among_many_peers():
    """defects.md D13: each peer had 4096 bytes, however many there were."""
    layout = sync.layout({**LLAMA, "vocab_size": 1920})
    sides = sync.Side.placed(layout, "tp", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=12, ranks=range(2, 14))
    plan = sync.plan(*sides, bucket_bytes=4096)
    for process in plan.processes:
        part = rank_plan(plan, process)
        for messages in (part.sends, part.takes):
            for number in range(part.rounds):
                assert sum(m.bytes for m in staged(messages, number)) <= 4096


def replica_case(rank, root, spoil):
    """TP1 × 2 replicas; replica 1's weights differ in one tensor's one bit."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=1, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    session = sync.Sync(sync.plan(src, dst), timeout=30, verify=True)
    held, into = loaded(root / "llama", src, 0, tp=1) if rank < 2 else None, blank(dst, rank) if rank > 1 else None
    if rank == 1 and spoil:
        held["decoder.layers.2.mlp.linear_fc2.weight"].view(torch.int16)[40, 90] ^= 1
    try:
        session.exchange(held, into, 1)
    except sync.SyncError as error:
        return str(error)
    return ""


def test_replicas_of_the_trainer_that_hold_other_weights_are_found(world, models):
    """defects.md D15: each replica sends a part, so that the engine was a mixture of both; verify=True passed."""
    assert world.call(replica_case, models, False) == [""] * 4
    for text in world.call(replica_case, models, True):
        assert "rank 0: replicas of the trainer hold other weights than rank 0: down of layer 2 on rank 1;" in text


@pytest.mark.parametrize("kind", ["bf16", "cast", "fp8", "strided"])
def test_both_ends_sum_alike_and_see_a_bit_in_every_tensor(models, kind):
    """defects.md D16: one pass over what is sent, without loops over elements; both ends compute from their own memory."""
    layout = sync.layout(LLAMA)
    options = {"fp8": sync.Fp8(LINEAR, edge=8)} if kind == "fp8" else {}
    src = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2), dtype="fp32" if kind == "cast" else "bf16")
    dst = sync.Side.placed(layout, "vllm", tp=3, ranks=range(2, 5), **options)
    plan = sync.plan(src, dst)
    sources = {r: loaded(models / "llama", src, r, tp=2) for r in range(2)}
    if kind == "cast":
        sources = {r: {n: t.float() + 1e-4 for n, t in state.items()} for r, state in sources.items()}
    if kind == "strided":
        sources = {r: {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()} for r, state in sources.items()}
    targets = {r: blank(dst, r) for r in range(2, 5)}
    loopback(plan, sources, targets)
    sent, taken = {}, {}
    for r in plan.processes:
        items = sent_and_taken(rank_plan(plan, r))
        if r < 2:
            sent |= Sums(items[0], bind(sources[r], src, r, "source")).run()
        else:
            sums = Sums(items[1], bind(targets[r], dst, r, "destination"))
            taken |= sums.run()
            for name, tensor in targets[r].items():
                flat = tensor.view(-1).view(torch.uint8)
                flat[-1] ^= 1
                assert any(not torch.equal(own, taken[pair]) for pair, own in sums.run().items()), name
                flat[-1] ^= 1
    assert sent.keys() == taken.keys() and all(torch.equal(sent[pair], taken[pair]) for pair in sent)


def test_a_sum_sees_each_bit_and_each_exchange():
    """Also of words in one column or one row, in one piece or two, or that differ in their highest bit alone, which a product with
    an even difference loses."""
    words = torch.randint(-(2**62), 2**62, (70000,), generator=torch.Generator().manual_seed(0))

    def total(words):
        return word_sums([words.split(40000)])[0]

    whole = total(words)
    for place in (0, 5, 4092, 4093, 39999, 40000, 69999):
        for bit in range(64):
            other = words.clone()
            other[place] ^= (1 << bit) - (1 << 64 if bit == 63 else 0)
            assert total(other) != whole
    for a, b in ((0, 1), (3, 3 + 4093), (3, 3 + 2 * 4093), (5, 40005), (39000, 39999), (40000, 69999)):
        other = words.clone()
        other[[a, b]] = words[[b, a]]
        assert total(other) != whole
        other[b] = words[a] ^ -(1 << 63)
        other[a] = words[a]
        assert total(other) != total(
            torch.where(torch.arange(70000) == a, other[b], torch.where(torch.arange(70000) == b, other[a], other))
        )
    assert total(words.flip(0)) != whole and total(words.roll(1)) != whole
    rows = words[:69632].view(136, 512)  # heads
    for a, b in ((0, 1), (7, 100), (3, 135)):
        other = rows.clone()
        other[[a, b]] = rows[[b, a]]
        assert total(other.view(-1)) != total(rows.reshape(-1))
    assert word_sums([[words], [rows.reshape(-1)]])[1] == word_sums([[rows.reshape(-1)]])[0]


def test_a_sum_of_columns_alone_would_miss_an_exchange():
    """The control: what each of the two kinds of sums is there for."""
    words = torch.arange(3 * 4093)
    down, across = words.clone(), words.clone()
    down[[7, 7 + 4093]], across[[7, 8]] = words[[7 + 4093, 7]], words[[8, 7]]
    square = [w.view(3, 4093) for w in (words, down, across)]
    assert torch.equal(square[0].sum(0), square[1].sum(0)) and torch.equal(square[0].sum(1), square[2].sum(1))
    sums = word_sums([[w] for w in (words, down, across)])
    assert len(set(sums.tolist())) == 3
