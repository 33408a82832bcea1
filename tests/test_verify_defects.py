"""A table of planted defects: each is one change to the stored files of a good checkpoint, and verify must find every one."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reshard

pytest.importorskip("transformers")

from ranks import verify

from reshard.verify.report import Report

pytestmark = [pytest.mark.models, pytest.mark.samples]

SAMPLES = Path(__file__).parents[2] / "shared" / "samples/hf"
L = "model.layers.1."  # where most defects go: hidden states are right until there
A = L + "self_attn."
M = "decoder.layers.1."

States = list[dict[str, torch.Tensor]]  # stored tensors of each rank's file, in the order of files
REFUSED, LOGITS = "refused", "logits"


@dataclass(frozen=True)
class Defect:
    """`change` breaks the files of `family` in `format`; `parts` is the first part of the model to be off, LOGITS where that is
    the output layer, REFUSED where the shards don't fit."""

    name: str
    family: str
    format: str
    mesh: dict = field(hash=False)
    parts: str
    change: Callable[[States], None] = field(hash=False)


# --- ways to break tensors ---


def each(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[States], None]:
    """`change` tensor `name` on every rank."""

    def apply(states: States) -> None:
        for state in states:
            state[name] = change(state[name])

    return apply


def on(rank: int, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[States], None]:
    """`change` tensor `name` in one file alone."""

    def apply(states: States) -> None:
        states[rank][name] = change(states[rank][name])

    return apply


def both(*changes: Callable[[States], None]) -> Callable[[States], None]:
    """Several of them: one defect that shows in several tensors."""

    def apply(states: States) -> None:
        for change in changes:
            change(states)

    return apply


def exchange(one: str, other: str) -> Callable[[States], None]:
    """Two tensors in each other's place, on every rank."""

    def apply(states: States) -> None:
        for state in states:
            state[one], state[other] = state[other], state[one]

    return apply


def between(*names: str) -> Callable[[States], None]:
    """Ranks 0 and 1 with each other's `names`."""

    def apply(states: States) -> None:
        for name in names:
            states[0][name], states[1][name] = states[1][name], states[0][name]

    return apply


def whole(name: str, dim: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[States], None]:
    """`change` the tensor that all ranks' pieces along `dim` make, and cut it again."""

    def apply(states: States) -> None:
        pieces = change(torch.cat([state[name] for state in states], dim)).chunk(len(states), dim)
        for state, piece in zip(states, pieces, strict=True):
            state[name] = piece

    return apply


def heads(x: torch.Tensor, order: list[int], size: int = 16) -> torch.Tensor:
    """The heads of `x` (rows, `size` to a head) in another order."""
    return x.unflatten(0, (-1, size))[order].flatten(0, 1)


def pairs(x: torch.Tensor, size: int = 16) -> torch.Tensor:
    """Rows of each head in Meta's rotary order, (0, 8), (1, 9), …, instead of halves."""
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def halves(x: torch.Tensor) -> torch.Tensor:
    """Alternate rows as two halves."""
    return torch.cat([x[0::2], x[1::2]])


def alternate(x: torch.Tensor) -> torch.Tensor:
    """Two halves as alternate rows."""
    return torch.stack(x.chunk(2), 1).flatten(0, 1)


def rolled(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, 0)


def layer_of(other: int) -> Callable[[States], None]:
    """Layer 1 with the tensors of layer `other`."""

    def apply(states: States) -> None:
        for state in states:
            state.update({name: state[name.replace(L, f"model.layers.{other}.")] for name in state if name.startswith(L)})

    return apply


def set_to(name: str, at: tuple[int, ...], value: float) -> Callable[[States], None]:
    """One element of one rank's tensor."""

    def apply(states: States) -> None:
        states[1][name][at] = value

    return apply


def everywhere(rank: int, *names: str) -> Callable[[States], None]:
    """Every rank with `rank`'s tensors: `names`, or all."""

    def apply(states: States) -> None:
        for state in states:
            state.update({name: states[rank][name] for name in names or state})

    return apply


def stages_exchanged(states: States) -> None:
    """Files by tp then pp: what both stages have (their layers) in each other's place."""
    for first, last in ((0, 1), (2, 3)):
        for name in states[first].keys() & states[last].keys():
            states[first][name], states[last][name] = states[last][name], states[first][name]


