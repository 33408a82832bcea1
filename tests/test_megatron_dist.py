"""Megatron-Core's torch_dist: its genuine folders are read, and what we write is what torch's own DCP, and Megatron's rules of keys, ask for.

megatron-core itself loads ours and saves what we read in scripts/check_frameworks.py (section megatron_dist).
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import reshard
from reshard.cli import main
from reshard.errors import FormatError, PlanError, ReshardError

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples/megatron"
GENUINE = ["llama/torch_dist_tp2", "llama/torch_dist_tp2_optim", "qwen3_moe/torch_dist_tp2"]
pytestmark = pytest.mark.samples


def model_of(name: str) -> Path:
    return SAMPLES / name.partition("/")[0] / "hf"


def equal(folder: Path, model: Path) -> bool:
    want, found = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    return want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.parametrize("name", GENUINE)
@pytest.mark.parametrize("below", [False, True])
def test_genuine_folders_become_their_originals(tmp_path, name, below):
    """Named by the folder with the tracker, or by the iteration's own."""
    folder = SAMPLES / name / "iter_0000010" if below else SAMPLES / name
    checkpoint = reshard.open(folder, config=model_of(name))
    assert (checkpoint.format, checkpoint.writer) == ("megatron-dist", "Megatron-Core")
    assert list(checkpoint.beside) == (["optimizer"] if name.endswith("optim") else [])
    reshard.convert(checkpoint, tmp_path / "hf", format="hf")
    assert equal(tmp_path / "hf", model_of(name))


def written(tmp_path: Path, model: Path, **mesh) -> Path:
    reshard.convert(model, tmp_path / "dist", format="megatron-dist", fsync=False, **mesh)
    return tmp_path / "dist"


