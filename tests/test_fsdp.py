"""Pickles of DTensors, one per rank: a genuine folder of verl's, and those that torch saves of every kind of placement."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.demo import make_model
from reshard.formats import fsdp
from reshard.geometry.regions import intervals

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 101, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.samples
def test_verls_own_folder(tmp_path):
    actor = SAMPLES / "verl/llama-2-fsdp/global_step_1/actor"
    checkpoint = reshard.open(actor)  # config.json is the one in huggingface/
    assert (checkpoint.format, checkpoint.writer, checkpoint.holders) == ("fsdp", "verl", 2)
    assert reshard.diff(actor, SAMPLES / "hf/llama")
    reshard.convert(actor, tmp_path / "hf", format="hf")
    want, found = (load_file(folder / "model.safetensors") for folder in (SAMPLES / "hf/llama", tmp_path / "hf"))
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def save(rank: int, size: int, source: str, out: str, meeting: str) -> None:
    """One rank of dp2 × tp2: its DTensors, placed by turns in every way that FSDP2, TP and HSDP know, pickled as verl does."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ways = (
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Shard(0), Shard(0)],
    )
    state = {}
    for i, (name, tensor) in enumerate(sorted(load_file(source).items())):
        even = tensor.shape[0] % 4 == 0  # torch itself loses its way in strided shards that are uneven
        way = [Shard(0), Replicate()] if tensor.ndim == 1 else ways[i % 5 if even else i % 4 + 1]
        whole = distribute_tensor(tensor, mesh, way, src_data_rank=None)
        if not torch.equal(whole.full_tensor(), tensor):  # what torch itself makes of it
            raise SystemExit(f"{name} {way}")
        state[f"module.{name}"] = whole
    state["module.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, f"{out}/model_world_size_{size}_rank_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp")
    make_model(root / "hf", CONFIG)
    (root / "actor/huggingface").mkdir(parents=True)
    shutil.copy(root / "hf/config.json", root / "actor/huggingface")
    context = multiprocessing.get_context("fork")
    arguments = [(rank, 4, str(root / "hf/model.safetensors"), str(root / "actor"), str(root / "meeting")) for rank in range(4)]
    processes = [context.Process(target=save, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    return root


@pytest.fixture
def actor(saved, tmp_path):
    shutil.copytree(saved / "actor", tmp_path / "actor")
    return tmp_path / "actor"


def test_every_placement_that_torch_knows(saved, actor):
    assert reshard.diff(actor, saved / "hf")
    assert len({tuple(s.shape) for s in reshard.open(actor).stored if s.name == "lm_head.weight"}) > 0


def test_a_ranks_place_is_in_its_file_and_not_in_its_name(saved, actor):
    one, other = (actor / f"model_world_size_4_rank_{rank}.pt" for rank in (1, 2))
    one.rename(actor / "x")
    other.rename(one)
    (actor / "x").rename(other)
    assert reshard.diff(actor, saved / "hf")


def test_strided_shards_are_not_plain_ones(saved, actor, monkeypatch):
    """The control: with every cut taken for a plain one, rows of just those tensors are elsewhere."""
    monkeypatch.setattr(fsdp, "intervals", lambda size, cuts: intervals(size, [(n, i, 1) for n, i, _ in cuts]))
    assert 1 < len(reshard.diff(actor, saved / "hf").differing) < 10


def test_other_bytes_are_other_weights(saved, actor):
    """The control."""
    stored = next(s for s in reshard.open(actor).stored if s.name.endswith("layers.1.mlp.up_proj.weight"))
    with open(actor / stored.file, "r+b") as file:
        file.seek(stored.start)
        file.write(b"\x01\x02")
    found = {d.name for d in reshard.diff(actor, saved / "hf").differing}
    assert found == {stored.name}


def test_folders_that_are_not_whole(actor, tmp_path):
    (actor / "model_world_size_4_rank_2.pt").rename(tmp_path / "lost")
    with pytest.raises(reshard.FormatError, match="3 of the files of 4 ranks; missing: rank 2"):
        reshard.open(actor)
    shutil.copy(tmp_path / "lost", actor / "model_world_size_8_rank_2.pt")
    with pytest.raises(reshard.FormatError, match="world sizes 4, 8"):
        reshard.open(actor)
    (actor / "model_world_size_8_rank_2.pt").unlink()
    shutil.copy(actor / "model_world_size_4_rank_3.pt", actor / "model_world_size_4_rank_2.pt")  # rank 3's twice
    with pytest.raises(reshard.PlanError, match="in no source file"):
        reshard.open(actor)


def test_it_is_not_written(saved, tmp_path):
    with pytest.raises(reshard.PlanError, match="fsdp is read, not written"):
        reshard.convert(saved / "hf", tmp_path / "out", format="fsdp")
