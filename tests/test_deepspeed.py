"""DeepSpeed's checkpoints, judged by what its own ``zero_to_fp32`` and ``ds_to_universal`` made of the same folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.errors import FormatError, ReshardError

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
DEEPSPEED, LLAMA = SAMPLES / "deepspeed", SAMPLES / "hf/llama"
ZERO2, ZERO3, AUTOTP = (DEEPSPEED / f"llama-{name}" for name in ("zero2-dp2-bf16", "zero3-dp2-bf16", "zero1-dp1-bf16-autotp2"))


def read(folder: Path, dtype: str | None = None) -> dict:
    return reshard.load(reshard.open(folder, config=LLAMA), format="hf", dtype=dtype)


def copied(source: Path, target: Path) -> Path:
    """A copy that may be changed, with its config.json."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.copyfile(LLAMA / "config.json", target / "config.json")
    return target


def equal(found: dict, want: dict) -> bool:
    return found.keys() == want.keys() and all(found[n].dtype == want[n].dtype and torch.equal(found[n], want[n]) for n in want)


@pytest.mark.samples
@pytest.mark.parametrize("folder", [ZERO2, ZERO3], ids=["zero2", "zero3"])
@pytest.mark.parametrize("tag", ["", "global_step1", "global_step1_universal"])
def test_genuine_folders_are_as_zero_to_fp32_made_them(folder, tag):
    """fp32 from the partitions, and rounded to bf16 what the model itself held, wherever either is read from."""
    want = load_file(folder / "zero_to_fp32_out/model.safetensors")
    assert equal(read(folder / tag, "fp32"), want)
    assert equal(read(folder / tag, "bf16"), {name: value.bfloat16() for name, value in want.items()})


@pytest.mark.samples
@pytest.mark.parametrize("tag", ["", "global_step1"])
def test_autotps_ranks_are_joined_by_their_affine_map(tag):
    universal = AUTOTP / "global_step1_universal"
    parts = {path.parent.name: torch.load(path, weights_only=True)["param"] for path in universal.glob("zero/*/fp32.pt")}
    assert equal(read(AUTOTP / tag, "fp32"), parts) and equal(read(universal), parts)
    assert equal(read(AUTOTP / tag), {name: value.bfloat16() for name, value in parts.items()})


@pytest.mark.samples
def test_weights_are_read_where_they_are_whole_and_masters_only_when_asked_for(tmp_path, capsys):
    folder = copied(ZERO2, tmp_path / "run")
    for file in folder.glob("global_step1/*_optim_states.pt"):
        file.unlink()
    assert {value.dtype for value in read(folder).values()} == {torch.bfloat16}
    with pytest.raises(FormatError, match=r"optimizer states of 0 ranks of 2.*zero_pp_rank_0_mp_rank_00_optim_states"):
        read(folder, "fp32")
    with pytest.raises(SystemExit):
        main(["inspect", str(folder)])
    assert "deepspeed" in (said := capsys.readouterr().out) and "DeepSpeed 0.19.8, ZeRO-2" in said and "model states" in said


@pytest.mark.samples
def test_a_round_trip_through_another_mesh_keeps_the_masters(tmp_path):
    reshard.convert(reshard.open(ZERO3, config=LLAMA), tmp_path / "tp4", format="tp", tp=4, fsync=False)
    assert equal(reshard.load(tmp_path / "tp4", format="hf"), load_file(ZERO3 / "zero_to_fp32_out/model.safetensors"))


def saved(folder: Path, change, pattern: str) -> None:
    """Files that match `pattern`, with `change` made to what they hold."""
    for path in sorted(folder.glob(pattern)):
        held = torch.load(path, weights_only=False)
        change(held)
        torch.save(held, path)


def missing(pattern: str):
    return lambda folder: next(iter(sorted(folder.glob(pattern)))).unlink()


