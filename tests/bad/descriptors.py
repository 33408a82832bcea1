"""Mutants of the descriptors that come with reshard: letters, lines and values changed as a slip or an attack would."""

import copy
import json
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from reshard.checkpoint import model_config
from reshard.formats import get
from reshard.layout import Mesh, Placement, load_descriptor
from reshard.layout.files import layout_dir

#: a config.json for descriptors that are for no known architecture
CONFIG = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 60,
    "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2, "v_head_dim": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "noaux_tc", "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}  # fmt: skip
_PLACES = [
    ("hf", Mesh()),
    ("tp", Mesh(2)),
    ("vllm", Mesh(2)),
    ("sglang", Mesh(2, 1, 2)),
    ("megatron", Mesh(2, 2)),
    ("megatron", Mesh(2, 1, 2, 1)),
]
_TOKENS = ["{", "}", "{layer}", "{expert}", "(", ")", "*", '"', "[", "]", "=", "false", "true", "0", "-1", "9" * 25, "ceil_to(vocab, 0)", "len(vocab)",
           "layer", "hidden", "kv", "ffn", "null", " / 0", "{layer:>9}", "[[0], [0]]", "\0", "\x1b[2J", "²", "extends", "drop", "of", "pad", "view"]  # fmt: skip
_VALUES = [None, True, False, 0, -1, 1 << 70, 1.5, float("nan"), "", "1", "{", "{layer}", "vocab", "hidden * " * 30 + "hidden", "x" * 600, [], [[]], [["q"]], ["q", "q"],
           ["k", "v"], {}, {"name": "x"}, {"name": 3}, {"name": "l.{layer}", "of": "q k"}, {"vocab": "0 - 1"}, {"hidden": "ceil_to(hidden, 0)"}]  # fmt: skip
_KEYS = ["name", "of", "dims", "cut", "split", "pad", "align", "when", "stage", "copy", "omit", "only_rank0", "view", "dtype", "constant", "shape", "drop",
         "until", "form", "args", "like", "extends", "axes", "conditions", "defaults", "replicate", "architectures", "layer", "odd", "place", "part", "parts", "at",
         "count", "optional", "transform", "within", "hf", "vllm"]  # fmt: skip


def mutant(random: random.Random, texts: list[str]) -> str | dict:
    """A descriptor as text with some letters or lines changed, or as a table with some values changed."""
    text = random.choice(texts)
    if random.random() < 0.5:
        for _ in range(random.choice([1, 1, 2, 5])):
            text = _changed_text(random, text)
        return text
    table = tomllib.loads(text)
    for _ in range(random.choice([1, 1, 2, 4])):
        _change_value(random, table)
    return table


def _changed_text(random: random.Random, text: str) -> str:
    at = random.randrange(len(text) or 1)
    lines = text.splitlines(keepends=True)
    line = random.randrange(len(lines) or 1)
    kinds: list[Callable[[], str]] = [
        lambda: text[:at] + text[at + random.choice([1, 1, 3, 20]) :],
        lambda: text[:at] + random.choice(_TOKENS) + text[at:],
        lambda: text[:at] + random.choice(_TOKENS) + text[at + random.choice([1, 3, 8]) :],
        lambda: "".join(lines[:line] + lines[line + 1 :]),
        lambda: "".join(lines[:line] + lines[line : line + 1] * 2 + lines[line + 1 :]),
        lambda: "".join(lines[:line] + [random.choice(lines)] + lines[line:]) if lines else "",
    ]
    return random.choice(kinds)()


def _change_value(random: random.Random, table: dict) -> None:
    places = [(table, key) for key in table]
    for holder, key in places:
        if isinstance(holder[key], dict):
            places += [(holder[key], inner) for inner in holder[key]]
    if not places:
        return
    holder, key = random.choice(places)
    match random.randrange(4):
        case 0:
            holder[key] = copy.deepcopy(random.choice(_VALUES))
        case 1:
            other, name = random.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case 2:
            del holder[key]
        case _:
            inner = holder[key] if isinstance(holder[key], dict) else holder
            inner[random.choice(_KEYS)] = copy.deepcopy(random.choice(_VALUES))


def written(value: object) -> str:
    """A table as TOML; what TOML can't say is left out."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(str(k))} = {written(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(item) for item in value if item is not None) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\u{ord(c):04x}" if c in '"\\' or not c.isprintable() else c for c in value) + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(mutant: str | dict) -> bytes:
    if isinstance(mutant, str):
        return mutant.encode("utf-8", "surrogatepass")
    return "\n".join(f"{written(key)} = {written(value)}" for key, value in mutant.items() if value is not None).encode()


def builtin_texts() -> list[str]:
    """The descriptors that come with reshard, and each of their parts inside one."""
    own = [path.read_text() for path in sorted(layout_dir().glob("*.toml"))]
    for path in sorted(layout_dir().glob("parts/*.toml")):
        inline = "".join(re.sub(r"^\[", f"[part.{path.stem}.", line) for line in path.read_text().splitlines(keepends=True))
        family = "deepseek_v3" if path.stem in ("mla", "shared_experts") else "qwen3_moe"
        own.append(f'extends = "{family}"\narchitectures = ["X"]\n[part.{path.stem}]\n{inline}')
    return own


@lru_cache
def configs() -> list[dict]:
    """config.json of a small model of each family."""
    return [json.loads(path.read_text())["config"] for path in sorted((Path(__file__).parents[1] / "families_data").glob("*.json"))]


def config_of(text: str) -> dict:
    """The config of the family that the descriptor `text` is for, or of one that it extends."""
    own = next((config for config in configs() if f'"{config["architectures"][0]}"' in text), None)
    parent = re.search(r'^extends = "(\w+)"', text, re.M)
    file = layout_dir() / f"{parent[1]}.toml" if parent else None
    return own or (config_of(file.read_text()) if file and file.is_file() and file.read_text() != text else CONFIG)


def use(path: Path) -> None:
    """All that is done with a descriptor before a file is touched: read, bound to sizes, placed on meshes."""
    descriptor = load_descriptor(path)
    layout = descriptor.bind(model_config(config_of(path.read_text())))
    for name, mesh in _PLACES:
        kind = get(name)
        if kind.section not in descriptor.formats:
            continue
        section, mesh = layout.section(kind.section), replace(mesh, pp=1) if layout.layers % mesh.pp else mesh
        placement = Placement(layout, section, kind.rules, mesh)
        for stored in placement.stored(aliases=True):
            assert len(stored.shape) < 10
        for rank in placement.ranks:
            list(placement.constants(rank))
        for _, until, variant in section.variants:
            list(Placement(layout, section.overlaid(variant), kind.rules, mesh).stored())
