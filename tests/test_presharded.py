"""Folders of files by rank, ``…-TP-RRR.safetensors`` beside ``…-TP-common.safetensors``, cut here in plain torch as grok-2 is published."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.demo import make_model

CONFIG = {
    "architectures": ["Grok1ForCausalLM"], "model_type": "git", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "residual_moe": True, "tie_word_embeddings": False,
}  # fmt: skip
RANKS = 4


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model(tmp_path / "hf", CONFIG)
    return tmp_path / "hf"


@pytest.fixture
def folder(hf, tmp_path) -> Path:
    """A file for each kind of tensor, the experts' one for each rank: w1 and w3 cut by rows, w2 by columns."""
    folder = tmp_path / "grok"
    folder.mkdir()
    shutil.copy(hf / "config.json", folder)
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(hf / "model.safetensors").items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), {})[name] = value
    for i, (kind, held) in enumerate(kinds.items()):
        if ".experts." not in kind:
            save_file(held, folder / f"pytorch_model-{i:05d}-TP-common.safetensors")
            continue
        for rank in range(RANKS):
            own = {name: value.chunk(RANKS, int("w2" in name))[rank].contiguous() for name, value in held.items()}
            save_file(own, folder / f"pytorch_model-{i:05d}-TP-{rank:03d}.safetensors")
    return folder


def test_the_ranks_files_are_joined(hf, folder):
    found, want = reshard.load(folder, format="hf"), load_file(hf / "model.safetensors")
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    source = reshard.open(folder)
    assert (source.format, source.mesh.tp) == ("presharded", RANKS)
    plan = reshard.plan(source, format="hf")
    assert plan.bytes_read == sum(value.nbytes for value in want.values())  # what all ranks share is read once


def test_another_number_of_ranks(folder, hf, tmp_path):
    reshard.convert(folder, tmp_path / "tp2", format="tp", tp=2, fsync=False)
    assert reshard.diff(tmp_path / "tp2", hf)


def test_without_a_dense_branch(tmp_path):
    make_model(tmp_path / "hf", CONFIG | {"residual_moe": False})
    assert not [name for name in load_file(tmp_path / "hf/model.safetensors") if ".mlp." in name]


def test_experts_of_ranks_exchanged_are_other_weights(hf, folder):
    """The control."""
    one, other = sorted(folder.glob("*-TP-00[01].safetensors"))[:2]
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert {name.partition("experts.")[1] for name in (d.name for d in reshard.diff(folder, hf).differing)} == {"experts."}


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: next(folder.glob("*-TP-002.safetensors")).unlink(), "-TP-002.safetensors"),
        (lambda folder: [path.unlink() for path in folder.glob("*-TP-0*")], "holds no …-TP-RRR.safetensors"),
        (lambda folder: sorted(folder.glob("*-TP-common*"))[0].unlink(), "is missing"),
        (lambda folder: (path := next(folder.glob("*-TP-001*"))).write_bytes(path.read_bytes()[:50]), "-TP-001.safetensors"),
        (lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | {"moe_intermediate_size": 32})), "expected [8, 32]"),
    ],
)  # fmt: skip
def test_what_is_missing_or_does_not_fit_is_named(folder, harm, says):
    harm(folder)
    with pytest.raises(reshard.ReshardError) as caught:
        reshard.open(folder)
    assert says in str(caught.value)
