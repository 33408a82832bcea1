"""Megatron-LM's legacy format, both ways, against files built the dumb way: chunk and cat of the Hugging Face tensors.

``megatron`` below is written from Megatron-LM's own rules and knows nothing of reshard. What no oracle of ours can say was
asked of megatron-core 0.16.1 on gloo (Llama TP2 and TP4, Qwen2 PP2 and TP2×PP2, Qwen3-MoE TP2, EP2, TP2×EP2 with expert tp 1
and 2, DeepSeek-V3 TP1, EP2 and TP2×EP2): its parallel_state names each rank's file, its model, configured by the file's args,
loads it strictly, and the logits are transformers' to 2e-5 (two experts exchanged: 1.7). The samples were converted by
another program, and loaded by megatron-core likewise (their README).
"""

import json
import shutil
from argparse import Namespace
from math import lcm
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard import formats
from reshard.demo import make_model
from reshard.layout import Mesh

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples/megatron"
DENSE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 250,
         "num_hidden_layers": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
         "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}  # fmt: skip
MOE = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": {**DENSE, "architectures": ["LlamaForCausalLM"]},
    "qwen2": {**DENSE, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {**DENSE, "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": {**DENSE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "norm_topk_prob": True},
    "qwen3_moe_dense1": {**DENSE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "mlp_only_layers": [1]},
    "mixtral": {**DENSE, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**DENSE, **MOE, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": 12,
                    "kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6, "first_k_dense_replace": 1,
                    "num_key_value_heads": 8, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        make_model(root / name, config)
    return {name: (root / name, load_file(root / name / "model.safetensors"), config) for name, config in CONFIGS.items()}


# ------------------------------------------------------------------------------------------------------------ the oracle


def qkv(w, at, kind, c):
    """Per key/value head: its queries, its key, its value."""
    groups, d = c["num_key_value_heads"], c["head_dim"]
    parts = [w[f"{at}self_attn.{x}_proj.{kind}"] for x in "qkv"]
    heads = [part.reshape(groups, -1, d, *part.shape[1:]) for part in parts]
    return torch.cat([part[g].flatten(0, 1) for g in range(groups) for part in heads])


def gated(gate, up, n, i):
    return torch.cat([gate.chunk(n)[i], up.chunk(n)[i]])


def attention(w, at, c, tp, t, local):
    out = {
        "input_layernorm.weight" if local or "kv_lora_rank" in c else "self_attention.linear_qkv.layer_norm_weight": w[
            at + "input_layernorm.weight"
        ]
    }
    put = "self_attention."
    out[put + "linear_proj.weight"] = w[at + "self_attn.o_proj.weight"].chunk(tp, 1)[t]
    if "kv_lora_rank" in c:
        out[put + "linear_q_down_proj.weight"] = w[at + "self_attn.q_a_proj.weight"]
        out[put + "linear_kv_down_proj.weight"] = w[at + "self_attn.kv_a_proj_with_mqa.weight"]
        for x in ("q", "kv"):
            out[put + (f"{x}_layernorm.weight" if local else f"linear_{x}_up_proj.layer_norm_weight")] = w[
                f"{at}self_attn.{x}_a_layernorm.weight"
            ]
            out[put + f"linear_{x}_up_proj.weight"] = w[f"{at}self_attn.{x}_b_proj.weight"].chunk(tp)[t]
        return out
    for kind in ("weight", "bias"):
        if f"{at}self_attn.q_proj.{kind}" in w:
            out[put + f"linear_qkv.{kind}"] = qkv(w, at, kind, c).chunk(tp)[t]
    for x in "qk":
        if f"{at}self_attn.{x}_norm.weight" in w:
            out[put + f"{x}_layernorm.weight"] = w[f"{at}self_attn.{x}_norm.weight"]
    return out


def mlp(w, at, tp, t, e, x, ep, etp, local, experts):
    norm = w[at + "post_attention_layernorm.weight"]
    moe = at + "block_sparse_moe." if at + "block_sparse_moe.gate.weight" in w else at + "mlp."
    if moe + "gate.weight" not in w:
        return {"pre_mlp_layernorm.weight" if local else "mlp.linear_fc1.layer_norm_weight": norm,
                "mlp.linear_fc1.weight": gated(w[at + "mlp.gate_proj.weight"], w[at + "mlp.up_proj.weight"], tp, t),
                "mlp.linear_fc2.weight": w[at + "mlp.down_proj.weight"].chunk(tp, 1)[t]}  # fmt: skip
    out = {"pre_mlp_layernorm.weight": norm, "mlp.router.weight": w[moe + "gate.weight"]}
    if moe + "gate.e_score_correction_bias" in w:
        out["mlp.router.expert_bias"] = w[moe + "gate.e_score_correction_bias"]
    if moe + "shared_experts.up_proj.weight" in w:
        gate, up, down = (w[f"{moe}shared_experts.{x_}_proj.weight"] for x_ in ("gate", "up", "down"))
        out |= {
            "mlp.shared_experts.linear_fc1.weight": gated(gate, up, tp, t),
            "mlp.shared_experts.linear_fc2.weight": down.chunk(tp, 1)[t],
        }
    names = ("w1", "w3", "w2") if "block_sparse" in moe else ("gate_proj", "up_proj", "down_proj")
    count = sum(key.startswith(moe + "experts.") for key in w) // 3
    fc1, fc2 = [], []
    for expert in range(e * count // ep, (e + 1) * count // ep):
        gate, up, down = (w[f"{moe}experts.{expert}.{name}.weight"] for name in names)
        fc1.append(gated(gate, up, etp, x))
        fc2.append(down.chunk(etp, 1)[x])
    if experts == "grouped":  # transposed, stored under other dimensions
        return out | {"mlp.experts.weight1": torch.stack([m.T for m in fc1]).reshape(fc1[0].shape[1], -1),
                      "mlp.experts.weight2": torch.cat([m.T for m in fc2])}  # fmt: skip
    for n, pair in enumerate(zip(fc1, fc2)):
        for number, matrix in enumerate(pair, 1):
            out[
                f"mlp.experts.linear_fc{number}.weight{n}" if experts == "te" else f"mlp.experts.local_experts.{n}.linear_fc{number}.weight"
            ] = matrix
    return out


def padded(table, tp, t, multiple, fill):
    rows = -(-len(table) // (multiple * tp)) * multiple * tp
    return torch.cat([table, torch.full((rows - len(table), table.shape[1]), fill, dtype=table.dtype)]).chunk(tp)[t]


def folder_name(t, p, e, pp, ep):
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")


def megatron(w, c, tp=1, pp=1, ep=1, etp=None, virtual=1, stages=None, multiple=128, fill=0.0, local=False, experts="te", prefix=""):
    """{folder: [state of each chunk]}. `stages`: layers per virtual stage, in order, where they are uneven."""
    etp = etp or tp
    layers, total = c["num_hidden_layers"], pp * virtual
    stages = stages or [layers // total] * total
    out = {}
    for p in range(pp):
        for g in range(lcm(tp, ep * etp)):
            t, e, x = g % tp, g // etp % ep, g % etp
            chunks = []
            for v in range(virtual):
                at, state = v * pp + p, {}
                if at == 0:
                    state["embedding.word_embeddings.weight"] = padded(w["model.embed_tokens.weight"], tp, t, multiple, fill)
                for n, layer in enumerate(range(sum(stages[:at]), sum(stages[: at + 1]))):
                    hf = f"model.layers.{layer}."
                    held = attention(w, hf, c, tp, t, local) | mlp(w, hf, tp, t, e, x, ep, etp, local, experts)
                    state |= {f"decoder.layers.{n}.{key}": value for key, value in held.items()}
                if at == total - 1:
                    state["decoder.final_layernorm.weight"] = w["model.norm.weight"]
                    if not c["tie_word_embeddings"] or total > 1:
                        state["output_layer.weight"] = padded(
                            w.get("lm_head.weight", w["model.embed_tokens.weight"]), tp, t, multiple, fill
                        )
                chunks.append({prefix + key: value.contiguous() for key, value in state.items()})
            out[folder_name(t, p, e, pp, ep)] = chunks
    return out


def save(root, ranks, args, folder="release", tracker="release", version=3.0):
    """Write what ``megatron`` made as Megatron-LM does: plain torch.save."""
    for name, chunks in ranks.items():
        (root / folder / name).mkdir(parents=True)
        models_ = {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}
        blob = {"checkpoint_version": version, "iteration": 100, **models_} | ({"args": args} if args else {})
        torch.save(blob, root / folder / name / "model_optim_rng.pt")
    if tracker:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    return root


def args_of(tp=1, pp=1, ep=1, etp=None, **more):
    return Namespace(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp or tp,
                     **{key: value for key, value in more.items() if key in ("virtual", "padded_vocab_size")})  # fmt: skip


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def back_to_hf(source, config, tmp_path) -> bytes:
    out = tmp_path / "hf"
    shutil.rmtree(out, ignore_errors=True)
    reshard.convert(source, out, format="hf", config=config, fsync=False)
    return (out / "model.safetensors").read_bytes()


def load_pt(path):
    return torch.load(path, weights_only=True)


# --------------------------------------------------------------------------------------------------------------- writing

WRITTEN = [
    ("llama", {"tp": 1}), ("llama", {"tp": 2}), ("llama", {"tp": 8}), ("llama", {"tp": 2, "pp": 2}), ("qwen2", {"tp": 2}),
    ("qwen2", {"pp": 2}), ("qwen2", {"tp": 8, "pp": 4}), ("qwen3", {"tp": 4}), ("qwen3_moe", {"ep": 2}), ("qwen3_moe", {"tp": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2}), ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}), ("qwen3_moe", {"tp": 2, "pp": 2, "ep": 4, "etp": 1}),
    ("qwen3_moe", {"pp": 2, "ep": 2}), ("qwen3_moe", {"tp": 4, "ep": 2, "etp": 2}), ("qwen3_moe_dense1", {"tp": 2, "pp": 2, "ep": 2}),
    ("mixtral", {"tp": 2, "ep": 2}), ("mixtral", {"tp": 2, "ep": 4, "etp": 1, "pp": 2}), ("deepseek_v3", {"tp": 2}), ("deepseek_v3", {"ep": 2}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "etp": 1}), ("deepseek_v3", {"tp": 2, "pp": 2, "ep": 2}),
]  # fmt: skip


def mesh_id(value):
    return value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())


@pytest.mark.parametrize("family, mesh", WRITTEN, ids=mesh_id)
def test_every_rank_is_chunk_and_cat(family, mesh, models, tmp_path):
    source, whole, config = models[family]
    want = megatron(whole, config, **mesh)
    reshard.convert(source, tmp_path / "m", format="megatron", fsync=False, **mesh)
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == "release"
    assert {p.name for p in (tmp_path / "m/release").iterdir()} == set(want)
    numbers = {
        formats.megatron.folder_name(rank, Mesh(**{"etp": 0, **mesh})): rank.number for rank in formats.megatron.mp_ranks(Mesh(**mesh))
    }
    loaded = max(want)
    for name, (state,) in want.items():
        blob = load_pt_with_args(tmp_path / "m/release" / name / "model_optim_rng.pt")
        assert same(blob["model"], state), name
        assert blob["checkpoint_version"] == 3.0 and blob["iteration"] == 0
        if name == loaded:
            assert same(dict(reshard.load(source, format="megatron", rank=numbers[name], **mesh)), state), name
    assert reshard.diff(source, tmp_path / "m")


def load_pt_with_args(path):
    """As Megatron-LM does since torch 2.6: weights only, its own classes allowed."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def test_control_exchanged_experts_and_wrong_orders_are_seen(models, tmp_path):
    """The comparisons above fail where one thing is wrong in the oracle."""
    source, whole, config = models["qwen3_moe"]
    reshard.convert(source, tmp_path / "m", format="megatron", tp=2, ep=2, etp=1, fsync=False)
    written = {p.name: load_pt_with_args(p / "model_optim_rng.pt")["model"] for p in (tmp_path / "m/release").iterdir()}

    def agrees(w, **options):
        want = megatron(w, config, tp=2, ep=2, etp=1, **options)
        return all(same(written[name], state) for name, (state,) in want.items())

    assert agrees(whole)
    a, b = (f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (3, 4))
    assert not agrees({**whole, a: whole[b], b: whole[a]})
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not agrees({**whole, q: whole[q].view(2, -1, 16).flip(0).reshape(whole[q].shape)})
    assert not agrees(whole, multiple=5) and not agrees(whole, fill=1.0)
    ranks = megatron(whole, config, tp=2, ep=2, etp=1)
    save(tmp_path / "swapped", {"mp_rank_00_000": ranks["mp_rank_01_001"], "mp_rank_01_001": ranks["mp_rank_00_000"]}, args_of(2, 1, 2, 1))
    assert not reshard.diff(source, reshard.open(tmp_path / "swapped", config=source))


def test_meshes_that_megatron_cannot_have(models):
    source = models["qwen3_moe"][0]
    for mesh, said in (
        ({"tp": 2, "etp": 4}, "etp=4 is larger"),
        ({"tp": 6, "etp": 4}, "divide"),
        ({"ep": 3}, "experts over ep=3"),
        ({"pp": 3}, "pp=3"),
    ):
        with pytest.raises(reshard.PlanError, match=said):
            reshard.plan(source, format="megatron", **mesh)
    with pytest.raises(reshard.PlanError, match="without experts"):
        reshard.plan(models["llama"][0], format="megatron", ep=2)


# --------------------------------------------------------------------------------------------------------------- reading

READ = [
    ("llama", {"tp": 2, "pp": 2}), ("llama", {"pp": 2, "virtual": 2}), ("llama", {"tp": 2, "pp": 2, "virtual": 2}), ("llama", {"pp": 2, "stages": [1, 3]}),
    ("llama", {"pp": 3, "stages": [2, 0, 2]}), ("llama", {"pp": 2, "virtual": 2, "stages": [1, 2, 1, 0]}), ("qwen2", {"pp": 2, "virtual": 2, "tp": 2}),
    ("llama", {"tp": 2, "multiple": 32}), ("llama", {"tp": 2, "multiple": 5, "fill": 7.0}), ("llama", {"tp": 2, "multiple": 1280, "fill": 7.0}),
    ("qwen2", {"tp": 2, "pp": 2, "multiple": 1000, "fill": 7.0}), ("llama", {"tp": 2, "prefix": "module."}), ("llama", {"prefix": "module.module."}),
    ("llama", {"tp": 2, "local": True}), ("qwen3", {"pp": 2, "local": True}), ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}), ("qwen3_moe", {"tp": 2, "ep": 2}),
    ("qwen3_moe", {"tp": 4, "ep": 4, "etp": 2, "pp": 2}), ("qwen3_moe", {"ep": 2, "experts": "sequential"}), ("qwen3_moe", {"tp": 2, "ep": 2, "experts": "grouped"}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1, "experts": "grouped", "local": True, "pp": 2, "virtual": 2}), ("qwen3_moe", {"tp": 2, "experts": "sequential", "local": True}),
    ("qwen3_moe_dense1", {"tp": 2, "ep": 2, "local": True, "experts": "sequential"}), ("mixtral", {"tp": 2, "ep": 2, "experts": "grouped"}),
    ("mixtral", {"ep": 4, "experts": "sequential", "local": True}), ("deepseek_v3", {"tp": 2, "ep": 2, "pp": 2, "experts": "sequential"}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "experts": "grouped"}), ("deepseek_v3", {"tp": 2, "pp": 2, "virtual": 2}), ("deepseek_v3", {"local": True}),
]  # fmt: skip


@pytest.mark.parametrize("family, how", READ, ids=mesh_id)
def test_reads_every_way_it_is_written(family, how, models, tmp_path):
    source, whole, config = models[family]
    root = save(tmp_path / "m", megatron(whole, config, **how), args_of(**{k: v for k, v in how.items() if k in ("tp", "pp", "ep", "etp")}))
    assert back_to_hf(root, source, tmp_path) == (source / "model.safetensors").read_bytes()
    for file in sorted((root / "release").glob("*/*.pt")):  # control: the same with one bit changed
        blob = torch.load(file, weights_only=False)
        weight = next((value for key, value in blob.get("model", blob.get("model0")).items() if "linear_proj" in key), None)
        if weight is not None:
            weight.view(torch.int16)[0, 0] ^= 1
            torch.save(blob, file)
            break
    try:
        assert not reshard.diff(source, reshard.open(root, config=source))
    except reshard.FormatError as error:
        assert "different values" in str(error)  # replicas that differ


@pytest.mark.parametrize("family, how", [("llama", {"tp": 2}), ("llama", {"tp": 2, "pp": 2}), ("qwen2", {"pp": 2}), ("qwen3_moe", {"ep": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "pp": 2}), ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}), ("qwen3_moe", {"tp": 4, "ep": 2, "etp": 1}), ("llama", {"pp": 2, "virtual": 2})], ids=mesh_id)  # fmt: skip
@pytest.mark.parametrize("folder", ["release", "iter_0000100", "."])
def test_mesh_by_folders_alone(family, how, folder, models, tmp_path):
    """Files without args, in a release, an iteration, or the folder of ranks itself."""
    source, whole, config = models[family]
    root = save(tmp_path / "m", megatron(whole, config, **how), None, folder, {"release": "release", "iter_0000100": "100\n"}.get(folder))
    opened = reshard.open(root, config=source)
    assert opened.format == "megatron"
    assert (opened.mesh.tp, opened.mesh.pp, opened.mesh.ep) == (
        how.get("tp", 1),
        how.get("pp", 1) * how.get("virtual", 1),
        how.get("ep", 1),
    )
    if folder == "release":
        assert reshard.diff(source, opened)


def test_the_tracker_chooses_among_iterations(models, tmp_path):
    source, whole, config = models["llama"]
    other = {key: value + 1 for key, value in whole.items()}
    save(tmp_path / "m", megatron(other, config), args_of(), "iter_0000050", None)
    save(tmp_path / "m", megatron(whole, config), args_of(), "iter_0000100", "100")
    assert reshard.diff(source, reshard.open(tmp_path / "m", config=source))
    assert not reshard.diff(source, reshard.open(tmp_path / "m/iter_0000050", config=source))


@pytest.mark.samples
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3"])
def test_samples(family, tmp_path):
    """Files of another program, which megatron-core loaded: to the original and from it, tensor by tensor; args agree."""
    sample, original = SAMPLES / family / "legacy_tp2", SAMPLES / family / "hf"
    reshard.convert(sample, tmp_path / "hf", format="hf", config=original, fsync=False)
    got, want = load_file(tmp_path / "hf/model.safetensors"), load_file(original / "model.safetensors")
    bias = {key for key in want if key.endswith("e_score_correction_bias")}  # transformers wrote it in bf16; Megatron keeps fp32
    assert same({k: v for k, v in got.items() if k not in bias}, {k: v for k, v in want.items() if k not in bias})
    assert all(torch.equal(got[key], want[key].float()) for key in bias)
    report = reshard.diff(original, reshard.open(sample, config=original))
    assert report or {d.name.split(" ")[0] for d in report.differing} == bias
    reshard.convert(original, tmp_path / "m", format="megatron", tp=2, fsync=False)
    for rank in ("mp_rank_00", "mp_rank_01"):
        ours, theirs = (load_pt_with_args(at / "release" / rank / "model_optim_rng.pt") for at in (tmp_path / "m", sample))
        assert ours["model"].keys() == theirs["model"].keys()
        assert {k: v.dtype for k, v in ours["model"].items()} == {k: v.dtype for k, v in theirs["model"].items()}
        differ = [k for k, v in theirs["model"].items() if not torch.equal(ours["model"][k], v)]
        # of the padding: the sample repeats a row there, reshard writes zeros
        assert all("word_embeddings" in k or k == "output_layer.weight" for k in differ), differ
        for key in differ:
            rows = 250 - 128 if rank == "mp_rank_01" else 128
            assert torch.equal(ours["model"][key][:rows], theirs["model"][key][:rows])
        mine, his = vars(ours["args"]), vars(theirs["args"])
        assert {k: mine.get(k, "absent") for k in his} == his
        assert {k: type(mine[k]) for k in his} == {k: type(v) for k, v in his.items()}


# ------------------------------------------------------------------------------------------------------------ what is wrong


def refused(folder, config, *said):
    with pytest.raises(reshard.ReshardError) as caught:
        reshard.open(folder, config=config)
    assert all(text in f"{caught.value} {caught.value.hint}" for text in said), caught.value


def test_broken_checkpoints_are_refused_by_name(models, tmp_path):
    source, whole, config = models["llama"]
    two = megatron(whole, config, tp=2)
    four = megatron(whole, config, tp=4)
    refused(save(tmp_path / "old", two, args_of(2), version=2.0), source, "checkpoint_version 2.0", "mp_rank_00")
    lost = save(tmp_path / "lost", four, args_of(4))
    shutil.rmtree(lost / "release/mp_rank_02")
    refused(lost, source, "lacks mp_rank_02", "args say tp4")
    for name, args in (("silent", None), ("last", args_of(4))):
        lost = save(tmp_path / name, four, args)
        shutil.rmtree(lost / "release/mp_rank_03" if args else lost / "release/mp_rank_01")
        refused(lost, source, "lacks mp_rank_03" if args else "lacks mp_rank_01")
    (save(tmp_path / "empty", two, args_of(2)) / "release/mp_rank_01/model_optim_rng.pt").unlink()
    refused(tmp_path / "empty", source, "mp_rank_01/model_optim_rng.pt is missing")
    mixed = save(tmp_path / "mixed", two, args_of(2))
    for name in ("mp_rank_02", "mp_rank_03"):
        save(tmp_path / "mixed", {name: four[name]}, args_of(4), tracker=None)
    refused(mixed, source, "args in mp_rank_00 say tp2, in mp_rank_02 tp4", "mixed")
    stages = save(tmp_path / "stages", two, None)
    save(tmp_path / "stages", megatron(whole, config, pp=2), None, tracker=None)
    refused(stages, source, "mp_rank_00 and mp_rank_00_000", "different meshes")
    refused(
        save(tmp_path / "args", two, args_of(1, 2)),
        source,
        "lacks mp_rank_00_000, mp_rank_00_001",
        "has besides mp_rank_00, mp_rank_01",
        "tp1×pp2",
    )
    refused(save(tmp_path / "more", two, args_of(1)), source, "has besides mp_rank_01", "args say tp1")
    refused(save(tmp_path / "absurd", two, args_of(10**9)), source, "no mesh")
    refused(save(tmp_path / "config", megatron(whole, config), args_of()), models["qwen3"][0], "q_layernorm")
    gone = save(tmp_path / "gone", two, args_of(2), "iter_0000050", "100")
    refused(gone, source, "iter_0000100", "missing", "iter_0000050")
    (gone / "latest_checkpointed_iteration.txt").write_text("latest")
    refused(gone, source, "latest", "expected a number or release")


def test_broken_blobs_are_refused_by_name(models, tmp_path):
    source, whole, config = models["llama"]
    ranks = megatron(whole, config, pp=2, virtual=2)
    file = save(tmp_path / "chunks", ranks, args_of(1, 2)) / "release/mp_rank_00_001/model_optim_rng.pt"
    blob = torch.load(file, weights_only=False)
    del blob["model1"]
    torch.save(blob, file)
    refused(tmp_path / "chunks", source, "mp_rank_00_000 holds model0, model1", "mp_rank_00_001 holds model0")
    for name, content, said in (("dict", [1], "holds no model"), ("none", {"checkpoint_version": 3.0}, "holds no model"), ("list", {"model": []}, "holds no model"),
                                ("legacy", {"checkpoint_version": 3.0, "model": {"language_model": {}}}, "before megatron-core"),
                                ("version", {"model": {}}, "checkpoint_version 0")):  # fmt: skip
        at = tmp_path / name / "release/mp_rank_00/model_optim_rng.pt"
        at.parent.mkdir(parents=True)
        torch.save(content, at)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("release")
        refused(tmp_path / name, source, said, "mp_rank_00")


def test_a_layer_too_few_is_said(models, tmp_path):
    source, whole, config = models["llama"]
    refused(save(tmp_path / "m", megatron(whole, {**config, "num_hidden_layers": 3}), args_of()), source, "holds 3 layers", "says 4")


# --------------------------------------------------------------------------------------------------------------------- args

#: what load_args_from_checkpoint of Megatron-LM d98e8a6 (August 2026) asks for, but for Mamba, hybrid and heterogeneous models
READ_BACK = """num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention kv_channels
max_position_embeddings position_embedding_type add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu untie_embeddings_and_output_weights apply_layernorm_1p normalization
apply_query_key_layer_scaling attention_dropout hidden_dropout mtp_num_layers mtp_use_repeated_layer spec num_experts moe_layer_freq moe_ffn_hidden_size
moe_router_topk moe_token_dispatcher_type moe_router_pre_softmax moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias
moe_shared_expert_intermediate_size moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor moe_latent_size
tokenizer_model tokenizer_type padded_vocab_size ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage expert_model_parallel_size""".split()  # noqa: SIM905


def written_args(config, tmp_path, **mesh):
    make_model(tmp_path / "a", config)
    reshard.convert(tmp_path / "a", tmp_path / "m", format="megatron", fsync=False, **mesh)
    blob = load_pt_with_args(next((tmp_path / "m/release").glob("*/model_optim_rng.pt")))
    return vars(blob["args"])


def differs(args, **want):
    return {
        key: args.get(key, "absent")
        for key, value in want.items()
        if args.get(key, "absent") != value or type(args[key]) is not type(value)
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_args_hold_all_that_megatron_reads_back(family, tmp_path):
    args = written_args(CONFIGS[family], tmp_path, tp=2)
    assert not set(READ_BACK) - set(args)
    moe = "num_experts_per_tok" in CONFIGS[family]
    assert not differs(args, num_layers=4, rotary_base=50000, norm_epsilon=1e-6, layernorm_epsilon=1e-6, padded_vocab_size=256, vocab_size=250,
                       rotary_percent=1.0, hidden_dropout=0.0, swiglu=True, moe_grouped_gemm=moe, tensor_model_parallel_size=2,
                       expert_tensor_parallel_size=2, bf16=True, untie_embeddings_and_output_weights=family != "qwen2",
                       add_qkv_bias=family == "qwen2", qk_layernorm=family.startswith(("qwen3", "deepseek")))  # fmt: skip


def test_args_of_latent_attention_and_its_experts(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
               "mscale_all_dim": 1.0}  # fmt: skip
    config = {**CONFIGS["deepseek_v3"], "rope_scaling": scaling, "rope_theta": 10000}
    del config["rope_parameters"]
    args = written_args(config, tmp_path, ep=2)
    assert not differs(args, multi_latent_attention=True, q_lora_rank=12, kv_lora_rank=10, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=6,
                       group_query_attention=False, moe_layer_freq=[0, 1, 1, 1], moe_ffn_hidden_size=8, num_experts=8,
                       moe_shared_expert_intermediate_size=8, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
                       moe_router_topk_scaling_factor=2.5, moe_router_num_groups=2, moe_router_group_topk=1, moe_router_pre_softmax=True,
                       position_embedding_type="rope", rope_type="yarn", rotary_scaling_factor=40.0, original_max_position_embeddings=4096,
                       beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, rotary_base=10000, use_rope_scaling=False,
                       expert_model_parallel_size=2)  # fmt: skip


def test_args_of_a_lite_latent_model(tmp_path):
    config = {**CONFIGS["deepseek_v3"], "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None, "topk_method": "greedy", "n_group": 1,
              "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_shared_experts": None}  # fmt: skip
    args = written_args(config, tmp_path)
    assert not differs(args, q_lora_rank=None, rope_type="rope", moe_layer_freq=1, moe_router_score_function="softmax", moe_router_num_groups=None,
                       moe_router_enable_expert_bias=False, moe_router_topk_scaling_factor=1.0, moe_shared_expert_intermediate_size=None)  # fmt: skip


def test_args_of_rotary_scaling_and_windows(tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    }
    cases = {
        "llama3": ({**CONFIGS["llama"], "rope_parameters": llama3}, {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000, "position_embedding_type": "rope"}),
        "linear": ({**CONFIGS["llama"], "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, {"rotary_seq_len_interpolation_factor": 4, "use_rope_scaling": False}),
        "yarn": ({**CONFIGS["qwen3"], "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "rope_parameters": None},
                 {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32768, "yarn_beta_fast": None}),
        "mistral": ({**CONFIGS["llama"], "architectures": ["MistralForCausalLM"], "sliding_window": 32}, {"window_size": (31, 0), "window_attn_skip_freq": None}),
        "unused": ({**CONFIGS["qwen2"], "sliding_window": 32, "use_sliding_window": False}, {"window_size": None}),
        "partial": ({**CONFIGS["llama"], "partial_rotary_factor": 0.75}, {"rotary_percent": 0.75}),
        "biased": ({**CONFIGS["llama"], "attention_bias": True, "mlp_bias": True}, {"add_bias_linear": True, "add_qkv_bias": True}),
        "topk": ({**CONFIGS["qwen3_moe_dense1"], "norm_topk_prob": False}, {"moe_router_pre_softmax": True, "moe_layer_freq": [1, 0, 1, 1], "moe_ffn_hidden_size": 8}),
        "gpt_oss": ({**DENSE, "architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "swiglu_limit": 7.0,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
                     "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150000}},
                    {"window_size": (15, 0), "window_attn_skip_freq": [1, 0, 1, 0], "softmax_type": "learnable", "quick_geglu": True, "swiglu": False, "add_bias_linear": True,
                         "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0, "position_embedding_type": "yarn", "yarn_beta_fast": 32.0,
                         "yarn_correction_range_round_to_int": False, "rotary_base": 150000, "moe_router_topk": 2}),
    }  # fmt: skip
    for name, (config, want) in cases.items():
        assert not differs(written_args(json.loads(json.dumps(config)), tmp_path / name), **want), name
