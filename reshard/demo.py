"""``reshard demo``: the whole story on a small model made on the spot: convert, convert again, come back, compare; and a
planted defect, which the comparison must find. No download."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reshard import formats
from reshard.api import convert, diff
from reshard.layout import Mesh, Placement, builtin_descriptors
from reshard.stores import safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 192,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 959, "num_hidden_layers": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
STEPS = (("megatron-tp3", "hf", {"format": "megatron", "tp": 3}), ("vllm-tp3", "megatron-tp3", {"format": "vllm", "tp": 3}),
         ("tp2", "vllm-tp3", {"format": "tp", "tp": 2}), ("back", "tp2", {"format": "hf"}))  # fmt: skip


def make_model(folder: Path, config: dict = CONFIG, seed: int = 0) -> None:
    """A checkpoint of random bf16 numbers in `folder`, of any architecture that has a descriptor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    family = next(d for d in builtin_descriptors().values() if set(config["architectures"]) & set(d.architectures))
    layout = family.bind(config)
    stored = list(Placement(layout, layout.section("hf"), formats.get("hf").rules, Mesh()).stored())
    pinned = {name: tensor.dtype for name, tensor in family.tensors.items() if tensor.dtype}
    image = safetensors.compose([(s.name, pinned.get(s.entry.of[0], "BF16"), s.shape) for s in stored], {"format": "pt"})
    rng = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(image.segments[0][1])
        for info in sorted(image.tensors.values(), key=lambda info: info.offset):
            words = (rng.normal(0, 0.02, info.nbytes // 2).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            out.write(words.tobytes())


def demo(say: Callable[[str], None]) -> bool:
    """Run the story in a temporary folder; True when all went as it should."""
    with tempfile.TemporaryDirectory(prefix="reshard-demo-") as name:
        root = Path(name)
        make_model(root / "hf")
        say("made    hf            a Llama-like model of random numbers: 9 query heads, 3 key/value heads, tied embeddings")
        for target, source, options in STEPS:
            report = convert(root / source, root / target, **options)
            mesh = f" --tp {options['tp']}" if "tp" in options else ""
            say(
                f"convert {source:<13} → {target:<13} --to {options['format']}{mesh}: {len(report.files)} files, {report.bytes_written:,} bytes"
            )
        same = diff(root / "hf", root / "back")
        say(f"diff    hf              back          {'equal' if same else 'DIFFERENT'}: {same.tensors} tensors, bit for bit")
        swap = [root / "vllm-tp3" / f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)]
        contents = [path.read_bytes() for path in swap]
        for path, content in zip(swap, reversed(contents)):
            path.write_bytes(content)
        broken = diff(root / "hf", root / "vllm-tp3")
        say(f"control two ranks' files exchanged: diff finds {len(broken.differing)} of {broken.tensors} tensors different")
        return bool(same) and not broken