MESHES = [{}, {"tp": 2}, {"tp": 2, "pp": 3}, {"tp": 4, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 3}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_torch_loads_the_same_from_any_mesh(tmp_path, mesh):
    """torch's loader gives whole tensors, equal to those of Megatron's own folder; every byte entry is a list of nothing."""
    folder = written(tmp_path, SAMPLES / "qwen3_moe/hf", **mesh) / "release"
    genuine = SAMPLES / "qwen3_moe/torch_dist_tp2/iter_0000010"
    held = []
    for path in (genuine, folder):
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {name: torch.zeros(value.size, dtype=value.properties.dtype) for name, value in metadata.items() if hasattr(value, "size")}
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
        held.append((state, {name for name in metadata if name not in state}))
    (want, theirs), (found, ours) = held
    assert want.keys() == found.keys()
    for name in want:
        rows = 250 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        assert torch.equal(want[name][:rows], found[name][:rows]), name
    assert theirs <= ours and all("_extra_state/shard_" in name for name in ours - theirs)
    state = dict.fromkeys(sorted(ours), None)
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    common = state.pop("common_state/shard_0_1")[0]
    assert set(map(str, state.values())) == {"[None]"} and common["args"].ckpt_format == "torch_dist"
    assert common["args"].num_layers == 3 and common["content_metadata"]["non_homogeneous_layers"] is True
    assert vars(torch.load(folder / "common.pt", weights_only=False)["args"]) == vars(common["args"])


def test_boxes_are_those_that_megatron_cuts(tmp_path):
    """For the same mesh the same chunks of every tensor as in the folder that Megatron's own save wrote."""
    folder = written(tmp_path, SAMPLES / "llama/hf", tp=2) / "release"
    both = [pickle.loads((path / ".metadata").read_bytes()) for path in (SAMPLES / "llama/torch_dist_tp2/iter_0000010", folder)]
    theirs, ours = ({name: {(tuple(c.offsets), tuple(c.sizes)) for c in value.chunks} for name, value in each.state_dict_metadata.items()
                     if hasattr(value, "chunks")} for each in both)  # fmt: skip
    assert theirs == ours and any(name.startswith("decoder.layers.mlp") for name in ours), "layers that are alike lie in one tensor"
    at = [{(i.fqn, tuple(i.offset)): v.relative_path[:3] for i, v in each.storage_data.items() if i.offset is not None} for each in both]
    assert sum(at[0][key] != at[1][key] for key in at[0]) <= 13, "norms, which every rank has, are filed by one or the other"
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


@pytest.mark.parametrize("mesh", [{"tp": 2, "pp": 3}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_one_rank_at_a_time_gives_the_same_folder(tmp_path, mesh):
    model = SAMPLES / "qwen3_moe/hf"
    reshard.convert(model, tmp_path / "at once", format="megatron-dist", fsync=False, **mesh)
    for rank in range(6 if "pp" in mesh else 2):
        reshard.convert(model, tmp_path / "by rank", format="megatron-dist", fsync=False, rank=rank, **mesh)
    both = [{str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
            for name in ("at once", "by rank")]  # fmt: skip
    assert both[0] == both[1]


def test_from_the_command_line(tmp_path, capsys):
    model, out = str(SAMPLES / "llama/hf"), str(tmp_path / "out")

    def run(*command: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(command))
        return ended.value.code

    assert run("convert", model, out, "--to", "megatron-dist", "--tp", "2", "--pp", "2") == 0
    assert run("inspect", out) == 0 and "megatron-dist of 4 ranks, written by reshard" in capsys.readouterr().out
    assert run("diff", out, str(SAMPLES / "llama/torch_dist_tp2"), "--config", model) == 0
    assert run("convert", model, str(tmp_path / "no"), "--to", "megatron-dist", "--ep", "2")
    assert "a model without experts" in capsys.readouterr().err


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(SAMPLES / "llama/torch_dist_tp2", tmp_path / "in")
    for path in (tmp_path / "in").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.copy(SAMPLES / "llama/hf/config.json", tmp_path / "in")
    return tmp_path / "in"


def test_a_folder_that_is_not_whole_says_which_file(copy):
    root = copy / "iter_0000010"

    def refused(error: type[ReshardError] = FormatError) -> str:
        with pytest.raises(error) as caught:
            reshard.open(copy)
        return f"{caught.value} {caught.value.hint}"

    assert reshard.diff(copy, SAMPLES / "llama/hf"), "the control"
    content = (root / "__1_0.distcp").read_bytes()
    (root / "__1_0.distcp").write_bytes(content[:-5000])
    assert "__1_0.distcp has 185342 bytes" in refused()
    (root / "__1_0.distcp").unlink()
    assert "__1_0.distcp (rank 1)" in refused()
    (root / "__1_0.distcp").write_bytes((SAMPLES / "qwen3_moe/torch_dist_tp2/iter_0000010/__1_0.distcp").read_bytes())
    assert "__1_0.distcp" in refused()
    (root / "__1_0.distcp").write_bytes(content)
    (root / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "metadata.json: sharded_backend is 'zarr'" in refused()
    (root / "metadata.json").unlink()
    assert "holds no metadata.json, which is written last" in refused() and str(root) in refused()
    with pytest.raises(FormatError, match="holds no metadata.json, which Megatron writes last"):
        reshard.open(root, config=copy)
    (root / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (root / ".metadata").unlink()
    assert ".metadata" in refused() and "not finished" in refused()
    shutil.rmtree(root)
    assert "iter_0000010, which is missing" in refused()


def test_another_models_config_is_refused(copy):
    """Heads of 16 in the place of 8: equal shapes, other rows."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="num_attention_heads"):
        reshard.open(copy)


def apart(model: Path, moe: bool) -> dict[str, torch.Tensor]:
    """Megatron-FSDP's names of the Hub's tensors, by hand: each layer and expert by itself, gate and up apart."""
    held, out = load_file(model / "model.safetensors"), {}
    names = {"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_layernorm", "lm_head": "output_layer"}
    for hub, megatron in names.items():
        out[f"{megatron}.weight"] = held[f"{hub}.weight"]
    for name in [name for name in held if name.endswith("q_proj.weight")]:
        hub = name.removesuffix("self_attn.q_proj.weight")
        layer = hub.replace("model.", "decoder.", 1)
        q, k, v = (held[f"{hub}self_attn.{each}_proj.weight"] for each in "qkv")
        groups = json.loads((model / "config.json").read_text())["num_key_value_heads"]
        rows = [part for at in zip(q.chunk(groups), k.chunk(groups), v.chunk(groups)) for part in at]
        out |= {f"{layer}self_attention.linear_qkv.weight": torch.cat(rows),
                f"{layer}self_attention.linear_qkv.layer_norm_weight": held[f"{hub}input_layernorm.weight"],
                f"{layer}self_attention.linear_proj.weight": held[f"{hub}self_attn.o_proj.weight"]}  # fmt: skip
        norm = "pre_mlp_layernorm.weight" if moe else "mlp.linear_fc1.layer_norm_weight"
        out[f"{layer}{norm}"] = held[f"{hub}post_attention_layernorm.weight"]
        if moe:
            out |= {f"{layer}self_attention.{each}_layernorm.weight": held[f"{hub}self_attn.{each}_norm.weight"] for each in "qk"}
            out[f"{layer}mlp.router.weight"] = held[f"{hub}mlp.gate.weight"]
        for e in range(8) if moe else ("",):
            own, there = (f"{hub}mlp.experts.{e}.", f"{layer}mlp.experts.") if moe else (f"{hub}mlp.", f"{layer}mlp.")
            out |= {f"{there}linear_fc1.weight{e}_w": held[f"{own}gate_proj.weight"], f"{there}linear_fc1.weight{e}_v": held[f"{own}up_proj.weight"],
                    f"{there}linear_fc2.weight{e}": held[f"{own}down_proj.weight"]}  # fmt: skip
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_megatron_fsdps_folders_are_read(tmp_path, name):
    """An imitation, saved by torch: names as megatron-core's fsdp_dtensor_checkpoint.py makes them."""
    model = SAMPLES / name / "hf"
    state = {f"module.{key}": value for key, value in apart(model, name == "qwen3_moe").items()}
    folder = tmp_path / "run" / "iter_0000005"
    dcp.save({"model": state, "optimizer": {"state": {"step": torch.ones(1)}}}, checkpoint_id=str(folder), no_dist=True)
    for path, format in ((folder, "dcp"), (tmp_path / "run", "megatron-dist")):
        checkpoint = reshard.open(path, config=model)
        assert checkpoint.format == format and list(checkpoint.beside) == ["optimizer"]
        reshard.convert(checkpoint, tmp_path / format, format="hf")
        assert equal(tmp_path / format, model)
        (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("5")
    assert checkpoint.writer == "Megatron-FSDP"


def test_several_optimizers_stand_beside_the_model(tmp_path):
    """Experts and the rest each have their own, whose names begin with chained_N in older folders; flat buckets have names of no parameter."""
    model = SAMPLES / "llama/hf"
    genuine = SAMPLES / "llama/torch_dist_tp2/iter_0000010"
    sizes = dcp.FileSystemReader(genuine).read_metadata().state_dict_metadata
    state = {name: torch.zeros(value.size, dtype=torch.bfloat16) for name, value in sizes.items() if hasattr(value, "size")}
    dcp.load(state, checkpoint_id=str(genuine), no_dist=True)
    moments = {f"chained_{i}.optimizer.state.exp_avg.{name}": tensor.float() for i, name in enumerate(state) for tensor in [state[name]]}
    flat = {f"chained_{i}.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.exp_avg": torch.zeros(77) for i in range(2)}
    dcp.save(state | moments | flat, checkpoint_id=str(tmp_path / "in"), no_dist=True)
    shutil.copy(genuine / "metadata.json", tmp_path / "in")
    checkpoint = reshard.open(tmp_path / "in", config=model)
    assert list(checkpoint.beside) == ["optimizer"] and checkpoint.beside["optimizer"][0] == len(moments) + 2
    reshard.convert(checkpoint, tmp_path / "hf", format="hf")
    assert equal(tmp_path / "hf", model)


@pytest.mark.parametrize("name", ["llama/torch_dist_tp2_optim", "ours"])
def test_what_is_published_is_whole(tmp_path, name):
    from reshard.publish.selection import select

    if name == "ours":
        folder = written(tmp_path, SAMPLES / "llama/hf", tp=2)
    else:
        shutil.copytree(SAMPLES / name, folder := tmp_path / "in")
    (folder / "secret.txt").write_text("no")
    selection = select(folder, config=SAMPLES / "llama/hf")
    every = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(selection.files) == every - {"secret.txt"} and set(selection.left_out) == {"secret.txt"}
