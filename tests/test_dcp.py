"""torch's distributed checkpoints, judged by torch: genuine folders are read, and what we write is loaded on any mesh."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.stores.dcp import compose_metadata, read_metadata

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
#: folder, its config.json's folder, and the weights that it was saved from
GENUINE = [
    ("dcp/llama-fsdp2-dp2-modelonly", "hf/llama", "hf/llama/model.safetensors"),
    ("dcp/llama-fsdp2-dp2-nested-optim", "hf/llama", "dcp/llama-fsdp2-dp2-nested-optim.full_after_step.safetensors"),
    ("dcp/llama-fsdp2-dp2-safetensors-distcp", "hf/llama", "hf/llama/model.safetensors"),
    ("dcp/llama-fsdp2dp2-tp2", "hf/llama", "hf/llama/model.safetensors"),
    ("dcp/llama-oddvocab-fsdp2-dp3-modelonly", "hf/llama-oddvocab", "hf/llama-oddvocab/model.safetensors"),
    ("accelerate/llama-fsdp2-dp2", "accelerate/llama-fsdp2-dp2", "accelerate/llama-fsdp2-dp2.full_inmemory_names.safetensors"),
    ("accelerate/llama-tied-fsdp2-dp2", "accelerate/llama-tied-fsdp2-dp2", "accelerate/llama-tied-fsdp2-dp2.full_inmemory_names.safetensors"),
    ("torchtitan_style/llama-meta-dp2/step-10", "meta/hf-original", "meta/hf-original/model.safetensors"),
]  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 101, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.samples
@pytest.mark.parametrize("name, config, weights", GENUINE, ids=lambda text: text.split("/")[1])
def test_genuine_folders_become_their_originals(tmp_path, name, config, weights):
    reshard.convert(reshard.open(SAMPLES / name, config=SAMPLES / config), tmp_path / "hf", format="hf")
    want, found = load_file(SAMPLES / weights), load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() <= want.keys() and {"lm_head.weight"} >= want.keys() - found.keys()  # a tied head is not stored by the Hub
    assert all(torch.equal(want[n], found[n]) for n in found)


@pytest.mark.samples
def test_torchtitans_rotary_order_is_not_the_hubs(tmp_path):
    """The control: as if heads were in the Hub's order, the same names give other queries and keys, and nothing else differs."""
    text = (Path(reshard.__file__).parents[1] / "layouts/llama.toml").read_text()
    own = tmp_path / "own.toml"
    own.write_text(text.replace("pair half) hidden", "half pair) hidden"))
    source = reshard.open(SAMPLES / GENUINE[-1][0], config=SAMPLES / GENUINE[-1][1], layout=own)
    report = reshard.diff(source, SAMPLES / "meta/hf-original")
    assert {d.name.rpartition(".self_attn.")[2] for d in report.differing} == {"q_proj.weight", "k_proj.weight"}


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf", CONFIG)
    return tmp_path / "hf"


def saved(state: dict, folder: Path, model: Path, **options) -> Path:
    """A folder by torch's own `save`, in this process."""
    dcp.save(state, checkpoint_id=str(folder), no_dist=True, **options)
    shutil.copy(model / "config.json", folder)
    return folder


