"""The join counts every element, and so does diff. Each is shown a cutter that is broken on purpose."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import reshard
from reshard.checkpoint import match
from reshard.cli import main
from reshard.comparison import compare
from reshard.demo import make_model
from reshard.geometry import block, regions
from reshard.geometry.block import Block, Part
from reshard.geometry.coverage import axes, faults_of, meet, nested
from reshard.geometry.pieces import pieces
from reshard.planner import join, tiles

# fmt: off
MODEL = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 4, "vocab_size": 16, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
# fmt: on


def dropped(parts):
    return parts[:-1]


def repeated(parts):
    return parts + parts[:1]


def late(parts):
    return [part.moved(8) for part in parts]  # a row further in the stored tensor


def beside(parts):
    """Of another place in the model's tensor, at the same place in the file."""
    return [Block(((part.box[0][0], part.box[0][1] + 1), *part.box[1:]), part.offset, part.strides) for part in parts]


def short(parts):
    return [Block((*part.box[:-1], (part.box[-1][0], part.box[-1][1] - 1)), part.offset, part.strides) for part in parts]


PAIRS = (("hf", "tp8"), ("tp8", "hf"), ("tp4", "tp8"), ("tp8", "tp8"))
BROKEN = [dropped, repeated, late, beside, short]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("counting")
    make_model(root / "hf", MODEL)
    reshard.convert(root / "hf", root / "tp8", format="megatron", tp=8)
    reshard.convert(root / "hf", root / "tp4", format="megatron", tp=4)
    return root


@pytest.mark.parametrize("spoil", BROKEN)
def test_a_broken_cutter_is_refused_before_a_byte_is_written(folders, tmp_path, monkeypatch, spoil):
    """issue, 1: by plan and convert, whichever side was cut; also where both sides were cut by the same broken rule."""
    monkeypatch.setattr(regions, "cut", lambda *at: spoil(block.cut(*at)))
    for source, target in (("hf", ("megatron", 8)), ("tp8", ("hf", 1)), ("tp8", ("megatron", 8)), ("tp4", ("megatron", 8))):
        options = {"format": target[0], "tp": target[1]}
        with pytest.raises(reshard.PlanError):
            reshard.plan(folders / source, **options)
        with pytest.raises(reshard.PlanError):
            reshard.convert(folders / source, tmp_path / "out", **options)
    with pytest.raises(reshard.PlanError):
        reshard.plan(folders / "hf", format="megatron", tp=8, rank=3)  # one rank alone: its own holes and overlaps at least
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", BROKEN)
def test_diff_never_says_equal_under_a_broken_cutter(folders, monkeypatch, spoil):
    """issue, 1: the folder cannot even be opened."""
    monkeypatch.setattr(regions, "cut", lambda *at: spoil(block.cut(*at)))
    for a, b in PAIRS:
        with pytest.raises(reshard.PlanError):
            reshard.diff(folders / a, folders / b)


@pytest.mark.parametrize("spoil", [dropped, beside, short])
def test_diffs_own_count_sees_what_a_broken_cutter_forgot(folders, monkeypatch, spoil):
    """issue, 1: with the check of opening taken out, so that diff's is what answers."""
    monkeypatch.setattr(regions, "cut", lambda *at: spoil(block.cut(*at)))
    monkeypatch.setattr(match, "faults_of", lambda stored: [])
    for a, b in PAIRS:
        assert not reshard.diff(folders / a, folders / b)


