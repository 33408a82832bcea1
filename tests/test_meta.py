"""Meta's consolidated.NN.pth and Mistral's consolidated.safetensors: samples that Meta's own model runs, and a reference in torch alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.errors import FormatError, PlanError, ReshardError

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
META, ORIGINAL = SAMPLES / "meta", SAMPLES / "meta/hf-original"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def equal(found: dict, want: dict) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


def by_hand(state: dict, ranks: int, columns: bool) -> list[dict]:
    """Meta's files of a Hub's state dict: what its converters write, in plain torch."""

    def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    heads, kv = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    size = CONFIG["hidden_size"] // heads
    out = []
    for rank in range(ranks):
        own = {"norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"].chunk(ranks)[rank],
               "tok_embeddings.weight": state["model.embed_tokens.weight"].chunk(ranks, int(columns))[rank]}  # fmt: skip
        head = slice(
            rank * kv // ranks * size, (rank * kv // ranks + max(kv // ranks, 1)) * size
        )  # more ranks than heads: a head on several
        for i in range(CONFIG["num_hidden_layers"]):
            hf, to = f"model.layers.{i}.", f"layers.{i}."
            own[to + "attention.wq.weight"] = pairs(state[hf + "self_attn.q_proj.weight"], heads).chunk(ranks)[rank]
            own[to + "attention.wk.weight"] = pairs(state[hf + "self_attn.k_proj.weight"], kv)[head]
            own[to + "attention.wv.weight"] = state[hf + "self_attn.v_proj.weight"][head]
            own[to + "attention.wo.weight"] = state[hf + "self_attn.o_proj.weight"].chunk(ranks, 1)[rank]
            for name, theirs, dim in (("w1", "gate", 0), ("w3", "up", 0), ("w2", "down", 1)):
                own[f"{to}feed_forward.{name}.weight"] = state[f"{hf}mlp.{theirs}_proj.weight"].chunk(ranks, dim)[rank]
            own[to + "attention_norm.weight"] = state[hf + "input_layernorm.weight"]
            own[to + "ffn_norm.weight"] = state[hf + "post_attention_layernorm.weight"]
        out.append({name: value.contiguous().clone() for name, value in own.items()})
    return out


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model(tmp_path / "hf", CONFIG)
    return tmp_path / "hf"


@pytest.mark.parametrize("release", ["2.0", "3.0"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_files_are_those_of_a_plain_reference(hf, tmp_path, ranks, release):
    """Written and read, both cuts of the embedding, more ranks than key/value heads; params.json gives a config.json back."""
    folder = tmp_path / "meta"
    reshard.convert(hf, folder, format="meta", tp=ranks, engine_version=release, fsync=False)
    want = by_hand(load_file(hf / "model.safetensors"), ranks, columns=release == "2.0")
    assert sorted(path.name for path in folder.glob("*.pth")) == [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
    for rank in range(ranks):
        assert equal(torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True), want[rank])
    params = json.loads((folder / "params.json").read_text())
    assert (params["dim"], params["n_heads"], params["n_kv_heads"]) == (32, 8, max(2, ranks))
    for name in ("reshard.json", "config.json"):
        (folder / name).unlink()
    assert ranks > 2 or equal(reshard.load(folder, format="hf"), load_file(hf / "model.safetensors"))  # by params.json alone
    assert equal(reshard.load(reshard.open(folder, config=hf), format="hf"), load_file(hf / "model.safetensors"))


@pytest.mark.samples
@pytest.mark.parametrize("name", ["llama2-style-mp2", "llama3-style-mp2"])
def test_samples_become_their_original(tmp_path, name, capsys):
    reshard.convert(META / name, tmp_path / "hf", format="hf", fsync=False)
    assert equal(load_file(tmp_path / "hf/model.safetensors"), load_file(ORIGINAL / "model.safetensors"))
    config, want = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", ORIGINAL))
    assert all(
        config[key] == want[key]
        for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "dtype")
    )
    with pytest.raises(SystemExit):
        main(["convert", str(META / name), str(tmp_path / "again"), "--to", "hf"])
    assert "config.json is made of params.json" in capsys.readouterr().out


@pytest.mark.samples
def test_mistrals_own_file_becomes_its_original():
    folder = SAMPLES / "mistral_native/mistral-tiny"
    assert equal(reshard.load(folder, format="hf"), load_file(ORIGINAL / "model.safetensors"))
    assert reshard.open(folder).architecture == "MistralForCausalLM"


def test_a_tied_head_is_written_twice_and_read_once(tmp_path):
    make_model(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    reshard.convert(tmp_path / "hf", tmp_path / "meta", format="meta", tp=2, fsync=False)
    held = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    assert torch.equal(held["output.weight"], held["tok_embeddings.weight"])  # Meta's model has both
    assert {name for name in held if "layers" not in name} == {"output.weight", "tok_embeddings.weight", "norm.weight"}
    assert equal(reshard.load(tmp_path / "meta", format="hf"), load_file(tmp_path / "hf/model.safetensors"))


@pytest.mark.parametrize(("hidden", "ffn"), [(32, 96), (32, 88), (32, 24), (48, 130), (64, 172), (40, 108)])
def test_metas_code_comes_to_the_same_feed_forward(tmp_path, hidden, ffn):
    make_model(tmp_path / "hf", CONFIG | {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 4})
    reshard.convert(tmp_path / "hf", tmp_path / "meta", format="meta", fsync=False)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    size = int(2 * 4 * params["dim"] / 3)  # llama-models, FeedForward.__init__
    if "ffn_dim_multiplier" in params:
        size = int(params["ffn_dim_multiplier"] * size)
    assert params["multiple_of"] * ((size + params["multiple_of"] - 1) // params["multiple_of"]) == ffn


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"head_dim": 8}, {}, "heads of 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, "rotary positions scaled as yarn"),
        ({}, {"tp": 3}, "tp"),
        ({}, {"pp": 2}, "leave --pp and --ep out"),
        ({}, {"engine_version": "4.0"}, "names are known for 1.0 to 3.0"),
        ({}, {"engine_platform": "cuda"}, "has no meaning for format meta"),
    ],
)
def test_what_metas_code_cannot_be_told_is_refused(tmp_path, change, options, says):
    make_model(tmp_path / "hf", CONFIG | change)
    with pytest.raises(PlanError) as caught:
        reshard.convert(tmp_path / "hf", tmp_path / "meta", format="meta", **options)
    assert says in f"{caught.value} {caught.value.hint}" and not (tmp_path / "meta").exists()


def written(hf: Path, folder: Path) -> Path:
    reshard.convert(hf, folder, format="meta", tp=4, fsync=False)
    for name in ("reshard.json", "config.json"):
        (folder / name).unlink()
    return folder


def other_params(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(json.loads((folder / "params.json").read_text()) | {"n_heads": 4, "n_kv_heads": 4}))


def other_rank(folder: Path) -> None:
    held = torch.load(folder / "consolidated.02.pth", weights_only=True)
    torch.save(held | {"norm.weight": held["norm.weight"][:-1].clone()}, folder / "consolidated.02.pth")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "consolidated.02.pth").unlink(), "missing: consolidated.02.pth"),
        (lambda folder: (folder / "consolidated.03.pth").write_bytes((folder / "consolidated.03.pth").read_bytes()[:5000]), "consolidated.03.pth"),
        (lambda folder: shutil.copy(folder / "consolidated.03.pth", folder / "consolidated.003.pth"), "one rank has two"),
        (other_rank, "norm.weight is BF16 [32] in consolidated.00.pth, BF16 [31] in consolidated.02.pth"),
        (other_params, "params.json says n_heads 4, config.json num_attention_heads 8"),
        (lambda folder: (folder / "params.json").write_text("[]"), "params.json holds a list"),
        (lambda folder: (folder / "params.json").write_text("{"), "params.json is not JSON"),
    ],
)  # fmt: skip
def test_what_is_missing_cut_short_or_mixed_is_named(hf, tmp_path, harm, says):
    folder = written(hf, tmp_path / "meta")
    harm(folder)
    with pytest.raises(ReshardError) as caught:
        reshard.open(folder, config=hf)
    assert says in str(caught.value), caught.value


def test_params_that_tell_too_little_ask_for_a_config(hf, tmp_path):
    folder = written(hf, tmp_path / "meta")
    (folder / "params.json").write_text("{}")
    with pytest.raises(FormatError, match="does not tell dim and n_heads") as caught:
        reshard.open(folder)
    assert "--config" in caught.value.hint


def test_the_hubs_rotary_order_is_not_metas(hf, tmp_path):
    """The control: with heads left in the Hub's order the same shapes open, and queries and keys come out wrong."""
    state = load_file(hf / "model.safetensors")
    folder = tmp_path / "meta"
    reshard.convert(hf, folder, format="meta", fsync=False)
    held = torch.load(folder / "consolidated.00.pth", weights_only=True)
    held |= {f"layers.{i}.attention.wq.weight": state[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)}
    torch.save(held, folder / "consolidated.00.pth")
    (folder / "reshard.json").unlink()
    found = reshard.load(folder, format="hf")
    assert {name for name in state if not torch.equal(found[name], state[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_scaled_rotary_positions(tmp_path):
    """Meta's code knows the factor 8 alone, and its own params.json do not tell it."""
    make_model(tmp_path / "hf", CONFIG | {"rope_scaling": SCALED})
    folder = tmp_path / "meta"
    reshard.convert(tmp_path / "hf", folder, format="meta", fsync=False)
    for name in ("reshard.json", "config.json"):
        (folder / name).unlink()
    assert reshard.open(folder).made["rope_scaling"] == SCALED
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if key != "rope_scaling_factor"}))
    with pytest.raises(FormatError, match="not by which factor") as caught:
        reshard.open(folder)
    assert "--config" in caught.value.hint
    make_model(tmp_path / "small", CONFIG | {"rope_scaling": SCALED | {"factor": 32.0}})
    with pytest.raises(PlanError, match="rotary positions scaled as llama3"):
        reshard.convert(tmp_path / "small", tmp_path / "out", format="meta")


def test_a_mistral_folder_with_an_index(hf, tmp_path):
    reshard.convert(hf, tmp_path / "meta", format="meta", fsync=False)
    held = {name: value.clone() for name, value in torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True).items()}
    folder = tmp_path / "mistral"
    folder.mkdir()
    names = sorted(held)
    files = {f"consolidated-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({name: held[name] for name in own}, folder / file)
    (folder / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: file for file, own in files.items() for n in own}})
    )
    params = {
        "dim": 32,
        "n_layers": 2,
        "head_dim": 4,
        "hidden_dim": 96,
        "n_heads": 8,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 64,
        "rope_theta": 1e4,
    }
    (folder / "params.json").write_text(json.dumps(params))
    assert equal(reshard.load(folder, format="hf"), load_file(hf / "model.safetensors"))
    next(folder.glob("consolidated-00002*")).unlink()
    with pytest.raises(FormatError, match=r"lists consolidated-00002-of-00002.safetensors, which is missing"):
        reshard.open(folder)
