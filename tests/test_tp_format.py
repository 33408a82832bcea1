"""Our own ``tp`` folders, judged by torch's DCP reader and transformers; and theirs, read by us."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.demo import make_model

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
GENUINE = [
    ("transformers_dist/llama-tp2-fsdp2", "llama"), ("transformers_dist/qwen3_moe-tp2-fsdp1", "qwen3_moe"),
    ("dcp/llama-fsdp2-dp2-hfwriter-sharded", "llama"),
]  # fmt: skip


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 101, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


def dcp_load(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch's own reader of such shards assembles, into empty tensors of the whole sizes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 3}, {"tp": 4}, {"tp": 6}, {"tp": 2, "pp": 2}], ids=str)
def test_dcp_reads_our_shards(tmp_path, mesh):
    """Even and uneven cuts, more ranks than key/value heads (replicas), pipeline stages."""
    make_model(tmp_path / "hf", CONFIG)
    whole = load_file(tmp_path / "hf/model.safetensors")
    reshard.convert(tmp_path / "hf", tmp_path / "tp", format="tp", **mesh)
    found = dcp_load(tmp_path / "tp", whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_dcp_sees_exchanged_shards(tmp_path):
    """The control: two ranks' pieces of one tensor are exchanged, and torch's reader puts other bits together."""
    make_model(tmp_path / "hf", CONFIG)
    whole = load_file(tmp_path / "hf/model.safetensors")
    reshard.convert(tmp_path / "hf", tmp_path / "tp", format="tp", tp=2)
    one, two = (s for s in reshard.open(tmp_path / "tp").stored if s.name == "model.layers.1.mlp.down_proj.weight")
    raw = {s.rank: (tmp_path / "tp" / s.file).read_bytes()[s.start : s.start + 2 * s.size] for s in (one, two)}
    for here, there in ((one, two), (two, one)):
        with open(tmp_path / "tp" / here.file, "r+b") as file:
            file.seek(here.start)
            file.write(raw[there.rank])
    found = dcp_load(tmp_path / "tp", whole)
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == [one.name]


@pytest.mark.samples
@pytest.mark.models
@pytest.mark.parametrize("family", ["llama", "llama-oddvocab", "qwen3", "gpt_oss"])
def test_transformers_opens_our_shards(tmp_path, family):
    """Where the model's names in memory are its names on the Hub, and nothing is tied: transformers asks for the former."""
    transformers = pytest.importorskip("transformers")
    original = SAMPLES / "hf" / family
    reshard.convert(original, tmp_path / "tp", format="tp", tp=2)
    tokens = load_file(original / "reference.safetensors.ref")["input_ids"]
    logits = []
    for folder in (original, tmp_path / "tp"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


@pytest.mark.samples
def test_a_fused_piece_is_refused_not_misread(tmp_path):
    """Phi-3 fuses on disk: a rank's rows are several boxes, which the offsets can't say, so they say nothing of it."""
    from torch.distributed.checkpoint import CheckpointException

    original = SAMPLES / "hf/phi3"
    reshard.convert(original, tmp_path / "tp", format="tp", tp=2)
    with pytest.raises(CheckpointException, match="(qkv_proj|gate_up_proj)"):
        dcp_load(tmp_path / "tp", load_file(original / "model.safetensors"))
    assert reshard.diff(tmp_path / "tp", original)


@pytest.mark.samples
@pytest.mark.parametrize("name, original", GENUINE)
def test_genuine_shards_are_read(tmp_path, name, original):
    source = reshard.open(SAMPLES / name, config=SAMPLES / "hf" / original)
    assert reshard.diff(source, SAMPLES / "hf" / original)
    reshard.convert(source, tmp_path / "hf", format="hf")
    whole, back = load_file(SAMPLES / "hf" / original / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert whole.keys() == back.keys() and all(torch.equal(whole[n], back[n]) for n in whole)


@pytest.mark.samples
def test_a_lost_genuine_shard_is_noticed(tmp_path):
    """torch's own reader takes the rest for a smaller tensor; config.json tells us better."""
    shutil.copytree(SAMPLES / "transformers_dist/llama-tp2-fsdp2", tmp_path / "lost")
    (tmp_path / "lost/shard-00004-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(reshard.PlanError, match="in no source file"):
        reshard.convert(tmp_path / "lost", tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()