def repeated_round_robin(states: States) -> None:
    """Rank r of 8 with the key/value head r % 4 instead of r // 2; each has one query head, then key, then value."""
    name = A + "qkv_proj.weight"
    keys = [state[name][16:].clone() for state in states]
    for rank, state in enumerate(states):
        state[name] = torch.cat([state[name][:16], keys[rank % 4 * 2]])


def cut_by_columns(states: States) -> None:
    """q_proj cut along its input instead of its output."""
    name = A + "q_proj.weight"
    for state, piece in zip(states, torch.cat([state[name] for state in states]).chunk(2, 1), strict=True):
        state[name] = piece


def fused_before_cut(name: str, *sizes: int) -> Callable[[States], None]:
    """Parts of `sizes` rows on a rank fused whole, and the whole cut in two: rank 0 has all of the first part."""

    def apply(states: States) -> None:
        parts = zip(*(state[name].split(sizes) for state in states))
        for state, piece in zip(states, torch.cat([torch.cat(part) for part in parts]).chunk(len(states)), strict=True):
            state[name] = piece

    return apply


def experts_rolled(states: States) -> None:
    for state in states:
        for leaf in ("w1", "w2", "w3"):
            names = [f"{L}block_sparse_moe.experts.{e}.{leaf}.weight" for e in range(4)]
            state.update(zip(names, [state[name] for name in names[1:] + names[:1]]))


def w1_w3_exchanged(states: States) -> None:
    for expert in range(4):
        exchange(*(f"{L}block_sparse_moe.experts.{expert}.{leaf}.weight" for leaf in ("w1", "w3")))(states)


def lost(name: str) -> Callable[[States], None]:
    def apply(states: States) -> None:
        del states[1][name]

    return apply


def one_too_many(states: States) -> None:
    for state in states:
        state[A + "q_proj.bias"] = torch.zeros(64)


def rows_short(states: States) -> None:
    for state in states:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:150]


def read_as_float16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().view(torch.float16).float()


def by_part(x: torch.Tensor) -> torch.Tensor:
    """GPT-NeoX's rows, query, key and value of each head, as all queries, all keys, all values."""
    return x.unflatten(0, (-1, 3, 8)).transpose(0, 1).flatten(0, 2)


def sections(x: torch.Tensor) -> torch.Tensor:
    """Megatron's groups (two query heads, key, value) as sections."""
    q, k, v = x.unflatten(0, (-1, 4, 16)).split((2, 1, 1), 1)
    return torch.cat([part.flatten(0, 2) for part in (q, k, v)])


def groups(x: torch.Tensor) -> torch.Tensor:
    """Sections as Megatron's groups."""
    q, k, v = (part.unflatten(0, (2, -1)) for part in x.split((64, 32, 32)))
    return torch.cat([q, k, v], 1).flatten(0, 1)


def values_first(x: torch.Tensor) -> torch.Tensor:
    """kv_b_proj with each head's value (12) before its key (16)."""
    k, v = x.unflatten(0, (-1, 28)).split((16, 12), 1)
    return torch.cat([v, k], 1).flatten(0, 1)


def rotary_in_halves(x: torch.Tensor) -> torch.Tensor:
    """The last 8 rows of each 24 (q_b_proj), or of all (the compressed keys), as halves; the model has pairs."""
    x = x.unflatten(0, (-1, 24 if len(x) % 24 == 0 else len(x)))
    rotary = x[:, -8:].unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([x[:, :-8], rotary], 1).flatten(0, 1)


def padding_in_front(x: torch.Tensor) -> torch.Tensor:
    """A vocabulary of 259 after the rows that pad it."""
    return x.roll(len(x) - 259, 0)


TP2, TP8, PP2, EP2 = {"tp": 2}, {"tp": 8}, {"tp": 2, "pp": 2}, {"ep": 2}
ATTENTION, MLP, NEOX = L + "self_attn", L + "mlp", "gpt_neox.layers.1.attention"
W13, W2 = (L + f"mlp.experts.routed_experts.{name}_weight" for name in ("w13", "w2"))


