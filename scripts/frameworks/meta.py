"""Meta's own model: the files that reshard writes are run by llama-models on gloo ranks, and logits compared with transformers'."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import SAMPLES, Differs, check, on_ranks, same

TITLE = "Meta (llama-models)"
INSTALL = ("--no-deps", "--no-build-isolation", "setuptools", "llama-models==0.3.0", "fairscale==0.4.13")
VERSIONS = ("llama-models", "fairscale", "torch", "transformers")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
         "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "dtype": "float32"}  # fmt: skip
SCALED = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
MODELS = {"llama": LLAMA, "multi-head": LLAMA | {"num_key_value_heads": 8}, "tied": LLAMA | {"tie_word_embeddings": True},
          "llama 3.1": LLAMA | SCALED, "wide feed-forward": LLAMA | {"intermediate_size": 224}}  # fmt: skip
#: of the largest logit
_CLOSE = 2e-5


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    for name in list(MODELS)[:1] if quick else MODELS:
        folder = scratch / name.replace(" ", "_")
        _model(folder / "hf", MODELS[name])
        for ranks in (1, 2, 8) if name == "llama" else (2,):
            yield check(
                f"{name}, written for {ranks} ranks, run by Meta's model", partial(_runs, folder, ranks), partial(_unrotated, folder, ranks)
            )
        if not MODELS[name]["tie_word_embeddings"]:  # which params.json does not tell
            yield check(f"{name}: written and read again, without config.json", partial(_back, folder))
    for name in ("llama3-style-mp2", "llama2-style-mp2"):
        yield check(f"sample {name} → hf", partial(_sample, name, scratch / name))


def _model(folder: Path, config: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32).save_pretrained(folder)


def _tokens():
    import torch

    return torch.arange(24).reshape(2, 12) * 7 % 320


def _runs(folder: Path, ranks: int) -> str:
    import reshard

    reshard.convert(folder / "hf", folder / f"meta{ranks}", format="meta", tp=ranks, overwrite=True, fsync=False)
    return _compared(folder, ranks)


def _compared(folder: Path, ranks: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")(_tokens()).logits
    found = on_ranks(ranks, logits, str(folder / f"meta{ranks}"))[0]
    worst = float((found - want).abs().max() / want.abs().max())
    if not worst <= _CLOSE:
        raise Differs(f"logits differ by {worst:.2g} of the largest")
    return f"logits within {worst:.1g} of the largest"


def _unrotated(folder: Path, ranks: int) -> str:
    """The first two rows of a query head exchanged in one rank's file."""
    import torch

    path = folder / f"meta{ranks}" / "consolidated.00.pth"
    held = torch.load(path, weights_only=True)
    wq = held["layers.0.attention.wq.weight"]
    wq[:2] = wq[:2].flip(0).clone()
    torch.save(held, path)
    return _compared(folder, ranks)


def logits(rank: int, folder: str):
    """On one rank: Meta's model, built from params.json, strictly filled with this rank's file."""
    import fairscale.nn.model_parallel.initialize as parallel
    import torch
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    parallel.initialize_model_parallel(torch.distributed.get_world_size())
    params = json.loads((Path(folder) / "params.json").read_text())
    model = Transformer(ModelArgs(**params, max_batch_size=2, max_seq_len=32))
    model.load_state_dict(torch.load(Path(folder) / f"consolidated.{rank:02d}.pth", weights_only=True), strict=True)
    with torch.no_grad():
        return model(_tokens(), 0).float()


def _back(folder: Path) -> str:
    from safetensors.torch import load_file

    import reshard

    out = folder / "again"
    reshard.convert(folder / "hf", out, format="meta", tp=2, overwrite=True, fsync=False)
    for name in ("reshard.json", "config.json"):
        (out / name).unlink()
    said = same(load_file(folder / "hf/model.safetensors"), dict(reshard.load(out, format="hf")))
    return f"{said}; config.json {json.dumps(dict(reshard.open(out).made))[:120]}…"


def _sample(name: str, out: Path) -> str:
    from safetensors.torch import load_file

    import reshard

    reshard.convert(SAMPLES / "meta" / name, out, format="hf", fsync=False)
    return same(load_file(SAMPLES / "meta/hf-original/model.safetensors"), load_file(out / "model.safetensors"))
