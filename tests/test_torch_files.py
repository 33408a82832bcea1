"""torch files of people's own: pytorch_model*.bin and rank_XX.pt, written by torch and transformers, read and written back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.demo import CONFIG, make_model
from reshard.errors import FormatError, PlanError

#: every size divides by 3, and the vocabulary does not: torch.chunk's uneven pieces are part of what is checked
UNTIED = {**CONFIG, "tie_word_embeddings": False}
INDEX = "pytorch_model.bin.index.json"
COLUMNS = ("o_proj", "down_proj")


def model(tmp_path: Path, config: dict = UNTIED) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in safetensors, and its tensors."""
    make_model(tmp_path / "hf", config)
    return tmp_path / "hf", load_file(tmp_path / "hf/model.safetensors")


def beside(folder: Path, config: dict = UNTIED) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_bytes(source: Path, folder: Path, scratch: Path) -> bool:
    """Whether `folder`, as reshard reads it, is `source` to the byte."""
    reshard.convert(folder, scratch, format="hf", fsync=False)
    return (scratch / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------ pytorch_model


def test_single_bin(tmp_path):
    source, tensors = model(tmp_path)
    folder = beside(tmp_path / "bin")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert reshard.open(folder).format == "hf"
    assert reshard.diff(source, folder)
    assert same_bytes(source, folder, tmp_path / "back")


def test_one_changed_number_is_seen(tmp_path):
    """The control: the comparisons of this file can fail."""
    source, tensors = model(tmp_path)
    folder = beside(tmp_path / "bin")
    tensors["model.norm.weight"][3] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    report = reshard.diff(source, folder)
    assert [d.name for d in report.differing] == ["model.norm.weight"] and report.differing[0].elements == 1
    assert not same_bytes(source, folder, tmp_path / "back")


def test_strided_views_of_shared_storages(tmp_path):
    """Transposed, sliced, stepped, expanded, and all of them in one storage: what counts is what torch.load would give."""
    source, tensors = model(tmp_path)
    at = "model.layers.0."
    views = dict(tensors)
    views[at + "self_attn.o_proj.weight"] = tensors[at + "self_attn.o_proj.weight"].t().contiguous().t()
    fused = torch.cat([tensors[at + f"mlp.{x}_proj.weight"] for x in ("gate", "up")])
    views[at + "mlp.gate_proj.weight"], views[at + "mlp.up_proj.weight"] = fused.chunk(2)
    wide = torch.stack([tensors[at + f"self_attn.{x}_proj.weight"] for x in "kv"], dim=-1)
    views[at + "self_attn.k_proj.weight"], views[at + "self_attn.v_proj.weight"] = wide.unbind(-1)
    padded = torch.zeros(959, 100, dtype=torch.bfloat16)
    padded[:, 2:98] = tensors["lm_head.weight"]
    views["lm_head.weight"] = padded[:, 2:98]
    for name, view in views.items():
        assert torch.equal(view, tensors[name])
    assert sum(not view.is_contiguous() for view in views.values()) == 4
    folder = beside(tmp_path / "bin")
    torch.save(views, folder / "pytorch_model.bin")
    assert same_bytes(source, folder, tmp_path / "back")
    for target in ({"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3}, {"format": "rank-pt", "tp": 3}):
        reshard.convert(folder, tmp_path / target["format"], fsync=False, **target)
        reshard.convert(source, tmp_path / f"{target['format']}-2", fsync=False, **target)
        written = [path for path in (tmp_path / target["format"]).rglob("*") if path.suffix in (".safetensors", ".pt")]
        assert len(written) == 3
        for path in written:
            assert path.read_bytes() == (tmp_path / f"{target['format']}-2" / path.relative_to(tmp_path / target["format"])).read_bytes()


def test_an_expanded_tensor(tmp_path):
    """Strides of 0: torch saves one element and reads back a whole tensor."""
    _, tensors = model(tmp_path)
    tensors["model.norm.weight"] = torch.full((1,), 0.5, dtype=torch.bfloat16).expand(96)
    folder = beside(tmp_path / "bin")
    torch.save(tensors, folder / "pytorch_model.bin")
    reshard.convert(folder, tmp_path / "back", format="hf", fsync=False)
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")["model.norm.weight"], torch.full((96,), 0.5, dtype=torch.bfloat16))


def test_tied_tensors_share_a_storage(tmp_path):
    source, tensors = model(tmp_path, CONFIG)
    assert "lm_head.weight" not in tensors
    folder = beside(tmp_path / "bin", CONFIG)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    ckpt = reshard.open(folder)
    starts = {s.name: s.start for s in ckpt.stored}
    assert starts["lm_head.weight"] == starts["model.embed_tokens.weight"]
    assert reshard.diff(source, folder)
    assert same_bytes(source, folder, tmp_path / "back")


def test_tied_tensors_that_differ_are_refused(tmp_path):
    _, tensors = model(tmp_path, CONFIG)
    folder = beside(tmp_path / "bin", CONFIG)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="different values"):
        reshard.convert(folder, tmp_path / "back", format="hf", fsync=False)
    assert not (tmp_path / "back").exists()


def sharded(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> Path:
    """As transformers 4 sharded with safe_serialization=False."""
    names = list(tensors)
    weight_map = {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save({name: tensors[name] for name in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}))
    return folder


def test_sharded_bin(tmp_path):
    source, tensors = model(tmp_path)
    folder = sharded(beside(tmp_path / "bin"), tensors)
    assert len(reshard.open(folder).files) == 3
    assert same_bytes(source, folder, tmp_path / "back")


def test_sharded_bin_without_index(tmp_path):
    _, tensors = model(tmp_path)
    folder = sharded(beside(tmp_path / "bin"), tensors)
    (folder / INDEX).unlink()
    with pytest.raises(FormatError, match=r"3 shards \(pytorch_model-00001-of-00003.bin, …\) and no pytorch_model.bin.index.json"):
        reshard.open(folder)


def test_module_state_dict_with_buffers_and_parameters(tmp_path):
    """A state dict straight from modules: an OrderedDict with _metadata, of Parameters."""
    source, tensors = model(tmp_path)
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    folder = beside(tmp_path / "bin")
    torch.save(root.state_dict(keep_vars=True), folder / "pytorch_model.bin")
    assert same_bytes(source, folder, tmp_path / "back")


@pytest.mark.models
def test_transformers_own_files(tmp_path):
    """A model that transformers makes, saved by it and by torch.save(model.state_dict()), and read back by it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=60, num_attention_heads=6, num_key_value_heads=3, vocab_size=131, num_hidden_layers=2
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # transformers 5 saves safetensors and nothing else
    made.save_pretrained(tmp_path / "safe")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "safe/config.json").read_bytes())
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    assert reshard.diff(tmp_path / "safe", folder)
    assert same_bytes(tmp_path / "safe", folder, tmp_path / "back")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    want, got = made.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_files_of_before_torch_1_6(tmp_path):
    _, tensors = model(tmp_path)
    folder = beside(tmp_path / "bin")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="pytorch_model.bin: is in torch's format of before 1.6") as caught:
        reshard.convert(folder, tmp_path / "out", format="hf")
    assert "torch.save(torch.load(path, weights_only=True), path)" in caught.value.hint
    torch.save(torch.load(folder / "pytorch_model.bin", weights_only=True), folder / "pytorch_model.bin")  # the hint works
    reshard.convert(folder, tmp_path / "out", format="hf", fsync=False)


@pytest.mark.parametrize(
    "wrap, said, hint",
    [
        (lambda t: {"state_dict": t, "epoch": 3}, "holds a dict under state_dict, expected tensors by name", "torch.load(path)['state_dict']"),
        (lambda t: list(t.values()), "holds no state dict but a list", "state_dict()"),
        (lambda t: {**t, 7: torch.zeros(1)}, "holds a TensorInfo under 7, expected names as text", None),
        (lambda t: {name: value.to(torch.complex128) for name, value in t.items()}, "ComplexDoubleStorage, which reshard does not know", "known: "),
        (lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to_sparse()}, "_rebuild_sparse_tensor, which reshard neither needs nor runs", "plain"),
    ],
)  # fmt: skip
def test_other_things_in_a_bin(tmp_path, wrap, said, hint):
    _, tensors = model(tmp_path)
    folder = beside(tmp_path / "bin")
    torch.save(wrap(tensors), folder / "pytorch_model.bin")
    with pytest.raises(FormatError) as caught:
        reshard.open(folder)
    assert said in str(caught.value) and "pytorch_model.bin" in str(caught.value)
    assert hint is None or hint in caught.value.hint


# ------------------------------------------------------------------------------------------------------------ rank-pt


def chunks(tensors: dict[str, torch.Tensor], tp: int, rank: int) -> dict[str, torch.Tensor]:
    """The dumb way: columns for the projections back, nothing for the norms, rows for the rest."""
    out = {}
    for name, tensor in tensors.items():
        dim = None if "norm" in name else 1 if any(word in name for word in COLUMNS) else 0
        out[name] = tensor if dim is None else tensor.chunk(tp, dim)[rank].contiguous()
    return out


def test_rank_pt_is_what_chunk_gives(tmp_path):
    source, tensors = model(tmp_path)
    reshard.convert(source, tmp_path / "ranks", format="rank-pt", tp=3, fsync=False)
    assert sorted(path.name for path in (tmp_path / "ranks").glob("*.pt")) == ["rank_00.pt", "rank_01.pt", "rank_02.pt"]
    for rank in range(3):
        state = torch.load(tmp_path / f"ranks/rank_{rank:02d}.pt", weights_only=True)
        want = chunks(tensors, 3, rank)
        assert state.keys() == want.keys()
        for name, tensor in want.items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert [len(chunks(tensors, 3, r)["lm_head.weight"]) for r in range(3)] == [320, 320, 319]
    assert same_bytes(source, tmp_path / "ranks", tmp_path / "back")


@pytest.mark.parametrize("tp", [1, 2, 3, 6, 9, 12])
def test_rank_pt_and_back(tmp_path, tp):
    """Also where little divides: 9 query heads and 3 key/value heads over 2, 6 and 12 ranks, a vocabulary of 959."""
    source, _ = model(tmp_path)
    reshard.convert(source, tmp_path / "ranks", format="rank-pt", tp=tp, fsync=False)
    assert len(list((tmp_path / "ranks").glob("rank_*.pt"))) == tp
    assert same_bytes(source, tmp_path / "ranks", tmp_path / "back")


def third_party(folder: Path, tensors: dict[str, torch.Tensor], tp: int, name="rank_{:02d}.pt") -> Path:
    """What another's script leaves: chunks saved with torch.save, no manifest, config.json beside them."""
    for rank in range(tp):
        torch.save(chunks(tensors, tp, rank), folder / name.format(rank))
    return folder


@pytest.mark.parametrize("name", ["rank_{:02d}.pt", "rank_{}.pt"])
def test_rank_pt_of_a_third_party(tmp_path, name):
    source, tensors = model(tmp_path)
    folder = third_party(beside(tmp_path / "theirs"), tensors, 3, name)
    ckpt = reshard.open(folder)
    assert (ckpt.format, ckpt.mesh.tp) == ("rank-pt", 3)
    assert reshard.diff(source, folder)
    assert same_bytes(source, folder, tmp_path / "back")
    reshard.convert(folder, tmp_path / "vllm", format="vllm", tp=3, fsync=False)
    assert reshard.diff(source, tmp_path / "vllm")


def test_rank_pt_with_slices_that_share_the_whole_storage(tmp_path):
    """torch.save keeps a view's whole storage: chunks that were not made contiguous."""
    source, tensors = model(tmp_path)
    folder = beside(tmp_path / "theirs")
    for rank in range(3):
        views = {n: t if "norm" in n else t.chunk(3, 1 if any(w in n for w in COLUMNS) else 0)[rank] for n, t in tensors.items()}
        torch.save(views, folder / f"rank_{rank:02d}.pt")
    assert (folder / "rank_00.pt").stat().st_size > (source / "model.safetensors").stat().st_size
    assert same_bytes(source, folder, tmp_path / "back")


def test_rank_pt_exchanged_is_seen(tmp_path):
    source, tensors = model(tmp_path)
    folder = third_party(beside(tmp_path / "theirs"), tensors, 3)
    (folder / "rank_00.pt").rename(folder / "x")
    (folder / "rank_01.pt").rename(folder / "rank_00.pt")
    (folder / "x").rename(folder / "rank_01.pt")
    report = reshard.diff(source, folder)
    assert not report and len(report.differing) == sum("norm" not in name for name in tensors)


def test_rank_pt_missing_ranks(tmp_path):
    _, tensors = model(tmp_path)
    folder = third_party(beside(tmp_path / "theirs"), tensors, 3)
    (folder / "rank_01.pt").unlink()
    with pytest.raises(FormatError, match="holds 2 rank_XX.pt, of ranks 0, 2; expected 3, of ranks 0 to 2"):
        reshard.open(folder)
    (folder / "rank_02.pt").unlink()  # what is left looks like tp 1, whose shapes are wrong
    with pytest.raises(PlanError, match=r"q_proj.weight \(rank_00.pt\): shape \[48, 96\], expected \[144, 96\]"):
        reshard.open(folder)


def test_rank_pt_names_one_rank_twice(tmp_path):
    _, tensors = model(tmp_path)
    folder = third_party(beside(tmp_path / "theirs"), tensors, 3)
    (folder / "rank_1.pt").write_bytes((folder / "rank_01.pt").read_bytes())
    with pytest.raises(FormatError, match="holds 4 rank_XX.pt, of ranks 0, 1, 1, 2; expected 3"):
        reshard.open(folder)