def layer_too_many(states: States) -> None:
    for state in states:
        state.update({name.replace(L, "model.layers.2."): state[name].clone() for name in list(state) if name.startswith(L)})


def experts_of_the_other_rank(states: States) -> None:
    """Two ranks of two experts each: their names say the other's numbers."""
    for state in states:
        names = [name for name in state if ".experts." in name]
        moved = {re.sub(r"experts\.(\d)", lambda found: f"experts.{(int(found[1]) + 2) % 4}", name): state.pop(name) for name in names}
        state.update(moved)


def one_matrix_of_an_expert(states: States) -> None:
    del states[0][L + "block_sparse_moe.experts.3.w2.weight"]


def uneven_gate(states: States) -> None:
    name = L + "mlp.gate_proj.weight"
    states[0][name], states[1][name] = torch.cat([state[name] for state in states]).split((70, 90))


def one_embedding_row(states: States) -> None:
    states[0]["model.embed_tokens.weight"][100] *= 2


DEFECTS = [
    Defect("experts named as the other rank's", "qwen3_moe", "tp", {"tp": 2, "ep": 2}, REFUSED, experts_of_the_other_rank),
    Defect("a layer that the model has not", "llama", "tp", TP2, REFUSED, layer_too_many),
    Defect("one matrix of one expert missing", "mixtral", "tp", TP2, REFUSED, one_matrix_of_an_expert),
    Defect("gate and up of other sizes on a rank", "llama", "tp", TP2, REFUSED, uneven_gate),
    Defect("an embedding row that no prompt reads", "llama", "tp", TP2, "model.embed_tokens", one_embedding_row),
    # queries, keys, values
    Defect("fused qkv grouped per key/value head where sections are read", "llama", "vllm", TP2, ATTENTION, each(A + "qkv_proj.weight", groups)),
    Defect("fused qkv in sections where groups are read", "llama", "megatron", TP2, ATTENTION, each(M + "self_attention.linear_qkv.weight", sections)),
    Defect("fused qkv cut straight over ranks", "llama", "vllm", TP2, ATTENTION, fused_before_cut(A + "qkv_proj.weight", 64, 32, 32)),
    Defect("per-head qkv in sections", "gpt_neox", "tp", TP2, NEOX, each(NEOX + ".query_key_value.weight", by_part)),
    Defect("keys and values exchanged", "llama", "tp", TP2, ATTENTION, exchange(A + "k_proj.weight", A + "v_proj.weight")),
    Defect("query heads off by one", "llama", "tp", TP2, ATTENTION, whole(A + "q_proj.weight", 0, lambda x: heads(x, [7, 0, 1, 2, 3, 4, 5, 6]))),
    Defect("query heads counted across groups", "llama", "tp", TP2, ATTENTION, whole(A + "q_proj.weight", 0, lambda x: heads(x, [0, 4, 1, 5, 2, 6, 3, 7]))),
    Defect("key/value heads of a rank exchanged", "llama", "tp", TP2, ATTENTION,
           both(*(each(A + f"{kv}_proj.weight", lambda x: heads(x, [1, 0])) for kv in "kv"))),
    Defect("key/value heads repeated round robin", "llama", "vllm", TP8, ATTENTION, repeated_round_robin),
    Defect("rotary pairs instead of halves", "llama", "tp", TP2, ATTENTION, both(*(each(A + f"{qk}_proj.weight", pairs) for qk in "qk"))),
    Defect("rotary pairs in the keys alone", "qwen3", "tp", TP2, ATTENTION, each(A + "k_proj.weight", pairs)),
    Defect("query and key norms exchanged", "qwen3", "vllm", TP2, ATTENTION, exchange(A + "q_norm.weight", A + "k_norm.weight")),
    Defect("attention sinks of another rank", "gpt_oss", "vllm", TP2, ATTENTION, between(L + "attn.sinks")),
    # MLA
    Defect("MLA: values before keys in each head of kv_b_proj", "deepseek_v3", "vllm", TP2, ATTENTION, each(A + "kv_b_proj.weight", values_first)),
    Defect("MLA: rotary rows in halves", "deepseek_v3", "megatron", TP2, ATTENTION,
           both(*(each(M + f"self_attention.linear_{name}_proj.weight", rotary_in_halves) for name in ("q_up", "kv_down")))),
    Defect("MLA: compressed keys before queries in the fused projection", "deepseek_v3", "sglang", TP2, ATTENTION,
           each(A + "fused_qkv_a_proj_with_mqa.weight", lambda x: x.roll(-24, 0))),
    # row parallel
    Defect("o_proj of two ranks exchanged", "llama", "tp", TP2, ATTENTION, between(A + "o_proj.weight")),
    Defect("o_proj transposed, square", "gpt_neox", "tp", {"tp": 1}, NEOX, each(NEOX + ".dense.weight", torch.t)),
    Defect("down_proj of two ranks exchanged", "qwen2", "sglang", TP2, MLP, between(L + "mlp.down_proj.weight")),
    Defect("down_proj of rank 0 on every rank", "qwen2", "tp", TP2, MLP, everywhere(0, L + "mlp.down_proj.weight")),
    Defect("down_proj's columns in turn over ranks", "phi3", "tp", TP2, MLP, whole(L + "mlp.down_proj.weight", 1, lambda x: halves(x.T).T)),
    # gate and up
    Defect("gate and up exchanged", "llama", "tp", TP2, MLP, exchange(L + "mlp.gate_proj.weight", L + "mlp.up_proj.weight")),
    Defect("up before gate in the fused projection", "phi3", "vllm", TP2, MLP, each(L + "mlp.gate_up_proj.weight", lambda x: x.roll(80, 0))),
    Defect("gate and up on alternate rows", "llama", "megatron", TP2, MLP, each(M + "mlp.linear_fc1.weight", alternate)),
    Defect("fused gate and up cut straight over ranks", "llama", "megatron", TP2, MLP, fused_before_cut(M + "mlp.linear_fc1.weight", 80, 80)),
    # whole layers, ranks, stages
    Defect("files of two ranks exchanged", "llama", "tp", TP2, "model.embed_tokens", lambda states: states.reverse()),
    Defect("rank 0's file for every rank", "llama", "vllm", TP2, "model.embed_tokens", everywhere(0)),
    Defect("folders by expert rank and then tensor rank", "qwen3_moe", "megatron", {"tp": 2, "ep": 2}, "model.embed_tokens",
           lambda states: states.insert(1, states.pop(2))),
    Defect("a stale layer: layer 0's tensors again", "llama", "tp", TP2, L + "input_layernorm", layer_of(0)),
    Defect("layers off by one", "llama", "rank-pt", TP2, "model.layers.0.input_layernorm", lambda states: [
        exchange(name, name.replace(L, "model.layers.0."))(states) for name in list(states[0]) if name.startswith(L)]),
    Defect("layers of two pipeline stages exchanged", "llama", "megatron", PP2, "model.layers.0.input_layernorm", stages_exchanged),
    # norms and biases
    Defect("two norms of a layer exchanged", "llama", "vllm", TP2, L + "input_layernorm", exchange(L + "input_layernorm.weight", L + "post_attention_layernorm.weight")),
    Defect("a norm stored less one (zero-centred)", "llama", "megatron", TP2, L + "post_attention_layernorm", each(M + "mlp.linear_fc1.layer_norm_weight", lambda x: x - 1)),
    Defect("a norm of ones: never loaded", "qwen3", "tp", TP2, "model.norm", each("model.norm.weight", torch.ones_like)),
    Defect("a bias of zeros: never loaded", "qwen2", "vllm", TP2, ATTENTION, each(A + "qkv_proj.bias", lambda x: torch.cat([x[:96], 0 * x[96:]]))),
    Defect("a column-parallel bias of another rank", "llama-tied", "tp", TP2, MLP, between(L + "mlp.gate_proj.bias")),
    Defect("a row-parallel bias added once per rank", "llama-tied", "tp", TP2, ATTENTION, each(A + "o_proj.bias", lambda x: 2 * x)),
    # vocabulary
    Defect("padding before the vocabulary", "llama-oddvocab", "megatron", TP2, "model.embed_tokens", whole("embedding.word_embeddings.weight", 0, padding_in_front)),
    Defect("output rows after their padding", "llama-oddvocab", "vllm", TP2, LOGITS, whole("lm_head.weight", 0, padding_in_front)),
    Defect("embedding rows off by one", "llama", "tp", TP2, "model.embed_tokens", whole("model.embed_tokens.weight", 0, rolled)),
    Defect("embedding and output layer exchanged", "llama", "tp", TP2, "model.embed_tokens", exchange("model.embed_tokens.weight", "lm_head.weight")),
    Defect("an output layer that is tied and should not be", "llama", "vllm", TP2, LOGITS,
           lambda states: [state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}) for state in states]),
    Defect("output rows of two ranks exchanged", "llama", "megatron", TP2, LOGITS, between("output_layer.weight")),
    # experts
    Defect("experts in another order than the router's", "mixtral", "tp", TP2, MLP, experts_rolled),
    Defect("router rows in another order", "qwen3_moe", "vllm", TP2, MLP, each(L + "mlp.experts.gate.weight", rolled)),
    Defect("w1 and w3 of experts exchanged", "mixtral", "tp", TP2, MLP, w1_w3_exchanged),
    Defect("experts of two ranks exchanged", "qwen3_moe", "megatron", EP2, MLP,
           between(*(M + f"mlp.experts.linear_{fc}.weight{e}" for fc in ("fc1", "fc2") for e in range(2)))),
    Defect("experts dealt out in turn instead of in a row", "qwen3_moe", "vllm", {"tp": 2, "ep": 2}, MLP, both(*(whole(name, 0, halves) for name in (W13, W2)))),
    Defect("experts' slices of two ranks exchanged", "qwen3_moe", "vllm", TP2, MLP, between(W2)),
    Defect("GPT-OSS: alternate gate and up rows stored as halves", "gpt_oss", "vllm", TP2, MLP,
           each(W13, lambda x: torch.stack([halves(expert) for expert in x]))),
    Defect("GPT-OSS: an expert bias on all ranks instead of the first", "gpt_oss", "vllm", TP2, MLP, everywhere(0, W2.replace("weight", "bias"))),
    Defect("GPT-OSS: an expert's output bias stale on one rank", "gpt_oss", "megatron", TP2, MLP, on(1, M + "mlp.experts.linear_fc2.bias3", rolled)),
    Defect("DeepSeek: the router's correction bias in another order", "deepseek_v3", "vllm", TP2, MLP,
           each(L + "mlp.experts.gate.e_score_correction_bias", lambda x: x.roll(2))),
    Defect("DeepSeek: the router's correction bias lost", "deepseek_v3", "vllm", TP2, MLP, each(L + "mlp.experts.gate.e_score_correction_bias", torch.zeros_like)),
    Defect("DeepSeek: shared experts' slices of two ranks exchanged", "deepseek_v3", "sglang", TP2, MLP, between(L + "mlp.shared_experts.down_proj.weight")),
    # numbers
    Defect("a tensor off by a hundredth", "llama", "tp", TP2, MLP, each(L + "mlp.down_proj.weight", lambda x: 1.01 * x)),
    Defect("a tensor cut to bf16", "llama", "tp", TP2, ATTENTION, each(A + "v_proj.weight", lambda x: x.bfloat16().float())),
    Defect("bf16's bits read as fp16", "llama", "tp", TP2, MLP, each(L + "mlp.up_proj.weight", read_as_float16)),
    Defect("one element set to zero", "llama", "vllm", TP2, MLP, set_to(L + "mlp.down_proj.weight", (3, 5), 0.0)),
    Defect("one NaN", "llama", "megatron", TP2, ATTENTION, set_to(M + "self_attention.linear_proj.weight", (3, 5), float("nan"))),
    # copies: what several ranks hold alike, wrong on one of them
    Defect("a norm stale on one rank", "llama", "tp", TP2, ATTENTION, on(1, L + "input_layernorm.weight", rolled)),
    Defect("a router stale on one rank", "qwen3_moe", "vllm", TP2, MLP, on(1, L + "mlp.experts.gate.weight", rolled)),
    Defect("a row-parallel bias lost on one rank", "llama-tied", "tp", TP2, MLP, on(1, A + "o_proj.bias", torch.zeros_like)),
    Defect("a repeated key/value head stale on one rank", "llama", "vllm", TP8, ATTENTION,
           on(3, A + "qkv_proj.weight", lambda x: torch.cat([x[:16], rolled(x[16:])]))),
    Defect("attention stale in one expert-parallel copy of the dense model", "qwen3_moe", "megatron", EP2, ATTENTION,
           on(1, M + "self_attention.linear_proj.weight", rolled)),
    Defect("an expert stale in one of its copies", "mixtral", "megatron", {"tp": 4, "ep": 2, "etp": 1}, MLP,
           on(2, M + "mlp.experts.linear_fc2.weight1", rolled)),
    Defect("the last stage's copy of a tied embedding stale", "qwen2", "megatron", PP2, LOGITS,
           both(on(1, "output_layer.weight", rolled), on(3, "output_layer.weight", rolled))),
    # shapes
    Defect("a projection cut along the wrong dimension", "llama", "tp", TP2, REFUSED, cut_by_columns),
    Defect("a projection transposed", "llama", "vllm", TP2, REFUSED, each(L + "mlp.down_proj.weight", lambda x: x.T.contiguous())),
    Defect("a tensor missing on one rank", "llama", "megatron", TP2, REFUSED, lost(M + "mlp.linear_fc1.layer_norm_weight")),
    Defect("a bias that the model has not", "llama", "tp", TP2, REFUSED, one_too_many),
    Defect("a vocabulary cut short", "llama", "tp", TP2, REFUSED, rows_short),
]  # fmt: skip