def truncated(pattern: str):
    def cut(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[-1]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.samples
@pytest.mark.parametrize(
    ("sample", "harm", "says"),
    [
        (ZERO3, missing("global_step1/zero_pp_rank_1*model_states.pt"), "missing: zero_pp_rank_1_mp_rank_00_model_states.pt"),
        (ZERO3, missing("global_step1/*zero_pp_rank_1*optim_states.pt"), "missing: (bf16_)zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (ZERO3, truncated("global_step1/*optim_states.pt"), "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (ZERO3, lambda folder: (folder / "latest").write_text("global_step9"), "names global_step9 as its latest checkpoint, which is missing"),
        (AUTOTP, missing("global_step1/mp_rank_01*"), "missing: mp_rank_01_model_states.pt"),
        (AUTOTP, truncated("global_step1/mp_rank*"), "mp_rank_01_model_states.pt"),
        (ZERO2, missing("global_step1_universal/zero/model.norm.weight/fp32.pt"), "zero/model.norm.weight/fp32.pt is missing"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)  # fmt: skip
def test_what_is_missing_or_cut_short_is_named(tmp_path, sample, harm, says):
    folder = copied(sample, tmp_path / "run")
    harm(folder)
    with pytest.raises(ReshardError) as caught:
        read(folder / "global_step1_universal" if "zero/" in says else folder, "fp32")
    assert says in str(caught.value) and caught.value.hint


@pytest.mark.samples
def test_files_of_two_steps_are_told_apart(tmp_path):
    folder = copied(AUTOTP, tmp_path / "run")
    saved(folder, lambda held: held.update(global_steps=7), "global_step1/mp_rank_01_model_states.pt")
    with pytest.raises(FormatError, match="global_steps is 1 in mp_rank_00_model_states.pt, 7 in mp_rank_01"):
        read(folder)


@pytest.mark.samples
def test_a_tensor_parallel_rank_without_a_map_is_refused(tmp_path):
    """As DeepSpeed before 0.19 wrote them: nothing in them says which rows a rank has."""
    folder = copied(AUTOTP, tmp_path / "run")
    saved(folder, lambda held: held.pop("universal_checkpoint_info"), "global_step1/mp_rank_*_model_states.pt")
    with pytest.raises(FormatError, match="nothing says which part of") as caught:
        read(folder)
    assert "ds_to_universal" in caught.value.hint


@pytest.mark.samples
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_what_a_rank_holds_divided_is_computed(tmp_path, dtype):
    """Biases that every rank adds: the map tells by how much; here one norm of one layer, and the last, by different numbers."""
    folder = copied(AUTOTP, tmp_path / "run")
    scales = {"model.layers.0.input_layernorm.weight": 0.5, "model.norm.weight": 0.25}

    def change(held: dict) -> None:
        for pattern, entry in held["universal_checkpoint_info"]["affine_map"]["params"].items():
            for rank in entry["ranks"].values():
                rank["pieces"][0]["scale"] = scales.get(pattern.strip("^$").replace("\\.", "."), 1.0)

    want = read(folder, dtype)
    saved(folder, change, "global_step1/mp_rank_*_model_states.pt")
    assert equal(read(folder, dtype), {name: value / scales.get(name, 1.0) for name, value in want.items()})


MAPS = {
    "leaves": lambda piece: piece.update(source=[1 << 40, piece["source"][1]]),
    "fill": lambda piece: piece.update(shape=[1, *piece["shape"][1:]]),
    "negative": lambda piece: piece.update(dest=[-1, piece["dest"][1]]),
    "zero": lambda piece: piece.update(scale=0.0),
    "text": lambda piece: piece.update(shape="x"),
}


@pytest.mark.samples
@pytest.mark.parametrize("how", MAPS)
def test_a_map_that_lies_is_refused(tmp_path, how):
    folder = copied(AUTOTP, tmp_path / "run")

    def change(held: dict) -> None:
        for name, entry in held["universal_checkpoint_info"]["affine_map"]["params"].items():
            if "q_proj" in name:
                MAPS[how](entry["ranks"][1]["pieces"][0])

    saved(folder, change, "global_step1/mp_rank_*_model_states.pt")
    with pytest.raises(FormatError, match="affine map is not as DeepSpeed writes one"):
        read(folder)


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 21, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_that_do_not_divide(tmp_path, stage, world):
    """Flat partitions cut here by brute force, as ``zero_to_fp32`` joins them: uneven ranks, several groups, paddings, frozen and tied ones."""
    make_model(tmp_path / "hf", CONFIG)
    state = {name: value.float() + 1e-4 for name, value in load_file(tmp_path / "hf/model.safetensors").items()}
    names = list(state)
    frozen, groups = names[3], [names[:3] + names[4:9], names[9:]]
    folder = tmp_path / "run/global_step3"
    folder.mkdir(parents=True)
    (tmp_path / "run/latest").write_text("global_step3\n")
    (tmp_path / "run/config.json").write_text(json.dumps(CONFIG))
    shapes = [{name: state[name].shape for name in group} for group in groups]
    paddings = [[i % 3 for i in range(len(group))] for group in groups]
    common = {"param_shapes": shapes, "shared_params": {}, "buffer_names": [], "dp_world_size": world, "mp_world_size": 1, "global_steps": 3,
              "frozen_param_shapes": {frozen: state[frozen].shape}}  # fmt: skip
    flat: list[list[torch.Tensor]] = [[] for _ in range(world)]
    fragments = []
    for rank in range(world):
        for group, pads in zip(groups, paddings):
            if stage == 3:
                own = [torch.nn.functional.pad(v := state[n].flatten(), (0, -len(v) % world)).chunk(world)[rank] for n in group]
                flat[rank].append(torch.cat(own))
            else:
                whole = torch.cat([torch.nn.functional.pad(state[n].flatten(), (0, p)) for n, p in zip(group, pads)])
                flat[rank].append(torch.nn.functional.pad(whole, (0, -len(whole) % world)).chunk(world)[rank].clone())
        value = state[frozen].flatten()
        fragments.append(
            torch.nn.functional.pad(value, (0, -len(value) % world)).chunk(world)[rank].clone() if stage == 3 else state[frozen]
        )
    if stage == 3:  # two of DeepSpeed's flat groups, which end inside a parameter
        flat = [[(every := torch.cat(own))[:77].clone(), every[77:].clone()] for own in flat]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(world):
        optimizer = {key: flat[rank], "zero_stage": stage, "partition_count": world, "param_alignment_paddings": paddings}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            module = {name: torch.empty(0) if stage == 3 else value.bfloat16() for name, value in state.items()}
            model = common | {"module": module, "frozen_param_fragments": {frozen: fragments[rank]}}
            torch.save(model, folder / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
    assert equal(reshard.load(tmp_path / "run", format="hf", dtype="fp32"), state)
    if stage == 2:  # control: other paddings, other elements
        held = torch.load(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        held["optimizer_state_dict"]["param_alignment_paddings"] = [[0] * len(pads) for pads in paddings]
        torch.save(held, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        assert not equal(reshard.load(tmp_path / "run", format="hf", dtype="fp32"), state)
