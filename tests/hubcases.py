"""What the tests of the Hub share: models, a server with the environment that leads to it, and what its log must show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hubserver import Hub
from safetensors.torch import save_file

import reshard
from reshard.demo import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's model, in three files."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder / "one")
    reshard.convert(folder / "one", folder / "hf", format="hf", max_file=400_000, fsync=False)
    (folder / "hf" / "reshard.json").unlink()
    return folder / "hf"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 60 MB in two files: many batches."""
    folder = tmp_path_factory.mktemp("large")
    make_large(folder / "hf")
    return folder / "hf"


def make_large(folder: Path, layers: int = 10, hidden: int = 512) -> None:
    ffn, vocab = 3 * hidden, 1000
    folder.mkdir()
    torch.manual_seed(0)
    state = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        state |= {at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,)}
        state |= {at + f"self_attn.{p}_proj.weight": (hidden if p in "qo" else hidden // 2, hidden) for p in "qkvo"}
        state |= {
            at + "mlp.gate_proj.weight": (ffn, hidden),
            at + "mlp.up_proj.weight": (ffn, hidden),
            at + "mlp.down_proj.weight": (hidden, ffn),
        }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "max_position_embeddings": 512, "dtype": "bfloat16"}  # fmt: skip
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[: len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    for file, own in halves.items():
        save_file({name: torch.randn(state[name]).to(torch.bfloat16) for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as server:
        for name, value in environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield server


def environment(server: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_ada", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(Path(reshard.__file__).parents[1]), **more}  # fmt: skip


def command(hub: Hub, tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    whole = {**os.environ, **environment(hub, tmp_path, **env)}
    return subprocess.run([sys.executable, "-m", "reshard", *args], cwd=tmp_path, env=whole, capture_output=True, text=True, check=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "reshard.json"}  # which notes where it comes from


def no_token_elsewhere(hub: Hub) -> bool:
    return not [r for r in hub.requests(host="cdn") if r.token] and bool(hub.requests(host="cdn"))


def one_resolve_per_file(hub: Hub) -> bool:
    asked = [r.path for r in hub.requests(path="/resolve/")]
    return len(asked) == len(set(asked)) > 0
