"""Inputs that reshard does not read: called by their names, with a way that leads on. Options that mean nothing: refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.errors import FormatError, LayoutError, PlanError, ReshardError

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model(tmp_path / "hf", CONFIG)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("files", "says", "hint"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter", "reshard merge"),
        (["llama-q4.gguf"], "is a folder of GGUF files", "original Hugging Face"),
        (["model_index.json", "unet/x"], "is a diffusers pipeline", "inside"),
        (["model.nemo"], "is a NeMo checkpoint", "export"),
        (["context/model.yaml", "weights/common.pt"], "is a NeMo 2 checkpoint", "weights inside"),
        (["rank0.engine", "config.json"], "is a folder of TensorRT engines", "built from"),
        (["rank0.safetensors", "config.json"], "is a TensorRT-LLM checkpoint", "converted from"),
        (["epoch=0-step=10.ckpt"], "is a folder of Lightning checkpoints", "state_dict"),
        (["manifest.ocdbt", "_METADATA"], "is an Orbax checkpoint", "export"),
        (["weights.npz", "config.json"], "is an MLX model", "converted from"),
        (["blobs/x", "snapshots/y", "refs/main"], "is a repository in the Hub's cache", "snapshots/COMMIT"),
        (["config.json", "tokenizer.json"], "holds a config.json and no weights", "download the weights"),
        (["tf_model.h5", "config.json"], "TensorFlow", "from_tf"),
        (
            ["checkpoint-500/model.safetensors", "checkpoint-1500/model.safetensors", "checkpoint-90/x"],
            "holds 3 checkpoints of a run",
            "the newest is {}/checkpoint-1500",
        ),
        (["global_step7/x", "latest"], "holds a checkpoint of a run", "global_step7"),
        (["iter_0000010/x", "iter_0000200/x", "latest_checkpointed_iteration.txt"], "", "iter_0000"),
        (["actor/x"], "holds no checkpoint that reshard knows (it holds actor)", "is it in {}/actor?"),
        (["notes.txt"], "holds no checkpoint that reshard knows (it holds notes.txt)", "--from"),
        ([], "it holds nothing", "--from"),
    ],
)
def test_folders_are_called_by_their_names(tmp_path, files, says, hint):
    """defects.md B, "Unsupported input": all of them were "no checkpoint that reshard knows"."""
    folder = tmp_path / "in"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"200" if file.endswith("iteration.txt") else b"")
    with pytest.raises(FormatError) as caught:
        reshard.open(folder)
    assert str(folder) in str(caught.value) and says in str(caught.value) and hint.format(folder) in caught.value.hint, (
        caught.value,
        caught.value.hint,
    )


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ("lora/phi3-r8", "LoRA"),
        ("megatron/llama/torch_dist_tp2/iter_0000010", "torch_dist"),
    ],
)
def test_genuine_folders_are_called_by_their_names(sample, says):
    """defects.md B, the same on what each framework itself wrote."""
    folder = SAMPLES / sample
    with pytest.raises(FormatError) as caught:
        reshard.open(folder)
    assert says in str(caught.value) and caught.value.hint and "problems" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.gguf", "model.safetensors", "model.nemo", "model.pth", "last.ckpt", "rank0.engine", "model.onnx", "notes"]
)
def test_a_file_is_no_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match="is not a folder but a") as caught:
        reshard.open(tmp_path / name)
    assert caught.value.hint


# ----------------------------------------------------------------------------------------------------------------- quantised


def changed(hf: Path, change, **config) -> Path:
    held = change(load_file(hf / "model.safetensors"))
    save_file(held, hf / "model.safetensors")
    (hf / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | config))
    return hf


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("config", "dtype", "extra", "says"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            torch.int32,
            "model.layers.0.self_attn.q_proj.qzeros",
            "gptq, bits 4, group_size 128",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, torch.uint8, Q + ".absmax", "bitsandbytes, 4 bit"),
        (None, torch.float8_e4m3fn, Q + "_scale_inv", "FP8 in blocks"),
        ({"quant_method": "int8"}, torch.int8, None, "is I8: codes, quantised as int8 by config.json, and no tensor holds their scales"),
        (None, torch.int8, None, "is I8: codes, and no tensor holds their scales"),
        ({"quant_method": "fp8"}, torch.float8_e4m3fn, None, "is F8_E4M3: codes"),
    ],
)
def test_quantised_models_are_refused_in_one_sentence(hf, config, dtype, extra, says):
    """defects.md B, quantised inputs: a line for each scale, or (int8 without scales) silently accepted."""

    def change(held):
        held[Q] = held[Q].float().to(dtype) if dtype.is_floating_point else torch.zeros(held[Q].shape, dtype=dtype)
        return held | ({extra: torch.ones(4)} if extra else {})

    folder = changed(hf, change, **({"quantization_config": config} if config else {}))
    with pytest.raises(FormatError) as caught:
        reshard.open(folder)
    assert says in str(caught.value) and "bf16" in caught.value.hint and "\n" not in str(caught.value)


def test_a_dequantised_copy_that_kept_the_entry_is_read(hf):
    """Control: quantised is what has codes, whatever config.json says."""
    assert reshard.open(changed(hf, lambda held: held, quantization_config={"quant_method": "fp8"})).tensors


# ------------------------------------------------------------------------------------------------- what contradicts itself


def test_a_single_file_beside_an_index_of_others_is_refused(hf, tmp_path):
    """defects.md B6: reshard read the shards, transformers the single file."""
    reshard.convert(hf, tmp_path / "sharded", format="hf", max_file=2000, fsync=False)
    for name in ("reshard.json",):
        (tmp_path / "sharded" / name).unlink()
    assert reshard.diff(hf, tmp_path / "sharded")
    shutil.copy(hf / "model.safetensors", tmp_path / "sharded/model.safetensors")
    with pytest.raises(FormatError, match="holds both model.safetensors and model.safetensors.index.json") as caught:
        reshard.open(tmp_path / "sharded")
    assert "transformers would load model.safetensors" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["model-rank-00-part-0.safetensors", "model-rank-٠-part-0.safetensors", "model-rank-1-part-00.safetensors"]
)
def test_two_spellings_of_one_rank_are_refused(hf, tmp_path, name):
    """defects.md, Low: of two files for rank 0, one was silently ignored."""
    reshard.convert(hf, tmp_path / "v", format="vllm", tp=2, fsync=False)
    (tmp_path / "v/reshard.json").unlink()
    shutil.copy(tmp_path / "v/model-rank-0-part-0.safetensors", tmp_path / "v" / name)
    with pytest.raises(FormatError, match="no engine writes its numbers so"):
        reshard.open(tmp_path / "v")


# ------------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options", [{"tp": "2"}, {"tp": 0}, {"pp": -1}, {"tp": 10**11}, {"tp": 2.0}, {"ep": True}, {"tp": 60000, "pp": 60000}, {"etp": None}]
)
def test_a_mesh_is_made_of_whole_numbers(hf, options):
    """defects.md B, "Other frictions": a text ended in a TypeError, a huge number never."""
    with pytest.raises(ReshardError, match="expected a whole number|more than 65536 ranks"):
        reshard.plan(hf, format="tp", **options)


@pytest.mark.parametrize("version", ["0.1", "9.9", "0.33", "0.10.2", "new", "", 3, "0.\u0663"])
def test_unknown_releases_are_refused(hf, version):
    """defects.md B10: accepted silently, with the newest names."""
    with pytest.raises((PlanError, LayoutError), match=r"names are known for 0\.11 to 0\.32|is not a version"):
        reshard.plan(hf, format="vllm", tp=2, engine_version=version)


@pytest.mark.parametrize("version", ["0.11", "0.11.2", "0.23.1", "0.32", "0.32.1", "v0.32.0rc1"])
def test_known_releases_are_not(hf, version):
    assert reshard.plan(hf, format="vllm", tp=2, engine_version=version)


def test_a_patch_release_has_the_names_of_its_minor_one(hf):
    """defects.md A7: `--pp` was refused for 0.28 and accepted for 0.28.0."""
    for version in ("0.28", "0.28.0", "0.28.1"):
        with pytest.raises(PlanError, match="no names for files of pipeline stages"):
            reshard.plan(hf, format="vllm", pp=2, engine_version=version)
    assert reshard.plan(hf, format="vllm", pp=2, engine_version="0.29.0")


def test_options_for_opening_are_refused_where_it_is_open_already(hf, tmp_path):
    """defects.md A8: ignored without a word."""
    ckpt = reshard.open(hf)
    for options in ({"config": hf}, {"layout": "x.toml"}):
        for call in (
            lambda o: reshard.plan(ckpt, format="tp", **o),
            lambda o: reshard.convert(ckpt, tmp_path / "o", format="tp", **o),
            lambda o: reshard.load(ckpt, format="tp", **o),
        ):
            with pytest.raises(ReshardError, match="open already") as caught:
                call(options)
            assert "reshard.open" in caught.value.hint
    assert not (tmp_path / "o").exists()


def test_each_file_counts_for_its_own_rank(hf):
    """defects.md A14: a file of constants alone was counted for rank 0."""
    job = reshard.plan(hf, format="vllm", tp=2, engine_version="0.32", max_file=4)
    filled = {piece.file for piece in job.folder.pieces}
    alone = [file for file in job.folder.files if file.path not in filled]
    assert alone  # control: there are such files
    by_rank = {rank: sum(file.image.size for file in job.folder.files if file.path.startswith(f"model-rank-{rank}-")) for rank in (0, 1)}
    assert {row["rank"]: row["bytes_written"] for row in job.ranks()} == by_rank


def test_hints_name_the_users_own_layout(hf, tmp_path, capsys):
    """defects.md B12: the hint named a layout that no command knows, and config.json alone was to blame."""
    own = tmp_path / "olmo9.toml"
    own.write_text('extends = "llama"\narchitectures = ["Olmo9ForCausalLM"]\n[hf]\nattn_norm = "other.weight"\n')
    with pytest.raises(PlanError) as caught:
        reshard.open(hf, layout=own)
    assert f"`reshard layouts show {own}`" in caught.value.hint and "is it right" in caught.value.hint
    with pytest.raises(SystemExit) as exit:
        main(["layouts", "show", str(own)])
    assert exit.value.code == 0 and "model.layers.{layer}.other.weight" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 200])
def test_the_list_of_layouts_fits_the_terminal(monkeypatch, capsys, width):
    """defects.md B, "Other frictions": 60 columns were ignored."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as exit:
        main(["layouts"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "DeepseekV3ForCausalLM" in out and all(len(line) <= width for line in out.splitlines())


def test_the_list_of_layouts_as_json(capsys):
    """defects.md B, "Other frictions"."""
    with pytest.raises(SystemExit) as exit:
        main(["layouts", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0 and found["ok"] is True
    row = next(row for row in found["layouts"] if row["name"] == "llama")
    assert "LlamaForCausalLM" in row["architectures"] and "megatron" in row["formats"] and row["description"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": 3}, "architectures is 3"),
        ({"tie_word_embeddings": "x"}, "expected true or false"),
        ({"architectures": ["New"]}, "no layout descriptor"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"rms_norm_eps": "x"}, "norm_epsilon is 'x'"),
        ({"layer_types": 5}, "layer_types is 5"),
    ],
)
def test_a_wrong_setting_is_said_of_its_file(hf, change, says):
    """defects.md L1: tracebacks for settings of other types, and errors that named no file."""
    changed(hf, lambda held: held, **change)
    with pytest.raises(ReshardError) as caught:
        reshard.plan(hf, format="megatron", tp=2)
    assert says in str(caught.value), caught.value