# --- files ---


def files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("release/*/*.pt")])


def read(file: Path) -> tuple[dict, object]:
    """The tensors of a file that reshard wrote, and the rest of it."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stored:
            return load_file(file), stored.metadata()
    blob = torch.load(file, weights_only=False)
    return blob.get("model", blob), blob


def write(file: Path, state: dict, rest) -> None:
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format) if torch.is_tensor(tensor) else tensor for name, tensor in state.items()
    }
    if file.suffix == ".safetensors":
        save_file(state, file, rest)
    else:
        torch.save({**rest, "model": state} if "model" in rest else state, file)


def rewrite(folder: Path, change: Callable[[States], None]) -> bool:
    """Change the stored tensors of all ranks; whether anything is another now."""
    found = [read(file) for file in files(folder)]
    states = [{name: tensor.clone() if torch.is_tensor(tensor) else tensor for name, tensor in state.items()} for state, _ in found]
    change(states)
    for file, state, (_, rest) in zip(files(folder), states, found, strict=True):
        write(file, state, rest)
    manifest = json.loads((folder / "reshard.json").read_text())
    manifest["files"] = {name: (folder / name).stat().st_size for name in manifest["files"]}  # torch.save's sizes are not ours
    (folder / "reshard.json").write_text(json.dumps(manifest))
    return not all(same(before, after) for (before, _), after in zip(found, states))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        not torch.is_tensor(t) or t.shape == other[n].shape and t.equal(other[n]) for n, t in one.items()
    )


@cache
def scratch() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="defects-")


@cache
def good(family: str, format: str, mesh: tuple) -> Path:
    """A converted checkpoint that passes, read and written back as the broken ones are: what is found later is the defect."""
    folder = Path(scratch().name) / "-".join([family, format, *map(str, sum(mesh, ()))])
    reshard.convert(SAMPLES / family, folder, format=format, fsync=False, **dict(mesh))
    assert not rewrite(folder, lambda states: None)
    report = verify(folder, SAMPLES / family)
    assert isinstance(report, Report) and report.passed, report
    return folder


@cache
def planted(defect: Defect):
    """What verify says of the checkpoint with the defect."""
    sound = good(defect.family, defect.format, tuple(defect.mesh.items()))
    with TemporaryDirectory(prefix="defect-") as folder:
        copytree(sound, folder, dirs_exist_ok=True)
        if not rewrite(Path(folder), defect.change):
            raise ValueError(f"{defect.name}: nothing was broken")
        return verify(Path(folder), SAMPLES / defect.family)


def found(defect: Defect) -> bool:
    """A clear refusal, or logits that are off from the layer and part on that was broken."""
    outcome = planted(defect)
    if defect.parts == REFUSED:
        return isinstance(outcome, reshard.ReshardError)
    return isinstance(outcome, Report) and not outcome.shards.passed


# --- tests ---


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: re.sub(r"\W+", "-", defect.name))
def test_found(defect):
    outcome = planted(defect)
    assert found(defect), outcome
    if defect.parts == REFUSED:
        assert re.search(r"rank [01]: .*(layers\.[12]\.|embed_tokens)", str(outcome))
        return
    parted = outcome.shards.parted
    assert (parted.path if parted else LOGITS) == defect.parts, [(point.path, point.relative) for point in outcome.shards.points]
    assert not outcome and "FAILED" in outcome.verdict() and (defect.parts in outcome.verdict() or "output layer" in outcome.verdict())


@pytest.mark.parametrize("family, format, change", [
    ("llama", "tp", {"tie_word_embeddings": True}),  # an engine that ties would not read the output layer that is there
    ("llama", "tp", {"num_hidden_layers": 3}),  # the third is nowhere
], ids=["tied", "layers"])  # fmt: skip
def test_a_config_json_that_tells_otherwise(family, format, change, tmp_path):
    copytree(good(family, format, (("tp", 2),)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | change))
    outcome = verify(tmp_path / "out", SAMPLES / family)
    assert isinstance(outcome, reshard.ReshardError) or isinstance(outcome, Report) and not outcome.shards.figures.passed, outcome


def experts_and_router(states: States) -> None:
    experts_rolled(states)
    each(L + "block_sparse_moe.gate.weight", lambda x: x.roll(-1, 0))(states)


@pytest.mark.parametrize("family, format, change", [
    ("llama-oddvocab", "megatron", whole("embedding.word_embeddings.weight", 0, lambda x: torch.cat([x[:259], torch.full_like(x[259:], 9.0)]))),
    ("llama-oddvocab", "vllm", whole("lm_head.weight", 0, lambda x: torch.cat([x[:259], torch.full_like(x[259:], float("nan"))]))),
    ("llama", "tp", between(*(A + f"{name}_proj.weight" for name in "qkvo"))),
    ("llama", "vllm", between(L + "mlp.gate_up_proj.weight", L + "mlp.down_proj.weight")),
    ("mixtral", "tp", experts_and_router),
], ids=["padding-of-embedding", "padding-of-output", "heads-of-two-ranks", "ffn-of-two-ranks", "experts-with-router"])  # fmt: skip
def test_what_is_no_defect(family, format, change, tmp_path):
    """Other bits, the same function: it passes, so what is found above is not mere difference."""
    copytree(good(family, format, (("tp", 2),)), tmp_path / "out")
    assert rewrite(tmp_path / "out", change)
    report = verify(tmp_path / "out", SAMPLES / family)
    assert isinstance(report, Report) and report.passed, report


@pytest.mark.parametrize("change", [{"vocab_size": 319}, {"vocab_size": 321}])
def test_a_vocabulary_that_is_not_the_originals_is_refused(change, tmp_path):
    """Megatron's padding has room for both."""
    copytree(good("llama", "megatron", (("tp", 2),)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | change))
    outcome = verify(tmp_path / "out", SAMPLES / "llama")
    assert isinstance(outcome, reshard.ReshardError) and "320" in str(outcome) and str(change["vocab_size"]) in str(outcome)


@pytest.mark.parametrize("name", ["keys and values exchanged", "rotary pairs instead of halves", "o_proj of two ranks exchanged"])
def test_controls_plant_what_they_say(name):
    """Planted on shards that have just this defect or its inverse, a control repairs them."""
    report = planted(next(defect for defect in DEFECTS if defect.name == name))
    assert not report.shards.figures.passed and len(report.missed) == 1 and "layer 1" in report.missed[0]


def test_count(capsys):
    count = sum(map(found, DEFECTS))
    with capsys.disabled():
        print(f"\n{len(DEFECTS)} kinds of defects planted, {count} found")
    assert len(DEFECTS) == len({defect.name for defect in DEFECTS}) >= 20
    assert count == len(DEFECTS)