def test_diff_counts_what_it_passed_over(folders, monkeypatch):
    """issue, 1: boxes that are lost between the two sides, or while they are cut into tiles, are no equal boxes."""
    assert reshard.diff(folders / "hf", folders / "tp8")

    clip, cut_small = tiles._clip, tiles.tiles
    for module, name, broken in (
        (join, "pieces", lambda a, b: pieces(a, b)[1:]),
        (tiles, "_clip", lambda copies, boxes: clip(copies, boxes)[1:]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            patch.setattr(compare, "tiles", lambda plan: cut_small(plan, 64))
            report = reshard.diff(folders / "hf", folders / "tp8")
        assert not report and any("elements compared" in d.why and d.elements for d in report.differing)


def test_a_shard_that_is_not_there_is_no_equal_shard(tmp_path):
    """A folder of whole tensors' boxes, as torch and transformers write them, without the files of one rank."""
    make_model(tmp_path / "a", MODEL)
    reshard.convert(tmp_path / "a", tmp_path / "b", format="tp", tp=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_text((tmp_path / "a/config.json").read_text())
    state = load_file(tmp_path / "b/shard-00001-model-00001-of-00001.safetensors")
    note = json.dumps({name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in state.items()})
    save_file(
        state,
        tmp_path / "c/shard-00001-model-00001-of-00001.safetensors",
        {"format": "pt", "DCP_SHARDING_INFO": note, "DCP_VERSION": "1.0"},
    )
    for pair in (("a", "c"), ("c", "a"), ("c", "c")):
        with pytest.raises(reshard.PlanError) as told:
            reshard.diff(*[tmp_path / name for name in pair])
    line = "model.embed_tokens.weight: files of rank 0 hold 64 of 128 elements, [8:16, 0:8] are in no source file"
    assert line in told.value.problems and not any("norm" in problem for problem in told.value.problems)


def test_elements_are_counted_once_however_many_ranks_hold_them(tmp_path):
    """defects.md B9: norms in Megatron TP2 were `elements 128` for 64."""
    make_model(tmp_path / "a", MODEL)
    state = load_file(tmp_path / "a/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    state["model.layers.0.self_attn.k_proj.weight"][3, 2] += 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text((tmp_path / "a/config.json").read_text())
    save_file(state, tmp_path / "b/model.safetensors", {"format": "pt"})
    for format, tp in (("megatron", 2), ("tp", 8), ("vllm", 4)):
        for source in "ab":
            reshard.convert(tmp_path / source, tmp_path / f"{source}-{format}", format=format, tp=tp)
        for a, b in ((f"a-{format}", "b"), ("a", f"b-{format}"), (f"a-{format}", f"b-{format}")):
            counts = {d.name: d.elements for d in reshard.diff(tmp_path / a, tmp_path / b).differing}
            assert counts == {"model.norm.weight": 8, "model.layers.0.self_attn.k_proj.weight": 1}, (a, b)


def run_diff(folder, capsys, *options):
    with pytest.raises(SystemExit, match="3"):
        main(["diff", str(folder / "a"), str(folder / "b"), *options])
    return capsys.readouterr().out


def test_nan_and_infinity_are_said_and_json_stays_json(tmp_path, capsys):
    """defects.md B9: an all-NaN tensor was `max |a-b| 0`, in JSON 0.0."""
    make_model(tmp_path / "a", MODEL)
    state = load_file(tmp_path / "a/model.safetensors")
    state["model.norm.weight"][:] = float("nan")
    state["model.layers.0.input_layernorm.weight"][2] = float("inf")
    state["model.layers.0.post_attention_layernorm.weight"][2] += 0.5
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text((tmp_path / "a/config.json").read_text())
    save_file(state, tmp_path / "b/model.safetensors", {"format": "pt"})
    report = reshard.diff(tmp_path / "a", tmp_path / "b")
    gaps = {d.name.split(".")[-2]: d.max_abs_diff for d in report.differing}
    assert np.isnan(gaps["norm"]) and gaps["input_layernorm"] == float("inf") and 0.4 < gaps["post_attention_layernorm"] < 0.6
    out = run_diff(tmp_path, capsys, "--json")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    found = {d["name"].split(".")[-2]: d["max_abs_diff"] for d in json.loads(out, parse_constant=refuse)["differing"]}
    assert found["norm"] == "NaN" and found["input_layernorm"] == "Infinity" and 0.4 < found["post_attention_layernorm"] < 0.6
    assert "nan" in run_diff(tmp_path, capsys)
    assert reshard.diff(tmp_path / "b", tmp_path / "b")  # NaN is itself, bit for bit


def test_two_blocks_meet_where_brute_force_says_so():
    """The count inside a stored tensor rests on this: blocks that share an element, exactly."""
    rng = np.random.default_rng(5)
    met = 0
    for _ in range(20000):
        blocks = []
        for _ in "ab":
            shape = tuple(int(n) for n in rng.integers(1, 4, rng.integers(1, 4)))
            strides, span = [], 1
            for size in reversed(shape):
                strides.insert(0, span + int(rng.choice([0, 0, 1, 3])))
                span += (size - 1) * strides[0]
            blocks.append(Block(tuple((0, size) for size in shape), int(rng.integers(0, 20)), tuple(strides)))
        assert all(nested(axes(one.strides, one.shape)) for one in blocks)
        a, b = ({one.offset + int(np.dot(index, one.strides)) for index in np.ndindex(*one.shape)} for one in blocks)
        assert meet(
            blocks[1].offset - blocks[0].offset, axes(blocks[0].strides, blocks[0].shape), axes(blocks[1].strides, blocks[1].shape)
        ) == bool(a & b)
        met += bool(a & b)
    assert 2000 < met < 18000


def test_blocks_outside_or_upon_each_other_or_holes_are_named():
    """defects.md A5: nothing tested bounds or overlaps inside one stored tensor."""
    q, k = (Part((name,), Block(((0, 2), (0, 4)), offset, (4, 1))) for name, offset in (("q", 0), ("k", 8)))
    whole = block.Stored(0, "x", "", (4, 4), (q, k))
    assert faults_of(whole) == []
    for offset, words in (
        (9, "k would lie at elements 9 to 17 of 16"),
        (4, "q and k would lie on the same elements"),
        (-8, "-8 to 0 of 16"),
    ):
        spoiled = whole._replace(parts=(q, Part(("k",), Block(((0, 2), (0, 4)), offset, (4, 1)))))
        assert words in faults_of(spoiled)[0]
    assert "8 of 16 elements are under no tensor, 0 are declared to be padding" in faults_of(whole._replace(parts=(q,)))[0]
    assert faults_of(whole._replace(parts=(q,), pad=8)) == []
    assert "on elements of its own" in faults_of(whole._replace(parts=(Part(("q",), Block(((0, 4), (0, 4)), 0, (1, 1))),)))[0]
