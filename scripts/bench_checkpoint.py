"""Make a random bf16 checkpoint of Llama-1B's shape (3.0 GB at 16+ layers), quickly, for the benchmarks."""

import json
import sys
from pathlib import Path

import numpy as np

from reshard import formats
from reshard.layout import Mesh, Placement, builtin_descriptors
from reshard.stores import safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "num_hidden_layers": 16,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint in two shards, as the Hub has such models. Returns its bytes."""
    config = {**CONFIG, "num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    layout = builtin_descriptors()["llama"].bind(config)
    stored = list(Placement(layout, layout.section("hf"), formats.get("hf").rules, Mesh()).stored())
    half = len(stored) // 2
    weight_map, total = {}, 0
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**16, 1 << 20, dtype=np.uint16)
    for i, part in enumerate((stored[:half], stored[half:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        image = safetensors.compose([(s.name, "BF16", s.shape) for s in part], {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(image.segments[0][1])
            for name, info in sorted(image.tensors.items(), key=lambda item: item[1].offset):
                left = info.nbytes // 2
                while left:
                    shift = int(rng.integers(0, noise.size))
                    piece = np.roll(noise, shift)[:left] if left < noise.size else np.roll(noise, shift)
                    # bits of finite numbers around 1e-2: exponents other than all ones
                    out.write(((piece & 0x80FF) | 0x3C00).tobytes())
                    left -= piece.size
                weight_map[name] = file
        total += image.size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), int(sys.argv[2])))