def loaded(rank: int, size: int, folder: str, meeting: str, results) -> None:
    """One rank of FSDP's kind: each tensor in rows over all ranks; what torch loads, put together, is sent by rank 0."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    sizes = {name: torch.Size(stored.size) for name, stored in read_metadata(Path(folder) / ".metadata").tensors.items()}
    state = {
        name: distribute_tensor(torch.full(shape, float("nan"), dtype=torch.bfloat16), mesh, [Shard(0)]) for name, shape in sizes.items()
    }
    dcp.load(state, checkpoint_id=folder)
    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    if rank == 0:
        save_file(whole, results)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tp, ranks", [(3, 2), (1, 3)])
def test_torch_loads_ours_on_any_number_of_ranks(model, tmp_path, tp, ranks):
    reshard.convert(model, tmp_path / "dcp", format="dcp", tp=tp)
    want = load_file(model / "model.safetensors")
    context = multiprocessing.get_context("fork")
    results = tmp_path / "whole.safetensors"
    processes = [
        context.Process(target=loaded, args=(rank, ranks, str(tmp_path / "dcp"), str(tmp_path / "meeting"), results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    found = load_file(results)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == tp


@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"tp": 64}, {"tp": 3, "max_file": 3000}], ids=str)
def test_torch_loads_ours_in_one_process(model, tmp_path, options):
    """More ranks than rows; several files of a rank."""
    reshard.convert(model, tmp_path / "dcp", format="dcp", **options)
    want = load_file(model / "model.safetensors")
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in want.items()}
    dcp.load(found, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert reshard.diff(tmp_path / "dcp", model)


def test_torch_sees_exchanged_items(model, tmp_path):
    """The control: bytes of two tensors of one size are exchanged in our files, and torch loads other values for those two alone."""
    reshard.convert(model, tmp_path / "dcp", format="dcp")
    one, two = (s for s in reshard.open(tmp_path / "dcp").stored if s.name.endswith("k_proj.weight"))
    with open(tmp_path / "dcp" / one.file, "r+b") as file:
        raw = file.read()
        for here, there in ((one, two), (two, one)):
            file.seek(here.start)
            file.write(raw[there.start : there.start + 2 * there.size])
    want = load_file(model / "model.safetensors")
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in want.items()}
    dcp.load(found, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert {name for name in want if not torch.equal(found[name], want[name])} == {one.name, two.name}
    assert {d.name for d in reshard.diff(tmp_path / "dcp", model).differing} == {one.name, two.name}


@pytest.mark.samples
def test_metadata_is_torchs_own():
    for name, _, _ in GENUINE[:1] + GENUINE[3:5]:
        theirs = pickle.loads((SAMPLES / name / ".metadata").read_bytes())
        ours = pickle.loads(compose_metadata(read_metadata(SAMPLES / name / ".metadata")))
        assert (ours.state_dict_metadata, ours.storage_data, ours.planner_data, ours.version) == (
            theirs.state_dict_metadata, theirs.storage_data, theirs.planner_data, theirs.version)  # fmt: skip


def test_one_rank_at_a_time_gives_the_same_folder(model, tmp_path):
    reshard.convert(model, tmp_path / "at once", format="dcp", tp=3)
    for rank in range(3):
        reshard.convert(model, tmp_path / "by rank", format="dcp", tp=3, rank=rank)
    both = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("at once", "by rank")]
    assert both[0] == both[1]


STATES = {
    "flat": lambda model: model,
    "nested": lambda model: {"model": model, "optim": {"state": {0: {"exp_avg": torch.ones(7), "step": 3}}, "lr": 0.1}},
    "deeper": lambda model: {"state": {"model": model, "optimizer": {f"state.{name}.exp_avg": t for name, t in model.items()}}},
    "beside": lambda model: {**model, "optimizer": {f"{name}.exp_avg": t for name, t in model.items()}, "train_state": {"step": torch.tensor(3)}},
    "two models": lambda model: {"ema": {name: t + 1 for name, t in model.items()}, "model": model},
    "compiled": lambda model: {name.replace("self_attn", "_orig_mod.self_attn"): t for name, t in model.items()},
    "by module": lambda model: {"model": {"model": {n.removeprefix("model."): t for n, t in model.items() if n != "lm_head.weight"}, "lm_head": {"weight": model["lm_head.weight"]}}},
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_names_are_found_below_any_key(model, tmp_path, kind):
    folder = saved(STATES[kind](load_file(model / "model.safetensors")), tmp_path / "dcp", model)
    assert reshard.diff(folder, model)


def test_what_stands_beside_the_model_is_told(model, tmp_path, capsys):
    weights = load_file(model / "model.safetensors")
    folder = saved(
        {"model": weights, "optim": {name: {"exp_avg": t.float(), "step": torch.tensor(1.0)} for name, t in weights.items()}},
        tmp_path / "dcp",
        model,
    )
    size = sum(4 * t.numel() + 4 for t in weights.values())
    line = f"beside the model, and not read: optim ({2 * len(weights)} tensors, {size / 1000:.2f} kB)"
    for command in (
        ["inspect", str(folder)],
        ["plan", str(folder), "--to", "hf"],
        ["convert", str(folder), str(tmp_path / "out"), "--to", "hf"],
    ):
        with pytest.raises(SystemExit) as exit:
            main(command)
        assert exit.value.code == 0
        assert line in capsys.readouterr().out.splitlines(), command
    with pytest.raises(SystemExit):
        main(["plan", str(folder), "--to", "hf", "--json"])
    assert json.loads(capsys.readouterr().out)["beside"] == {"optim": {"tensors": 2 * len(weights), "bytes": size}}


def test_two_trees_that_both_could_be_the_model_are_refused(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    folder = saved({"actor": weights, "critic": weights}, tmp_path / "dcp", model)
    with pytest.raises(reshard.FormatError, match=r"below (actor|critic)\. and below (actor|critic)\."):
        reshard.open(folder)


def test_several_writers_and_a_save_without_collectives(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    threads = saved(weights, tmp_path / "threads", model, storage_writer=dcp.FileSystemWriter(str(tmp_path / "threads"), thread_count=3))
    single = saved(
        weights, tmp_path / "single", model, storage_writer=dcp.FileSystemWriter(str(tmp_path / "single"), single_file_per_rank=False)
    )
    assert len(list(threads.glob("*.distcp"))) == 3 and len(list(single.glob("*.distcp"))) == len(weights)
    assert reshard.diff(threads, model) and reshard.diff(single, model)
    (threads / ".metadata").rename(threads / "__0.metadata")
    assert reshard.diff(threads, model)
    (threads / "__0.metadata").rename(threads / "__1.metadata")
    with pytest.raises(reshard.FormatError, match=r"missing: __0\.metadata \(rank 0\)"):
        reshard.open(threads)
